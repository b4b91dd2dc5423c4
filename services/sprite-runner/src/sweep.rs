//! Searching an account for Sprites that no session knows, and deleting them.

use std::time::Duration;

use bus::work::Outcome;
use contract::{
    rpc,
    runner::SweepSprites,
    scheduler::{ClaimSweepRequest, FindOrphansRequest},
};
use sealing::KeyPair;
use types::CredentialKind;

use crate::{Runner, secrets::Secrets};

const DEADLINE: Duration = Duration::from_secs(10);
/// A question about so many names fits a message.
const NAMES_AT_A_TIME: usize = 1000;
/// The next search comes by itself: this one is not tried for long.
const DELIVERIES_MAX: u64 = 3;

pub async fn run(runner: &Runner, job: SweepSprites, delivery: u64, again: Duration) -> Outcome {
    match sweep(runner, job).await {
        Ok(()) => Outcome::Done,
        Err(reason) if delivery >= DELIVERIES_MAX => {
            tracing::warn!(reason, "failed to search an account for orphaned Sprites");
            Outcome::Done
        }
        Err(_) => Outcome::Retry(again),
    }
}

async fn sweep(runner: &Runner, job: SweepSprites) -> Result<(), String> {
    let key = KeyPair::generate().map_err(|error| error.to_string())?;
    let request = ClaimSweepRequest {
        user_id: job.user_id,
        runner: runner.name.to_string(),
        public_key: key.public().to_vec(),
    };
    let claim = runner
        .bus
        .call::<rpc::ClaimSweep>(&request, DEADLINE)
        .await
        .map_err(|error| error.to_string())?;
    let secrets =
        Secrets::redeem(runner, &claim.lease_id, &key).await.map_err(|error| error.to_string())?;
    let Some(token) = secrets.credential(CredentialKind::Sprites) else { return Ok(()) };
    let client = sprites::Client::new(runner.http.clone(), &runner.sprites_base_url, token.clone());
    let names = client.list(&claim.name_prefix).await.map_err(|error| error.to_string())?;
    let mut failed = None;
    for names in names.chunks(NAMES_AT_A_TIME) {
        let request = FindOrphansRequest { names: names.to_vec() };
        let orphans = runner
            .bus
            .call::<rpc::FindOrphans>(&request, DEADLINE)
            .await
            .map_err(|error| error.to_string())?;
        for name in orphans.names {
            let Ok(name) = name.parse() else { continue };
            match client.delete(&name).await {
                Ok(()) => {
                    metrics::counter!("aod_orphans_deleted_total").increment(1);
                    tracing::warn!(sprite = %name, "deleting an orphaned Sprite");
                }
                // The others all the same.
                Err(error) => failed = Some(error.to_string()),
            }
        }
    }
    failed.map_or(Ok(()), Err)
}
