//! The servers from images, where Docker answers. Run by `cargo test -p testkit --features
//! containers`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use contract::access;
use testkit::{Database, Nats, containers, postgres::Server};

/// Whether Docker answers; says so where it does not.
fn docker() -> bool {
    let available = containers::available();
    if !available {
        eprintln!("skipped: no Docker engine answers");
    }
    available
}

#[tokio::test]
async fn a_database_for_each_test_comes_from_an_image() {
    if !docker() {
        return;
    }
    let server = Server::start_in_container().unwrap();
    server.ready().await.unwrap();
    let (one, other) = (create_on(&server).await, create_on(&server).await);
    let mut admin = one.admin().await.unwrap();
    sqlx::query("create table mark ()").execute(&mut admin).await.unwrap();
    let mut admin = other.admin().await.unwrap();
    let marks: i64 = sqlx::query_scalar("select count(*) from pg_tables where tablename = 'mark'")
        .fetch_one(&mut admin)
        .await
        .unwrap();
    assert_eq!(marks, 0);
}

async fn create_on(server: &Server) -> Database {
    Database::create_on(server.url().to_owned()).await.unwrap()
}

#[tokio::test]
async fn a_nats_server_from_an_image_has_our_users_and_keeps_its_streams() {
    if !docker() {
        return;
    }
    let mut nats = Nats::start_in_container().unwrap();
    nats.with_streams().await.unwrap();
    nats.restart().unwrap();
    let bus = nats.connect(&access::SCHEDULER).await.unwrap();
    let stream = contract::topology::streams([types::Partition::FIRST]).next().unwrap();
    assert!(bus.find_stream(&stream).await.unwrap().is_some());
}
