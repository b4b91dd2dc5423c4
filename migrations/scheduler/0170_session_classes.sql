-- What a session's own row tells of its status in the Managed Agents API: an active one is idle while its turn waits.
create function v1_class(status text, archived_at timestamptz, sprite_destroyed_at timestamptz, destroy_after timestamptz)
returns text language sql immutable parallel safe as $$
    select case
        when archived_at is not null then 'archived'
        when status = 'terminated' or sprite_destroyed_at is not null or (status = 'failed' and destroy_after is not null)
            then 'terminated'
        when status in ('pending', 'running') then 'active'
        else 'idle'
    end
$$;

create or replace function v1_status(s session) returns text language sql stable set search_path from current as $$
    select case v1_class(s.status, s.archived_at, s.sprite_destroyed_at, s.destroy_after)
        when 'archived' then 'terminated'
        when 'active' then
            case when exists (select from turn t
                              where t.session_id = s.session_id and t.turn_number = s.turn_count and t.waiting_since is not null)
                then 'idle'
                else 'running'
            end
        else v1_class(s.status, s.archived_at, s.sprite_destroyed_at, s.destroy_after)
    end
$$;

-- Whose own version of its agent it is.
alter table agent_version add column session_id uuid;
update agent_version v set session_id = s.session_id
from session s
where v.version < 0 and s.agent_id = v.agent_id and s.agent_version = v.version;
create index agent_version_of_session on agent_version (session_id) where session_id is not null;
create index agent_version_by_secret on agent_version (mcp_secret_id) where mcp_secret_id is not null;

-- Those that changes of sessions have replaced: nothing said whose they were.
with gone as (
    delete from agent_version v
    where v.version < 0 and v.session_id is null
        and not exists (select from session s where s.agent_id = v.agent_id and s.agent_version = v.version)
        and not exists (select from session_update u join session s using (session_id)
                        where s.agent_id = v.agent_id and u.agent_version = v.version)
    returning agent_id, version, mcp_secret_id
)
insert into unused_secret (secret_id)
select distinct g.mcp_secret_id
from gone g
where g.mcp_secret_id is not null
    and not exists (select from agent_version v
                    where v.mcp_secret_id = g.mcp_secret_id and (v.agent_id, v.version) not in (select agent_id, version from gone))
on conflict do nothing;
