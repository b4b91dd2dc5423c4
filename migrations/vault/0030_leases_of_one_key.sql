-- A lease is redeemed by the key that its claim named, and once: again only within a minute, for an answer may be lost.
alter table lease add column public_key bytea, add column redeemed_at timestamptz;
