//! Runs one turn, from the end of its log so far to the turn's end.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use contract::{
    host::{Input, event},
    scheduler::TurnSpec,
    session::{AgentEvent, Failure, TurnEnded, TurnStarted, session_event::Kind},
};
use sealing::KeyPair;
use sprites::{OutsideSecret, Sprite};
use tokio::time::Instant;
use types::{CredentialKind, ModelRef, Runtime, SessionId, SpriteName, Stage, StageState};

use crate::{
    Runner,
    agent::Agent,
    event_log::{EventLog, Fenced, Position},
    files,
    host::{Access, Incoming, Link, STARTS_MAX},
    inputs::{self, Inputs},
    meter::Meter,
    outcome::{self, Outcome},
    pace::Pace,
    playback::{Playback, Scope, sent_bytes, turn_input},
    provision::{Provisioning, StepRunner},
    runtimes,
    secrets::{ModelToken, Secrets},
    setup::Setup,
    stopped::Stopped,
};

/// How much of the journal is kept after it was appended, in case the stream loses events before
/// they are persisted.
const UNPERSISTED_BYTES: u64 = 8 << 20;
/// How much of the journal may be persisted before the host is told to delete it.
const PERSISTED_STEP: u64 = 1 << 20;
/// How long an agent that waits for a decision must be silent before its sandbox may sleep.
const REST_AFTER: Duration = Duration::from_secs(1);
/// How long a sandbox is kept awake for an input that the host does not accept: it may know the
/// input already.
const ACCEPTED_WITHIN: Duration = Duration::from_secs(15);

/// How a runner's work on a turn ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The turn's end is in the log, with this id.
    Settled(u64),
    /// Another runner, or the scheduler, writes the log.
    Superseded,
    /// The session was terminated: its Sprite has to go.
    Terminated,
    /// Released for another attempt. The reason names the infrastructure failure; it is empty if
    /// there was none.
    Released(String),
}

pub async fn run(
    runner: &Runner,
    session: SessionId,
    turn: u32,
    spec: TurnSpec,
    (key, model_token): (&KeyPair, Option<ModelToken>),
    inputs: Inputs,
) -> End {
    let epoch = spec.epoch;
    tracing::info!(%session, turn, epoch, sprite = spec.sprite, "turn claimed");
    let (log, secrets) = tokio::join!(
        EventLog::open(&runner.bus, session, turn, &spec),
        Secrets::redeem(runner, &spec.lease_id, key)
    );
    let mut log = match log {
        Ok(Position::Open(log)) => log,
        Ok(Position::Ended(id)) => return End::Settled(id),
        Ok(Position::Fenced(fenced)) => return end_of(fenced),
        Err(error) => {
            tracing::warn!(%session, %error, "event log cannot be read");
            return End::Released("its event log cannot be read".to_owned());
        }
    };
    if epoch > 1 {
        metrics::counter!("aod_takeovers_total").increment(1);
        tracing::info!(%session, turn, epoch, stdout = log.checkpoint.stdout_offset, "taking the turn over");
        if let Err(fenced) = log.take_over().await {
            return end_of(fenced);
        }
    }
    let secrets = match secrets {
        Ok(secrets) => secrets.of_turn(session, model_token),
        Err(error) => {
            tracing::warn!(%session, %error, "secrets cannot be redeemed");
            return End::Released(format!("its secrets cannot be had: {}", error.message));
        }
    };
    log.secrets = secrets.masker();
    if runner.mask_output {
        log.masker = log.secrets.clone();
    }
    let ended = match Box::pin(work(runner, session, turn, &spec, &secrets, &mut log, inputs)).await
    {
        Ok(mut ended) => {
            if let Some(failure) = &mut ended.failure {
                failure.message = log.secrets.text(&failure.message);
            }
            ended
        }
        Err(Stopped::Fenced(fenced)) => return end_of(fenced),
        Err(Stopped::Released(reason)) => return End::Released(log.secrets.text(&reason)),
        Err(Stopped::Failed { stage, message }) => {
            let message = log.secrets.text(&message);
            tracing::info!(%session, turn, stage, message, "turn failed");
            TurnEnded { failure: Some(Failure { stage, message }), ..TurnEnded::default() }
        }
    };
    let unstarted = || TurnStarted {
        prompt: log.masker.text(&spec.prompt),
        input_id: spec.input_id.clone(),
        ..TurnStarted::default()
    };
    let ended = TurnEnded { unstarted: (!log.checkpoint.started).then(unstarted), ..ended };
    match log.ended(ended).await {
        Ok(id) => End::Settled(id),
        Err(fenced) => end_of(fenced),
    }
}

