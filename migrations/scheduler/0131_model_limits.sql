-- Budgets and policies of sessions, agents, users and the deployment, whose id is all zeros. A transaction that locks several rows locks them in
-- this order.
create table model_limit (
    scope text not null check (scope in ('session', 'agent', 'user', 'deployment')),
    scope_id uuid not null,
    -- Null: the deployment's default of the scope.
    max_cost_micro_usd bigint,
    max_tokens bigint,
    max_requests bigint,
    max_seconds bigint,
    -- What settled requests used since the budget was made, and what those under way hold.
    used_cost_micro_usd bigint not null default 0,
    used_tokens bigint not null default 0,
    used_requests bigint not null default 0,
    used_us bigint not null default 0,
    held_cost_micro_usd bigint not null default 0,
    held_tokens bigint not null default 0,
    -- The soft limit was told of.
    has_warned boolean not null default false,
    -- Null: every model.
    allowed_models text[],
    -- Null: the deployment's default.
    requests_per_minute integer,
    primary key (scope, scope_id)
);
