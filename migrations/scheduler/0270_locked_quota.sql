-- Takes the lock of a user's quota until the transaction ends, then counts the user's active sessions. Volatile, so that the count sees
-- what was committed before the lock was taken, also where the statement that calls it began earlier.
create function lock_active_sessions(owner uuid, is_alone boolean) returns bigint volatile language plpgsql set search_path from current as $$
declare
    quota constant bigint := hashtextextended('quota ' || owner, 0);
begin
    if is_alone then
        perform pg_advisory_xact_lock(quota);
    else
        perform pg_advisory_xact_lock_shared(quota);
    end if;
    return (select coalesce(sum(sessions), 0) from active_sessions where user_id = owner);
end
$$;