fn end_of(fenced: Fenced) -> End {
    metrics::counter!("aod_leases_lost_total").increment(1);
    match fenced {
        Fenced::Terminated => End::Terminated,
        Fenced::Superseded => End::Superseded,
        // The log continues from what is persisted, which the next claim brings.
        Fenced::Forgotten => End::Released(String::new()),
    }
}

/// A turn's sandbox, with all that precedes the turn itself.
pub struct Reached {
    runtime: Runtime,
    sprite: Sprite,
    agent: Agent,
    pub link: Link,
    /// Where the turn's records are looked for, as far as is known.
    position: u64,
    renews: bool,
}

/// Sets a new sandbox up, or renews an existing one, and connects to its agent host.
pub async fn reach(
    runner: &Runner,
    session: SessionId,
    turn: u32,
    spec: &TurnSpec,
    secrets: &Secrets,
    log: &mut EventLog,
) -> Result<Reached, Stopped> {
    let Ok(runtime) = spec.runtime.parse::<Runtime>() else {
        return Err(Stopped::failed(
            Stage::InstallRuntime.as_str(),
            format!("Runtime {} is not available on this deployment", spec.runtime),
        ));
    };
    let adapter = runtimes::adapter(runtime);
    let Some(token) = secrets.credential(CredentialKind::Sprites) else {
        return Err(Stopped::failed(
            Stage::CreateSprite.as_str(),
            "No backend credentials configured",
        ));
    };
    let name: SpriteName = spec.sprite.parse().map_err(|_| {
        Stopped::failed(Stage::CreateSprite.as_str(), "The Sprite's name is not valid")
    })?;
    let started = log.checkpoint.started;
    if started && log.checkpoint.journal_offset == 0 {
        // An earlier release kept no journal, and its files in the Sprite are no longer supported.
        let message = "The turn was started by an earlier release of the runner and cannot be continued; send the prompt again";
        return Err(Stopped::failed("sandbox", message));
    }
    let client = sprites::Client::new(runner.http.clone(), &runner.sprites_base_url, token.clone());
    let sprite = client.sprite(name);
    let unreadable = |error: serde_json::Error| {
        let message = format!("The session's set-up cannot be read: {error}");
        Stopped::failed(Stage::CreateSprite.as_str(), message)
    };
    let setup = Setup::read(spec).map_err(unreadable)?;
    let provider = ModelRef::parse(runtime, &spec.model).ok().and_then(|model| model.provider());
    if let Some(name) = provider.and_then(|provider| secrets.address_without_key(provider)) {
        let message = format!(
            "The session sets {name} without a key: stored keys are sent to the model gateway's providers alone. Set the key's variable beside it."
        );
        return Err(Stopped::failed("credentials", message));
    }
    let models = runner.models_of(secrets);
    let mut agent =
        Agent::new(session, spec, (runtime, adapter), &models, &setup, runner.agent_idle)
            .map_err(unreadable)?;
    let gateway = runner.model_gateway.as_deref();
    let provisioning = Provisioning {
        client: &client,
        sprite: &sprite,
        setup: &setup,
        secrets,
        runtime,
        adapter,
        models: &models,
        gateway,
        is_prepared: spec.is_prepared,
    };
    let is_new = turn == 1 && !started;
    if is_new {
        provisioning.create(log).await?;
    }
    let outside = secrets.outside();
    if spec.may_change {
        // A sandbox that was not set up has no later turns.
        let stage = if is_new { Stage::EnvFile.as_str() } else { "credentials" };
        agent.add_variables(keep_outside(&sprite, &client, &outside, stage).await?);
    }
    let offset = log.checkpoint.journal_offset;
    let is_preparation = log.is_unwritten();
    // A CLI that a preparation started may have another key than the one that is stored by now, or
    // one where none is.
    let may_have_old_key =
        is_new && (is_preparation || spec.is_prepared) && secrets.may_be_in_sandbox();
    let may_change = spec.may_change || may_have_old_key;
    let revision = if may_change {
        agent.revision(secrets, &provisioning.config_without_token())
    } else {
        String::new()
    };
    // Before a message is sent: what runs from the turn before is replaced where it is another.
    let renews = spec.may_change && !started && !is_new;
    if renews && let Err(error) = provisioning.renew_config().await {
        return Err(Stopped::Released(format!(
            "its sandbox does not take the agent's configuration: {error}"
        )));
    }
    if !started && !is_new {
        files::mount(runner, &sprite, spec, is_new).await?;
    }
    let access = |from: u64, may_run: bool, keeps_host: bool| Access {
        client: client.clone(),
        sprite: sprite.clone(),
        program: runner.program.clone(),
        spec: agent.spec(secrets, revision.clone()),
        outside: outside.values().cloned().collect(),
        from,
        may_run,
        keeps_host,
        // A host that ends in a preparation was replaced by the first turn.
        starts_max: if is_preparation { 1 } else { STARTS_MAX },
        may_skip: !started,
    };
    // A set-up's journal is read again by each runner: what a failed script said is told. Scripts
    // that run continue, whatever their host was started with.
    let from = if is_new { 0 } else { offset };
    let mut link = Link::open(access(from, offset > 0 && !renews, is_new));
    let mut position = 0;
    if is_new {
        let scope = Scope::SetUp { stage: "", logged_below: offset };
        let playback =
            Playback::new(scope, log.secrets.clone(), runner.output.bytes_max, &log.checkpoint);
        let mut host = StepRunner { link, playback };
        provisioning.install_packages(log, &mut host).await?;
        files::mount(runner, &sprite, spec, is_new).await?;
        provisioning.set_up(log, &mut host).await?;
        position = host.playback.position().max(offset);
        link = host.link;
        let may_be_of_another = spec.is_prepared || spec.epoch > 1;
        if may_be_of_another && !is_preparation && !revision.is_empty() {
            drop(link);
            link = Link::open(access(position, false, false));
        }
    }
    Ok(Reached { runtime, sprite, agent, link, position, renews })
}

