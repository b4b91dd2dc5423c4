-- Model requests, as the model gateway counted them.

-- A process of the model gateway. When its lease expires, its requests are settled as unknown.
create table model_gateway (
    gateway_id uuid primary key,
    expires_at timestamptz not null
);

create table model_request (
    request_id uuid primary key,
    session_id uuid not null,
    user_id uuid not null,
    agent_id uuid,
    turn_number integer not null,
    gateway_id uuid not null,
    provider text not null,
    model text not null,
    -- The kind of the credential that it was sent with.
    key text not null,
    -- `unknown`: no one said what became of it. It may still become `settled`.
    status text not null check (status in ('open', 'settled', 'unknown')),
    started_at timestamptz not null default now(),
    ended_at timestamptz,
    http_status integer,
    is_partial boolean not null default false,
    -- `input_tokens` holds those from and into caches.
    input_tokens bigint,
    output_tokens bigint,
    cache_read_tokens bigint,
    cache_write_tokens bigint,
    reasoning_tokens bigint,
    -- Null: no price, or no usage.
    cost_micro_usd bigint,
    -- What it holds of budgets while it is open.
    is_budgeted boolean not null default false,
    held_tokens bigint not null default 0,
    held_cost_micro_usd bigint not null default 0,
    -- Whether it is in usage_day.
    is_summed boolean not null default false
);

create index model_request_open on model_request (gateway_id) where status = 'open';
create index model_request_open_of_session on model_request (session_id) where status = 'open';
create index model_request_to_sum on model_request (ended_at) where status <> 'open' and not is_summed;
create index model_request_summed on model_request (ended_at) where is_summed;

-- What a session's runner appends to its log, numbered without gaps.
create table model_entry (
    session_id uuid not null,
    number bigint not null,
    recorded_at timestamptz not null default now(),
    -- An aod.scheduler.v1.MeterEntry.
    payload bytea not null,
    primary key (session_id, number)
);

create index model_entry_recorded on model_entry (recorded_at);

-- One row per session that made a model request: locked first by every transaction that writes about its requests.
create table model_meter (
    session_id uuid primary key,
    -- The newest entry's.
    number bigint not null default 0,
    -- Requests since the minute began.
    minute_began_at timestamptz not null default now(),
    minute_requests integer not null default 0,
    -- Of the time that its turns ran: what budgets have counted.
    counted_us bigint not null default 0,
    -- A request was sent though others held what was left of a budget: no second one is.
    has_overdrawn boolean not null default false,
    -- The turn that a budget ended, and what that budget was: an aod.session.v1.BudgetNotice.
    reached_turn integer,
    reached bytea,
    -- The turn whose newest request failed, and why.
    failed_turn integer,
    failure text
);

-- What turns used.
create table turn_usage (
    session_id uuid not null,
    turn_number integer not null,
    requests bigint not null default 0,
    -- Those of which no usage is known, and those without a price.
    unknown bigint not null default 0,
    unpriced bigint not null default 0,
    input_tokens bigint not null default 0,
    output_tokens bigint not null default 0,
    cache_read_tokens bigint not null default 0,
    cache_write_tokens bigint not null default 0,
    reasoning_tokens bigint not null default 0,
    cost_micro_usd bigint not null default 0,
    model text not null,
    primary key (session_id, turn_number)
);

-- Totals per day: what requests add up to once they are settled.
create table usage_day (
    day date not null,
    user_id uuid not null,
    -- All zeros: the agent is gone.
    agent_id uuid not null,
    key text not null,
    provider text not null,
    model text not null,
    requests bigint not null default 0,
    unknown bigint not null default 0,
    unpriced bigint not null default 0,
    input_tokens bigint not null default 0,
    output_tokens bigint not null default 0,
    cache_read_tokens bigint not null default 0,
    cache_write_tokens bigint not null default 0,
    cost_micro_usd bigint not null default 0,
    primary key (user_id, day, agent_id, key, provider, model)
);

-- The turn's model requests went through the model gateway: turn_usage holds what it used.
alter table turn add column is_metered boolean not null default false;

-- What each turn used, from the source that counts.
create view turn_used as
select t.session_id, t.turn_number, t.prompt, t.status, t.exit_code, t.created_at, t.started_at, t.ended_at,
       case when t.is_metered then coalesce(u.input_tokens, 0) else t.input_tokens end as input_tokens,
       case when t.is_metered then coalesce(u.output_tokens, 0) else t.output_tokens end as output_tokens,
       case when t.is_metered then coalesce(u.cache_read_tokens, 0) else t.cache_read_tokens end as cache_read_tokens,
       case when t.is_metered then coalesce(u.cache_write_tokens, 0) else t.cache_write_tokens end as cache_write_tokens,
       case when t.is_metered then case when u.unpriced > 0 then null else coalesce(u.cost_micro_usd, 0) end
            else t.cost_micro_usd end as cost_micro_usd,
       case when t.is_metered then u.model else t.model_used end as model_used
from turn t
left join turn_usage u using (session_id, turn_number);
