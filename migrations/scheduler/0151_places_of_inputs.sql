-- Where inputs stand in their sessions' logs, so that a reader can go on after one. Null: the input is of an earlier release.
-- settled_by: the event that settled it; none where it was settled without one. sent_after: the newest event when it was sent.
alter table input add column settled_by bigint, add column sent_after bigint;
