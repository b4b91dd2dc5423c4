-- Vaults of the Managed Agents API: credentials that a user's sessions may be given. Secrets are at the credential vault.
create table vault (
    vault_id uuid primary key,
    user_id uuid not null,
    display_name text not null,
    metadata jsonb not null default '{}',
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    archived_at timestamptz
);

create index vault_of_user on vault (user_id, created_at, vault_id);

create table vault_credential (
    credential_id uuid primary key,
    vault_id uuid not null references vault on delete cascade,
    display_name text,
    metadata jsonb not null default '{}',
    kind text not null check (kind in ('environment_variable', 'static_bearer')),
    -- A variable's name, or a server's URL.
    key text not null,
    -- As it is shown.
    auth jsonb not null,
    -- Null once it is archived.
    secret_id uuid,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    archived_at timestamptz,
    constraint archived_without_secret check ((archived_at is null) = (secret_id is not null))
);

create unique index vault_credential_key on vault_credential (vault_id, kind, key) where archived_at is null;
create index credential_of_vault on vault_credential (vault_id, created_at, credential_id);
