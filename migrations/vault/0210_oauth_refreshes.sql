-- Who refreshes the access token of a secret at the moment, and which refresh token was refused.
create table oauth_refresh (
    secret_id uuid primary key references secret on delete cascade,
    claim_id uuid not null,
    claimed_until timestamptz not null,
    -- SHA-256.
    refused bytea
);
