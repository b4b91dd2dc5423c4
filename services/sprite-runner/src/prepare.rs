//! Prepares a session's sandbox before its first message (ADR 0240), or before the session is
//! created (ADR 0250): all that precedes the first turn, and the CLI, which then waits.
//!
//! Nothing of it is in the event log, and no one owns it. The first turn does the same once more
//! and finds it done, as a successor finds what a runner that died has done.

use std::time::Duration;

use bus::work::Outcome;
use contract::{
    host::{Input, StartCli, input, input_settled, record},
    rpc,
    scheduler::{ClaimPreparationReply, ClaimPreparationRequest, EndPreparationRequest, TurnSpec},
    subject,
};
use futures::StreamExt as _;
use sealing::KeyPair;
use tokio::sync::OwnedSemaphorePermit;
use tracing::Instrument as _;
use types::{SessionId, limits::PROVISIONING_MAX};

use crate::{
    Runner,
    event_log::EventLog,
    host::{Incoming, Link},
    jobs::claim_and_destroy,
    playback::START_INPUT,
    secrets::{ModelToken, Secrets},
    stopped::Stopped,
    turn,
};

/// Many clients send the message at once. Its turn is slower beside a preparation than without one.
const MESSAGE_WITHIN: Duration = Duration::from_millis(200);
const CLAIM_DEADLINE: Duration = Duration::from_secs(10);
/// How long a CLI that starts is waited for. It continues to start by itself.
const CLI_MAX: Duration = Duration::from_secs(60);

/// Prepares a session, unless this runner prepares enough others: the first turn loses time by
/// that, and nothing else.
pub async fn handle(runner: Runner, session: SessionId) -> Outcome {
    let Ok(permit) = runner.preparations.clone().try_acquire_owned() else { return Outcome::Done };
    Outcome::Accepted(Box::pin(
        prepare(runner, session, permit).instrument(tracing::info_span!("preparation", %session)),
    ))
}

async fn prepare(runner: Runner, session: SessionId, _permit: OwnedSemaphorePermit) {
    // Subscribed before the claim: what ends the preparation is seen by the one or the other.
    let (Ok(mut terminated), Ok(mut messages)) = (
        runner.bus.hints(subject::terminate_hint(session)).await,
        runner.bus.hints(subject::inputs_hint(session)).await,
    ) else {
        return;
    };
    if tokio::time::timeout(MESSAGE_WITHIN, messages.next()).await.is_ok() {
        return;
    }
    let Claim { spec, secrets, is_spare } = match claim(&runner, session).await {
        Ok(Some(claimed)) => claimed,
        Ok(None) => return,
        Err(reason) => {
            tracing::info!(reason, "session is not prepared");
            return;
        }
    };
    let work = tokio::time::timeout(PROVISIONING_MAX, work(&runner, session, &spec, &secrets));
    let is_ready = tokio::select! {
        () = runner.stop.cancelled() => {
            if !is_spare {
                return;
            }
            false
        }
        // Its turn continues, with this runner or another.
        _ = messages.next() => {
            tracing::debug!("a message ended the preparation");
            false
        }
        _ = terminated.next() => false,
        done = work => {
            match &done {
                Ok(Ok(())) => tracing::info!("session is prepared"),
                // The first turn tells its user.
                Ok(Err(reason)) => tracing::info!(reason, "session is not prepared"),
                Err(_) => tracing::info!("preparing the session took too long"),
            }
            matches!(done, Ok(Ok(())))
        }
    };
    if is_spare {
        report(&runner, session, is_ready).await;
    }
    // A session that ended meanwhile may have had its Sprite deleted before this made it.
    if let Ok(Err(reason)) = claim_and_destroy(&runner, session).await {
        tracing::debug!(reason, "Sprite not deleted here");
    }
}

/// Reports how the preparation of a spare ended.
async fn report(runner: &Runner, session: SessionId, is_ready: bool) {
    let request = EndPreparationRequest { session_id: session.to_string(), is_ready };
    if let Err(error) = runner.bus.call::<rpc::EndPreparation>(&request, CLAIM_DEADLINE).await {
        tracing::info!(%error, "the end of the preparation is not reported");
    }
}

/// What a preparation takes.
struct Claim {
    spec: TurnSpec,
    secrets: Secrets,
    is_spare: bool,
}

/// Claims the preparation, if there is anything to prepare.
async fn claim(runner: &Runner, session: SessionId) -> Result<Option<Claim>, String> {
    let key = KeyPair::generate().map_err(|error| error.to_string())?;
    let model_token = runner.model_token().map_err(|error| error.to_string())?;
    let request = ClaimPreparationRequest {
        session_id: session.to_string(),
        runner: runner.name.to_string(),
        public_key: key.public().to_vec(),
        model_token_hash: model_token.as_ref().map(ModelToken::hash).unwrap_or_default(),
        routing: runner.routing(),
    };
    let reply = runner.bus.call::<rpc::ClaimPreparation>(&request, CLAIM_DEADLINE).await;
    let ClaimPreparationReply { spec, is_spare } = reply.map_err(|error| error.to_string())?;
    let Some(spec) = spec else { return Ok(None) };
    let secrets = Secrets::redeem(runner, &spec.lease_id, &key).await;
    if secrets.is_err() && is_spare {
        report(runner, session, false).await;
    }
    let secrets = secrets.map_err(|error| error.to_string())?.of_turn(session, model_token);
    Ok(Some(Claim { spec, secrets, is_spare }))
}

async fn work(
    runner: &Runner,
    session: SessionId,
    spec: &TurnSpec,
    secrets: &Secrets,
) -> Result<(), String> {
    let log = EventLog::unwritten(&runner.bus, session, spec);
    let mut log = log.map_err(|error| error.to_string())?;
    log.secrets = secrets.masker();
    let reached = Box::pin(turn::reach(runner, session, 1, spec, secrets, &mut log)).await;
    let mut reached = reached.map_err(|stopped| match stopped {
        Stopped::Fenced(_) => "its log is written".to_owned(),
        Stopped::Released(reason) => log.secrets.text(&reason),
        Stopped::Failed { message, .. } => log.secrets.text(&message),
    })?;
    if runner.agent_idle.is_zero() {
        return Ok(());
    }
    tokio::time::timeout(CLI_MAX, start_cli(&mut reached.link))
        .await
        .unwrap_or_else(|_| Err("its CLI does not take messages yet".to_owned()))
}

/// Starts the CLI and waits until it takes a message: the connection keeps the sandbox awake.
async fn start_cli(link: &mut Link) -> Result<(), String> {
    let kind = Some(input::Kind::StartCli(StartCli {}));
    link.send(Input { id: START_INPUT.to_owned(), kind });
    loop {
        match link.next().await {
            Incoming::Record { record, .. } => {
                let Some(record::Kind::InputSettled(settled)) = record.kind else { continue };
                if settled.id == START_INPUT {
                    return match settled.outcome() {
                        input_settled::Outcome::Applied => Ok(()),
                        _ => Err(settled.message),
                    };
                }
            }
            Incoming::Attached(_) => {}
            Incoming::Gone(gone) => return Err(format!("its sandbox is gone: {gone:?}")),
        }
    }
}
