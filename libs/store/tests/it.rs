//! Migrations, on a real server.

use store::Step;
use testkit::Database;

const OLD: &[Step] = &[(1, "first", "create table first (id int)")];
const NEW: &[Step] = &[OLD[0], (2, "second", "create table second (id int)")];

/// In an upgrade old replicas start again beside new ones; and a rollback is one to the release before.
#[tokio::test]
async fn a_release_starts_on_the_schema_of_the_next() {
    let database = Database::create().await.unwrap();
    let config = database.config("auth");
    for steps in [OLD, NEW, OLD, NEW] {
        store::open(&config, "test", steps).await.unwrap();
    }
}
