//! Requests between services: which message goes where, and what comes back.

use crate::{auth, common, scheduler, vault};

/// A request that one service serves and others call.
pub trait Rpc {
    type Request: prost::Message + Default + Send;
    type Reply: prost::Message + Default + Send;
    const SUBJECT: &'static str;
    /// Doing it twice is the same as doing it once: the caller may try again when no answer came.
    const IDEMPOTENT: bool;
}

/// A request, for those who describe the bus.
#[derive(Debug)]
pub struct RpcInfo {
    pub name: &'static str,
    pub subject: &'static str,
    /// `module::Message`, as in this crate.
    pub request: &'static str,
    pub reply: &'static str,
    pub idempotent: bool,
    pub meaning: &'static str,
}

macro_rules! rpcs {
    ($($(#[doc = $doc:literal])* $name:ident: $request:ty => $reply:ty, $subject:literal, idempotent: $idempotent:literal;)*) => {
        $(
            $(#[doc = $doc])*
            #[derive(Debug)]
            pub struct $name;

            impl Rpc for $name {
                type Request = $request;
                type Reply = $reply;
                const SUBJECT: &'static str = $subject;
                const IDEMPOTENT: bool = $idempotent;
            }
        )*

        /// Reads bytes as every message of every request.
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
            idempotent: $idempotent,
            meaning: concat!($($doc),*),
        }),*];
    };
}

