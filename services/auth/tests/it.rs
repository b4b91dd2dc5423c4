//! Auth on real Postgres and NATS, called as the operator and the gateway call it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use bus::Bus;
use contract::{
    access,
    auth::{
        BootstrapRequest, CreateConsoleSessionRequest, CreateKeyRequest, CreateUserRequest,
        DeactivateKeyRequest, EndConsoleSessionRequest, FindUserRequest, ListKeysRequest,
        ListUsersRequest, SetQuotaRequest, SetUserActiveRequest, VerifyKeyRequest,
    },
    rpc,
};
use futures::future::join_all;
use service::Lifecycle;
use testkit::{Database, Nats};
use types::{ApiKey, ConsoleToken, ErrorCode};

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
        let config =
            auth::Config { bus: nats.config(&access::AUTH), store: database.config("auth") };
        auth::run(config, Lifecycle::new()).await.unwrap();
        let (operator, gateway) = (
            nats.connect(&access::OPERATOR).await.unwrap(),
            nats.connect(&access::GATEWAY).await.unwrap(),
        );
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
    let results = join_all(
        tries.iter().map(|(_, request)| auth.operator.call::<rpc::Bootstrap>(request, SOON)),
    )
    .await;
    let won: Vec<_> = results.iter().zip(&tries).filter(|(result, _)| result.is_ok()).collect();
    assert_eq!(won.len(), 1);
    assert!(auth.verify(&won[0].1.0).await.is_ok());
    let refused = results.iter().find_map(|result| result.as_ref().err()).unwrap();
    assert_eq!(refused.code, ErrorCode::Conflict);
    assert_eq!(
        auth.operator
            .call::<rpc::ListUsers>(&ListUsersRequest::default(), SOON)
            .await
            .unwrap()
            .users
            .len(),
        1
    );
}

#[tokio::test]
async fn users_are_listed_page_by_page() {
    let auth = Auth::start().await;
    let names = "insert into auth.account (user_id, name, created_at) select gen_random_uuid(), 'user-' || n, now() from generate_series(1, 1500) as n";
    sqlx::query(names).execute(&mut auth.database.admin().await.unwrap()).await.unwrap();
    let first =
        auth.operator.call::<rpc::ListUsers>(&ListUsersRequest::default(), SOON).await.unwrap();
    assert_eq!((first.users.len(), first.has_more), (1000, true));
    let after_name = first.users.last().unwrap().name.clone();
    let rest =
        auth.operator.call::<rpc::ListUsers>(&ListUsersRequest { after_name }, SOON).await.unwrap();
    assert_eq!((rest.users.len(), rest.has_more), (500, false));
}

#[tokio::test]
async fn a_users_keys_work_as_long_as_the_user_may() {
    let auth = Auth::start().await;
    let user = auth
        .operator
        .call::<rpc::CreateUser>(&CreateUserRequest { name: "é".to_owned() }, SOON)
        .await
        .unwrap();
    for bad in ["é", "", "a\nb", &"x".repeat(151)] {
        assert!(
            auth.operator
                .call::<rpc::CreateUser>(&CreateUserRequest { name: bad.to_owned() }, SOON)
                .await
                .is_err(),
            "{bad}"
        );
    }
    let key = ApiKey::generate().unwrap();
    let request = CreateKeyRequest {
        user_id: user.user_id.clone(),
        name: "k".to_owned(),
        key_hash: key.hash().as_bytes().to_vec(),
        prefix: key.display_prefix(),
        expires_at_us: None,
        ..CreateKeyRequest::default()
    };
    let created = auth.operator.call::<rpc::CreateKey>(&request, SOON).await.unwrap();
    assert_eq!(auth.verify(&key).await, Ok(None));
    // Asked again, as by a gateway that got no answer: one key. The same key of another user is
    // refused.
    assert_eq!(
        auth.operator.call::<rpc::CreateKey>(&request, SOON).await.unwrap().key_id,
        created.key_id
    );
    let other = auth
        .operator
        .call::<rpc::CreateUser>(&CreateUserRequest { name: "other".to_owned() }, SOON)
        .await
        .unwrap();
    let stolen = CreateKeyRequest { user_id: other.user_id, ..request.clone() };
    assert!(auth.operator.call::<rpc::CreateKey>(&stolen, SOON).await.is_err());
    let quota = |session_limit| SetQuotaRequest { user_id: user.user_id.clone(), session_limit };
    auth.operator.call::<rpc::SetQuota>(&quota(Some(7)), SOON).await.unwrap();
    assert_eq!(auth.verify(&key).await, Ok(Some(7)));
    assert!(auth.operator.call::<rpc::SetQuota>(&quota(Some(0)), SOON).await.is_err());
    auth.operator.call::<rpc::SetQuota>(&quota(None), SOON).await.unwrap();
    assert_eq!(auth.verify(&key).await, Ok(None));
    for (is_active, expected) in [(false, Err("API key is inactive".to_owned())), (true, Ok(None))]
    {
        let request = SetUserActiveRequest { user_id: user.user_id.clone(), is_active };
        auth.operator.call::<rpc::SetUserActive>(&request, SOON).await.unwrap();
        assert_eq!(auth.verify(&key).await, expected);
    }
    // The gateway, which the world can reach, cannot make users or raise quotas.
    let gateway = auth
        .gateway
        .call::<rpc::FindUser>(
            &FindUserRequest { name: "é".to_owned() },
            Duration::from_millis(500),
        )
        .await;
    assert_eq!(gateway.unwrap_err().code, ErrorCode::DeadlineExceeded);
    let list = ListKeysRequest { user_id: user.user_id.clone(), limit: 10, after_key_id: None };
    assert!(
        auth.gateway.call::<rpc::ListKeys>(&list, SOON).await.unwrap().keys[0]
            .last_used_at_us
            .is_some()
    );
}

