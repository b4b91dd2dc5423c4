//! One turn, from wherever its record ends to its end.

use contract::{
    scheduler::TurnSpec,
    session::{Failure, TurnEnded},
};
use sprites::Sprite;
use types::{CredentialKind, Runtime, SessionId, SpriteName, Stage};

use crate::{
    Runner,
    agent::Agent,
    diagnosis::{self, Cause},
    follow::{self, Contact},
    job::Status,
    mask::Piece,
    provision::{Provisioning, StageFailed},
    record::{Fenced, Position, Record},
    runtimes,
    secrets::Secrets,
    setup::Setup,
    usage,
};

/// The stage of a failure that is the agent's own.
const AGENT: &str = "agent";

/// How a runner's work on a turn ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The turn's end is in the log, with this id.
    Settled(u64),
    /// Another writes the log.
    Superseded,
    /// The session was terminated: its Sprite has to go.
    Terminated,
    /// Released for another attempt. The reason says which infrastructure failure was in the way; it is empty where none was.
    Released(String),
}

/// Why a turn could not go on.
#[derive(Debug)]
pub enum Stopped {
    Fenced(Fenced),
    /// This runner cannot go on, and another attempt may: its lease of secrets is not good any more, or the sandbox does not answer it.
    Released(String),
    /// The turn failed, and this is what its user is told.
    Failed {
        stage: String,
        message: String,
    },
}

impl From<Fenced> for Stopped {
    fn from(fenced: Fenced) -> Self {
        Self::Fenced(fenced)
    }
}

impl From<StageFailed> for Stopped {
    fn from(failed: StageFailed) -> Self {
        match failed {
            StageFailed::Fenced(fenced) => Self::Fenced(fenced),
            StageFailed::Released(reason) => Self::Released(reason),
            StageFailed::Failed { stage, message } => {
                Self::Failed { stage: stage.to_string(), message: format!("Provisioning failed at {stage}: {message}") }
            }
        }
    }
}

pub async fn run(runner: &Runner, session: SessionId, turn: u32, spec: TurnSpec) -> End {
    let epoch = spec.epoch;
    tracing::info!(%session, turn, epoch, sprite = spec.sprite, "turn claimed");
    let mut record = match Record::open(&runner.bus, session, turn, &spec).await {
        Ok(Position::Open(record)) => record,
        Ok(Position::Ended(id)) => return End::Settled(id),
        Ok(Position::Fenced(fenced)) => return end_of(fenced),
        Err(error) => {
            tracing::warn!(%session, %error, "record cannot be read");
            return End::Released("its record cannot be read".to_owned());
        }
    };
    if epoch > 1 {
        metrics::counter!("aod_takeovers_total").increment(1);
        tracing::info!(%session, turn, epoch, stdout = record.checkpoint.stdout_offset, "taking the turn over");
        if let Err(fenced) = record.take_over().await {
            return end_of(fenced);
        }
    }
    let secrets = match Secrets::redeem(runner, &spec.lease_id).await {
        Ok(secrets) => secrets,
        Err(error) => {
            tracing::warn!(%session, %error, "secrets cannot be redeemed");
            return End::Released(format!("its secrets cannot be had: {}", error.message));
        }
    };
    record.secrets = secrets.masker();
    if runner.mask_output {
        record.masker = record.secrets.clone();
    }
    let ended = match work(runner, session, turn, &spec, &secrets, &mut record).await {
        Ok(ended) => ended,
        Err(Stopped::Fenced(fenced)) => return end_of(fenced),
        Err(Stopped::Released(reason)) => return End::Released(record.secrets.text(&reason)),
        Err(Stopped::Failed { stage, message }) => {
            let message = record.secrets.text(&message);
            tracing::info!(%session, turn, stage, message, "turn failed");
            TurnEnded { failure: Some(Failure { stage, message }), ..TurnEnded::default() }
        }
    };
    match record.ended(ended).await {
        Ok(id) => End::Settled(id),
        Err(fenced) => end_of(fenced),
    }
}

fn end_of(fenced: Fenced) -> End {
    metrics::counter!("aod_leases_lost_total").increment(1);
    match fenced {
        Fenced::Terminated => End::Terminated,
        Fenced::Superseded => End::Superseded,
        // The log goes on from what is persisted, which the next claim brings.
        Fenced::Forgotten => End::Released(String::new()),
    }
}

