-- Where a session's agent works; null: in its only repository, else in /workspace.
alter table session add column working_directory text;
