//! The vault as a process' worth of it: real Postgres, real NATS, called as others call it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Mutex, time::Duration};

use bus::{Bus, vault::AcceptedKeys};
use contract::{
    access, rpc,
    vault::{
        Bundle, ClaimRefreshRequest, DeleteSecretsRequest, FindAccountsRequest,
        FinishRefreshRequest, ListCredentialsRequest, ListRedemptionsRequest, MintLeaseRequest,
        PutCredentialRequest, PutSecretRequest, RedeemLeaseRequest, RedeemModelTokenRequest,
        RefreshState, RevokeLeasesRequest, RevokeModelTokensRequest, RotateKeysReply,
        RotateKeysRequest, Route, RouteKind, Routes,
    },
};
use credential_vault::Config;
use futures::{StreamExt as _, TryStreamExt as _};
use prost::Message as _;
use sealing::KeyPair;
use service::Lifecycle;
use sha2::Digest as _;
use sqlx::Row as _;
use testkit::{Database, Nats};
use types::{ErrorCode, SecretId, SessionId, UserId};

const SOON: Duration = Duration::from_secs(5);

struct Vault {
    nats: Nats,
    database: Database,
    running: Mutex<Vec<Lifecycle>>,
}

impl Vault {
    fn config(&self, key: &str) -> Config {
        Config {
            bus: self.nats.config(&access::VAULT),
            store: self.database.config("vault"),
            encryption_key: key.to_owned().into(),
            shared_sprites_token: None,
        }
    }

    async fn run(&self, key: &str) -> anyhow::Result<()> {
        let lifecycle = Lifecycle::new();
        self.running.lock().unwrap().push(lifecycle.clone());
        credential_vault::run(self.config(key), lifecycle).await
    }

    async fn stop_all(&self) {
        let running = std::mem::take(&mut *self.running.lock().unwrap());
        for lifecycle in running {
            lifecycle.stop_token().cancel();
            let tasks = lifecycle.tracker();
            tasks.close();
            tasks.wait().await;
        }
    }

    async fn start() -> (Self, Bus, Bus, Bus) {
        let vault = Self {
            nats: Nats::start().unwrap(),
            database: Database::create().await.unwrap(),
            running: Mutex::default(),
        };
        vault.run("0123456789abcdef").await.unwrap();
        let connect = |access| vault.nats.connect(access);
        let buses = (
            connect(&access::GATEWAY).await.unwrap(),
            connect(&access::SCHEDULER).await.unwrap(),
            connect(&access::RUNNER).await.unwrap(),
        );
        (vault, buses.0, buses.1, buses.2)
    }
}

