-- no-transaction
-- Prepared sessions that wait for their first message.
create index concurrently if not exists session_prepared on session (user_id, prepared_at)
    where prepared_at is not null and turn_count = 0;
