-- Which deployment the database belongs to, as its setting AOD_DEPLOYMENT_ID says: a copy in another deployment is noticed. Written by the
-- first scheduler that starts with the setting.
alter table deployment add column owner text;
