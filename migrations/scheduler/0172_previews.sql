-- Whether someone followed the session who wants to see texts while the agent writes them.
alter table session add column wants_previews boolean not null default false;
