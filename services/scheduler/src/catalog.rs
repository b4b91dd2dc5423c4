//! Resources that sessions are made from: agents, environments, files, and vaults with their
//! credentials.

pub mod agents;
pub mod environments;
pub mod files;
pub mod vault_credentials;
pub mod vaults;
