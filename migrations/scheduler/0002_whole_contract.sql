-- Skills, MCP servers, repositories, secrets of sessions; requests that take effect once; what deleted sessions leave behind.
-- Columns with constant defaults: no table is rewritten.

alter table agent_version
    add column skills jsonb not null default '[]',
    -- Secret values are redacted here; the vault keeps them.
    add column mcp_servers jsonb not null default '[]',
    add column mcp_secret_id uuid;

alter table session
    add column resources jsonb not null default '[]',
    -- The session's own variables and its repositories' tokens.
    add column secret_id uuid;

-- What was answered to a request with an Idempotency-Key, written in the transaction of what it did.
create table answered_once (
    user_id uuid not null,
    route text not null,
    key text not null,
    body_hash bytea not null,
    reply bytea not null,
    created_at timestamptz not null default now(),
    primary key (user_id, route, key)
);

create index answered_once_by_age on answered_once (created_at);

-- Secrets that nothing refers to any more: the vault is told to forget them.
create table unused_secret (
    secret_id uuid primary key
);

-- Sessions whose events, stream and Sprite are still to be removed.
create table deleted_session (
    session_id uuid primary key,
    user_id uuid not null,
    sprite text not null,
    deleted_at timestamptz not null default now(),
    purged_at timestamptz,
    sprite_destroyed_at timestamptz
);
