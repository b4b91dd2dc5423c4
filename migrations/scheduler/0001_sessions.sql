-- Agents, environments, sessions, turns and their events: the system of record.

create table environment (
    environment_id uuid primary key,
    user_id uuid not null,
    name text not null,
    version integer not null default 1,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    archived_at timestamptz
);

create unique index environment_name_is_unique on environment (user_id, name) where archived_at is null;
create index environment_of_user on environment (user_id, created_at desc, environment_id desc);

-- What a version of an environment holds. Values of variables are in the vault; here are their names alone.
create table environment_version (
    environment_id uuid not null references environment on delete cascade,
    version integer not null,
    name text not null,
    packages jsonb not null,
    setup_script text not null,
    networking jsonb not null,
    env_var_names text[] not null,
    env_vars_secret_id uuid,
    created_at timestamptz not null default now(),
    primary key (environment_id, version)
);

create table agent (
    agent_id uuid primary key,
    user_id uuid not null,
    environment_id uuid references environment on delete set null,
    version integer not null default 1,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    archived_at timestamptz
);

create index agent_of_user on agent (user_id, created_at desc, agent_id desc);
create index agent_of_environment on agent (environment_id);

create table agent_version (
    agent_id uuid not null references agent on delete cascade,
    version integer not null,
    name text not null,
    description text not null,
    system text not null,
    model text not null,
    runtime text not null,
    environment_id uuid,
    metadata jsonb not null,
    created_at timestamptz not null default now(),
    primary key (agent_id, version)
);

create table session (
    session_id uuid primary key,
    user_id uuid not null,
    agent_id uuid references agent on delete set null,
    -- Pinned: a later edit does not change this session's next turn.
    agent_version integer not null,
    environment_id uuid references environment,
    environment_version integer,
    runtime text not null,
    provider text,
    sprite text not null,
    -- The CLI's own conversation, resumed by every later turn.
    conversation_id uuid not null,
    metadata jsonb not null,
    status text not null check (status in ('pending', 'running', 'completed', 'failed', 'terminated')),
    exit_code integer,
    failure_stage text,
    failure_message text,
    turn_count integer not null,
    sprite_destroyed_at timestamptz,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);

create index session_of_user on session (user_id, created_at desc, session_id desc);
-- The quota counts these.
create index active_session_of_user on session (user_id) where status in ('pending', 'running');
create index session_of_agent on session (agent_id);
create index session_of_environment on session (environment_id);

create table turn (
    session_id uuid not null references session on delete cascade,
    turn_number integer not null,
    prompt text not null,
    timeout_seconds integer not null,
    status text not null check (status in ('pending', 'running', 'completed', 'failed')),
    exit_code integer,
    -- Fencing: raised by every claim.
    epoch integer not null default 0,
    created_at timestamptz not null default now(),
    started_at timestamptz,
    ended_at timestamptz,
    -- When the turn is settled whatever its runner does.
    deadline_at timestamptz not null,
    primary key (session_id, turn_number)
);

create index turn_by_deadline on turn (deadline_at) where status in ('pending', 'running');

-- The record of the EVENTS stream, by its sequence. No foreign key: the recorder leaves out what has no session.
create table event (
    session_id uuid not null,
    event_id bigint not null,
    payload bytea not null,
    primary key (session_id, event_id)
);

-- How far each stream is recorded. A stream that is made anew begins above it.
create table recorded (
    stream text primary key,
    event_id bigint not null
);

create table outbox (
    outbox_id uuid primary key,
    subject text not null,
    payload bytea not null,
    traceparent text,
    created_at timestamptz not null default now()
);
