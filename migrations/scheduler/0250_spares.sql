-- Sandboxes that are prepared for sessions which do not exist yet. Each is of one user and of what its preparation depends on.
create table spare (
    -- Of the session that gets it.
    session_id uuid primary key,
    user_id uuid not null,
    agent_id uuid not null,
    agent_version integer not null,
    environment_id uuid,
    environment_version integer,
    working_directory text,
    collects_outputs boolean not null,
    runtime text not null,
    sprite text not null,
    conversation_id uuid not null,
    event_partition smallint not null,
    state text not null check (state in ('offered', 'preparing', 'ready', 'failed', 'adopted')),
    state_since timestamptz not null default now(),
    -- Of an adopted one: the id that the session would have had, by which another attempt of its creation finds it.
    requested_id uuid unique
);

create index spare_of_user on spare (user_id) where state <> 'adopted';

-- What a preparation takes, as `session` has it: a session that needs more gets no spare.
create view spare_session as
select session_id, user_id, agent_id, agent_version, environment_id, environment_version, working_directory, collects_outputs,
       runtime, sprite, conversation_id, event_partition,
       '[]'::jsonb as vault_ids, '[]'::jsonb as resources, null::uuid as secret_id, false as had_files, false as wants_previews,
       null::timestamptz as tokens_changed_at, null::timestamptz as prepared_at
from spare;
