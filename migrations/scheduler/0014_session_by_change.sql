-- no-transaction
create index concurrently if not exists session_by_change on session (updated_at, user_id);
