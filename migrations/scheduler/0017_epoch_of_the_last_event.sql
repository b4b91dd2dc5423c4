-- An id is used twice where a stream was set back. Together with the epoch of its writer it names one event.
alter table event_log add column last_epoch integer;
