-- no-transaction
create index concurrently if not exists session_by_agent on session (agent_id, created_at desc, session_id desc);
