//! Services whose NATS and Postgres are reached over TLS, with a certificate authority of their
//! own.

use contract::{access, common::Empty, rpc};
use sqlx::{Connection as _, PgConnection};
use testkit::{Database, Nats, eventually, postgres::Server, services, tls::Tls};

use std::time::Duration;

#[tokio::test]
async fn a_service_reaches_both_over_tls_and_refuses_who_cannot_prove_itself() {
    let tls = Tls::generate().unwrap();
    let (server, nats) = (Server::start_tls(&tls).unwrap(), Nats::start_tls().unwrap());
    server.ready().await.unwrap();
    let database = Database::create_on(server.url().to_owned()).await.unwrap();
    let url = |ca: &str| format!("{}?sslmode=verify-full&sslrootcert={ca}", database.url("auth"));
    let ca = tls.ca_file().display().to_string();
    let nats_ca = nats.config(&access::AUTH).ca_file.unwrap().display().to_string();
    let password = nats.password(access::AUTH.user);
    let settings = |database_url: &str, nats_url: &str, nats_ca: &str| {
        [
            ("DATABASE_URL", database_url),
            ("NATS_URL", nats_url),
            ("NATS_CA_FILE", nats_ca),
            ("NATS_PASSWORD", password.as_str()),
        ]
        .map(|(name, value)| (name, value.to_owned()))
    };
    let says = |settings: [(&'static str, String); 4]| {
        let mut command = std::process::Command::new("timeout");
        command
            .arg("20")
            .arg(services::binary("auth").unwrap())
            .env("AOD_ADMIN_ADDR", "127.0.0.1:0")
            .envs(settings);
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };

    let good = settings(&url(&ca), &nats.url(), &nats_ca);
    let good: Vec<(&str, &str)> =
        good.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let _auth = services::start("auth", &good).unwrap();
    let gateway = nats.connect(&access::GATEWAY).await.unwrap();
    eventually("auth answers over TLS", async || {
        gateway.call::<rpc::AuthHealth>(&Empty {}, Duration::from_secs(1)).await.is_ok()
    })
    .await;
    let mut admin: PgConnection = database.admin().await.unwrap();
    let encrypted: Vec<bool> = sqlx::query_scalar(
        "select s.ssl from pg_stat_ssl s join pg_stat_activity a using (pid) where a.application_name = 'auth' and a.usename = 'auth'",
    )
    .fetch_all(&mut admin)
    .await
    .unwrap();
    assert!(!encrypted.is_empty() && encrypted.iter().all(|ssl| *ssl), "{encrypted:?}");
    admin.close().await.unwrap();

    // A certificate of another authority is refused.
    let other = Tls::generate().unwrap();
    let other = other.ca_file().display().to_string();
    let said = says(settings(&url(&other), &nats.url(), &nats_ca));
    assert!(said.contains("Postgres cannot be reached") && said.contains("certificate"), "{said}");
    let said = says(settings(&url(&ca), &nats.url(), &other));
    assert!(said.contains("cannot connect to NATS") && said.contains("certificate"), "{said}");
    // With an authority nothing goes in the clear, whatever the URL says.
    let plain = Nats::start().unwrap();
    let said = says(settings(&url(&ca), &plain.url(), &nats_ca));
    assert!(said.contains("cannot connect to NATS"), "{said}");
    assert!(!said.contains(&password), "{said}");
}
