-- Key-encryption keys that were ever used: what a configured key has to open to be the same one. Never the key.
create table key_version (
    version integer primary key constraint key_version_is_positive check (version > 0),
    proof bytea not null,
    first_used_at timestamptz not null default now()
);

-- Which of them encrypts. Whoever encrypts holds the row shared, so that a rotation waits for it.
create table current_key (
    is_the_row boolean primary key default true check (is_the_row),
    version integer not null references key_version
);

-- Which claim of the work a lease is for: a later claim's lease ends an earlier one's.
alter table lease add column epoch bigint not null default 0;

-- Leases are forgotten; what they were for is not.
alter table redemption add column purpose text;

create index redemption_of_session on redemption (session_id, redemption_id);

create function refuse_change() returns trigger language plpgsql as $$
begin
    raise exception 'the audit of redemptions is append-only';
end
$$;

create trigger redemption_is_append_only before update or delete or truncate on redemption
    for each statement execute function refuse_change();
