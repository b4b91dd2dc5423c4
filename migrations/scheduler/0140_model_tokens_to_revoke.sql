-- Sessions whose sandbox is to go: the vault is told to revoke their tokens for the model gateway, also while no sandbox can be deleted.
create table model_tokens_to_revoke (
    session_id uuid primary key
);
