-- The outbox in lanes, one for each stream, so that a stream which refuses holds up no other; and what could not be published is tried
-- again later, behind what is due. The table is short: its rewrite takes no time.
alter table outbox
    add column lane text not null generated always as (
        case when subject like 'aod.log.%' then 'log.' || split_part(subject, '.', 6) else split_part(subject, '.', 2) end
    ) stored,
    add column attempts integer not null default 0,
    add column not_before timestamptz not null default now();

create index outbox_due on outbox (lane, not_before, outbox_id);

-- Messages that no stream takes: too large, or for a stream that has not been there for an hour. An operator decides (docs/runbook.md).
create table outbox_dead (
    outbox_id uuid primary key,
    subject text not null,
    payload bytea not null,
    traceparent text,
    created_at timestamptz not null,
    dead_at timestamptz not null default now(),
    reason text not null
);

-- When a deleted session's events are removed; later where that failed, so that one which fails holds up no other.
alter table deleted_session add column purge_after timestamptz not null default now();

create index deleted_session_to_purge on deleted_session (purge_after) where purged_at is null or sprite_destroyed_at is not null;

-- When something of a user's last changed that leaves no other trace: a deleted session whose rows are all removed.
alter table sprite_sweep add column changed_at timestamptz not null default now();

-- Sessions that began before event_log was there.
insert into event_log as l (session_id, last_event_id, first_day, last_day)
select session_id, max(event_id), min(recorded_on), max(recorded_on) from event group by session_id
on conflict (session_id) do update
set last_event_id = greatest(l.last_event_id, excluded.last_event_id),
    first_day = least(l.first_day, excluded.first_day),
    last_day = greatest(l.last_day, excluded.last_day);
