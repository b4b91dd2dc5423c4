-- no-transaction
create index concurrently if not exists usage_by_day on usage_day (day);
