-- no-transaction
-- `model_request_open_of_session` has all open requests; each beginning and each end wrote to both.
drop index concurrently if exists model_request_open;
