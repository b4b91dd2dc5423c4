-- When a runner began to prepare a session's sandbox for its first message.
alter table session add column prepared_at timestamptz;
