-- Where a turn's events begin in its session's log, so that a reader finds the state at an event without reading the log from its start.
-- Null: the turn is of an earlier release.
alter table turn add column begun_after bigint;