async fn work(
    runner: &Runner,
    session: SessionId,
    turn: u32,
    spec: &TurnSpec,
    secrets: &Secrets,
    log: &mut EventLog,
    inputs: Inputs,
) -> Result<TurnEnded, Stopped> {
    let (started, offset) = (log.checkpoint.started, log.checkpoint.journal_offset);
    let Reached { runtime, sprite, agent, mut link, mut position, renews } =
        reach(runner, session, turn, spec, secrets, log).await?;
    let mut waited = Duration::ZERO;
    if !started {
        log.stage(Stage::RuntimeStart, StageState::Started, None, None).await?;
        let prompt = log.masker.text(&spec.prompt);
        let begin = TurnStarted {
            prompt,
            input_id: spec.input_id.clone(),
            is_metered: secrets.is_metered(),
        };
        let begun = Instant::now();
        // The turn begins before its sandbox has answered, which may have to wake: the host runs as
        // the previous turn left it.
        let is_early = position == 0 && offset > 0 && !renews;
        if is_early {
            log.started(begin.clone(), offset).await?;
        }
        // Where the turn's records are looked for. A journal that was lost between turns is no
        // loss.
        if position == 0 {
            position = match link.next().await {
                Incoming::Attached(offset) => offset,
                Incoming::Record { next, .. } => next,
                Incoming::Gone(gone) => return Err(gone.into()),
            };
        }
        match is_early {
            true => log.checkpoint.journal_offset = position,
            false => log.started(begin, position).await?,
        }
        waited = if is_early { begun.elapsed() } else { Duration::ZERO };
    }
    let mut meter = match secrets.is_metered() {
        true => {
            let turn = inputs::Turn { session, turn, epoch: spec.epoch };
            let meter = Meter::follow(&runner.bus, &turn, log.checkpoint.metered_through).await;
            Some(meter.map_err(|error| {
                Stopped::Released(format!("hints cannot be subscribed to: {}", error.message))
            })?)
        }
        false => None,
    };
    let mut playback = Playback::new(
        Scope::Turn(turn),
        log.masker.clone(),
        runner.output.bytes_max,
        &log.checkpoint,
    );
    if !playback.has_begun() {
        // The turn's timeout runs from its beginning in the log.
        let waited = u32::try_from(waited.as_secs()).unwrap_or(u32::MAX);
        link.send(agent.message(turn, spec.timeout_seconds.saturating_sub(waited).max(1)));
    }
    play(log, turn, &mut playback, (&mut link, &mut meter), inputs, Pace::new(&runner.output))
        .await?;
    log.continue_from(playback.checkpoint());
    // Before the turn's end is in the log, so that a client that sees the end finds the files.
    files::collect(runner, &sprite, (session, turn), spec).await;
    let ended = playback.ended().cloned().unwrap_or_default();
    let outcome = Outcome {
        runtime,
        ended: &ended,
        timeout_seconds: spec.timeout_seconds,
        printed: [playback.tail(false), playback.tail(true)],
    };
    let Some(mut meter) = meter else { return Ok(outcome.turn_ended("")) };
    let metered = meter.finish(log).await?;
    let ended = TurnEnded { usage: metered.turn_usage, ..outcome.turn_ended(&metered.failure) };
    Ok(match metered.budget_reached {
        Some(reached) => outcome::at_budget(ended, &reached),
        None => ended,
    })
}

