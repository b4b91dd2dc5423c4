-- What users send to a session while its turn runs, and what its agent asks them. Constant defaults and nulls: no table is rewritten.
create table input (
    input_id uuid primary key,
    session_id uuid not null references session on delete cascade,
    kind text not null check (kind in ('message', 'interrupt', 'decision')),
    status text not null check (status in ('queued', 'delivered', 'applied', 'refused', 'withdrawn')),
    -- Of a message.
    text text not null default '',
    timeout_seconds integer not null default 0,
    -- It is to join the running turn.
    steers boolean not null default false,
    -- The turn that it belongs to. A queued message has none until it begins one.
    turn_number integer,
    -- Of a decision.
    request_id bigint,
    verdict text check (verdict in ('allow', 'allow_for_session', 'deny')),
    deny_message text not null default '',
    -- Why it was refused.
    reason text not null default '',
    -- Who sent it; null: a time-out.
    key_id uuid,
    created_at timestamptz not null default clock_timestamp(),
    delivered_at timestamptz,
    settled_at timestamptz
);

create index input_of_session on input (session_id, created_at, input_id);
create index open_input on input (session_id, created_at, input_id) where status in ('queued', 'delivered');

create table permission_request (
    session_id uuid not null references session on delete cascade,
    -- The event that shows the tool use.
    request_id bigint not null,
    -- The agent host's own id of the request.
    journal_id bigint not null,
    turn_number integer not null,
    tool text not null,
    input_json text not null,
    diff text not null,
    reason text not null,
    status text not null check (status in ('open', 'allowed', 'denied', 'withdrawn', 'void')),
    -- The decision that was sent for it.
    answer_id uuid,
    created_at timestamptz not null default now(),
    settled_at timestamptz,
    -- When it is decided without its user, and how.
    decide_after timestamptz,
    on_timeout text check (on_timeout in ('allow', 'deny')),
    primary key (session_id, request_id)
);

create index overdue_request on permission_request (decide_after) where status = 'open' and answer_id is null;

alter table turn
    -- Since when it has waited for a decision: its deadline stands still.
    add column waiting_since timestamptz,
    -- The input that became it.
    add column input_id uuid;

-- Null: everything is allowed.
alter table agent_version add column permissions jsonb;
