//! Handles jobs. The scheduler knows whether a job is still to be done and who owns it; the event
//! log knows how far it got.

use std::time::Duration;

use bus::{
    RpcError,
    work::{Job, Outcome},
};
use contract::{
    rpc,
    runner::{DestroySprite, RunTurn},
    scheduler::{
        ClaimSpriteRequest, ClaimTurnRequest, ReleaseTurnRequest, TurnSpec,
        claim_turn_reply::Verdict,
    },
    subject::RunnerJob,
};
use futures::StreamExt as _;
use sealing::KeyPair;
use tracing::Instrument as _;
use types::{Backoff, ErrorCode, SessionId};

use crate::{
    Runner, destroy,
    inputs::{self, Inputs},
    lease::Hold,
    prepare,
    secrets::ModelToken,
    sweep, turn,
};

const CLAIM_DEADLINE: Duration = Duration::from_secs(10);
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(200), max: Duration::from_secs(10), attempts: u32::MAX };
/// How soon a job is delivered again that came while this runner had no lease.
const NO_LEASE: Duration = Duration::from_millis(200);
/// After a termination that this runner noticed itself. The job for the Sprite keeps trying.
const DESTROY_ATTEMPTS: u32 = 4;
/// A Sprite that cannot be deleted this often is dead-lettered.
const DESTROY_DELIVERIES_MAX: u64 = 50;

pub async fn handle(runner: Runner, job: Job) -> Outcome {
    let again = RETRY.jittered(u32::try_from(job.delivery).unwrap_or(u32::MAX));
    match RunnerJob::parse(&job.subject, &job.payload) {
        Ok(RunnerJob::RunTurn(message)) => Box::pin(run_turn(runner, message, again)).await,
        Ok(RunnerJob::SweepSprites(message)) => {
            sweep::run(&runner, message, job.delivery, again).await
        }
        Ok(RunnerJob::DestroySprite(message)) => {
            destroy_sprite(&runner, message, job.delivery, again).await
        }
        Err(error) => Outcome::Reject(error.to_string()),
    }
}

/// Claims a turn. Once it is owned, the job has done its part: the turn continues under this
/// runner's lease.
async fn run_turn(runner: Runner, job: RunTurn, again: Duration) -> Outcome {
    let Ok(session) = job.session_id.parse::<SessionId>() else {
        return Outcome::Reject("malformed session id".to_owned());
    };
    if job.turn == 0 {
        return prepare::handle(runner, session).await;
    }
    let Some(lease) = runner.turns.lease() else { return Outcome::Retry(NO_LEASE) };
    let Some(hold) = runner.turns.hold(session, job.turn) else { return Outcome::Done };
    // Subscribed before the claim: a termination is seen by the one or the other.
    let Ok(terminated) = runner.bus.hints(contract::subject::terminate_hint(session)).await else {
        return Outcome::Retry(again);
    };
    let Ok(key) = KeyPair::generate() else { return Outcome::Retry(again) };
    let Ok(model_token) = runner.model_token() else { return Outcome::Retry(again) };
    let claim = ClaimTurnRequest {
        session_id: job.session_id.clone(),
        turn: job.turn,
        runner: runner.name.to_string(),
        runner_lease: lease.to_string(),
        public_key: key.public().to_vec(),
        model_token_hash: model_token.as_ref().map(ModelToken::hash).unwrap_or_default(),
        routing: runner.routing(),
    };
    let verdict = match runner.bus.call::<rpc::ClaimTurn>(&claim, CLAIM_DEADLINE).await {
        Ok(reply) => reply.verdict,
        Err(error) => {
            tracing::warn!(%session, %error, "failed to claim a turn; will retry");
            return Outcome::Retry(again);
        }
    };
    match verdict {
        Some(Verdict::Run(spec)) => {
            hold.claimed(spec.epoch);
            let span = tracing::info_span!("turn", %session, turn = job.turn, epoch = spec.epoch, runtime = spec.runtime);
            Outcome::Accepted(Box::pin(
                own(runner, session, job.turn, spec, (key, model_token), hold, terminated)
                    .instrument(span),
            ))
        }
        Some(Verdict::Settled(settled)) => match settled.destroy {
            None => Outcome::Done,
            Some(claim) => {
                destroy::outcome(destroy::sprite(&runner, session, &claim, &key).await, again)
            }
        },
        Some(Verdict::Owned(_)) => Outcome::Done,
        Some(Verdict::LeaseExpired(_)) => Outcome::Retry(NO_LEASE),
        None => Outcome::Retry(again),
    }
}

