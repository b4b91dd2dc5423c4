-- An id is used twice where a stream was set back. Together with its event's tag it names one event.
alter table event_log add column last_tag bigint;
