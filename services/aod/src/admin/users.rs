//! Users and their quotas.

use clap::Subcommand;
use contract::{
    auth::{CreateUserRequest, ListUsersRequest, SetQuotaRequest, SetUserActiveRequest, User},
    rpc,
};
use serde_json::{Value, json};

use crate::{
    admin::operator::{AdminError, Operator, time},
    output::Table,
};

#[derive(Debug, Subcommand)]
pub enum Users {
    /// Create a user
    Create {
        /// Name of the user
        name: String,
    },
    /// List users
    List,
    /// Disable a user: none of its keys work until it is enabled again
    Disable {
        /// Name of the user
        name: String,
    },
    /// Enable a disabled user
    Enable {
        /// Name of the user
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum Quotas {
    /// Set the limit of a user
    Set {
        /// Name of the user
        user: String,
        /// A number from 1, or `default`
        limit: Limit,
    },
}

#[derive(Clone, Debug)]
pub struct Limit(Option<u32>);

impl std::str::FromStr for Limit {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "default" => Ok(Self(None)),
            text => text
                .parse()
                .ok()
                .filter(|limit| *limit > 0)
                .map(|limit| Self(Some(limit)))
                .ok_or("a number from 1, or `default`"),
        }
    }
}

impl Operator {
    pub(super) async fn users(&self, command: Users) -> Result<(), AdminError> {
        const USERS: Table = Table(&["name", "id", "is_active", "session_limit", "created_at"]);
        match command {
            Users::Create { name } => {
                self.output.one(&describe_user(
                    &self.call::<rpc::CreateUser>(&CreateUserRequest { name }).await?,
                ));
            }
            Users::List => {
                let (mut users, mut request) = (Vec::new(), ListUsersRequest::default());
                loop {
                    let page = self.call::<rpc::ListUsers>(&request).await?;
                    request.after_name =
                        page.users.last().map(|user| user.name.clone()).unwrap_or_default();
                    users.extend(page.users);
                    if !page.has_more {
                        break;
                    }
                }
                self.output.list(&users.iter().map(describe_user).collect::<Vec<_>>(), USERS);
            }
            Users::Disable { name } => self.set_active(name, false).await?,
            Users::Enable { name } => self.set_active(name, true).await?,
        }
        Ok(())
    }

    pub(super) async fn quotas(&self, command: Quotas) -> Result<(), AdminError> {
        let Quotas::Set { user, limit } = command;
        let user_id = self.user(user).await?;
        let user = self
            .call::<rpc::SetQuota>(&SetQuotaRequest { user_id, session_limit: limit.0 })
            .await?;
        self.output.one(&describe_user(&user));
        Ok(())
    }

    async fn set_active(&self, name: String, is_active: bool) -> Result<(), AdminError> {
        let user_id = self.user(name).await?;
        let user =
            self.call::<rpc::SetUserActive>(&SetUserActiveRequest { user_id, is_active }).await?;
        self.output.one(&describe_user(&user));
        Ok(())
    }
}

fn describe_user(user: &User) -> Value {
    json!({
        "name": user.name,
        "id": user.user_id,
        "is_active": user.is_active,
        "session_limit": user.session_limit,
        "created_at": time(user.created_at_us),
    })
}