/// Keeps the values of variables outside of the sandbox, in place of those of the turn before, and
/// returns the variables that this takes. A sandbox server that cannot do it fails the turn: the
/// values are for their hosts alone.
async fn keep_outside(
    sprite: &Sprite,
    client: &sprites::Client,
    outside: &BTreeMap<String, OutsideSecret>,
    stage: &str,
) -> Result<BTreeMap<String, String>, Stopped> {
    let secrets: Vec<OutsideSecret> = outside.values().cloned().collect();
    let failed = |message: String| Err(Stopped::failed(stage, message));
    match sprite.set_secrets(&secrets).await {
        Ok(variables) => Ok(variables),
        // Where nothing can be kept outside, nothing is.
        Err(error) if outside.is_empty() && !error.is_transient() => Ok(BTreeMap::new()),
        // A sandbox that is gone is told of by what follows.
        Err(sprites::Error::NotFound { .. })
            if matches!(client.exists(sprite.name()).await, Ok(false)) =>
        {
            Ok(BTreeMap::new())
        }
        Err(sprites::Error::NotFound { .. }) => {
            let names: Vec<&str> = outside.keys().map(String::as_str).collect();
            failed(format!(
                "Vault credentials with limited networking ({}) cannot be used: this deployment's sandboxes cannot keep values from the agent. Give the credentials unrestricted networking to put their values into the sandbox.",
                names.join(", ")
            ))
        }
        Err(error) if !error.is_transient() => {
            failed(format!("Vault credentials cannot be used: {error}"))
        }
        Err(error) => {
            Err(Stopped::Released(format!("its sandbox does not take its credentials: {error}")))
        }
    }
}

