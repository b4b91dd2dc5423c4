-- no-transaction
create index concurrently if not exists sprite_to_destroy on session (destroy_after) where destroy_after is not null and sprite_destroyed_at is null;
