-- Secrets, encrypted each under a data key of its own, which is wrapped by a versioned key-encryption key.

create table secret (
    secret_id uuid primary key,
    user_id uuid not null,
    kind text not null,
    -- A credential is the user's one secret of its kind; other secrets are found by their id alone.
    is_credential boolean not null,
    hint text not null,
    key_version integer not null,
    wrapped_key bytea not null,
    ciphertext bytea not null,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);

create unique index credential_of_user on secret (user_id, kind) where is_credential;
-- Rotation walks the rows of an old key.
create index secret_by_key_version on secret (key_version, secret_id);

create table lease (
    lease_id uuid primary key,
    user_id uuid not null,
    session_id uuid not null,
    purpose text not null,
    credential_kinds text[] not null,
    secret_ids uuid[] not null,
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,
    revoked_at timestamptz
);

create index lease_of_session on lease (session_id);
create index lease_by_expiry on lease (expires_at);

-- Append-only: who had which lease unsealed, when, and what came of it. Never a secret.
create table redemption (
    redemption_id bigint generated always as identity primary key,
    lease_id uuid not null,
    session_id uuid,
    runner text not null,
    outcome text not null,
    kinds text[] not null,
    redeemed_at timestamptz not null default now()
);

create index redemption_of_lease on redemption (lease_id);
