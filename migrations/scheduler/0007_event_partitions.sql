-- Which of the streams holds a session's record (EVENT_PARTITIONS). Constant defaults: no table is rewritten.
alter table session add column event_partition smallint not null default 0;
alter table deleted_session add column event_partition smallint not null default 0;