rpcs! {
    /// Answers when auth can query its tables.
    AuthHealth: common::Empty => common::Empty, "aod.rpc.auth.v1.health.check", idempotent: true;
    /// Finds the user of an API key, or of a console session, by its hash.
    VerifyKey: auth::VerifyKeyRequest => auth::VerifyKeyReply, "aod.rpc.auth.v1.key.verify", idempotent: true;
    /// Signs a browser in with an API key.
    CreateConsoleSession: auth::CreateConsoleSessionRequest => auth::ConsoleSession, "aod.rpc.auth.v1.console.create", idempotent: true;
    /// Returns whose a console session is, and when it expires.
    FindConsoleSession: auth::FindConsoleSessionRequest => auth::ConsoleSession, "aod.rpc.auth.v1.console.find", idempotent: true;
    /// Ends a console session.
    EndConsoleSession: auth::EndConsoleSessionRequest => common::Empty, "aod.rpc.auth.v1.console.end", idempotent: true;
    /// Creates an API key of a user.
    CreateKey: auth::CreateKeyRequest => auth::Key, "aod.rpc.auth.v1.key.create", idempotent: true;
    /// Lists the API keys of a user, newest first.
    ListKeys: auth::ListKeysRequest => auth::ListKeysReply, "aod.rpc.auth.v1.key.list", idempotent: true;
    /// Deactivates an API key.
    DeactivateKey: auth::DeactivateKeyRequest => auth::Key, "aod.rpc.auth.v1.key.deactivate", idempotent: true;
    /// Finds a user by name. For operators.
    FindUser: auth::FindUserRequest => auth::User, "aod.rpc.auth.v1.user.find", idempotent: true;
    /// Creates a user. For operators.
    CreateUser: auth::CreateUserRequest => auth::User, "aod.rpc.auth.v1.user.create", idempotent: false;
    /// Lists users. For operators.
    ListUsers: auth::ListUsersRequest => auth::ListUsersReply, "aod.rpc.auth.v1.user.list", idempotent: true;
    /// Enables or disables a user. For operators.
    SetUserActive: auth::SetUserActiveRequest => auth::User, "aod.rpc.auth.v1.user.set_active", idempotent: true;
    /// Returns whether a user may go on using the deployment. For the model gateway.
    CheckUser: auth::CheckUserRequest => auth::CheckUserReply, "aod.rpc.auth.v1.user.check", idempotent: true;
    /// Sets how many sessions of a user may be active at once. For operators.
    SetQuota: auth::SetQuotaRequest => auth::User, "aod.rpc.auth.v1.quota.set", idempotent: true;
    /// Creates the first user and key; fails if any user exists. For operators.
    Bootstrap: auth::BootstrapRequest => auth::Key, "aod.rpc.auth.v1.user.bootstrap", idempotent: false;
    /// Finds the user of a name, or creates it. For operators.
    EnsureUser: auth::EnsureUserRequest => auth::User, "aod.rpc.auth.v1.user.ensure", idempotent: true;

    /// Answers after a real encryption and decryption.
    VaultHealth: common::Empty => common::Empty, "aod.rpc.vault.v1.health.check", idempotent: true;
    /// Returns the public key that secrets are sealed to on their way to the vault.
    SealingKey: common::Empty => vault::SealingKeyReply, "aod.rpc.vault.v1.sealing.key", idempotent: true;
    /// Stores a credential of a user, encrypted.
    PutCredential: vault::PutCredentialRequest => vault::Credential, "aod.rpc.vault.v1.credential.put", idempotent: true;
    /// Lists the credentials of a user, without their values.
    ListCredentials: vault::ListCredentialsRequest => vault::ListCredentialsReply, "aod.rpc.vault.v1.credential.list", idempotent: true;
    /// Deletes a credential of a user.
    DeleteCredential: vault::DeleteCredentialRequest => common::Empty, "aod.rpc.vault.v1.credential.delete", idempotent: false;
    /// Stores the secret values of an agent, environment or session, encrypted.
    PutSecret: vault::PutSecretRequest => vault::PutSecretReply, "aod.rpc.vault.v1.secret.put", idempotent: true;
    /// Deletes stored secret values.
    DeleteSecrets: vault::DeleteSecretsRequest => common::Empty, "aod.rpc.vault.v1.secret.delete", idempotent: true;
    /// Returns one user of each Sprites account of the given users. For the scheduler.
    FindAccounts: vault::FindAccountsRequest => vault::FindAccountsReply, "aod.rpc.vault.v1.account.find", idempotent: true;
    /// Grants a runner the secrets of a session for a limited time. For the scheduler.
    MintLease: vault::MintLeaseRequest => vault::MintLeaseReply, "aod.rpc.vault.v1.lease.mint", idempotent: true;
    /// Returns the secrets of a lease, encrypted to a one-time key. For runners.
    RedeemLease: vault::RedeemLeaseRequest => vault::RedeemLeaseReply, "aod.rpc.vault.v1.lease.redeem", idempotent: true;
    /// Revokes the leases of a session.
    RevokeLeases: vault::RevokeLeasesRequest => common::Empty, "aod.rpc.vault.v1.lease.revoke", idempotent: true;
    /// Returns the credentials for models of a session's token, encrypted to a one-time key. For the model gateway.
    RedeemModelToken: vault::RedeemModelTokenRequest => vault::RedeemModelTokenReply, "aod.rpc.vault.v1.model_token.redeem", idempotent: true;
    /// Revokes the tokens for the model gateway of sessions that ended.
    RevokeModelTokens: vault::RevokeModelTokensRequest => common::Empty, "aod.rpc.vault.v1.model_token.revoke", idempotent: true;
    /// Re-wraps one batch of secrets with the newest key-encryption key. For operators.
    RotateKeys: vault::RotateKeysRequest => vault::RotateKeysReply, "aod.rpc.vault.v1.key.rotate", idempotent: true;
    /// Returns which key-encryption keys are in use. For operators.
    KeyStatus: common::Empty => vault::KeyStatusReply, "aod.rpc.vault.v1.key.status", idempotent: true;
    /// Lists which runner redeemed which leases. For operators.
    ListRedemptions: vault::ListRedemptionsRequest => vault::ListRedemptionsReply, "aod.rpc.vault.v1.audit.list", idempotent: true;

    /// Answers when the scheduler can query its tables.
    SchedulerHealth: common::Empty => common::Empty, "aod.rpc.scheduler.v1.health.check", idempotent: true;
    /// Creates an agent.
    CreateAgent: scheduler::CreateAgentRequest => scheduler::CreateAgentReply, "aod.rpc.scheduler.v1.agent.create", idempotent: true;
    /// Returns an agent.
    GetAgent: scheduler::GetAgentRequest => scheduler::Agent, "aod.rpc.scheduler.v1.agent.get", idempotent: true;
    /// Changes an agent: a new version, unless nothing changed.
    UpdateAgent: scheduler::UpdateAgentRequest => scheduler::Agent, "aod.rpc.scheduler.v1.agent.update", idempotent: false;
    /// Archives an agent.
    ArchiveAgent: scheduler::GetAgentRequest => scheduler::Agent, "aod.rpc.scheduler.v1.agent.archive", idempotent: false;
    /// Lists the versions of an agent, newest first.
    ListAgentVersions: scheduler::ListPartsRequest => scheduler::ListAgentsReply, "aod.rpc.scheduler.v1.agent.versions", idempotent: true;
    /// Lists the agents of a user that are not archived.
    ListAgents: scheduler::ListRequest => scheduler::ListAgentsReply, "aod.rpc.scheduler.v1.agent.list", idempotent: true;
    /// Creates an environment.
    CreateEnvironment: scheduler::CreateEnvironmentRequest => scheduler::CreateEnvironmentReply, "aod.rpc.scheduler.v1.environment.create", idempotent: true;
    /// Returns an environment.
    GetEnvironment: scheduler::GetEnvironmentRequest => scheduler::Environment, "aod.rpc.scheduler.v1.environment.get", idempotent: true;
    /// Changes an environment: a new version, unless nothing changed.
    UpdateEnvironment: scheduler::UpdateEnvironmentRequest => scheduler::Environment, "aod.rpc.scheduler.v1.environment.update", idempotent: false;
    /// Archives an environment.
    ArchiveEnvironment: scheduler::GetEnvironmentRequest => scheduler::Environment, "aod.rpc.scheduler.v1.environment.archive", idempotent: false;
    /// Deletes an environment that no session uses.
    DeleteEnvironment: scheduler::GetEnvironmentRequest => common::Empty, "aod.rpc.scheduler.v1.environment.delete", idempotent: false;
    /// Lists the versions of an environment, newest first.
    ListEnvironmentVersions: scheduler::ListPartsRequest => scheduler::ListEnvironmentsReply, "aod.rpc.scheduler.v1.environment.versions", idempotent: true;
    /// Lists the environments of a user that are not archived.
    ListEnvironments: scheduler::ListRequest => scheduler::ListEnvironmentsReply, "aod.rpc.scheduler.v1.environment.list", idempotent: true;
    /// Creates a session with its first turn.
    CreateSession: scheduler::CreateSessionRequest => scheduler::CreateSessionReply, "aod.rpc.scheduler.v1.session.create", idempotent: true;
    /// Returns a session.
    GetSession: scheduler::GetSessionRequest => scheduler::Session, "aod.rpc.scheduler.v1.session.get", idempotent: true;
    /// Lists the sessions of a user.
    ListSessions: scheduler::ListRequest => scheduler::ListSessionsReply, "aod.rpc.scheduler.v1.session.list", idempotent: true;
    /// Lists the turns of a session.
    ListTurns: scheduler::ListPartsRequest => scheduler::ListTurnsReply, "aod.rpc.scheduler.v1.session.turns", idempotent: true;
    /// Starts the next turn of a session.
    Prompt: scheduler::PromptRequest => scheduler::CreateSessionReply, "aod.rpc.scheduler.v1.session.prompt", idempotent: true;
    /// Sends events to a session, all or none.
    SendEvents: scheduler::SendEventsRequest => scheduler::SendEventsReply, "aod.rpc.scheduler.v1.session.send", idempotent: true;
    /// Returns where in a session's log a turn begins, and what was used before it.
    FindTurn: scheduler::FindTurnRequest => scheduler::FindTurnReply, "aod.rpc.scheduler.v1.session.find_turn", idempotent: true;
    /// The inputs of a session, newest first.
    ListInputs: scheduler::ListPartsRequest => scheduler::ListInputsReply, "aod.rpc.scheduler.v1.session.inputs", idempotent: true;
    /// The inputs of a session of which its log does not say yet what became of them, oldest first.
    ListOpenInputs: scheduler::ListPartsRequest => scheduler::ListInputsReply, "aod.rpc.scheduler.v1.session.open_inputs", idempotent: true;
    /// Changes the text of a queued message.
    ChangeInput: scheduler::ChangeInputRequest => scheduler::Input, "aod.rpc.scheduler.v1.session.change_input", idempotent: true;
    /// Withdraws a queued message.
    WithdrawInput: scheduler::WithdrawInputRequest => scheduler::Input, "aod.rpc.scheduler.v1.session.withdraw_input", idempotent: false;
    /// Interrupts the running turn; the session continues.
    Interrupt: scheduler::InterruptRequest => scheduler::Input, "aod.rpc.scheduler.v1.session.interrupt", idempotent: true;
    /// The permission requests of a session, newest first.
    ListPermissionRequests: scheduler::ListPermissionRequestsRequest => scheduler::ListPermissionRequestsReply, "aod.rpc.scheduler.v1.session.requests", idempotent: true;
    /// Answers a permission request, once.
    Decide: scheduler::DecideRequest => scheduler::PermissionRequest, "aod.rpc.scheduler.v1.session.decide", idempotent: false;
    /// Changes the title, the metadata or the agent of a session.
    UpdateSession: scheduler::UpdateSessionRequest => scheduler::Session, "aod.rpc.scheduler.v1.session.update", idempotent: true;
    /// Archives a session that is idle, which terminates it.
    ArchiveSession: scheduler::ArchiveSessionRequest => scheduler::Session, "aod.rpc.scheduler.v1.session.archive", idempotent: true;
    /// Terminates a session.
    Terminate: scheduler::TerminateRequest => scheduler::Session, "aod.rpc.scheduler.v1.session.terminate", idempotent: false;
    /// Deletes a session.
    DeleteSession: scheduler::DeleteSessionRequest => common::Empty, "aod.rpc.scheduler.v1.session.delete", idempotent: false;
    /// Returns a page of a session's event log.
    ReadEvents: scheduler::ReadEventsRequest => scheduler::ReadEventsReply, "aod.rpc.scheduler.v1.session.events", idempotent: true;
    /// Creates a vault.
    CreateVault: scheduler::CreateVaultRequest => scheduler::Vault, "aod.rpc.scheduler.v1.vault.create", idempotent: true;
    /// Returns a vault.
    GetVault: scheduler::GetVaultRequest => scheduler::Vault, "aod.rpc.scheduler.v1.vault.get", idempotent: true;
    /// Changes the name or the metadata of a vault.
    UpdateVault: scheduler::UpdateVaultRequest => scheduler::Vault, "aod.rpc.scheduler.v1.vault.update", idempotent: true;
    /// Lists the vaults of a user, newest first.
    ListVaults: scheduler::ListRequest => scheduler::ListVaultsReply, "aod.rpc.scheduler.v1.vault.list", idempotent: true;
    /// Archives a vault with its credentials, whose secrets are deleted.
    ArchiveVault: scheduler::GetVaultRequest => scheduler::Vault, "aod.rpc.scheduler.v1.vault.archive", idempotent: true;
    /// Deletes a vault with its credentials.
    DeleteVault: scheduler::GetVaultRequest => common::Empty, "aod.rpc.scheduler.v1.vault.delete", idempotent: false;
    /// Adds a credential to a vault.
    CreateVaultCredential: scheduler::CreateVaultCredentialRequest => scheduler::VaultCredential, "aod.rpc.scheduler.v1.vault_credential.create", idempotent: true;
    /// Returns a credential of a vault, without its secret.
    GetVaultCredential: scheduler::GetVaultCredentialRequest => scheduler::VaultCredential, "aod.rpc.scheduler.v1.vault_credential.get", idempotent: true;
    /// Changes a credential of a vault.
    UpdateVaultCredential: scheduler::UpdateVaultCredentialRequest => scheduler::VaultCredential, "aod.rpc.scheduler.v1.vault_credential.update", idempotent: true;
    /// Lists the credentials of a vault, newest first.
    ListVaultCredentials: scheduler::ListVaultCredentialsRequest => scheduler::ListVaultCredentialsReply, "aod.rpc.scheduler.v1.vault_credential.list", idempotent: true;
    /// Archives a credential, whose secret is deleted.
    ArchiveVaultCredential: scheduler::GetVaultCredentialRequest => scheduler::VaultCredential, "aod.rpc.scheduler.v1.vault_credential.archive", idempotent: true;
    /// Deletes a credential.
    DeleteVaultCredential: scheduler::GetVaultCredentialRequest => common::Empty, "aod.rpc.scheduler.v1.vault_credential.delete", idempotent: false;
    /// Announces a file that is about to be stored.
    CreateFile: scheduler::CreateFileRequest => scheduler::File, "aod.rpc.scheduler.v1.file.create", idempotent: true;
    /// Tells that a file's bytes are stored.
    CommitFile: scheduler::CommitFileRequest => scheduler::File, "aod.rpc.scheduler.v1.file.commit", idempotent: true;
    /// Returns a file's metadata.
    GetFile: scheduler::GetFileRequest => scheduler::File, "aod.rpc.scheduler.v1.file.get", idempotent: true;
    /// Lists the files that a user uploaded, or that a session's agent wrote, newest first.
    ListFiles: scheduler::ListFilesRequest => scheduler::ListFilesReply, "aod.rpc.scheduler.v1.file.list", idempotent: true;
    /// Deletes a file.
    DeleteFile: scheduler::GetFileRequest => common::Empty, "aod.rpc.scheduler.v1.file.delete", idempotent: false;
    /// Gives a session a copy of a file.
    AddSessionFile: scheduler::AddSessionFileRequest => scheduler::File, "aod.rpc.scheduler.v1.session.add_file", idempotent: true;
    /// Returns the secret that a session keeps its variables and tokens in, and gives it one if it has none.
    EnsureSessionSecret: scheduler::EnsureSessionSecretRequest => scheduler::EnsureSessionSecretReply, "aod.rpc.scheduler.v1.session.ensure_secret", idempotent: true;
    /// Takes a file from a session.
    RemoveSessionFile: scheduler::RemoveSessionFileRequest => common::Empty, "aod.rpc.scheduler.v1.session.remove_file", idempotent: false;
    /// Announces a file that an agent wrote. For runners.
    BeginOutput: scheduler::BeginOutputRequest => scheduler::File, "aod.rpc.scheduler.v1.turn.begin_output", idempotent: true;
    /// Tells that the bytes of a file that an agent wrote are stored. For runners.
    CommitOutput: scheduler::CommitOutputRequest => common::Empty, "aod.rpc.scheduler.v1.turn.commit_output", idempotent: true;
    /// Makes a runner the owner of a turn, raises the turn's epoch, and returns what is needed to run it. For runners.
    ClaimTurn: scheduler::ClaimTurnRequest => scheduler::ClaimTurnReply, "aod.rpc.scheduler.v1.turn.claim", idempotent: true;
    /// Releases a turn, with the reason where an attempt failed. For runners.
    ReleaseTurn: scheduler::ReleaseTurnRequest => common::Empty, "aod.rpc.scheduler.v1.turn.hand_back", idempotent: true;
    /// Extends a runner's lease and compares the turns it holds with those it owns. For runners.
    Heartbeat: scheduler::HeartbeatRequest => scheduler::HeartbeatReply, "aod.rpc.scheduler.v1.turn.heartbeat", idempotent: true;
    /// The inputs that wait for a turn. For its runner.
    FetchInputs: scheduler::FetchInputsRequest => scheduler::FetchInputsReply, "aod.rpc.scheduler.v1.turn.inputs", idempotent: true;
    /// What the model gateway recorded of a session and is not in its log. For the runner of its turn.
    FetchModelRequests: scheduler::FetchModelRequestsRequest => scheduler::FetchModelRequestsReply, "aod.rpc.scheduler.v1.turn.model_requests", idempotent: true;
    /// Checks a model request against budgets and policies, and reserves what it may use. For the model gateway.
    BeginModelRequest: scheduler::BeginModelRequestRequest => scheduler::BeginModelRequestReply, "aod.rpc.scheduler.v1.model_request.begin", idempotent: true;
    /// Settles a model request with what it used. For the model gateway.
    EndModelRequest: scheduler::EndModelRequestRequest => common::Empty, "aod.rpc.scheduler.v1.model_request.end", idempotent: true;
    /// Extends the lease of a model gateway, on which its requests depend.
    RenewModelGateway: scheduler::RenewModelGatewayRequest => common::Empty, "aod.rpc.scheduler.v1.model_request.renew", idempotent: true;
    /// Returns a budget: what is allowed and what is used.
    GetBudget: scheduler::GetBudgetRequest => scheduler::Budget, "aod.rpc.scheduler.v1.budget.get", idempotent: true;
    /// Changes a budget.
    SetBudget: scheduler::SetBudgetRequest => scheduler::Budget, "aod.rpc.scheduler.v1.budget.set", idempotent: true;
    /// Removes a budget's own limits; what was used is forgotten.
    ClearBudget: scheduler::GetBudgetRequest => scheduler::Budget, "aod.rpc.scheduler.v1.budget.clear", idempotent: true;
    /// Adds up model requests.
    ListUsage: scheduler::ListUsageRequest => scheduler::ListUsageReply, "aod.rpc.scheduler.v1.usage.list", idempotent: true;
    /// Returns what is needed to delete a session's Sprite. For runners.
    ClaimSprite: scheduler::ClaimSpriteRequest => scheduler::SpriteClaim, "aod.rpc.scheduler.v1.sprite.claim", idempotent: true;
    /// Returns what is needed to search an account for orphaned Sprites. For runners.
    ClaimSweep: scheduler::ClaimSweepRequest => scheduler::ClaimSweepReply, "aod.rpc.scheduler.v1.sprite.claim_sweep", idempotent: true;
    /// Returns which of these Sprites belong to no session. For runners.
    FindOrphans: scheduler::FindOrphansRequest => scheduler::FindOrphansReply, "aod.rpc.scheduler.v1.sprite.find_orphans", idempotent: true;
    /// Reports that a Sprite was deleted. For runners.
    SpriteDestroyed: scheduler::SpriteDestroyedRequest => common::Empty, "aod.rpc.scheduler.v1.sprite.destroyed", idempotent: true;
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
