-- no-transaction
-- What a user uploaded, without going through what agents wrote.
create index concurrently if not exists upload_of_user on file (user_id, created_at, file_id) where kind = 'upload' and state = 'ready';
