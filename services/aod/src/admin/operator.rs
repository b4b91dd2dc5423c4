//! The operator's connection to the bus.

use std::{path::PathBuf, time::Duration};

use bus::{Bus, RpcError};
use contract::{
    access,
    auth::FindUserRequest,
    rpc::{self, Rpc},
};
use secrecy::SecretString;
use types::Timestamp;

use crate::output::Output;

/// Why a command failed, as the command prints it.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("{0}")]
    Local(String),
    #[error(transparent)]
    Connect(#[from] bus::ConnectError),
    #[error("{}", .0.message)]
    Refused(#[from] RpcError),
}

pub const DEADLINE: Duration = Duration::from_secs(10);

/// The bus, as its user `operator`.
pub fn operator_config(
    url: String,
    password: SecretString,
    ca_file: Option<PathBuf>,
) -> bus::Config {
    bus::Config {
        url,
        user: access::OPERATOR.user,
        password,
        ca_file,
        name: format!("aod-admin/{}", std::process::id()),
    }
}

pub struct Operator {
    pub bus: Bus,
    pub output: Output,
}

impl Operator {
    pub async fn call<R: Rpc>(&self, request: &R::Request) -> Result<R::Reply, AdminError> {
        Ok(self.bus.call::<R>(request, DEADLINE).await?)
    }

    pub async fn user(&self, name: String) -> Result<String, AdminError> {
        Ok(self.call::<rpc::FindUser>(&FindUserRequest { name }).await?.user_id)
    }
}

pub fn time(micros: i64) -> String {
    Timestamp::from_unix_micros(micros).to_string()
}
