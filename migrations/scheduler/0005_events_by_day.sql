-- Events in a table for each day, so that old ones go by dropping tables. The days ahead are made by the service (`retention.rs`).
-- The rows are copied: nothing has been released yet that could have many.
alter table event rename to event_whole;

create table event (
    session_id uuid not null,
    event_id bigint not null,
    recorded_on date not null default ((now() at time zone 'utc')::date),
    payload bytea not null,
    primary key (session_id, event_id, recorded_on)
) partition by range (recorded_on);

do $$
begin
    for ahead in 0..7 loop
        execute format(
            'create table %I partition of event for values from (%L) to (%L)',
            'event_' || to_char((now() at time zone 'utc')::date + ahead, 'YYYYMMDD'),
            (now() at time zone 'utc')::date + ahead,
            (now() at time zone 'utc')::date + ahead + 1
        );
    end loop;
end
$$;

insert into event (session_id, event_id, payload) select session_id, event_id, payload from event_whole;
drop table event_whole;
