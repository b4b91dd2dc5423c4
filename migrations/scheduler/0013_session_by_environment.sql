-- no-transaction
create index concurrently if not exists session_by_environment on session (environment_id, created_at desc, session_id desc);
