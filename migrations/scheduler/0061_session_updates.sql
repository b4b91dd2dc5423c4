-- Changes of sessions that their logs do not show yet: a log belongs to the turn that runs.
create table session_update (
    -- In the order of the changes.
    update_id uuid primary key,
    session_id uuid not null references session on delete cascade,
    changes jsonb not null,
    agent_version integer not null
);

create index session_update_by_session on session_update (session_id);

-- A session's status in the Managed Agents API. A turn that waits for its user's decision is idle, and so is a session whose turn
-- failed; one whose sandbox is gone takes no more messages.
create function v1_status(s session) returns text language sql stable set search_path from current as $$
    select case
        when s.status = 'terminated' or s.sprite_destroyed_at is not null or (s.status = 'failed' and s.destroy_after is not null)
            then 'terminated'
        when s.status not in ('pending', 'running') then 'idle'
        when exists (select from turn t
                     where t.session_id = s.session_id and t.turn_number = s.turn_count and t.waiting_since is not null)
            then 'idle'
        else 'running'
    end
$$;
