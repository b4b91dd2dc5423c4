//! Types that all crates share: ids, states, codes, limits and the rules of the domain.
//!
//! Pure by rule: no I/O, no async, and no dependency on any other crate of ours.

pub mod address;
pub mod agent;
pub mod backoff;
pub mod credential;
pub mod environment;
pub mod error;
pub mod file;
pub mod id;
pub mod input;
pub mod limits;
pub mod model;
pub mod partition;
pub mod permissions;
pub mod repository;
pub mod route;
pub mod session;
pub mod skill;
pub mod sprite_name;
pub mod timestamp;
pub mod token;
pub mod vault;

pub use agent::{McpServer, Skill};
pub use backoff::{Backoff, random_fraction};
pub use credential::CredentialKind;
pub use environment::{Networking, PackageManager};
pub use error::ErrorCode;
pub use id::{
    AgentId, EnvironmentId, FileId, InputId, KeyId, LeaseId, SecretId, SessionId, UserId,
    VaultCredentialId, VaultId,
};
pub use input::{InputKind, InputStatus, RequestStatus, Verdict, WhenBusy};
pub use model::{ModelRef, Provider, Runtime};
pub use partition::Partition;
pub use permissions::{Evaluation, Permissions};
pub use repository::Repository;
pub use session::{SessionStatus, Stage, StageState, TurnStatus};
pub use sprite_name::SpriteName;
pub use timestamp::Timestamp;
pub use token::{ApiKey, ConsoleToken, KeyHash, MalformedKey};
