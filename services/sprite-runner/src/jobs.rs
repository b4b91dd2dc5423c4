//! What a job means now. The scheduler knows whether it still is to be done; the record knows how far it got.

use std::time::Duration;

use bus::work::{HAND_BACK, Job, Outcome};
use contract::{
    rpc,
    runner::{DestroySprite, RunTurn, SweepSprites},
    scheduler::{ClaimSpriteRequest, ClaimTurnRequest, ReleaseTurnRequest, claim_turn_reply::Verdict},
};
use futures::StreamExt as _;
use prost::Message as _;
use tracing::Instrument as _;
use types::{Backoff, ErrorCode, SessionId};

use crate::{Runner, destroy, sweep, turn};

const CLAIM_DEADLINE: Duration = Duration::from_secs(10);
const RETRY: Backoff = Backoff { base: Duration::from_millis(200), max: Duration::from_secs(10), attempts: u32::MAX };
/// A Sprite that cannot be deleted this often is left to the dead letters and to whoever reads them.
const DESTROY_DELIVERIES_MAX: u64 = 50;

pub async fn handle(runner: Runner, job: Job) -> Outcome {
    let again = RETRY.jittered(u32::try_from(job.delivery).unwrap_or(u32::MAX));
    if job.subject.contains(".turn.run.") {
        match RunTurn::decode(job.payload.clone()) {
            Ok(message) => Box::pin(run_turn(runner, message, again)).await,
            Err(error) => Outcome::Reject(format!("malformed job: {error}")),
        }
    } else if job.subject.contains(".sprite.sweep.") {
        match SweepSprites::decode(job.payload.clone()) {
            Ok(message) => sweep::run(&runner, message, job.delivery, again).await,
            Err(error) => Outcome::Reject(format!("malformed job: {error}")),
        }
    } else {
        match DestroySprite::decode(job.payload.clone()) {
            Ok(message) => destroy_sprite(&runner, message, job.delivery, again).await,
            Err(error) => Outcome::Reject(format!("malformed job: {error}")),
        }
    }
}

async fn run_turn(runner: Runner, job: RunTurn, again: Duration) -> Outcome {
    let Ok(session) = job.session_id.parse::<SessionId>() else { return Outcome::Reject("malformed session id".to_owned()) };
    // Subscribed before the claim: a termination is seen by the one or the other.
    let mut terminated = match runner.bus.hints(contract::subject::terminate_hint(session)).await {
        Ok(hints) => hints,
        Err(_) => return Outcome::Retry(again),
    };
    let claim =
        ClaimTurnRequest { session_id: job.session_id.clone(), turn: job.turn, runner: runner.name.to_string(), ..Default::default() };
    let verdict = match runner.bus.call::<rpc::ClaimTurn>(&claim, CLAIM_DEADLINE).await {
        Ok(reply) => reply.verdict,
        Err(error) => {
            tracing::warn!(%session, %error, "turn cannot be claimed; handing it back");
            return Outcome::Retry(again);
        }
    };
    let spec = match verdict {
        Some(Verdict::Run(spec)) => spec,
        Some(Verdict::Settled(settled)) => {
            return match settled.destroy {
                None => Outcome::Done,
                Some(claim) => destroy::outcome(destroy::sprite(&runner, session, &claim).await, again),
            };
        }
        Some(Verdict::Owned(_)) => return Outcome::Done,
        Some(Verdict::LeaseExpired(_)) | None => return Outcome::Retry(again),
    };
    let (sprite, epoch) = (spec.sprite.clone(), spec.epoch);
    let stop = runner.stop.clone();
    let span = tracing::info_span!("turn", %session, turn = job.turn, epoch, runtime = spec.runtime);
    tokio::select! {
        // Handed over at once: whoever takes it goes on where the record ends.
        () = stop.cancelled() => Outcome::Retry(HAND_BACK),
        _ = terminated.next() => {
            tracing::info!(%session, "terminated while in hand");
            // This runner may just have been making the Sprite: it is deleted here too, whoever else does.
            let request = ClaimSpriteRequest { session_id: session.to_string(), runner: runner.name.to_string() };
            match runner.bus.call::<rpc::ClaimSprite>(&request, CLAIM_DEADLINE).await {
                Ok(claim) => destroy::outcome(destroy::sprite(&runner, session, &claim).await, again),
                Err(_) => Outcome::Retry(again),
            }
        }
        end = turn::run(&runner, session, job.turn, spec).instrument(span) => match end {
            turn::End::Settled => Outcome::Done,
            turn::End::Superseded => Outcome::Leave,
            turn::End::Terminated => Outcome::Retry(Duration::ZERO),
            turn::End::HandBack(reason) => {
                tracing::info!(%session, sprite, reason, "handing the turn back");
                // Told to whoever asks; losing it costs the reason alone.
                let told = ReleaseTurnRequest { session_id: session.to_string(), turn: job.turn, epoch, reason };
                let _ = runner.bus.call::<rpc::ReleaseTurn>(&told, CLAIM_DEADLINE).await;
                Outcome::Retry(again)
            }
        },
    }
}

async fn destroy_sprite(runner: &Runner, job: DestroySprite, delivery: u64, again: Duration) -> Outcome {
    let Ok(session) = job.session_id.parse::<SessionId>() else { return Outcome::Reject("malformed session id".to_owned()) };
    let request = ClaimSpriteRequest { session_id: job.session_id, runner: runner.name.to_string() };
    let destroyed = match runner.bus.call::<rpc::ClaimSprite>(&request, CLAIM_DEADLINE).await {
        Ok(claim) => destroy::sprite(runner, session, &claim).await,
        Err(failure) if failure.code == ErrorCode::NotFound => return Outcome::Done,
        Err(failure) => Err(failure.to_string()),
    };
    match destroyed {
        Err(reason) if delivery >= DESTROY_DELIVERIES_MAX => Outcome::Reject(format!("Sprite {} is not deleted: {reason}", job.sprite)),
        destroyed => destroy::outcome(destroyed, again),
    }
}