async fn work(
    runner: &Runner,
    session: SessionId,
    turn: u32,
    spec: &TurnSpec,
    secrets: &Secrets,
    record: &mut Record,
) -> Result<TurnEnded, Stopped> {
    let failed = |stage: Stage, message: String| Stopped::Failed { stage: stage.to_string(), message };
    let Ok(runtime) = spec.runtime.parse::<Runtime>() else {
        return Err(failed(Stage::InstallRuntime, format!("Runtime {} is not available on this deployment", spec.runtime)));
    };
    let adapter = runtimes::adapter(runtime);
    let Some(token) = secrets.credential(CredentialKind::Sprites) else {
        return Err(failed(Stage::CreateSprite, "No backend credentials configured".to_owned()));
    };
    let name: SpriteName = spec.sprite.parse().map_err(|_| failed(Stage::CreateSprite, "The Sprite's name is not valid".to_owned()))?;
    let client = sprites::Client::new(runner.http.clone(), &runner.sprites_base_url, token.clone());
    let sprite = client.sprite(name);
    let setup = Setup::read(spec).map_err(|error| failed(Stage::CreateSprite, format!("The session's set-up cannot be read: {error}")))?;
    let agent = Agent::new(session, turn, spec, adapter, &runner.models, setup.working_dir());
    let mut contact = Contact::new();

    if turn == 1 && !record.checkpoint.started {
        let provisioning = Provisioning {
            client: &client,
            sprite: &sprite,
            session,
            setup: &setup,
            secrets,
            agent: &agent,
            runtime,
            adapter,
            models: &runner.models,
        };
        provisioning.run(record, &mut contact).await?;
    }
    let start = agent.start(&sprite, record).await;
    start.map_err(|error| match error {
        StageFailed::Failed { stage, message } => failed(stage, format!("The agent could not be started: {message}")),
        other => other.into(),
    })?;
    let status = follow::to_the_end(&client, &sprite, &agent, record, &mut contact).await?;
    Ok(match status {
        Status::Exited { code, dropped } => {
            if dropped > 0 {
                // Where room was found again, the spool says where it is missing; here it is certain to be read.
                let note = format!("[aod] the sandbox's disk was full: {dropped} bytes of output were lost\n");
                record.output(true, Piece { spooled: 0, data: note.into() }).await?;
            }
            let bytes = record.checkpoint.stdout_offset;
            let usage = match adapter.usage() {
                Some(reader) => usage::read(&sprite, &agent.spool(false), bytes, reader).await,
                None => None,
            };
            let cause = match (code, runtime) {
                (0, _) => None,
                _ if dropped > 0 => Some(Cause::DiskFull),
                (_, Runtime::Shell) => None,
                _ => diagnose(&sprite, &agent, record, Some(code)).await,
            };
            let failure = cause.map(|cause| Failure { stage: AGENT.to_owned(), message: format!("The agent exited with {code}: {cause}") });
            TurnEnded { exit_code: Some(i32::from(code)), failure, usage, ..TurnEnded::default() }
        }
        Status::TimedOut => {
            // CLIs ask a model that fails again and again, for longer than many a turn may take.
            let cause = if runtime == Runtime::Shell { None } else { diagnose(&sprite, &agent, record, None).await };
            let hint = cause.map(|cause| format!(". Its last output suggests that {cause}")).unwrap_or_default();
            without_exit_code("timeout", format!("Turn timed out after {}s{hint}", spec.timeout_seconds))
        }
        Status::Killed => {
            let message = "The process that supervises the agent was killed, and what was left of the agent was stopped";
            without_exit_code("sandbox", message.to_owned())
        }
        Status::Lost => without_exit_code("sandbox", "The sandbox restarted while the agent was running".to_owned()),
    })
}

/// What an agent's end is put down to, where its last words say; without a status where it was ended.
async fn diagnose(sprite: &Sprite, agent: &Agent, record: &Record, code: Option<u8>) -> Option<Cause> {
    const LAST_BYTES: u64 = 8 * 1024;
    let (stdout, stderr) = (agent.spool(false), agent.spool(true));
    let (stdout, stderr) = tokio::join!(
        usage::tail(sprite, &stdout, record.checkpoint.stdout_offset, LAST_BYTES),
        usage::tail(sprite, &stderr, record.checkpoint.stderr_offset, LAST_BYTES),
    );
    let said = [stdout, stderr].into_iter().flatten().collect::<Vec<_>>().join("\n");
    diagnosis::of_agent(code, &said)
}

fn without_exit_code(stage: &str, message: String) -> TurnEnded {
    TurnEnded { failure: Some(Failure { stage: stage.to_owned(), message }), ..TurnEnded::default() }
}
