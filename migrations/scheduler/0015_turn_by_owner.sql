-- no-transaction
create index concurrently if not exists turn_by_owner on turn (owner) where owner is not null;
