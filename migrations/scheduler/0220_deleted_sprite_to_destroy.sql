-- no-transaction
-- Sprites of deleted sessions: as many as the Sprites API has not deleted yet.
create index concurrently if not exists deleted_sprite_to_destroy on deleted_session (destroy_after)
    where sprite_destroyed_at is null;
