//! Requests between services: subject, request and reply of each.

use crate::{auth, common, scheduler, vault};

/// A request that one service serves and others call.
pub trait Rpc {
    type Request: prost::Message + Default + Send;
    type Reply: prost::Message + Default + Send;
    const SUBJECT: &'static str;
    /// Whether the caller may repeat it when no reply arrived.
    const RETRY_SAFE: bool;
}

/// Describes a request, for the documents of the bus.
#[derive(Debug)]
pub struct RpcInfo {
    pub name: &'static str,
    pub subject: &'static str,
    /// `module::Message`, as in this crate.
    pub request: &'static str,
    pub reply: &'static str,
    pub retry_safe: bool,
    pub meaning: &'static str,
}

macro_rules! rpcs {
    ($($(#[doc = $doc:literal])* $name:ident: $request:ty => $reply:ty, $subject:literal, retry_safe: $retry_safe:literal;)*) => {
        $(
            $(#[doc = $doc])*
            #[derive(Debug)]
            pub struct $name;

            impl Rpc for $name {
                type Request = $request;
                type Reply = $reply;
                const SUBJECT: &'static str = $subject;
                const RETRY_SAFE: bool = $retry_safe;
            }
        )*

        /// Decodes bytes as each message of each request.
        #[cfg(test)]
        fn decode_all(bytes: &[u8]) {
            use prost::Message as _;
            $(
                let _ = (<$request>::decode(bytes), <$reply>::decode(bytes));
            )*
        }

        /// Every request there is.
        pub const RPCS: &[RpcInfo] = &[$(RpcInfo {
            name: stringify!($name),
            subject: $subject,
            request: stringify!($request),
            reply: stringify!($reply),
            retry_safe: $retry_safe,
            meaning: concat!($($doc),*),
        }),*];
    };
}

rpcs! {
    /// Answers when auth can query its tables.
    AuthHealth: common::Empty => common::Empty, "aod.rpc.auth.v1.health.check", retry_safe: true;
    /// Finds the user of an API key, or of a console session, by its hash.
    VerifyKey: auth::VerifyKeyRequest => auth::VerifyKeyReply, "aod.rpc.auth.v1.key.verify", retry_safe: true;
    /// Signs a browser in with an API key.
    CreateConsoleSession: auth::CreateConsoleSessionRequest => auth::ConsoleSession, "aod.rpc.auth.v1.console.create", retry_safe: true;
    /// Returns the user of a console session, and when it expires.
    FindConsoleSession: auth::FindConsoleSessionRequest => auth::ConsoleSession, "aod.rpc.auth.v1.console.find", retry_safe: true;
    /// Ends a console session.
    EndConsoleSession: auth::EndConsoleSessionRequest => common::Empty, "aod.rpc.auth.v1.console.end", retry_safe: true;
    /// Creates an API key of a user.
    CreateKey: auth::CreateKeyRequest => auth::Key, "aod.rpc.auth.v1.key.create", retry_safe: true;
    /// Lists the API keys of a user, newest first.
    ListKeys: auth::ListKeysRequest => auth::ListKeysReply, "aod.rpc.auth.v1.key.list", retry_safe: true;
    /// Deactivates an API key.
    DeactivateKey: auth::DeactivateKeyRequest => auth::Key, "aod.rpc.auth.v1.key.deactivate", retry_safe: true;
    /// Finds a user by name. For operators.
    FindUser: auth::FindUserRequest => auth::User, "aod.rpc.auth.v1.user.find", retry_safe: true;
    /// Creates a user. For operators.
    CreateUser: auth::CreateUserRequest => auth::User, "aod.rpc.auth.v1.user.create", retry_safe: false;
    /// Lists users. For operators.
    ListUsers: auth::ListUsersRequest => auth::ListUsersReply, "aod.rpc.auth.v1.user.list", retry_safe: true;
    /// Enables or disables a user. For operators.
    SetUserActive: auth::SetUserActiveRequest => auth::User, "aod.rpc.auth.v1.user.set_active", retry_safe: true;
    /// Returns whether a user is active. For the model gateway.
    CheckUser: auth::CheckUserRequest => auth::CheckUserReply, "aod.rpc.auth.v1.user.check", retry_safe: true;
    /// Sets how many sessions of a user may be active at once. For operators.
    SetQuota: auth::SetQuotaRequest => auth::User, "aod.rpc.auth.v1.quota.set", retry_safe: true;
    /// Creates the first user and key; fails if any user exists. For operators.
    Bootstrap: auth::BootstrapRequest => auth::Key, "aod.rpc.auth.v1.user.bootstrap", retry_safe: false;
    /// Finds the user of a name, or creates it. For operators.
    EnsureUser: auth::EnsureUserRequest => auth::User, "aod.rpc.auth.v1.user.ensure", retry_safe: true;

    /// Answers after a real encryption and decryption.
    VaultHealth: common::Empty => common::Empty, "aod.rpc.vault.v1.health.check", retry_safe: true;
    /// Returns the public key that secrets are sealed to on their way to the vault.
    SealingKey: common::Empty => vault::SealingKeyReply, "aod.rpc.vault.v1.sealing.key", retry_safe: true;
    /// Stores a credential of a user, encrypted.
    PutCredential: vault::PutCredentialRequest => vault::Credential, "aod.rpc.vault.v1.credential.put", retry_safe: true;
    /// Lists the credentials of a user, without their values.
    ListCredentials: vault::ListCredentialsRequest => vault::ListCredentialsReply, "aod.rpc.vault.v1.credential.list", retry_safe: true;
    /// Deletes a credential of a user.
    DeleteCredential: vault::DeleteCredentialRequest => common::Empty, "aod.rpc.vault.v1.credential.delete", retry_safe: false;
    /// Stores the secret values of an agent, environment or session, encrypted.
    PutSecret: vault::PutSecretRequest => vault::PutSecretReply, "aod.rpc.vault.v1.secret.put", retry_safe: true;
    /// Deletes stored secret values.
    DeleteSecrets: vault::DeleteSecretsRequest => common::Empty, "aod.rpc.vault.v1.secret.delete", retry_safe: true;
    /// Returns one user of each Sprites account of the given users. For the scheduler.
    FindAccounts: vault::FindAccountsRequest => vault::FindAccountsReply, "aod.rpc.vault.v1.account.find", retry_safe: true;
    /// Grants a runner the secrets of a session for a limited time. For the scheduler.
    MintLease: vault::MintLeaseRequest => vault::MintLeaseReply, "aod.rpc.vault.v1.lease.mint", retry_safe: true;
    /// Returns the secrets of a lease, encrypted to a one-time key. For runners.
    RedeemLease: vault::RedeemLeaseRequest => vault::RedeemLeaseReply, "aod.rpc.vault.v1.lease.redeem", retry_safe: true;
    /// Revokes the leases of a session.
    RevokeLeases: vault::RevokeLeasesRequest => common::Empty, "aod.rpc.vault.v1.lease.revoke", retry_safe: true;
    /// Returns the credentials for models of a session's token, encrypted to a one-time key. For
    /// the model gateway.
    RedeemModelToken: vault::RedeemModelTokenRequest => vault::RedeemModelTokenReply, "aod.rpc.vault.v1.model_token.redeem", retry_safe: true;
    /// Grants the right to refresh an access token of OAuth, to one caller at a time. For the model
    /// gateway.
    ClaimRefresh: vault::ClaimRefreshRequest => vault::ClaimRefreshReply, "aod.rpc.vault.v1.oauth.claim", retry_safe: true;
    /// Stores the tokens that a refresh brought, or that it was refused.
    FinishRefresh: vault::FinishRefreshRequest => common::Empty, "aod.rpc.vault.v1.oauth.finish", retry_safe: true;
    /// Revokes the tokens for the model gateway of sessions that ended.
    RevokeModelTokens: vault::RevokeModelTokensRequest => common::Empty, "aod.rpc.vault.v1.model_token.revoke", retry_safe: true;
    /// Re-wraps one batch of secrets with the newest key-encryption key. For operators.
    RotateKeys: vault::RotateKeysRequest => vault::RotateKeysReply, "aod.rpc.vault.v1.key.rotate", retry_safe: true;
    /// Returns which key-encryption keys are in use. For operators.
    KeyStatus: common::Empty => vault::KeyStatusReply, "aod.rpc.vault.v1.key.status", retry_safe: true;
    /// Lists which runner redeemed which leases. For operators.
    ListRedemptions: vault::ListRedemptionsRequest => vault::ListRedemptionsReply, "aod.rpc.vault.v1.audit.list", retry_safe: true;

    /// Answers when the scheduler can query its tables.
    SchedulerHealth: common::Empty => common::Empty, "aod.rpc.scheduler.v1.health.check", retry_safe: true;
    /// Creates an agent.
    CreateAgent: scheduler::CreateAgentRequest => scheduler::CreateAgentReply, "aod.rpc.scheduler.v1.agent.create", retry_safe: true;
    /// Returns an agent.
    GetAgent: scheduler::GetAgentRequest => scheduler::Agent, "aod.rpc.scheduler.v1.agent.get", retry_safe: true;
    /// Changes an agent: a new version, unless nothing changed.
    UpdateAgent: scheduler::UpdateAgentRequest => scheduler::Agent, "aod.rpc.scheduler.v1.agent.update", retry_safe: false;
    /// Archives an agent.
    ArchiveAgent: scheduler::GetAgentRequest => scheduler::Agent, "aod.rpc.scheduler.v1.agent.archive", retry_safe: false;
    /// Lists the versions of an agent, newest first.
    ListAgentVersions: scheduler::ListPartsRequest => scheduler::ListAgentsReply, "aod.rpc.scheduler.v1.agent.versions", retry_safe: true;
    /// Lists the agents of a user that are not archived.
    ListAgents: scheduler::ListRequest => scheduler::ListAgentsReply, "aod.rpc.scheduler.v1.agent.list", retry_safe: true;
    /// Creates an environment.
    CreateEnvironment: scheduler::CreateEnvironmentRequest => scheduler::CreateEnvironmentReply, "aod.rpc.scheduler.v1.environment.create", retry_safe: true;
    /// Returns an environment.
    GetEnvironment: scheduler::GetEnvironmentRequest => scheduler::Environment, "aod.rpc.scheduler.v1.environment.get", retry_safe: true;
    /// Changes an environment: a new version, unless nothing changed.
    UpdateEnvironment: scheduler::UpdateEnvironmentRequest => scheduler::Environment, "aod.rpc.scheduler.v1.environment.update", retry_safe: false;
    /// Archives an environment.
    ArchiveEnvironment: scheduler::GetEnvironmentRequest => scheduler::Environment, "aod.rpc.scheduler.v1.environment.archive", retry_safe: false;
    /// Deletes an environment that no session uses.
    DeleteEnvironment: scheduler::GetEnvironmentRequest => common::Empty, "aod.rpc.scheduler.v1.environment.delete", retry_safe: false;
    /// Lists the versions of an environment, newest first.
    ListEnvironmentVersions: scheduler::ListPartsRequest => scheduler::ListEnvironmentsReply, "aod.rpc.scheduler.v1.environment.versions", retry_safe: true;
    /// Lists the environments of a user that are not archived.
    ListEnvironments: scheduler::ListRequest => scheduler::ListEnvironmentsReply, "aod.rpc.scheduler.v1.environment.list", retry_safe: true;
    /// Creates a session with its first turn.
    CreateSession: scheduler::CreateSessionRequest => scheduler::CreateSessionReply, "aod.rpc.scheduler.v1.session.create", retry_safe: true;
    /// Returns a session.
    GetSession: scheduler::GetSessionRequest => scheduler::Session, "aod.rpc.scheduler.v1.session.get", retry_safe: true;
    /// Lists the sessions of a user.
    ListSessions: scheduler::ListRequest => scheduler::ListSessionsReply, "aod.rpc.scheduler.v1.session.list", retry_safe: true;
    /// Lists the turns of a session.
    ListTurns: scheduler::ListPartsRequest => scheduler::ListTurnsReply, "aod.rpc.scheduler.v1.session.turns", retry_safe: true;
    /// Starts the next turn of a session.
    Prompt: scheduler::PromptRequest => scheduler::CreateSessionReply, "aod.rpc.scheduler.v1.session.prompt", retry_safe: true;
    /// Sends events to a session, all or none.
    SendEvents: scheduler::SendEventsRequest => scheduler::SendEventsReply, "aod.rpc.scheduler.v1.session.send", retry_safe: true;
    /// Returns where in a session's log a turn begins, and what was used before it.
    FindTurn: scheduler::FindTurnRequest => scheduler::FindTurnReply, "aod.rpc.scheduler.v1.session.find_turn", retry_safe: true;
    /// Lists the inputs of a session, newest first.
    ListInputs: scheduler::ListPartsRequest => scheduler::ListInputsReply, "aod.rpc.scheduler.v1.session.inputs", retry_safe: true;
    /// Lists the inputs of a session that its log has not settled yet, oldest first.
    ListOpenInputs: scheduler::ListPartsRequest => scheduler::ListInputsReply, "aod.rpc.scheduler.v1.session.open_inputs", retry_safe: true;
    /// Changes the text of a queued message.
    ChangeInput: scheduler::ChangeInputRequest => scheduler::Input, "aod.rpc.scheduler.v1.session.change_input", retry_safe: true;
    /// Withdraws a queued message.
    WithdrawInput: scheduler::WithdrawInputRequest => scheduler::Input, "aod.rpc.scheduler.v1.session.withdraw_input", retry_safe: false;
    /// Interrupts the running turn; the session continues.
    Interrupt: scheduler::InterruptRequest => scheduler::Input, "aod.rpc.scheduler.v1.session.interrupt", retry_safe: true;
    /// Lists the permission requests of a session, newest first.
    ListPermissionRequests: scheduler::ListPermissionRequestsRequest => scheduler::ListPermissionRequestsReply, "aod.rpc.scheduler.v1.session.requests", retry_safe: true;
    /// Answers a permission request, once.
    Decide: scheduler::DecideRequest => scheduler::PermissionRequest, "aod.rpc.scheduler.v1.session.decide", retry_safe: false;
    /// Changes the title, the metadata or the agent of a session.
    UpdateSession: scheduler::UpdateSessionRequest => scheduler::Session, "aod.rpc.scheduler.v1.session.update", retry_safe: true;
    /// Archives a session that is idle, which terminates it.
    ArchiveSession: scheduler::ArchiveSessionRequest => scheduler::Session, "aod.rpc.scheduler.v1.session.archive", retry_safe: true;
    /// Terminates a session.
    Terminate: scheduler::TerminateRequest => scheduler::Session, "aod.rpc.scheduler.v1.session.terminate", retry_safe: false;
    /// Deletes a session.
    DeleteSession: scheduler::DeleteSessionRequest => common::Empty, "aod.rpc.scheduler.v1.session.delete", retry_safe: false;
    /// Returns a page of a session's event log.
    ReadEvents: scheduler::ReadEventsRequest => scheduler::ReadEventsReply, "aod.rpc.scheduler.v1.session.events", retry_safe: true;
    /// Creates a vault.
    CreateVault: scheduler::CreateVaultRequest => scheduler::Vault, "aod.rpc.scheduler.v1.vault.create", retry_safe: true;
    /// Returns a vault.
    GetVault: scheduler::GetVaultRequest => scheduler::Vault, "aod.rpc.scheduler.v1.vault.get", retry_safe: true;
    /// Changes the name or the metadata of a vault.
    UpdateVault: scheduler::UpdateVaultRequest => scheduler::Vault, "aod.rpc.scheduler.v1.vault.update", retry_safe: true;
    /// Lists the vaults of a user, newest first.
    ListVaults: scheduler::ListRequest => scheduler::ListVaultsReply, "aod.rpc.scheduler.v1.vault.list", retry_safe: true;
    /// Archives a vault with its credentials, whose secrets are deleted.
    ArchiveVault: scheduler::GetVaultRequest => scheduler::Vault, "aod.rpc.scheduler.v1.vault.archive", retry_safe: true;
    /// Deletes a vault with its credentials.
    DeleteVault: scheduler::GetVaultRequest => common::Empty, "aod.rpc.scheduler.v1.vault.delete", retry_safe: false;
    /// Adds a credential to a vault.
    CreateVaultCredential: scheduler::CreateVaultCredentialRequest => scheduler::VaultCredential, "aod.rpc.scheduler.v1.vault_credential.create", retry_safe: true;
    /// Returns a credential of a vault, without its secret.
    GetVaultCredential: scheduler::GetVaultCredentialRequest => scheduler::VaultCredential, "aod.rpc.scheduler.v1.vault_credential.get", retry_safe: true;
    /// Changes a credential of a vault.
    UpdateVaultCredential: scheduler::UpdateVaultCredentialRequest => scheduler::VaultCredential, "aod.rpc.scheduler.v1.vault_credential.update", retry_safe: true;
    /// Lists the credentials of a vault, newest first.
    ListVaultCredentials: scheduler::ListVaultCredentialsRequest => scheduler::ListVaultCredentialsReply, "aod.rpc.scheduler.v1.vault_credential.list", retry_safe: true;
    /// Archives a credential, whose secret is deleted.
    ArchiveVaultCredential: scheduler::GetVaultCredentialRequest => scheduler::VaultCredential, "aod.rpc.scheduler.v1.vault_credential.archive", retry_safe: true;
    /// Deletes a credential.
    DeleteVaultCredential: scheduler::GetVaultCredentialRequest => common::Empty, "aod.rpc.scheduler.v1.vault_credential.delete", retry_safe: false;
    /// Announces a file that is about to be stored.
    CreateFile: scheduler::CreateFileRequest => scheduler::File, "aod.rpc.scheduler.v1.file.create", retry_safe: true;
    /// Tells that a file's bytes are stored.
    CommitFile: scheduler::CommitFileRequest => scheduler::File, "aod.rpc.scheduler.v1.file.commit", retry_safe: true;
    /// Returns a file's metadata.
    GetFile: scheduler::GetFileRequest => scheduler::File, "aod.rpc.scheduler.v1.file.get", retry_safe: true;
    /// Lists the files that a user uploaded, or that a session's agent wrote, newest first.
    ListFiles: scheduler::ListFilesRequest => scheduler::ListFilesReply, "aod.rpc.scheduler.v1.file.list", retry_safe: true;
    /// Deletes a file.
    DeleteFile: scheduler::GetFileRequest => common::Empty, "aod.rpc.scheduler.v1.file.delete", retry_safe: false;
    /// Adds a copy of a file to a session.
    AddSessionFile: scheduler::AddSessionFileRequest => scheduler::File, "aod.rpc.scheduler.v1.session.add_file", retry_safe: true;
    /// Returns the id of the secret with a session's variables and tokens; creates it if necessary.
    EnsureSessionSecret: scheduler::EnsureSessionSecretRequest => scheduler::EnsureSessionSecretReply, "aod.rpc.scheduler.v1.session.ensure_secret", retry_safe: true;
    /// Removes a file from a session.
    RemoveSessionFile: scheduler::RemoveSessionFileRequest => common::Empty, "aod.rpc.scheduler.v1.session.remove_file", retry_safe: false;
    /// Announces a file that an agent wrote. For runners.
    BeginOutput: scheduler::BeginOutputRequest => scheduler::File, "aod.rpc.scheduler.v1.turn.begin_output", retry_safe: true;
    /// Reports that the bytes of an agent's file are stored. For runners.
    CommitOutput: scheduler::CommitOutputRequest => common::Empty, "aod.rpc.scheduler.v1.turn.commit_output", retry_safe: true;
    /// Makes a runner the owner of a turn, raises the turn's epoch, and returns what is needed to
    /// run it. For runners.
    ClaimTurn: scheduler::ClaimTurnRequest => scheduler::ClaimTurnReply, "aod.rpc.scheduler.v1.turn.claim", retry_safe: true;
    /// Returns what it takes to prepare a session for its first turn, once for each session. For
    /// runners.
    ClaimPreparation: scheduler::ClaimPreparationRequest => scheduler::ClaimPreparationReply, "aod.rpc.scheduler.v1.turn.prepare", retry_safe: false;
    /// Reports how the preparation of a spare ended. For runners.
    EndPreparation: scheduler::EndPreparationRequest => common::Empty, "aod.rpc.scheduler.v1.turn.end_preparation", retry_safe: true;
    /// Releases a turn, with the reason where an attempt failed. For runners.
    ReleaseTurn: scheduler::ReleaseTurnRequest => common::Empty, "aod.rpc.scheduler.v1.turn.hand_back", retry_safe: true;
    /// Extends a runner's lease and compares the turns it holds with those it owns. For runners.
    Heartbeat: scheduler::HeartbeatRequest => scheduler::HeartbeatReply, "aod.rpc.scheduler.v1.turn.heartbeat", retry_safe: true;
    /// Returns the inputs that wait for a turn. For its runner.
    FetchInputs: scheduler::FetchInputsRequest => scheduler::FetchInputsReply, "aod.rpc.scheduler.v1.turn.inputs", retry_safe: true;
    /// Returns model requests of a session that are not in its log yet. For the runner of its turn.
    FetchModelRequests: scheduler::FetchModelRequestsRequest => scheduler::FetchModelRequestsReply, "aod.rpc.scheduler.v1.turn.model_requests", retry_safe: true;
    /// Checks a model request against budgets and policies, and reserves what it may use. For the
    /// model gateway.
    BeginModelRequest: scheduler::BeginModelRequestRequest => scheduler::BeginModelRequestReply, "aod.rpc.scheduler.v1.model_request.begin", retry_safe: true;
    /// Settles a model request with what it used. For the model gateway.
    EndModelRequest: scheduler::EndModelRequestRequest => common::Empty, "aod.rpc.scheduler.v1.model_request.end", retry_safe: true;
    /// Begins and settles many model requests at once, as far as nothing limits their sessions. For the
    /// model gateway.
    RecordModelRequests: scheduler::RecordModelRequestsRequest => scheduler::RecordModelRequestsReply, "aod.rpc.scheduler.v1.model_request.record", retry_safe: false;
    /// Extends the lease of a model gateway, on which its requests depend.
    RenewModelGateway: scheduler::RenewModelGatewayRequest => common::Empty, "aod.rpc.scheduler.v1.model_request.renew", retry_safe: true;
    /// Returns a budget: what is allowed and what is used.
    GetBudget: scheduler::GetBudgetRequest => scheduler::Budget, "aod.rpc.scheduler.v1.budget.get", retry_safe: true;
    /// Changes a budget.
    SetBudget: scheduler::SetBudgetRequest => scheduler::Budget, "aod.rpc.scheduler.v1.budget.set", retry_safe: true;
    /// Removes a budget's own limits and resets its counts.
    ClearBudget: scheduler::GetBudgetRequest => scheduler::Budget, "aod.rpc.scheduler.v1.budget.clear", retry_safe: true;
    /// Adds up model requests.
    ListUsage: scheduler::ListUsageRequest => scheduler::ListUsageReply, "aod.rpc.scheduler.v1.usage.list", retry_safe: true;
    /// Returns what is needed to delete a session's Sprite. For runners.
    ClaimSprite: scheduler::ClaimSpriteRequest => scheduler::SpriteClaim, "aod.rpc.scheduler.v1.sprite.claim", retry_safe: true;
    /// Returns what is needed to search an account for orphaned Sprites. For runners.
    ClaimSweep: scheduler::ClaimSweepRequest => scheduler::ClaimSweepReply, "aod.rpc.scheduler.v1.sprite.claim_sweep", retry_safe: true;
    /// Returns which of these Sprites belong to no session. For runners.
    FindOrphans: scheduler::FindOrphansRequest => scheduler::FindOrphansReply, "aod.rpc.scheduler.v1.sprite.find_orphans", retry_safe: true;
    /// Reports that a Sprite was deleted. For runners.
    SpriteDestroyed: scheduler::SpriteDestroyedRequest => common::Empty, "aod.rpc.scheduler.v1.sprite.destroyed", retry_safe: true;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;
    use crate::session::SessionEvent;

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            decode_all(&bytes);
            if let Ok(event) = SessionEvent::decode(bytes.as_slice()) {
                prop_assert_eq!(SessionEvent::decode(event.encode_to_vec().as_slice()).unwrap(), event);
            }
        }

        /// Closer to what is sent: fields with texts and numbers, in any order and number.
        #[test]
        fn any_fields_are_a_message_or_an_error(fields in proptest::collection::vec((1_u8..20, "\\PC{0,20}", any::<u64>()), 0..20)) {
            let mut bytes = Vec::new();
            for (number, text, varint) in fields {
                bytes.extend([number << 3 | 2, text.len() as u8]);
                bytes.extend_from_slice(text.as_bytes());
                bytes.push(number << 3);
                prost::encoding::encode_varint(varint, &mut bytes);
            }
            decode_all(&bytes);
        }
    }
}
