-- Tokens that agents show to the model gateway, by their hash. A token belongs to its session: it is renewed by each claim and each use, and
-- ends with the session.
create table model_token (
    token_hash bytea primary key,
    token_id uuid not null,
    user_id uuid not null,
    session_id uuid not null,
    credential_kinds text[] not null,
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,
    revoked_at timestamptz
);

create index model_token_of_session on model_token (session_id);
create index model_token_by_expiry on model_token (expires_at);

-- What a lease leaves to the model gateway.
alter table lease add column proxied_kinds text[] not null default '{}';
