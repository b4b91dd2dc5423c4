-- Requests that the model gateway passes on with secrets of a session, other than those to model providers: an aod.vault.v1.Routes, and the
-- secrets that its headers are read from. Absent where a runner of the release before claimed.
alter table model_token
    add column routes bytea,
    add column secret_ids uuid[] not null default '{}';

-- What a lease leaves to the model gateway.
alter table lease add column routes bytea;
