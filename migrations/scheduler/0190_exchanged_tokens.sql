-- When a token of the session's repositories was exchanged last.
alter table session add column if not exists tokens_changed_at timestamptz;
