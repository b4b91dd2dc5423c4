-- Raw output is most of a log, and the typed views leave it out. Null: written by an earlier release, decided by the payload. No table is
-- rewritten.
alter table event add column is_output boolean;

-- For the tables of the days to come. Those that have rows are not indexed, which would block their writers: they are filtered.
create index event_not_output on only event (session_id, event_id) where is_output is not true;

do $$
declare
    day regclass;
    is_used boolean;
begin
    for day in select inhrelid::regclass from pg_inherits where inhparent = 'event'::regclass loop
        execute format('select exists (select from %s)', day) into is_used;
        if not is_used then
            execute format('create index on %s (session_id, event_id) where is_output is not true', day);
        end if;
    end loop;
end
$$;

-- Whether a SessionEvent is raw output, by its first bytes. Fields are written in the order of their numbers: what kind of event it is
-- follows the fields below 10. Where the bytes end before it, it is none.
create function event_is_output(head bytea) returns boolean language plpgsql immutable strict parallel safe as $$
declare
    size constant integer := length(head);
    at integer := 0;
    tag integer;
    byte integer;
    shift integer;
    value bigint;
begin
    while at < size loop
        tag := get_byte(head, at);
        -- Field 10 and above; 11 is `output`.
        if tag >= 80 then
            return tag = 90;
        end if;
        at := at + 1;
        if tag & 7 = 1 then
            at := at + 8;
        elsif tag & 7 = 5 then
            at := at + 4;
        elsif tag & 7 in (0, 2) then
            value := 0;
            shift := 0;
            loop
                if at >= size or shift > 56 and tag & 7 = 2 then
                    return false;
                end if;
                byte := get_byte(head, at);
                at := at + 1;
                if tag & 7 = 2 then
                    value := value | ((byte & 127)::bigint << shift);
                    shift := shift + 7;
                end if;
                exit when byte < 128;
            end loop;
            if value > size then
                return false;
            end if;
            at := at + value::integer;
        else
            return false;
        end if;
    end loop;
    return false;
end
$$;
