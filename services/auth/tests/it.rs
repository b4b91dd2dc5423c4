//! Auth on real Postgres and NATS, called as the operator and the gateway call it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use bus::Bus;
use contract::{
    access,
    auth::{
        BootstrapRequest, CreateKeyRequest, CreateUserRequest, FindUserRequest, ListKeysRequest, ListUsersRequest, SetQuotaRequest,
        SetUserActiveRequest, VerifyKeyRequest,
    },
    rpc,
};
use futures::future::join_all;
use service::Lifecycle;
use testkit::{Database, Nats};
use types::{ApiKey, ErrorCode};

const SOON: Duration = Duration::from_secs(5);

struct Auth {
    _nats: Nats,
    database: Database,
    operator: Bus,
    gateway: Bus,
}

impl Auth {
    async fn start() -> Self {
        let (nats, database) = (Nats::start().unwrap(), Database::create().await.unwrap());
        let config = auth::Config { bus: nats.config(&access::AUTH), store: database.config("auth") };
        auth::run(config, Lifecycle::new()).await.unwrap();
        let (operator, gateway) = (nats.connect(&access::OPERATOR).await.unwrap(), nats.connect(&access::GATEWAY).await.unwrap());
        Self { _nats: nats, database, operator, gateway }
    }

    async fn verify(&self, key: &ApiKey) -> Result<Option<u32>, String> {
        let request = VerifyKeyRequest { key_hash: key.hash().as_bytes().to_vec() };
        let verified = self.gateway.call::<rpc::VerifyKey>(&request, SOON).await;
        verified.map(|reply| reply.session_limit).map_err(|failure| failure.message)
    }
}

fn first_key(name: &str) -> (ApiKey, BootstrapRequest) {
    let key = ApiKey::generate().unwrap();
    let request = BootstrapRequest {
        user_name: name.to_owned(),
        key_name: "bootstrap".to_owned(),
        key_hash: key.hash().as_bytes().to_vec(),
        prefix: key.display_prefix(),
    };
    (key, request)
}

#[tokio::test]
async fn an_empty_deployment_is_bootstrapped_once() {
    let auth = Auth::start().await;
    let tries: Vec<_> = (0..20).map(|n| first_key(&format!("admin-{n}"))).collect();
    let results = join_all(tries.iter().map(|(_, request)| auth.operator.call::<rpc::Bootstrap>(request, SOON))).await;
    let won: Vec<_> = results.iter().zip(&tries).filter(|(result, _)| result.is_ok()).collect();
    assert_eq!(won.len(), 1);
    assert!(auth.verify(&won[0].1.0).await.is_ok());
    let refused = results.iter().find_map(|result| result.as_ref().err()).unwrap();
    assert_eq!(refused.code, ErrorCode::Conflict);
    assert_eq!(auth.operator.call::<rpc::ListUsers>(&ListUsersRequest::default(), SOON).await.unwrap().users.len(), 1);
}

#[tokio::test]
async fn users_are_listed_page_by_page() {
    let auth = Auth::start().await;
    let names = "insert into auth.account (user_id, name, created_at) select gen_random_uuid(), 'user-' || n, now() from generate_series(1, 1500) as n";
    sqlx::query(names).execute(&mut auth.database.admin().await.unwrap()).await.unwrap();
    let first = auth.operator.call::<rpc::ListUsers>(&ListUsersRequest::default(), SOON).await.unwrap();
    assert_eq!((first.users.len(), first.has_more), (1000, true));
    let after_name = first.users.last().unwrap().name.clone();
    let rest = auth.operator.call::<rpc::ListUsers>(&ListUsersRequest { after_name }, SOON).await.unwrap();
    assert_eq!((rest.users.len(), rest.has_more), (500, false));
}

#[tokio::test]
async fn a_users_keys_work_as_long_as_the_user_may() {
    let auth = Auth::start().await;
    let user = auth.operator.call::<rpc::CreateUser>(&CreateUserRequest { name: "é".to_owned() }, SOON).await.unwrap();
    for bad in ["é", "", "a\nb", &"x".repeat(151)] {
        assert!(auth.operator.call::<rpc::CreateUser>(&CreateUserRequest { name: bad.to_owned() }, SOON).await.is_err(), "{bad}");
    }
    let key = ApiKey::generate().unwrap();
    let request = CreateKeyRequest {
        user_id: user.user_id.clone(),
        name: "k".to_owned(),
        key_hash: key.hash().as_bytes().to_vec(),
        prefix: key.display_prefix(),
        expires_at_us: None,
    };
    let created = auth.operator.call::<rpc::CreateKey>(&request, SOON).await.unwrap();
    assert_eq!(auth.verify(&key).await, Ok(None));
    // Asked again, as by a gateway that got no answer: one key. The same key of another user is refused.
    assert_eq!(auth.operator.call::<rpc::CreateKey>(&request, SOON).await.unwrap().key_id, created.key_id);
    let other = auth.operator.call::<rpc::CreateUser>(&CreateUserRequest { name: "other".to_owned() }, SOON).await.unwrap();
    let stolen = CreateKeyRequest { user_id: other.user_id, ..request.clone() };
    assert!(auth.operator.call::<rpc::CreateKey>(&stolen, SOON).await.is_err());
    let quota = |session_limit| SetQuotaRequest { user_id: user.user_id.clone(), session_limit };
    auth.operator.call::<rpc::SetQuota>(&quota(Some(7)), SOON).await.unwrap();
    assert_eq!(auth.verify(&key).await, Ok(Some(7)));
    assert!(auth.operator.call::<rpc::SetQuota>(&quota(Some(0)), SOON).await.is_err());
    auth.operator.call::<rpc::SetQuota>(&quota(None), SOON).await.unwrap();
    assert_eq!(auth.verify(&key).await, Ok(None));
    for (is_active, expected) in [(false, Err("API key is inactive".to_owned())), (true, Ok(None))] {
        let request = SetUserActiveRequest { user_id: user.user_id.clone(), is_active };
        auth.operator.call::<rpc::SetUserActive>(&request, SOON).await.unwrap();
        assert_eq!(auth.verify(&key).await, expected);
    }
    // The gateway, which the world can reach, cannot make users or raise quotas.
    let gateway = auth.gateway.call::<rpc::FindUser>(&FindUserRequest { name: "é".to_owned() }, Duration::from_millis(500)).await;
    assert_eq!(gateway.unwrap_err().code, ErrorCode::DeadlineExceeded);
    let list = ListKeysRequest { user_id: user.user_id.clone(), limit: 10, after_key_id: None };
    assert!(auth.gateway.call::<rpc::ListKeys>(&list, SOON).await.unwrap().keys[0].last_used_at_us.is_some());
}
