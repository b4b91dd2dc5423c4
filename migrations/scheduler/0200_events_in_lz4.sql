-- Large events compressed by LZ4, which takes a fourth of the time of Postgres' own method or less. For what is written from here on. A
-- Postgres that was built without it keeps its own.
do $$
declare
    today constant text := 'event_' || to_char((now() at time zone 'utc')::date, 'YYYYMMDD');
    each regclass;
begin
    alter table event alter column payload set compression lz4;
    for each in
        select inhrelid::regclass from pg_inherits join pg_class on oid = inhrelid
        where inhparent = 'event'::regclass and relname >= today
    loop
        execute format('alter table %s alter column payload set compression lz4', each);
    end loop;
exception
    when feature_not_supported then
        raise notice 'this Postgres has no LZ4: events are compressed by its own method';
end
$$;
