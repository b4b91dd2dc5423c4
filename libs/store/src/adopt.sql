-- Makes a copied database one of another deployment's own. None of the Sprites that it names are this deployment's.
begin;
set local search_path = scheduler;
lock table deployment in exclusive mode;
create temporary table names on commit drop as
    select deployment_id as old, substr(md5(random()::text || clock_timestamp()::text), 1, 8) as new from deployment;
update deployment set deployment_id = names.new, owner = null from names;
-- Whatever is done with a Sprite from here on is done by another name.
update session set sprite = replace(sprite, '-' || old || '-', '-' || new || '-'), sprite_destroyed_at = coalesce(sprite_destroyed_at, now()),
    destroy_after = null from names;
update deleted_session set sprite = replace(sprite, '-' || old || '-', '-' || new || '-'),
    sprite_destroyed_at = coalesce(sprite_destroyed_at, now()), destroy_after = null from names;
-- Nor is what was prepared for sessions to come: one of the other deployment's sessions may have it by now.
delete from spare;
-- Turns that ran when the copy was made end the regular way, by their deadline.
update turn set deadline_at = now(), owner = null, offer_after = 'infinity' where status in ('pending', 'running');
-- What was to leave concerns the other deployment.
delete from outbox;
delete from outbox_dead;
commit;
