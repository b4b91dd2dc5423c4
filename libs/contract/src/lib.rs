//! The bus contract. Messages, subjects, streams, consumers, headers and permissions are declared
//! here and nowhere else.
//!
//! A subject reads `aod.<class>.<owner>.v<N>.<noun>.<verb>[.<key>]`, and its class says what may be
//! lost:
//!
//! | class | carried by | may be lost |
//! | --- | --- | --- |
//! | `rpc` | request/reply with a deadline | the caller learns of it |
//! | `cmd` | stream JOBS, a work queue | never |
//! | `log` | stream EVENTS, one subject per session | never |
//! | `evt` | stream LIFECYCLE | never |
//! | `hint` | core NATS | always: costs latency alone |
//! | `dlq` | stream DLQ | never |

pub mod access;
pub mod header;
pub mod rpc;
pub mod subject;
pub mod topology;

/// Generated messages, in the packages of their `.proto` files.
pub mod proto {
    #![allow(clippy::all, clippy::allow_attributes, reason = "generated code keeps its own style")]

    pub mod aod {
        pub mod auth {
            pub mod v1 {
                include!("gen/aod.auth.v1.rs");
            }
        }
        pub mod common {
            pub mod v1 {
                include!("gen/aod.common.v1.rs");
            }
        }
        pub mod host {
            pub mod v1 {
                include!("gen/aod.host.v1.rs");
            }
        }
        pub mod runner {
            pub mod v1 {
                include!("gen/aod.runner.v1.rs");
            }
        }
        pub mod scheduler {
            pub mod v1 {
                include!("gen/aod.scheduler.v1.rs");
            }
        }
        pub mod session {
            pub mod v1 {
                include!("gen/aod.session.v1.rs");
            }
        }
        pub mod vault {
            pub mod v1 {
                include!("gen/aod.vault.v1.rs");
            }
        }
    }
}

pub use proto::aod::{
    auth::v1 as auth, common::v1 as common, host::v1 as host, runner::v1 as runner,
    scheduler::v1 as scheduler, session::v1 as session, vault::v1 as vault,
};

/// Values of variables may be secrets.
impl std::fmt::Debug for host::Variable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Variable").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Values of headers are secrets.
impl std::fmt::Debug for vault::RouteHeader {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("RouteHeader").field("name", &self.name).finish_non_exhaustive()
    }
}