/// Appends events from the journal until the turn's end, and passes inputs to the host.
async fn play(
    log: &mut EventLog,
    turn: u32,
    playback: &mut Playback,
    (link, meter): (&mut Link, &mut Option<Meter>),
    mut inputs: Inputs,
    mut pace: Pace,
) -> Result<(), Stopped> {
    inputs.first().for_each(|input| playback.knows(input));
    let mut waiting: Vec<Input> = Vec::new();
    // Inputs that the host has not accepted, as far as its journal was read.
    let mut unaccepted: BTreeSet<String> = BTreeSet::new();
    if !playback.has_begun() {
        unaccepted.insert(turn_input(turn));
    }
    let (mut persisted, mut resting, mut quiet_since) =
        (log.checkpoint.journal_offset, false, Instant::now());
    loop {
        while let Some(emitted) = playback.next() {
            let bytes = emitted.output_bytes();
            if let Some(meter) = meter.as_mut() {
                if meter.precedes(&emitted.kind) {
                    meter.append(log).await?;
                }
                // What the model gateway counts, and not what the CLI reports of the same requests.
                if is_own_report(&emitted.kind) {
                    log.continue_from(emitted.place);
                    continue;
                }
                meter.precede(&emitted.kind, log).await?;
            }
            let id = log.play(emitted).await?;
            playback.appended(id);
            pace.spend(bytes, Instant::now());
        }
        if playback.ended().is_some() {
            return Ok(());
        }
        // What is in the log may be lost with its stream before it is persisted: then it is read
        // again.
        let kept = playback.persisted().saturating_sub(UNPERSISTED_BYTES);
        if kept >= persisted + PERSISTED_STEP {
            persisted = kept;
            link.persisted(persisted);
        }
        unaccepted.retain(|id| {
            let accepted = playback.has_accepted(id);
            if accepted {
                link.accepted(id.clone());
            }
            !accepted
        });
        // Inputs are for the turn's agent: not for what ran before it.
        if playback.has_begun() {
            for input in waiting.drain(..) {
                (resting, quiet_since) = (false, Instant::now());
                unaccepted.insert(input.id.clone());
                link.send(input);
            }
        }
        let may_rest = playback.awaits_decision() && !resting;
        let rest_after = if unaccepted.is_empty() { REST_AFTER } else { ACCEPTED_WITHIN };
        tokio::select! {
            // A host that is not read stops reading its agent: nothing is dropped.
            incoming = async {
                tokio::time::sleep_until(pace.ready_at).await;
                link.next().await
            } => {
                (resting, quiet_since) = (false, Instant::now());
                let mut incoming = Some(incoming);
                while let Some(came) = incoming {
                    playback.absorb(came)?;
                    incoming = if playback.is_drained() { link.try_next() } else { None };
                }
                playback.settle();
                let previews = playback.previews();
                if !previews.is_empty() {
                    pace.spend(sent_bytes(&previews), Instant::now());
                    log.preview(previews).await;
                }
            }
            input = inputs.next() => {
                playback.knows(&input);
                if !waiting.iter().any(|known| known.id == input.id) {
                    waiting.push(input);
                }
            }
            () = due(meter) => {
                if let Some(meter) = meter.as_mut() {
                    meter.append(log).await?;
                }
            }
            () = tokio::time::sleep_until(quiet_since + rest_after), if may_rest => {
                resting = true;
                link.rest();
            }
        }
    }
}

async fn due(meter: &mut Option<Meter>) {
    match meter {
        Some(meter) => meter.due().await,
        None => std::future::pending().await,
    }
}

fn is_own_report(kind: &Kind) -> bool {
    matches!(kind, Kind::Agent(AgentEvent { event: Some(event), .. }) if matches!(event.kind, Some(event::Kind::ModelRequestEnded(_))))
}
