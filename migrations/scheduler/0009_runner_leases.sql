-- Who owns a turn is a level: a runner's lease, kept alive by its heartbeats, and a reference to it in the turn. A lease that is
-- deleted releases its turns at once (`on delete set null`); the reconciler offers every unsettled turn without an owner again.
create table runner_lease (
    lease_id uuid primary key,
    runner text not null,
    expires_at timestamptz not null
);

-- Constant defaults: the table is not rewritten. `not valid`: old rows have no owner and need no check.
alter table turn
    add column owner uuid,
    add column claimed_at timestamptz,
    -- When runners are offered the turn again, while it has no owner.
    add column offer_after timestamptz not null default now(),
    add column offers integer not null default 0,
    -- Attempts that failed. Takeovers do not count.
    add column failures integer not null default 0,
    add constraint turn_owner_fkey foreign key (owner) references runner_lease on delete set null not valid;

-- A Sprite that has to go is a level too: a time until it is destroyed, at which the job is published again.
alter table session add column destroy_after timestamptz;
alter table deleted_session add column destroy_after timestamptz;
update session set destroy_after = now() where status = 'terminated' and sprite_destroyed_at is null;
update deleted_session set destroy_after = now() where sprite_destroyed_at is null;

-- Where the persisted event log of each session ends, and on which days it was written. Written with the events.
create table event_log (
    session_id uuid primary key,
    last_event_id bigint not null,
    first_day date not null,
    last_day date not null
) with (fillfactor = 70);

-- Work that one replica does at a time: a projector for each partition, the care for streams.
create table lease (
    name text primary key,
    owner uuid not null,
    -- Raised by every change of the owner.
    epoch bigint not null,
    expires_at timestamptz not null
);

-- What is known of each stream. A stream that was created at another time, or that ends before its high watermark, is not the one
-- that was published to.
create table stream_generation (
    stream text primary key,
    created_at timestamptz not null,
    high_watermark bigint not null
);
