-- Browsers that are signed in to the console. Each works as long as its API key does, and until it expires.
create table console_session (
    -- SHA-256 of the token in the browser's cookie. The token itself is nowhere.
    token_hash bytea primary key check (length(token_hash) = 32),
    key_id uuid not null references api_key on delete cascade,
    created_at timestamptz not null default now(),
    expires_at timestamptz not null
);

create index console_session_of_key on console_session (key_id, created_at desc);