/// A gateway that gets no answer asks another replica.
#[tokio::test]
async fn a_document_that_is_stored_again_under_its_id_is_stored_once() {
    let (vault, gateway, ..) = Vault::start().await;
    let (id, user) = (SecretId::new().to_string(), UserId::new());
    let request = |value: &str| PutSecretRequest {
        user_id: user.to_string(),
        kind: "session".to_owned(),
        value: value.as_bytes().to_vec(),
        secret_id: id.clone(),
        ..PutSecretRequest::default()
    };
    for _ in 0..3 {
        assert_eq!(
            gateway.call::<rpc::PutSecret>(&request(r#"{"a":"1"}"#), SOON).await.unwrap().secret_id,
            id
        );
    }
    let malformed = PutSecretRequest { secret_id: "x".to_owned(), ..request("{}") };
    assert_eq!(
        gateway.call::<rpc::PutSecret>(&malformed, SOON).await.unwrap_err().code,
        ErrorCode::InvalidArgument
    );
    let stored: i64 = sqlx::query_scalar("select count(*) from vault.secret")
        .fetch_one(&mut vault.database.admin().await.unwrap())
        .await
        .unwrap();
    assert_eq!(stored, 1);
}

/// A token of one repository is exchanged while the session's other secrets stay, also where two
/// are exchanged at once.
#[tokio::test]
async fn a_document_is_merged_with_another() {
    let (_vault, gateway, scheduler, runner) = Vault::start().await;
    let (id, user, session) = (SecretId::new().to_string(), UserId::new(), SessionId::new());
    let request = |value: &str| PutSecretRequest {
        user_id: user.to_string(),
        kind: "session".to_owned(),
        value: value.as_bytes().to_vec(),
        secret_id: id.clone(),
        merge: true,
        ..PutSecretRequest::default()
    };
    let put = async |value: &str| gateway.call::<rpc::PutSecret>(&request(value), SOON).await;
    put(r#"{"env":{"A":"1"},"tokens":{"/a":"old","/b":"old"}}"#).await.unwrap();
    let (one, two) =
        tokio::join!(put(r#"{"env":{},"tokens":{"/a":"new"}}"#), put(r#"{"tokens":{"/c":"new"}}"#));
    one.unwrap();
    two.unwrap();
    let of_another = PutSecretRequest { user_id: UserId::new().to_string(), ..request("{}") };
    assert_eq!(
        gateway.call::<rpc::PutSecret>(&of_another, SOON).await.unwrap_err().code,
        ErrorCode::NotFound
    );
    let key = KeyPair::generate().unwrap();
    let mint = MintLeaseRequest {
        user_id: user.to_string(),
        session_id: session.to_string(),
        purpose: "turn 1".to_owned(),
        secret_ids: vec![id.clone()],
        ttl_seconds: 60,
        epoch: 1,
        public_key: key.public().to_vec(),
        ..MintLeaseRequest::default()
    };
    let lease_id = scheduler.call::<rpc::MintLease>(&mint, SOON).await.unwrap().lease_id;
    let redeem = RedeemLeaseRequest {
        lease_id: lease_id.clone(),
        public_key: key.public().to_vec(),
        ..RedeemLeaseRequest::default()
    };
    let sealed = runner.call::<rpc::RedeemLease>(&redeem, SOON).await.unwrap().sealed;
    let opened = key.open(&sealed, lease_id.as_bytes()).unwrap();
    let bundle = Bundle::decode(opened.as_slice()).unwrap();
    let document: serde_json::Value = serde_json::from_slice(&bundle.secrets[0].value).unwrap();
    assert_eq!(
        document,
        serde_json::json!({ "env": { "A": "1" }, "tokens": { "/a": "new", "/b": "old", "/c": "new" } })
    );
}

/// What sweeps go by: an account that many share is searched once.
#[tokio::test]
async fn users_without_a_sprites_token_share_the_deployments_account() {
    let (vault, gateway, scheduler, _) = Vault::start().await;
    let users: Vec<UserId> = (0..4).map(|_| UserId::new()).collect();
    for (user, kind) in [
        (users[1], "backend:sprites"),
        (users[2], "provider:anthropic"),
        (users[3], "backend:sprites"),
    ] {
        let request =
            PutCredentialRequest { kind: kind.to_owned(), ..put(user, "a-token-of-its-own") };
        gateway.call::<rpc::PutCredential>(&request, SOON).await.unwrap();
    }
    let accounts = async |users: &[UserId]| {
        let request =
            FindAccountsRequest { user_ids: users.iter().map(UserId::to_string).collect() };
        let found = scheduler.call::<rpc::FindAccounts>(&request, SOON).await.unwrap().user_ids;
        found
            .iter()
            .map(|id| users.iter().position(|user| user.to_string() == *id).unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(accounts(&users).await, [1, 3], "the others have none");
    vault.stop_all().await;
    let config = Config {
        shared_sprites_token: Some("shared".to_owned().into()),
        ..vault.config("0123456789abcdef")
    };
    credential_vault::run(config, Lifecycle::new()).await.unwrap();
    assert_eq!(accounts(&users).await, [1, 3, 0], "and one of the two that share the deployment's");
    assert_eq!(accounts(&users[1..2]).await, [0], "whose users come first");
    assert_eq!(accounts(&[]).await, [0_usize; 0]);
}

fn put(user: UserId, value: &str) -> PutCredentialRequest {
    let kind = "provider:anthropic".to_owned();
    PutCredentialRequest {
        user_id: user.to_string(),
        kind,
        value: value.into(),
        ..PutCredentialRequest::default()
    }
}

async fn lease(scheduler: &Bus, user: UserId, session: SessionId, epoch: u32) -> String {
    lease_of(scheduler, user, session, epoch, Vec::new()).await
}

/// A lease that the key of its claim alone may redeem.
async fn lease_of(
    scheduler: &Bus,
    user: UserId,
    session: SessionId,
    epoch: u32,
    public_key: Vec<u8>,
) -> String {
    let request = MintLeaseRequest {
        user_id: user.to_string(),
        session_id: session.to_string(),
        purpose: "turn 1".to_owned(),
        credential_kinds: vec!["provider:anthropic".to_owned(), "backend:sprites".to_owned()],
        secret_ids: Vec::new(),
        ttl_seconds: 60,
        epoch,
        public_key,
        ..MintLeaseRequest::default()
    };
    scheduler.call::<rpc::MintLease>(&request, SOON).await.unwrap().lease_id
}

#[tokio::test]
async fn a_secret_reaches_only_the_runner_that_redeems_its_lease() {
    let (vault, gateway, scheduler, runner) = Vault::start().await;
    let (user, session) = (UserId::new(), SessionId::new());
    let stored =
        gateway.call::<rpc::PutCredential>(&put(user, "sk-sentinel-0001"), SOON).await.unwrap();
    assert_eq!(stored.hint, "0001");
    let replaced =
        gateway.call::<rpc::PutCredential>(&put(user, "sk-sentinel-0002"), SOON).await.unwrap();
    assert_eq!(replaced.created_at_us, stored.created_at_us);

    let lease_id = lease(&scheduler, user, session, 1).await;
    let key = KeyPair::generate().unwrap();
    let request = RedeemLeaseRequest {
        lease_id: lease_id.clone(),
        public_key: key.public().to_vec(),
        runner: "r1".to_owned(),
    };
    let sealed = runner.call::<rpc::RedeemLease>(&request, SOON).await.unwrap().sealed;
    assert!(!sealed.windows(8).any(|window| window == b"sentinel"));
    let bundle =
        Bundle::decode(key.open(&sealed, lease_id.as_bytes()).unwrap().as_slice()).unwrap();
    let secrets: Vec<_> = bundle
        .secrets
        .iter()
        .map(|secret| (secret.kind.as_str(), secret.value.as_slice()))
        .collect();
    assert_eq!(secrets, [("provider:anthropic", b"sk-sentinel-0002".as_slice())]);

    // What lies in the database is unreadable, and every redemption is written down.
    let mut admin = vault.database.admin().await.unwrap();
    let row =
        sqlx::query("select ciphertext from vault.secret").fetch_one(&mut admin).await.unwrap();
    assert!(!row.get::<Vec<u8>, _>(0).windows(8).any(|window| window == b"sentinel"));
    scheduler
        .call::<rpc::RevokeLeases>(&RevokeLeasesRequest { session_id: session.to_string() }, SOON)
        .await
        .unwrap();
    let refused = runner.call::<rpc::RedeemLease>(&request, SOON).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::NotFound);
    let operator = vault.nats.connect(&access::OPERATOR).await.unwrap();
    let of_session =
        ListRedemptionsRequest { session_id: Some(session.to_string()), limit: 10, before: None };
    let audit = operator.call::<rpc::ListRedemptions>(&of_session, SOON).await.unwrap().redemptions;
    let told: Vec<_> = audit
        .iter()
        .map(|r| {
            (r.purpose.as_deref().unwrap(), r.runner.as_str(), r.outcome.as_str(), r.kinds.len())
        })
        .collect();
    assert_eq!(told, [("turn 1", "r1", "refused", 0), ("turn 1", "r1", "granted", 1)]);
    for change in [
        "update vault.redemption set runner = 'x'",
        "delete from vault.redemption",
        "truncate vault.redemption",
    ] {
        let refused = sqlx::raw_sql(change).execute(&mut admin).await.unwrap_err();
        assert!(refused.to_string().contains("append-only"), "{change}: {refused}");
    }
}

#[tokio::test]
async fn a_lease_is_redeemed_once_and_by_the_key_of_its_claim_alone() {
    let (vault, gateway, scheduler, runner) = Vault::start().await;
    let (user, session) = (UserId::new(), SessionId::new());
    gateway.call::<rpc::PutCredential>(&put(user, "sk-sentinel-0001"), SOON).await.unwrap();
    let (key, thief) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let lease_id = lease_of(&scheduler, user, session, 1, key.public().to_vec()).await;
    let redeem = async |public_key: Vec<u8>| {
        let request =
            RedeemLeaseRequest { lease_id: lease_id.clone(), public_key, runner: "r1".to_owned() };
        runner.call::<rpc::RedeemLease>(&request, SOON).await.map(|reply| reply.sealed)
    };
    for other in [thief.public().to_vec(), Vec::new()] {
        assert_eq!(redeem(other).await.unwrap_err().code, ErrorCode::NotFound);
    }
    let sealed = redeem(key.public().to_vec()).await.unwrap();
    assert!(thief.open(&sealed, lease_id.as_bytes()).is_err());
    assert!(key.open(&sealed, lease_id.as_bytes()).is_ok());
    // Its answer may have been lost: the same key may ask again for a minute.
    assert!(redeem(key.public().to_vec()).await.is_ok());
    let mut admin = vault.database.admin().await.unwrap();
    let later = "update vault.lease set redeemed_at = redeemed_at - interval '61 seconds'";
    sqlx::raw_sql(later).execute(&mut admin).await.unwrap();
    assert_eq!(redeem(key.public().to_vec()).await.unwrap_err().code, ErrorCode::NotFound);
    // A runner that died in between has lost its key; the next claim brings another lease.
    let next = KeyPair::generate().unwrap();
    let lease_id = lease_of(&scheduler, user, session, 2, next.public().to_vec()).await;
    let request = RedeemLeaseRequest {
        lease_id: lease_id.clone(),
        public_key: next.public().to_vec(),
        runner: "r2".to_owned(),
    };
    let sealed = runner.call::<rpc::RedeemLease>(&request, SOON).await.unwrap().sealed;
    assert!(next.open(&sealed, lease_id.as_bytes()).is_ok());
}

/// With a model gateway the lease of a runner holds no key of a provider.
#[tokio::test]
async fn a_providers_key_is_redeemed_by_the_model_gateway_with_the_sessions_token_and_not_by_the_runner()
 {
    let (vault, gateway, scheduler, runner) = Vault::start().await;
    let models = vault.nats.connect(&access::MODEL_GATEWAY).await.unwrap();
    let (user, session) = (UserId::new(), SessionId::new());
    gateway.call::<rpc::PutCredential>(&put(user, "sk-sentinel-0001"), SOON).await.unwrap();
    let (key, own, hash) =
        (KeyPair::generate().unwrap(), KeyPair::generate().unwrap(), vec![7_u8; 32]);
    let mint = MintLeaseRequest {
        user_id: user.to_string(),
        session_id: session.to_string(),
        purpose: "turn 1".to_owned(),
        credential_kinds: ["provider:anthropic", "provider:openai", "backend:sprites"]
            .map(str::to_owned)
            .into(),
        ttl_seconds: 60,
        epoch: 1,
        public_key: key.public().to_vec(),
        model_token_hash: hash.clone(),
        ..MintLeaseRequest::default()
    };
    let lease_id = scheduler.call::<rpc::MintLease>(&mint, SOON).await.unwrap().lease_id;
    let request = RedeemLeaseRequest {
        lease_id: lease_id.clone(),
        public_key: key.public().to_vec(),
        runner: "r1".to_owned(),
    };
    let sealed = runner.call::<rpc::RedeemLease>(&request, SOON).await.unwrap().sealed;
    let bundle =
        Bundle::decode(key.open(&sealed, lease_id.as_bytes()).unwrap().as_slice()).unwrap();
    assert!(bundle.secrets.is_empty());
    assert_eq!(bundle.proxied_kinds, ["provider:anthropic"]);

    let redeem = async |token_hash: Vec<u8>| {
        let request = RedeemModelTokenRequest {
            token_hash,
            public_key: own.public().to_vec(),
            gateway: "m1".to_owned(),
        };
        models.call::<rpc::RedeemModelToken>(&request, SOON).await
    };
    assert_eq!(redeem(vec![8; 32]).await.unwrap_err().code, ErrorCode::NotFound);
    let reply = redeem(hash.clone()).await.unwrap();
    assert_eq!((reply.user_id, reply.session_id), (user.to_string(), session.to_string()));
    assert!(!reply.sealed.windows(8).any(|window| window == b"sentinel"));
    let bundle = Bundle::decode(own.open(&reply.sealed, &hash).unwrap().as_slice()).unwrap();
    let secrets: Vec<_> = bundle
        .secrets
        .iter()
        .map(|secret| (secret.kind.as_str(), secret.value.as_slice()))
        .collect();
    assert_eq!(secrets, [("provider:anthropic", b"sk-sentinel-0001".as_slice())]);
    // A key that was replaced is the next answer's; the audit shows one redemption of the two.
    gateway.call::<rpc::PutCredential>(&put(user, "sk-sentinel-0002"), SOON).await.unwrap();
    let sealed = redeem(hash.clone()).await.unwrap().sealed;
    let bundle = Bundle::decode(own.open(&sealed, &hash).unwrap().as_slice()).unwrap();
    assert_eq!(bundle.secrets[0].value, b"sk-sentinel-0002");
    let operator = vault.nats.connect(&access::OPERATOR).await.unwrap();
    let of_session =
        ListRedemptionsRequest { session_id: Some(session.to_string()), limit: 10, before: None };
    let audit = operator.call::<rpc::ListRedemptions>(&of_session, SOON).await.unwrap().redemptions;
    let told: Vec<_> = audit
        .iter()
        .map(|r| (r.purpose.as_deref().unwrap(), r.runner.as_str(), r.kinds.len()))
        .collect();
    assert_eq!(told, [("models", "m1", 1), ("turn 1", "r1", 0)]);
    // The session ends, and its token with it.
    let revoke = RevokeModelTokensRequest { session_ids: vec![session.to_string()] };
    scheduler.call::<rpc::RevokeModelTokens>(&revoke, SOON).await.unwrap();
    assert_eq!(redeem(hash).await.unwrap_err().code, ErrorCode::NotFound);
}

/// What the model gateway adds to requests is not in the lease of a runner, and what the sandbox
/// needs is not the model gateway's.
#[tokio::test]
async fn secrets_of_routes_are_redeemed_by_the_model_gateway_alone() {
    let (vault, gateway, scheduler, runner) = Vault::start().await;
    let models = vault.nats.connect(&access::MODEL_GATEWAY).await.unwrap();
    let (user, session) = (UserId::new(), SessionId::new());
    let store = async |kind: &str, value: &str| {
        let request = PutSecretRequest {
            user_id: user.to_string(),
            kind: kind.to_owned(),
            value: value.as_bytes().to_vec(),
            ..PutSecretRequest::default()
        };
        gateway.call::<rpc::PutSecret>(&request, SOON).await.unwrap().secret_id
    };
    let of_session =
        store("session", r#"{"env":{"A":"sandbox-1"},"tokens":{"/w/r":"routed-1"}}"#).await;
    let of_agent =
        store("mcp_servers", r#"{"led":{"X-Key":"routed-2"},"local":{"VAR":"sandbox-2"}}"#).await;
    let bearer = async |value: &str| {
        let document = format!(
            r#"{{"kind":"static_bearer","key":"https://kept.example/mcp","value":"{value}"}}"#
        );
        store("vault_credential", &document).await
    };
    let (first, second) = (bearer("routed-3").await, bearer("routed-4").await);
    let route = |kind: RouteKind, path: &str, name: &str, url: &str| Route {
        kind: kind.into(),
        path: path.to_owned(),
        name: name.to_owned(),
        url: url.to_owned(),
        ..Route::default()
    };
    let routes = vec![
        route(RouteKind::Mcp, "mcp/led", "led", "https://led.example/mcp"),
        route(RouteKind::Mcp, "mcp/kept", "kept", "https://kept.example/mcp"),
        route(RouteKind::Mcp, "mcp/open", "open", "https://open.example/mcp"),
        route(RouteKind::Git, "git/github.com/o/r", "/w/r", "https://github.com/o/r"),
        route(RouteKind::Git, "git/github.com/o/open", "/w/open", "https://github.com/o/open"),
    ];
    let key = KeyPair::generate().unwrap();
    let mint = async |epoch: u32, bearer: &str, routes: Option<Routes>| {
        let request = MintLeaseRequest {
            user_id: user.to_string(),
            session_id: session.to_string(),
            purpose: "turn 1".to_owned(),
            secret_ids: [&of_session, &of_agent, bearer].map(str::to_owned).into(),
            ttl_seconds: 60,
            epoch,
            public_key: key.public().to_vec(),
            model_token_hash: vec![u8::try_from(epoch).unwrap(); 32],
            routes,
            ..MintLeaseRequest::default()
        };
        let lease_id = scheduler.call::<rpc::MintLease>(&request, SOON).await.unwrap().lease_id;
        let request = RedeemLeaseRequest {
            lease_id: lease_id.clone(),
            public_key: key.public().to_vec(),
            runner: "r1".to_owned(),
        };
        let sealed = runner.call::<rpc::RedeemLease>(&request, SOON).await.unwrap().sealed;
        Bundle::decode(key.open(&sealed, lease_id.as_bytes()).unwrap().as_slice()).unwrap()
    };
    let redeem = async |token_hash: Vec<u8>| {
        let request = RedeemModelTokenRequest {
            token_hash: token_hash.clone(),
            public_key: key.public().to_vec(),
            gateway: "m1".to_owned(),
        };
        let sealed = models.call::<rpc::RedeemModelToken>(&request, SOON).await.unwrap().sealed;
        Bundle::decode(key.open(&sealed, &token_hash).unwrap().as_slice()).unwrap()
    };
    let text = |bundle: &Bundle| String::from_utf8_lossy(&bundle.encode_to_vec()).into_owned();
    let paths =
        |bundle: &Bundle| bundle.routes.iter().map(|route| route.path.clone()).collect::<Vec<_>>();

    let lease = mint(1, &first, Some(Routes { routes: routes.clone() })).await;
    assert_eq!(paths(&lease), ["mcp/led", "mcp/kept", "git/github.com/o/r"]);
    assert!(
        !text(&lease).contains("routed-")
            && text(&lease).contains("sandbox-1")
            && text(&lease).contains("sandbox-2")
    );
    let redeemed = redeem(vec![1; 32]).await;
    assert_eq!(paths(&redeemed), ["mcp/led", "mcp/kept", "mcp/open", "git/github.com/o/r"]);
    assert!(!text(&redeemed).contains("sandbox-") && redeemed.secrets.is_empty());
    let values = |bundle: &Bundle| {
        bundle
            .routes
            .iter()
            .flat_map(|route| &route.headers)
            .map(|header| header.value.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        values(&redeemed),
        ["routed-2", "Bearer routed-3", "Basic eC1hY2Nlc3MtdG9rZW46cm91dGVkLTE="]
    );

    // The next claim replaces what the session's earlier tokens stand for.
    mint(2, &second, Some(Routes { routes })).await;
    for token in [1, 2] {
        assert_eq!(values(&redeem(vec![token; 32]).await)[1], "Bearer routed-4");
    }
    // A runner of the release before knows no routes: its lease is whole, and the routes of the
    // session stay.
    let lease = mint(3, &second, None).await;
    assert!(
        lease.routes.is_empty()
            && text(&lease).contains("routed-1")
            && text(&lease).contains("routed-4")
    );
    assert_eq!(values(&redeem(vec![1; 32]).await).len(), 3);
}

#[tokio::test]
async fn an_access_token_is_refreshed_by_one_gateway_at_a_time_and_a_refused_grant_by_none() {
    let (vault, gateway, scheduler, runner) = Vault::start().await;
    let models = vault.nats.connect(&access::MODEL_GATEWAY).await.unwrap();
    let (user, session) = (UserId::new(), SessionId::new());
    let key = KeyPair::generate().unwrap();
    let hash = |text: &str| sha2::Sha256::digest(text).to_vec();
    let store = async |secret_id: &str, merge: bool, value: &str| {
        let request = PutSecretRequest {
            user_id: user.to_string(),
            kind: "vault_credential".to_owned(),
            value: value.as_bytes().to_vec(),
            secret_id: secret_id.to_owned(),
            merge,
            ..PutSecretRequest::default()
        };
        gateway.call::<rpc::PutSecret>(&request, SOON).await.unwrap().secret_id
    };
    let document = r#"{"kind":"mcp_oauth","key":"https://kept.example/mcp","value":"access-1","oauth":{"refresh":
        {"client_id":"c","refresh_token":"refresh-1","token_endpoint":"https://kept.example/token","token_endpoint_auth":{"type":"none"}}}}"#;
    let secret_id = store("", false, document).await;
    let mint = MintLeaseRequest {
        user_id: user.to_string(),
        session_id: session.to_string(),
        purpose: "turn 1".to_owned(),
        secret_ids: vec![secret_id.clone()],
        ttl_seconds: 60,
        epoch: 1,
        public_key: key.public().to_vec(),
        model_token_hash: vec![1; 32],
        ..MintLeaseRequest::default()
    };
    // Also where it has no route, a sandbox gets no refresh token.
    let lease_id = scheduler.call::<rpc::MintLease>(&mint, SOON).await.unwrap().lease_id;
    let redeem = RedeemLeaseRequest {
        lease_id: lease_id.clone(),
        public_key: key.public().to_vec(),
        runner: "r1".to_owned(),
    };
    let sealed = runner.call::<rpc::RedeemLease>(&redeem, SOON).await.unwrap().sealed;
    let lease = key.open(&sealed, lease_id.as_bytes()).unwrap();
    let lease = String::from_utf8_lossy(&lease);
    assert!(lease.contains("access-1") && !lease.contains("refresh-1"));
    let route = Route {
        kind: RouteKind::Mcp.into(),
        url: "https://kept.example/mcp".to_owned(),
        ..Route::default()
    };
    let mint = MintLeaseRequest { epoch: 2, routes: Some(Routes { routes: vec![route] }), ..mint };
    scheduler.call::<rpc::MintLease>(&mint, SOON).await.unwrap();

    let claim = async |claim_id: uuid::Uuid, access_token: &str| {
        let request = ClaimRefreshRequest {
            session_token_hash: vec![1; 32],
            secret_id: secret_id.clone(),
            token_hash: hash(access_token),
            claim_id: claim_id.to_string(),
            public_key: key.public().to_vec(),
        };
        models.call::<rpc::ClaimRefresh>(&request, SOON).await.unwrap()
    };
    let finish = async |claim_id: uuid::Uuid, change: Option<&str>, is_refused: bool| {
        let sealed = match change {
            Some(change) => Some(
                models
                    .seal_for_vault(
                        &AcceptedKeys::default(),
                        &user.to_string(),
                        "vault_credential",
                        change.as_bytes(),
                        SOON,
                    )
                    .await
                    .unwrap(),
            ),
            None => None,
        };
        let request = FinishRefreshRequest {
            secret_id: secret_id.clone(),
            claim_id: claim_id.to_string(),
            sealed,
            is_refused,
        };
        models.call::<rpc::FinishRefresh>(&request, SOON).await.unwrap();
    };
    let (first, second) = (uuid::Uuid::new_v4(), uuid::Uuid::new_v4());
    let granted = claim(first, "access-1").await;
    assert_eq!(granted.state(), RefreshState::Granted);
    let grant = key.open(&granted.sealed, &[1; 32]).unwrap();
    assert!(String::from_utf8_lossy(&grant).contains("refresh-1"));
    assert_eq!(claim(first, "access-1").await.state(), RefreshState::Granted);
    assert_eq!(claim(second, "access-1").await.state(), RefreshState::Busy);
    let change = r#"{"value":"access-2","oauth":{"refresh":{"refresh_token":"refresh-2"}}}"#;
    finish(first, Some(change), false).await;
    assert_eq!(claim(second, "access-1").await.state(), RefreshState::Current);
    // What comes late changes nothing.
    finish(first, Some(r#"{"value":"late"}"#), false).await;
    let granted = claim(second, "access-2").await;
    let grant = key.open(&granted.sealed, &[1; 32]).unwrap();
    assert!(String::from_utf8_lossy(&grant).contains("refresh-2"));
    // One that failed may be tried again; one that was refused may not, until it is replaced.
    finish(second, None, false).await;
    assert_eq!(claim(first, "access-2").await.state(), RefreshState::Granted);
    finish(first, None, true).await;
    assert_eq!(claim(second, "access-2").await.state(), RefreshState::Refused);
    // Whatever it is that its user replaces: it may have been the client's secret that was wrong.
    store(&secret_id, true, r#"{"oauth":{"refresh":{"client_id":"d"}}}"#).await;
    assert_eq!(claim(second, "access-2").await.state(), RefreshState::Granted);
    finish(second, None, true).await;
    store(&secret_id, true, r#"{"oauth":{"refresh":{"refresh_token":"refresh-3"}}}"#).await;
    assert_eq!(claim(second, "access-2").await.state(), RefreshState::Granted);

    // What the user stores while a refresh is under way is neither replaced by what the refresh
    // brings nor taken for what was refused.
    store(&secret_id, true, r#"{"value":"own","oauth":{"refresh":{"refresh_token":"own"}}}"#).await;
    finish(second, Some(change), false).await;
    assert_eq!(claim(first, "own").await.state(), RefreshState::Granted);
    store(&secret_id, true, r#"{"oauth":{"refresh":{"refresh_token":"own-2"}}}"#).await;
    finish(first, None, true).await;
    let granted = claim(second, "own").await;
    assert_eq!(granted.state(), RefreshState::Granted);
    let grant = key.open(&granted.sealed, &[1; 32]).unwrap();
    assert!(String::from_utf8_lossy(&grant).contains("own-2"));

    // A gateway that was killed holds up no one for longer than its claim lasts, and what it says
    // after that changes nothing.
    assert_eq!(claim(first, "own").await.state(), RefreshState::Busy);
    let mut admin = vault.database.admin().await.unwrap();
    let over = "update vault.oauth_refresh set claimed_until = now() - interval '1 second'";
    sqlx::query(over).execute(&mut admin).await.unwrap();
    assert_eq!(claim(first, "own").await.state(), RefreshState::Granted);
    finish(second, Some(change), false).await;
    finish(second, None, true).await;
    assert_eq!(claim(first, "own").await.state(), RefreshState::Granted);

    // Of a credential that is archived meanwhile nothing comes back.
    let delete = DeleteSecretsRequest { secret_ids: vec![secret_id.clone()] };
    scheduler.call::<rpc::DeleteSecrets>(&delete, SOON).await.unwrap();
    let late = FinishRefreshRequest {
        secret_id: secret_id.clone(),
        claim_id: first.to_string(),
        ..FinishRefreshRequest::default()
    };
    let gone = models.call::<rpc::FinishRefresh>(&late, SOON).await.unwrap_err();
    assert_eq!(gone.code, ErrorCode::NotFound);
    let left: i64 = sqlx::query_scalar(
        "select (select count(*) from vault.secret) + (select count(*) from vault.oauth_refresh)",
    )
    .fetch_one(&mut admin)
    .await
    .unwrap();
    assert_eq!(left, 0);
}

/// A stream may have any subjects, so a user who may create one could read every request.
#[tokio::test]
async fn the_bus_carries_no_secret_in_the_clear_on_its_way_to_the_vault() {
    let (vault, gateway, scheduler, runner) = Vault::start().await;
    let operator = vault.nats.connect(&access::OPERATOR).await.unwrap();
    let capture = async_nats::jetstream::stream::Config {
        name: "EVENTS".to_owned(),
        subjects: vec!["aod.rpc.vault.>".to_owned()],
        no_ack: true,
        ..Default::default()
    };
    jetstream_as(&vault.nats, &access::STREAMS).await.create_stream(capture).await.unwrap();
    let (user, session) = (UserId::new(), SessionId::new());
    let seal = async |kind: &str, value: &[u8]| {
        Some(
            gateway
                .seal_for_vault(&AcceptedKeys::default(), &user.to_string(), kind, value, SOON)
                .await
                .unwrap(),
        )
    };
    let kind = "provider:anthropic".to_owned();
    let sealed = seal(&kind, b"sk-sentinel-0001").await;
    let request = PutCredentialRequest {
        user_id: user.to_string(),
        kind,
        sealed: sealed.clone(),
        ..PutCredentialRequest::default()
    };
    assert_eq!(gateway.call::<rpc::PutCredential>(&request, SOON).await.unwrap().hint, "0001");
    let document = PutSecretRequest {
        user_id: user.to_string(),
        kind: "session".to_owned(),
        sealed: seal("session", br#"{"env":{"X":"sentinel-99"}}"#).await,
        ..PutSecretRequest::default()
    };
    gateway.call::<rpc::PutSecret>(&document, SOON).await.unwrap();
    // What was captured is of no use: it is bound to its user and kind.
    let other = PutCredentialRequest { user_id: UserId::new().to_string(), ..request.clone() };
    assert_eq!(
        operator.call::<rpc::PutCredential>(&other, SOON).await.unwrap_err().code,
        ErrorCode::InvalidArgument
    );
    let key = KeyPair::generate().unwrap();
    let lease_id = lease_of(&scheduler, user, session, 1, key.public().to_vec()).await;
    let redeem = RedeemLeaseRequest {
        lease_id: lease_id.clone(),
        public_key: key.public().to_vec(),
        runner: "r1".to_owned(),
    };
    let sealed = runner.call::<rpc::RedeemLease>(&redeem, SOON).await.unwrap().sealed;
    let bundle =
        Bundle::decode(key.open(&sealed, lease_id.as_bytes()).unwrap().as_slice()).unwrap();
    assert_eq!(bundle.secrets[0].value, b"sk-sentinel-0001");

    let reader = jetstream_as(&vault.nats, &access::SCHEDULER).await;
    let mut captured = reader.get_stream("EVENTS").await.unwrap();
    let held = captured.info().await.unwrap().state.last_sequence;
    assert!(held >= 6, "the check checks nothing: {held}");
    for sequence in 1..=held {
        let message = captured.get_raw_message(sequence).await.unwrap();
        assert!(
            !message.payload.windows(8).any(|window| window == b"sentinel"),
            "{}",
            message.subject
        );
    }
    // A key that is not the vault's is not used.
    let pinned = AcceptedKeys::parse(&base64(&KeyPair::generate().unwrap().public())).unwrap();
    let refused = gateway
        .seal_for_vault(&pinned, &user.to_string(), "session", b"{}", SOON)
        .await
        .unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unavailable);
}

async fn jetstream_as(nats: &Nats, access: &access::Access) -> async_nats::jetstream::Context {
    let options = async_nats::ConnectOptions::with_user_and_password(
        access.user.to_owned(),
        nats.password(access.user),
    );
    async_nats::jetstream::new(
        options.custom_inbox_prefix(access.inbox()).connect(nats.url()).await.unwrap(),
    )
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[tokio::test]
async fn a_claim_that_was_overtaken_gets_no_secret() {
    let (_vault, gateway, scheduler, runner) = Vault::start().await;
    let (user, session) = (UserId::new(), SessionId::new());
    gateway.call::<rpc::PutCredential>(&put(user, "sk-sentinel-0001"), SOON).await.unwrap();
    let redeem = async |lease_id: String| {
        let public_key = KeyPair::generate().unwrap().public().to_vec();
        runner
            .call::<rpc::RedeemLease>(
                &RedeemLeaseRequest { lease_id, public_key, runner: "r1".to_owned() },
                SOON,
            )
            .await
    };
    // In whichever order the two were minted.
    let (second, first) =
        (lease(&scheduler, user, session, 2).await, lease(&scheduler, user, session, 1).await);
    assert_eq!(redeem(first).await.unwrap_err().code, ErrorCode::NotFound);
    redeem(second.clone()).await.unwrap();
    redeem(second).await.unwrap();
}

#[tokio::test]
async fn the_bus_never_carries_a_secret_in_the_clear_from_vault_to_runner_even_for_a_bad_key() {
    let (_vault, gateway, scheduler, runner) = Vault::start().await;
    let user = UserId::new();
    gateway.call::<rpc::PutCredential>(&put(user, "sk-sentinel-0001"), SOON).await.unwrap();
    // Points of low order would make the shared secret known to everybody.
    for bad in [vec![], vec![0; 32], vec![1; 31], [vec![1], vec![0; 31]].concat()] {
        let lease_id = lease(&scheduler, user, SessionId::new(), 1).await;
        let request =
            RedeemLeaseRequest { lease_id, public_key: bad.clone(), runner: "r1".to_owned() };
        let refused = runner.call::<rpc::RedeemLease>(&request, SOON).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::InvalidArgument, "{bad:?}");
    }
}

const OLD: &str = "1:0123456789abcdef";
const BOTH: &str = "1:0123456789abcdef 2:fedcba9876543210";
const NEW: &str = "2:fedcba9876543210";

async fn rotate(operator: &Bus, after_secret_id: Option<String>) -> RotateKeysReply {
    operator.call::<rpc::RotateKeys>(&RotateKeysRequest { after_secret_id }, SOON).await.unwrap()
}

#[tokio::test]
async fn keys_are_rotated_while_two_replicas_serve_and_the_old_one_is_removed() {
    let (vault, gateway, scheduler, runner) = Vault::start().await;
    let users: Vec<UserId> = (0..1200).map(|_| UserId::new()).collect();
    let gateway = &gateway;
    let puts = users.iter().map(|user| async move {
        gateway.call::<rpc::PutCredential>(&put(*user, "sk-before"), SOON).await
    });
    futures::stream::iter(puts).buffer_unordered(16).try_collect::<Vec<_>>().await.unwrap();
    vault.stop_all().await;
    for _ in 0..2 {
        vault.run(BOTH).await.unwrap();
    }
    let operator = vault.nats.connect(&access::OPERATOR).await.unwrap();
    let walk = async || {
        let mut after = None;
        loop {
            let step = rotate(&operator, after).await;
            assert_eq!((step.version, step.damaged_secret_ids.len()), (2, 0));
            if step.last_secret_id.is_none() {
                return step.remaining;
            }
            after = step.last_secret_id;
        }
    };
    // Interrupted after a step; then two at once, while secrets are written and read.
    let first = rotate(&operator, None).await;
    assert_eq!((first.rotated, first.remaining), (500, 700));
    let written = async {
        for user in users.iter().step_by(10) {
            gateway.call::<rpc::PutCredential>(&put(*user, "sk-during"), SOON).await.unwrap();
            let lease_id = lease(&scheduler, *user, SessionId::new(), 1).await;
            let public_key = KeyPair::generate().unwrap().public().to_vec();
            runner
                .call::<rpc::RedeemLease>(
                    &RedeemLeaseRequest { lease_id, public_key, runner: "r1".to_owned() },
                    SOON,
                )
                .await
                .unwrap();
        }
    };
    let (one, other, ()) = tokio::join!(walk(), walk(), written);
    assert_eq!((one, other), (0, 0));

    let keys = operator.call::<rpc::KeyStatus>(&Default::default(), SOON).await.unwrap().keys;
    let told: Vec<_> = keys.iter().map(|key| (key.version, key.is_current, key.secrets)).collect();
    assert_eq!(told, [(1, false, 0), (2, true, 1200)]);
    vault.stop_all().await;
    vault.run(NEW).await.unwrap();
    let lease_id = lease(&scheduler, users[1], SessionId::new(), 1).await;
    let key = KeyPair::generate().unwrap();
    let request = RedeemLeaseRequest {
        lease_id: lease_id.clone(),
        public_key: key.public().to_vec(),
        runner: "r1".to_owned(),
    };
    let sealed = runner.call::<rpc::RedeemLease>(&request, SOON).await.unwrap().sealed;
    let bundle =
        Bundle::decode(key.open(&sealed, lease_id.as_bytes()).unwrap().as_slice()).unwrap();
    assert_eq!(bundle.secrets[0].value, b"sk-before");
    // A vault that has the old key alone refuses to start, and says why.
    let refused = format!("{:#}", vault.run(OLD).await.unwrap_err());
    assert!(
        refused.contains("FIELD_ENCRYPTION_KEY: key version 2 is in use and is not configured"),
        "{refused}"
    );
    let refused = format!("{:#}", vault.run("2:another key, as long").await.unwrap_err());
    assert!(refused.contains("FIELD_ENCRYPTION_KEY"), "{refused}");
}

#[tokio::test]
async fn a_damaged_secret_stays_behind_by_name_and_the_others_are_rotated() {
    let (vault, gateway, ..) = Vault::start().await;
    let users = [UserId::new(), UserId::new(), UserId::new()];
    for user in users {
        gateway.call::<rpc::PutCredential>(&put(user, "sk-before"), SOON).await.unwrap();
    }
    let mut admin = vault.database.admin().await.unwrap();
    let damaged: (uuid::Uuid,) = sqlx::query_as(
        "update vault.secret set wrapped_key = 'x' where user_id = $1 returning secret_id",
    )
    .bind(users[1].uuid())
    .fetch_one(&mut admin)
    .await
    .unwrap();
    vault.stop_all().await;
    vault.run(BOTH).await.unwrap();
    let operator = vault.nats.connect(&access::OPERATOR).await.unwrap();
    let step = rotate(&operator, None).await;
    assert_eq!(
        (step.rotated, step.remaining, step.damaged_secret_ids),
        (2, 1, vec![damaged.0.to_string()])
    );
}

#[tokio::test]
async fn a_wrong_key_is_refused_at_the_start() {
    let (vault, gateway, ..) = Vault::start().await;
    gateway
        .call::<rpc::PutCredential>(&put(UserId::new(), "sk-sentinel-0001"), SOON)
        .await
        .unwrap();
    let error = format!("{:#}", vault.run("another key, as long").await.unwrap_err());
    assert_eq!(
        error,
        "FIELD_ENCRYPTION_KEY: key version 1 is not the key that it was when it encrypted"
    );
}

#[tokio::test]
async fn a_row_that_was_swapped_is_an_error_and_not_another_value() {
    let (vault, gateway, scheduler, runner) = Vault::start().await;
    let (one, other) = (UserId::new(), UserId::new());
    for user in [one, other] {
        gateway
            .call::<rpc::PutCredential>(&put(user, &format!("sk-of-{user}")), SOON)
            .await
            .unwrap();
    }
    let mut admin = vault.database.admin().await.unwrap();
    let swap = "update vault.secret s set wrapped_key = o.wrapped_key, ciphertext = o.ciphertext from vault.secret o where s.user_id = $1 and o.user_id = $2";
    sqlx::query(swap).bind(one.uuid()).bind(other.uuid()).execute(&mut admin).await.unwrap();
    let lease_id = lease(&scheduler, one, SessionId::new(), 1).await;
    let request = RedeemLeaseRequest {
        lease_id,
        public_key: KeyPair::generate().unwrap().public().to_vec(),
        runner: "r1".to_owned(),
    };
    assert_eq!(
        runner.call::<rpc::RedeemLease>(&request, SOON).await.unwrap_err().code,
        ErrorCode::Internal
    );
}

#[tokio::test]
async fn bad_values_are_refused_and_users_see_their_own() {
    let (_vault, gateway, ..) = Vault::start().await;
    for bad in ["", "two\nlines", "nul\0"] {
        let failure =
            gateway.call::<rpc::PutCredential>(&put(UserId::new(), bad), SOON).await.unwrap_err();
        assert_eq!(
            (failure.code, failure.field.map(|field| field.name).as_deref()),
            (ErrorCode::Unprocessable, Some("value")),
            "{bad:?}"
        );
    }
    gateway
        .call::<rpc::PutCredential>(&put(UserId::new(), "sk-sentinel-0001"), SOON)
        .await
        .unwrap();
    let list = ListCredentialsRequest { user_id: UserId::new().to_string() };
    assert!(
        gateway.call::<rpc::ListCredentials>(&list, SOON).await.unwrap().credentials.is_empty()
    );
}
