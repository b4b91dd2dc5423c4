-- Sprites carry the name of the deployment that made them, so that none deletes another's.
create table deployment (
    deployment_id text primary key
);

insert into deployment (deployment_id) values (substr(md5(random()::text || clock_timestamp()::text), 1, 8));

create index session_by_sprite on session (sprite);

-- When a user's account was last searched for Sprites that no session knows.
create table sprite_sweep (
    user_id uuid primary key,
    queued_at timestamptz not null
);
