-- no-transaction
create index concurrently if not exists session_by_class
    on session (user_id, v1_class(status, archived_at, sprite_destroyed_at, destroy_after), created_at desc, session_id desc);
