-- no-transaction
-- Uploads whose days are over.
create index concurrently if not exists upload_by_age on file (created_at) where kind = 'upload' and state = 'ready';
