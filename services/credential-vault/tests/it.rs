//! The vault as a process' worth of it: real Postgres, real NATS, called as others call it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use bus::Bus;
use contract::{
    access, rpc,
    vault::{Bundle, ListCredentialsRequest, MintLeaseRequest, PutCredentialRequest, RedeemLeaseRequest, RevokeLeasesRequest},
};
use credential_vault::Config;
use prost::Message as _;
use sealing::OneTimeKey;
use service::Lifecycle;
use sqlx::Row as _;
use testkit::{Database, Nats};
use types::{ErrorCode, SessionId, UserId};

const SOON: Duration = Duration::from_secs(5);

struct Vault {
    nats: Nats,
    database: Database,
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

    async fn start() -> (Self, Bus, Bus, Bus) {
        let vault = Self { nats: Nats::start().unwrap(), database: Database::create().await.unwrap() };
        credential_vault::run(vault.config("0123456789abcdef"), Lifecycle::new()).await.unwrap();
        let connect = |access| vault.nats.connect(access);
        let buses =
            (connect(&access::GATEWAY).await.unwrap(), connect(&access::SCHEDULER).await.unwrap(), connect(&access::RUNNER).await.unwrap());
        (vault, buses.0, buses.1, buses.2)
    }
}

fn put(user: UserId, value: &str) -> PutCredentialRequest {
    PutCredentialRequest { user_id: user.to_string(), kind: "provider:anthropic".to_owned(), value: value.into() }
}

async fn lease(scheduler: &Bus, user: UserId, session: SessionId) -> String {
    let request = MintLeaseRequest {
        user_id: user.to_string(),
        session_id: session.to_string(),
        purpose: "turn 1".to_owned(),
        credential_kinds: vec!["provider:anthropic".to_owned(), "backend:sprites".to_owned()],
        secret_ids: Vec::new(),
        ttl_seconds: 60,
    };
    scheduler.call::<rpc::MintLease>(&request, SOON).await.unwrap().lease_id
}

#[tokio::test]
async fn a_secret_reaches_the_runner_that_redeems_its_lease_and_nobody_else() {
    let (vault, gateway, scheduler, runner) = Vault::start().await;
    let (user, session) = (UserId::new(), SessionId::new());
    let stored = gateway.call::<rpc::PutCredential>(&put(user, "sk-sentinel-0001"), SOON).await.unwrap();
    assert_eq!(stored.hint, "0001");
    let replaced = gateway.call::<rpc::PutCredential>(&put(user, "sk-sentinel-0002"), SOON).await.unwrap();
    assert_eq!(replaced.created_at_us, stored.created_at_us);

    let lease_id = lease(&scheduler, user, session).await;
    let key = OneTimeKey::generate().unwrap();
    let request = RedeemLeaseRequest { lease_id: lease_id.clone(), public_key: key.public().to_vec(), runner: "r1".to_owned() };
    let sealed = runner.call::<rpc::RedeemLease>(&request, SOON).await.unwrap().sealed;
    assert!(!sealed.windows(8).any(|window| window == b"sentinel"));
    let bundle = Bundle::decode(key.open(&sealed, lease_id.as_bytes()).unwrap().as_slice()).unwrap();
    let secrets: Vec<_> = bundle.secrets.iter().map(|secret| (secret.kind.as_str(), secret.value.as_slice())).collect();
    assert_eq!(secrets, [("provider:anthropic", b"sk-sentinel-0002".as_slice())]);

    // What lies in the database is unreadable, and every redemption is written down.
    let mut admin = vault.database.admin().await.unwrap();
    let row = sqlx::query("select ciphertext from vault.secret").fetch_one(&mut admin).await.unwrap();
    assert!(!row.get::<Vec<u8>, _>(0).windows(8).any(|window| window == b"sentinel"));
    scheduler.call::<rpc::RevokeLeases>(&RevokeLeasesRequest { session_id: session.to_string() }, SOON).await.unwrap();
    let refused = runner.call::<rpc::RedeemLease>(&request, SOON).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::NotFound);
    let audit: Vec<(String, String)> =
        sqlx::query_as("select runner, outcome from vault.redemption order by redemption_id").fetch_all(&mut admin).await.unwrap();
    assert_eq!(audit, [("r1".to_owned(), "granted".to_owned()), ("r1".to_owned(), "refused".to_owned())]);
}

#[tokio::test]
async fn a_wrong_key_is_refused_at_the_start() {
    let (vault, gateway, ..) = Vault::start().await;
    gateway.call::<rpc::PutCredential>(&put(UserId::new(), "sk-sentinel-0001"), SOON).await.unwrap();
    let error = credential_vault::run(vault.config("another key, as long"), Lifecycle::new()).await.unwrap_err();
    assert!(format!("{error:#}").contains("FIELD_ENCRYPTION_KEY"), "{error:#}");
}

#[tokio::test]
async fn a_row_that_was_swapped_is_an_error_and_not_another_value() {
    let (vault, gateway, scheduler, runner) = Vault::start().await;
    let (one, other) = (UserId::new(), UserId::new());
    for user in [one, other] {
        gateway.call::<rpc::PutCredential>(&put(user, &format!("sk-of-{user}")), SOON).await.unwrap();
    }
    let mut admin = vault.database.admin().await.unwrap();
    let swap = "update vault.secret s set wrapped_key = o.wrapped_key, ciphertext = o.ciphertext from vault.secret o where s.user_id = $1 and o.user_id = $2";
    sqlx::query(swap).bind(one.uuid()).bind(other.uuid()).execute(&mut admin).await.unwrap();
    let lease_id = lease(&scheduler, one, SessionId::new()).await;
    let request = RedeemLeaseRequest { lease_id, public_key: OneTimeKey::generate().unwrap().public().to_vec(), runner: "r1".to_owned() };
    assert_eq!(runner.call::<rpc::RedeemLease>(&request, SOON).await.unwrap_err().code, ErrorCode::Internal);
}

#[tokio::test]
async fn bad_values_are_refused_and_users_see_their_own() {
    let (_vault, gateway, ..) = Vault::start().await;
    for bad in ["", "two\nlines", "nul\0"] {
        let failure = gateway.call::<rpc::PutCredential>(&put(UserId::new(), bad), SOON).await.unwrap_err();
        assert_eq!((failure.code, failure.field.map(|field| field.name).as_deref()), (ErrorCode::Unprocessable, Some("value")), "{bad:?}");
    }
    gateway.call::<rpc::PutCredential>(&put(UserId::new(), "sk-sentinel-0001"), SOON).await.unwrap();
    let list = ListCredentialsRequest { user_id: UserId::new().to_string() };
    assert!(gateway.call::<rpc::ListCredentials>(&list, SOON).await.unwrap().credentials.is_empty());
}
