-- no-transaction
create index concurrently if not exists turn_without_owner on turn (offer_after) where owner is null and status in ('pending', 'running');
