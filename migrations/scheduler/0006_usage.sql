-- What a turn used, as its agent reported it.
alter table turn
    add column input_tokens bigint,
    add column output_tokens bigint,
    add column cost_micro_usd bigint,
    add column model_used text;
