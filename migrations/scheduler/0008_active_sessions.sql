-- How many of a user's sessions are active: a quota is checked by adding up a few rows, however many sessions there are. A trigger keeps it, for
-- replicas of the release before too. Sixteen rows for each user and partition, so that sessions which begin and end at once seldom wait for
-- one another, and recorders of two partitions never.
create table active_sessions (
    user_id uuid not null,
    slot smallint not null,
    sessions integer not null,
    primary key (user_id, slot)
);

create function count_active_session() returns trigger language plpgsql set search_path from current as $$
declare
    counted session := case when tg_op = 'DELETE' then old else new end;
    change integer := case when tg_op <> 'DELETE' and new.status in ('pending', 'running') then 1 else -1 end;
begin
    insert into active_sessions as a (user_id, slot, sessions)
    values (counted.user_id, counted.event_partition * 16 + get_byte(uuid_send(counted.session_id), 14) % 16, change)
    on conflict (user_id, slot) do update set sessions = a.sessions + excluded.sessions;
    return null;
end
$$;

-- Deferred: no transaction locks a count before it has all its locks of sessions, so that none waits for another in a circle.
create constraint trigger session_begins after insert on session deferrable initially deferred
    for each row when (new.status in ('pending', 'running')) execute function count_active_session();
create constraint trigger session_changes after update of status on session deferrable initially deferred
    for each row when ((old.status in ('pending', 'running')) <> (new.status in ('pending', 'running'))) execute function count_active_session();
create constraint trigger session_goes after delete on session deferrable initially deferred
    for each row when (old.status in ('pending', 'running')) execute function count_active_session();

insert into active_sessions (user_id, slot, sessions)
select user_id, event_partition * 16 + get_byte(uuid_send(session_id), 14) % 16, count(*)
from session
where status in ('pending', 'running')
group by 1, 2;
