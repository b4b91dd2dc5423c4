//! Searching an account for Sprites that no session knows, and deleting them.

use std::time::Duration;

use bus::work::Outcome;
use contract::{
    rpc,
    runner::SweepSprites,
    scheduler::{ClaimSweepRequest, FindOrphansRequest},
};
use types::CredentialKind;

use crate::{Runner, secrets::Secrets};

const DEADLINE: Duration = Duration::from_secs(10);
/// The next search comes by itself: this one is not tried for long.
const DELIVERIES_MAX: u64 = 3;

pub async fn run(runner: &Runner, job: SweepSprites, delivery: u64, again: Duration) -> Outcome {
    match sweep(runner, job).await {
        Ok(()) => Outcome::Done,
        Err(reason) if delivery >= DELIVERIES_MAX => {
            tracing::warn!(reason, "an account was not searched for orphaned Sprites");
            Outcome::Done
        }
        Err(_) => Outcome::Retry(again),
    }
}

async fn sweep(runner: &Runner, job: SweepSprites) -> Result<(), String> {
    let request = ClaimSweepRequest { user_id: job.user_id, runner: runner.name.to_string() };
    let claim = runner.bus.call::<rpc::ClaimSweep>(&request, DEADLINE).await.map_err(|error| error.to_string())?;
    let secrets = Secrets::redeem(runner, &claim.lease_id).await.map_err(|error| error.to_string())?;
    let Some(token) = secrets.credential(CredentialKind::Sprites) else { return Ok(()) };
    let client = sprites::Client::new(runner.http.clone(), &runner.sprites_base_url, token.clone());
    let names = client.list(&claim.name_prefix).await.map_err(|error| error.to_string())?;
    if names.is_empty() {
        return Ok(());
    }
    let orphans = runner.bus.call::<rpc::FindOrphans>(&FindOrphansRequest { names }, DEADLINE).await.map_err(|error| error.to_string())?;
    for name in orphans.names {
        let Ok(name) = name.parse() else { continue };
        client.delete(&name).await.map_err(|error| error.to_string())?;
        metrics::counter!("aod_orphans_deleted_total").increment(1);
        tracing::warn!(sprite = %name, "a Sprite that no session knows is deleted");
    }
    Ok(())
}
