-- Credentials of OAuth. The rows that there are have one of the former kinds: they need no check.
alter table vault_credential
    drop constraint vault_credential_kind_check,
    add constraint vault_credential_kind_check check (kind in ('environment_variable', 'static_bearer', 'mcp_oauth')) not valid;