/// Runs a turn that this runner owns until it ends, is lost, or is released.
async fn own(
    runner: Runner,
    session: SessionId,
    turn: u32,
    spec: TurnSpec,
    (key, model_token): (KeyPair, Option<ModelToken>),
    hold: Hold,
    mut terminated: impl futures::Stream<Item = ()> + Unpin + Send,
) {
    let (sprite, epoch) = (spec.sprite.clone(), spec.epoch);
    let (stop, lost) = (runner.stop.clone(), hold.lost.clone());
    let inputs = match Inputs::follow(
        &runner.bus,
        inputs::Turn { session, turn, epoch },
        hold.inputs.clone(),
    )
    .await
    {
        Ok(inputs) => inputs,
        Err(error) => {
            tracing::warn!(%error, "failed to subscribe to hints of inputs");
            return release(&runner, session, turn, epoch, String::new()).await;
        }
    };
    let end = tokio::select! {
        // Released at once: the next runner continues where the log ends.
        () = stop.cancelled() => turn::End::Released(String::new()),
        () = lost.cancelled() => {
            tracing::info!(%session, turn, "lost ownership of the turn; stopping");
            return;
        }
        _ = terminated.next() => turn::End::Terminated,
        end = turn::run(&runner, session, turn, spec, (&key, model_token), inputs) => end,
    };
    match end {
        turn::End::Settled(id) => hold.ended(id),
        turn::End::Terminated => {
            tracing::info!(%session, turn, "session was terminated");
            // This runner may just have been creating the Sprite: it is deleted here too, beside
            // the job that does so.
            destroy_now(&runner, session).await;
        }
        turn::End::Superseded => release(&runner, session, turn, epoch, String::new()).await,
        turn::End::Released(reason) => {
            tracing::info!(%session, turn, sprite, reason, "releasing the turn");
            release(&runner, session, turn, epoch, reason).await;
        }
    }
}

/// Lets others have the turn. Should no answer come, the next heartbeats do not name it.
async fn release(runner: &Runner, session: SessionId, turn: u32, epoch: u32, reason: String) {
    let request = ReleaseTurnRequest { session_id: session.to_string(), turn, epoch, reason };
    if let Err(error) = runner.bus.call::<rpc::ReleaseTurn>(&request, CLAIM_DEADLINE).await {
        tracing::warn!(%session, turn, %error, "release not answered");
    }
}

async fn destroy_now(runner: &Runner, session: SessionId) {
    for attempt in 1..=DESTROY_ATTEMPTS {
        // Its termination may not be persisted yet.
        let destroyed = claim_and_destroy(runner, session)
            .await
            .unwrap_or_else(|failure| Err(failure.to_string()));
        match destroyed {
            Ok(()) => return,
            Err(reason) => tracing::debug!(%session, attempt, reason, "Sprite not deleted here"),
        }
        tokio::time::sleep(RETRY.jittered(attempt)).await;
    }
}

/// Claims the Sprite of a session that ended, with a key of its own, and deletes it.
pub async fn claim_and_destroy(
    runner: &Runner,
    session: SessionId,
) -> Result<Result<(), String>, RpcError> {
    let key = KeyPair::generate().map_err(RpcError::internal)?;
    let request = ClaimSpriteRequest {
        session_id: session.to_string(),
        runner: runner.name.to_string(),
        public_key: key.public().to_vec(),
    };
    let claim = runner.bus.call::<rpc::ClaimSprite>(&request, CLAIM_DEADLINE).await?;
    Ok(destroy::sprite(runner, session, &claim, &key).await)
}

async fn destroy_sprite(
    runner: &Runner,
    job: DestroySprite,
    delivery: u64,
    again: Duration,
) -> Outcome {
    let Ok(session) = job.session_id.parse::<SessionId>() else {
        return Outcome::Reject("malformed session id".to_owned());
    };
    let destroyed = match claim_and_destroy(runner, session).await {
        Ok(destroyed) => destroyed,
        Err(failure) if failure.code == ErrorCode::NotFound => return Outcome::Done,
        Err(failure) => Err(failure.to_string()),
    };
    match destroyed {
        Err(reason) if delivery >= DESTROY_DELIVERIES_MAX => {
            Outcome::Reject(format!("Sprite {} is not deleted: {reason}", job.sprite))
        }
        destroyed => destroy::outcome(destroyed, again),
    }
}
