//! Deleting a Sprite that no session needs any more.

use std::time::Duration;

use bus::work::Outcome;
use contract::{
    rpc,
    scheduler::{SpriteClaim, SpriteDestroyedRequest},
};
use sealing::KeyPair;
use types::{CredentialKind, SessionId, SpriteName};

use crate::{Runner, secrets::Secrets};

/// Deletes the Sprite and reports that to the scheduler. Idempotent.
pub async fn sprite(
    runner: &Runner,
    session: SessionId,
    claim: &SpriteClaim,
    key: &KeyPair,
) -> Result<(), String> {
    let name: SpriteName =
        claim.sprite.parse().map_err(|error| format!("{}: {error}", claim.sprite))?;
    let secrets =
        Secrets::redeem(runner, &claim.lease_id, key).await.map_err(|error| error.to_string())?;
    // Without credentials there is nothing this deployment could delete it with.
    if let Some(token) = secrets.credential(CredentialKind::Sprites) {
        let client =
            sprites::Client::new(runner.http.clone(), &runner.sprites_base_url, token.clone());
        client.delete(&name).await.map_err(|error| error.to_string())?;
    }
    let told = SpriteDestroyedRequest { session_id: session.to_string() };
    runner
        .bus
        .call::<rpc::SpriteDestroyed>(&told, Duration::from_secs(10))
        .await
        .map_err(|error| error.to_string())?;
    tracing::info!(%session, sprite = %name, "Sprite deleted");
    Ok(())
}

pub fn outcome(destroyed: Result<(), String>, again: Duration) -> Outcome {
    match destroyed {
        Ok(()) => Outcome::Done,
        Err(reason) => {
            tracing::warn!(reason, "failed to delete a Sprite; will retry");
            Outcome::Retry(again)
        }
    }
}
