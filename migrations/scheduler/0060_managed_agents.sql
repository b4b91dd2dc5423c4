-- What the Managed Agents API has beside the original one. Nulls and constant defaults: no table is rewritten.
alter table agent_version
    -- The tools as they were sent; null: they follow from the permissions.
    add column tools jsonb,
    -- Of a session's own version of its agent, whose number is negative: the version that it overrides.
    add column base_version integer;

-- Numbers of such versions.
create sequence agent_override_number as integer;

alter table environment
    add column description text,
    add column metadata jsonb not null default '{}';

alter table session
    add column title text,
    add column archived_at timestamptz,
    -- Vaults whose credentials its turns get, the first that has one wins.
    add column vault_ids jsonb not null default '[]';

alter table turn
    add column cache_read_tokens bigint,
    add column cache_write_tokens bigint;
