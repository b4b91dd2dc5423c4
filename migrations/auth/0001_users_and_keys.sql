-- Users, the keys they call with, and how many sessions they may have at once.

create table account (
    user_id uuid primary key,
    name text not null constraint account_name_is_unique unique,
    is_active boolean not null default true,
    -- Null: the deployment's default.
    session_limit integer constraint account_session_limit_is_positive check (session_limit > 0),
    created_at timestamptz not null default now()
);

create table api_key (
    key_id uuid primary key,
    user_id uuid not null references account on delete cascade,
    -- SHA-256 of the whole key. The key itself is nowhere.
    key_hash bytea not null constraint api_key_hash_is_unique unique check (length(key_hash) = 32),
    prefix text not null,
    name text not null check (length(name) <= 100),
    is_active boolean not null default true,
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    last_used_at timestamptz
);

create index api_key_of_user on api_key (user_id, created_at desc);
