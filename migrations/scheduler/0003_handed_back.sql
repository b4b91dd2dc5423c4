-- Why a turn was last handed back by its runner: what its user is told while it waits, and when it is given up.
alter table turn add column handed_back_reason text;
