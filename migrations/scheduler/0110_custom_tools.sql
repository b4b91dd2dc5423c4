-- Results of custom tools are inputs, and their calls wait as requests do. A constant default: no table is rewritten.
alter table input
    drop constraint input_kind_check,
    add constraint input_kind_check check (kind in ('message', 'interrupt', 'decision', 'tool_result')) not valid,
    -- Of a result; its text is `text`.
    add column is_error boolean not null default false;

alter table permission_request
    -- A call of a custom tool, which waits for its result; its input has no diff and no decision.
    add column is_custom_tool boolean not null default false;