#[tokio::test]
async fn a_console_session_works_until_it_ends_expires_or_its_key_does() {
    let auth = Auth::start().await;
    let (key, bootstrap) = first_key("ada");
    let key_id = auth.operator.call::<rpc::Bootstrap>(&bootstrap, SOON).await.unwrap().key_id;
    let sign_in = async |key_hash: Vec<u8>, expires_in_seconds: u32| {
        let token = ConsoleToken::generate().unwrap();
        let request = CreateConsoleSessionRequest {
            key_hash,
            token_hash: token.hash().as_bytes().to_vec(),
            expires_in_seconds,
        };
        auth.gateway
            .call::<rpc::CreateConsoleSession>(&request, SOON)
            .await
            .map(|session| (token, session))
    };
    let verify = async |token: &ConsoleToken| {
        let request = VerifyKeyRequest { key_hash: token.hash().as_bytes().to_vec() };
        auth.gateway
            .call::<rpc::VerifyKey>(&request, SOON)
            .await
            .map(|reply| reply.key_id)
            .map_err(|failure| failure.message)
    };
    let key_hash = key.hash().as_bytes().to_vec();
    let (first, session) = sign_in(key_hash.clone(), 3600).await.unwrap();
    assert_eq!((session.user_name.as_str(), session.key_prefix), ("ada", key.display_prefix()));
    let (second, _) = sign_in(key_hash.clone(), 3600).await.unwrap();
    assert_eq!(verify(&first).await, Ok(key_id.clone()));

    // A console session does not sign another one in, and an unknown key none.
    for other in [first.hash(), ApiKey::generate().unwrap().hash()] {
        assert_eq!(
            sign_in(other.as_bytes().to_vec(), 3600).await.unwrap_err().code,
            ErrorCode::Unauthenticated
        );
    }
    let end = EndConsoleSessionRequest { token_hash: first.hash().as_bytes().to_vec() };
    for _ in 0..2 {
        auth.gateway.call::<rpc::EndConsoleSession>(&end, SOON).await.unwrap();
    }
    assert_eq!(verify(&first).await, Err("Invalid API key".to_owned()));
    assert_eq!(verify(&second).await, Ok(key_id.clone()));

    let (short, _) = sign_in(key_hash, 1).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(verify(&short).await, Err("Console session has expired".to_owned()));

    let user_id = auth
        .gateway
        .call::<rpc::VerifyKey>(
            &VerifyKeyRequest { key_hash: key.hash().as_bytes().to_vec() },
            SOON,
        )
        .await
        .unwrap()
        .user_id;
    auth.gateway
        .call::<rpc::DeactivateKey>(&DeactivateKeyRequest { user_id, key_id }, SOON)
        .await
        .unwrap();
    assert_eq!(verify(&second).await, Err("API key is inactive".to_owned()));
}
