-- Files of the Managed Agents API. Their bytes are objects of a store; a row is written before its object, and deleted after it.
create table file (
    file_id uuid primary key,
    user_id uuid not null,
    kind text not null check (kind in ('upload', 'output', 'copy')),
    -- pending: its bytes are being written. deleted: its bytes are to be deleted.
    state text not null check (state in ('pending', 'ready', 'deleted')),
    -- Copies share their original's.
    object_id uuid not null,
    filename text not null,
    mime_type text not null,
    size_bytes bigint not null default 0,
    sha256 bytea not null default '',
    -- Of outputs and copies. Without a reference: the files go after their session.
    session_id uuid,
    path text not null default '',
    modified_us bigint not null default 0,
    created_at timestamptz not null default now(),
    state_since timestamptz not null default now(),
    expires_at timestamptz
);

create index file_of_user on file (user_id, created_at, file_id) where state <> 'deleted';
create index file_of_session on file (session_id, kind, path) where session_id is not null;
create unique index one_copy_at_a_path on file (session_id, path) where kind = 'copy' and state <> 'deleted';
create index file_by_object on file (object_id);
create index unfinished_file on file (state_since) where state <> 'ready';
create index file_by_expiry on file (expires_at) where expires_at is not null and state = 'ready';

alter table session
    -- What its agent writes is kept.
    add column collects_outputs boolean not null default false,
    -- Whether it was ever given files: then its sandbox may have some.
    add column had_files boolean not null default false;
