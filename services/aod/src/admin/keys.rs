//! API keys.

use clap::Subcommand;
use contract::{
    auth::{BootstrapRequest, CreateKeyRequest, DeactivateKeyRequest, Key, ListKeysRequest},
    rpc,
};
use serde_json::{Value, json};
use types::{ApiKey, Timestamp, limits::PAGE_MAX};

use crate::{
    admin::operator::{AdminError, Operator, time},
    output::Table,
};

#[derive(Debug, Subcommand)]
pub enum Keys {
    /// Create a key; it is shown only once
    #[command(after_help = "Example:\n  aod admin key create alice --expires-in-days 90")]
    Create {
        /// Name of the user
        user: String,
        /// What the key is for
        #[arg(long, default_value = "operator")]
        name: String,
        /// Days until the key expires; without this it never does
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        expires_in_days: Option<u32>,
    },
    /// List the keys of a user
    List {
        /// Name of the user
        user: String,
    },
    /// Deactivate a key
    Revoke {
        /// Name of the user
        user: String,
        /// Id of the key
        id: String,
    },
}

impl Operator {
    pub(super) async fn bootstrap(&self, user: String) -> Result<(), AdminError> {
        let key = new_key()?;
        let request = BootstrapRequest {
            user_name: user,
            key_name: "bootstrap".to_owned(),
            key_hash: key.hash().as_bytes().to_vec(),
            prefix: key.display_prefix(),
        };
        let made = self.call::<rpc::Bootstrap>(&request).await?;
        self.show_new_key(&made, &key);
        Ok(())
    }

    pub(super) async fn keys(&self, command: Keys) -> Result<(), AdminError> {
        const KEYS: Table =
            Table(&["id", "name", "prefix", "is_active", "expires_at", "last_used_at"]);
        match command {
            Keys::Create { user, name, expires_in_days } => {
                let user_id = self.user(user).await?;
                let key = new_key()?;
                let expires_at_us = expires_in_days
                    .map(|days| Timestamp::now().unix_micros() + i64::from(days) * 86_400_000_000);
                let request = CreateKeyRequest {
                    user_id,
                    name,
                    key_hash: key.hash().as_bytes().to_vec(),
                    prefix: key.display_prefix(),
                    expires_at_us,
                    ..CreateKeyRequest::default()
                };
                let made = self.call::<rpc::CreateKey>(&request).await?;
                self.show_new_key(&made, &key);
            }
            Keys::List { user } => {
                let user_id = self.user(user).await?;
                let request = ListKeysRequest { user_id, limit: PAGE_MAX, after_key_id: None };
                let keys = self.call::<rpc::ListKeys>(&request).await?.keys;
                self.output.list(&keys.iter().map(describe_key).collect::<Vec<_>>(), KEYS);
            }
            Keys::Revoke { user, id } => {
                let user_id = self.user(user).await?;
                let key = self
                    .call::<rpc::DeactivateKey>(&DeactivateKeyRequest { user_id, key_id: id })
                    .await?;
                self.output.one(&describe_key(&key));
            }
        }
        Ok(())
    }

    fn show_new_key(&self, made: &Key, key: &ApiKey) {
        let mut described = describe_key(made);
        if let Some(object) = described.as_object_mut() {
            object.insert("key".to_owned(), key.reveal().into());
        }
        self.output.one(&described);
    }
}

fn new_key() -> Result<ApiKey, AdminError> {
    ApiKey::generate().map_err(|error| AdminError::Local(format!("no randomness: {error}")))
}

fn describe_key(key: &Key) -> Value {
    json!({
        "id": key.key_id,
        "name": key.name,
        "prefix": key.prefix,
        "is_active": key.is_active,
        "created_at": time(key.created_at_us),
        "expires_at": key.expires_at_us.map(time),
        "last_used_at": key.last_used_at_us.map(time),
    })
}
