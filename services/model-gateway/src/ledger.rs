//! Accounts for model requests at the scheduler: asks it before each request, and reports the usage
//! afterwards.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bus::{Bus, RpcError};
use contract::{
    rpc,
    scheduler::{
        BeginModelRequestRequest, EndModelRequestRequest, ModelRequestAdmitted,
        ModelRequestRefused, RenewModelGatewayRequest, begin_model_request_reply::Verdict,
    },
    session::Usage,
};
use moka::future::Cache;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use types::{Backoff, ErrorCode, Provider};
use uuid::Uuid;

use crate::{
    batches::Batches,
    prices::Prices,
    usage::{Asked, Reported, Tokens},
};

const BEGIN_DEADLINE: Duration = Duration::from_secs(5);
const END_DEADLINE: Duration = Duration::from_secs(5);
/// How long a request waits for what others reserved of a budget.
const WAIT_MAX: Duration = Duration::from_secs(60);
const WAIT: Backoff =
    Backoff { base: Duration::from_millis(100), max: Duration::from_secs(1), attempts: u32::MAX };
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(200), max: Duration::from_secs(10), attempts: 90 };
/// How long a session that nothing limits is served while the scheduler does not answer.
const UNLIMITED_FOR: Duration = Duration::from_secs(600);
const SESSIONS_MAX: u64 = 20_000;
/// Ends that may wait to be reported at a time; each has some hundred bytes.
const ENDS_MAX: usize = 50_000;
const RENEW_EVERY: Duration = Duration::from_secs(5);
/// Bytes of a request's text per token, at least roughly; more than this many tokens no model
/// reads.
const BYTES_PER_TOKEN: u64 = 4;
const INPUT_TOKENS_MAX: u64 = 200_000;
/// What an answer is taken to be at most, where its own limit is higher.
const OUTPUT_TOKENS_MAX: u64 = 4096;

/// Why a request is not sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// A budget, a policy: asking again does not help.
    For(String),
    /// Too many for now: seconds to wait.
    Rate(String, u32),
    Unavailable,
}

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Ledger {
    bus: Bus,
    batches: Batches,
    gateway: Arc<str>,
    prices: Arc<Prices>,
    /// Whether nothing limited a session when it asked last.
    are_unlimited: Cache<String, bool>,
    ends: Arc<Semaphore>,
    tasks: TaskTracker,
}

/// An admitted request. Its end is reported once, at the latest when this is dropped.
#[derive(Debug)]
pub struct Entry {
    ledger: Ledger,
    begun: BeginModelRequestRequest,
    provider: Provider,
    /// What was reserved.
    estimate: Tokens,
    at: Instant,
    /// The provider may have it.
    is_sent: bool,
    is_told: bool,
}

/// What became of a request.
#[derive(Debug, Default)]
pub struct Outcome {
    /// 0: no answer came.
    pub status: u16,
    pub reported: Reported,
    /// The client went away, or the provider broke off.
    pub is_cut: bool,
    /// Why it failed, where no response says so.
    pub failure: String,
}

impl Ledger {
    pub fn new(bus: Bus, batches: Batches, prices: Prices, tasks: TaskTracker) -> Self {
        Self {
            bus,
            batches,
            gateway: Uuid::now_v7().to_string().into(),
            prices: Arc::new(prices),
            are_unlimited: Cache::builder()
                .max_capacity(SESSIONS_MAX)
                .time_to_live(UNLIMITED_FOR)
                .build(),
            ends: Arc::new(Semaphore::new(ENDS_MAX)),
            tasks,
        }
    }

    /// Shows the scheduler that this process lives, until the stop.
    pub async fn renew(self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(RENEW_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let request = RenewModelGatewayRequest { gateway_id: self.gateway.to_string() };
            if let Err(error) =
                self.bus.call::<rpc::RenewModelGateway>(&request, END_DEADLINE).await
            {
                tracing::warn!(%error, "failed to renew the lease of this gateway; will retry");
            }
        }
    }

    /// Asks whether a request may be sent, and reserves what it may use.
    pub async fn begin(
        &self,
        session: &str,
        key: &str,
        provider: Provider,
        asked: Asked,
        bytes: usize,
    ) -> Result<Entry, Refused> {
        let input = (bytes as u64 / BYTES_PER_TOKEN).clamp(1, INPUT_TOKENS_MAX);
        let output = asked.output_max.unwrap_or(OUTPUT_TOKENS_MAX).min(OUTPUT_TOKENS_MAX);
        let estimate = Tokens { input, output, ..Tokens::default() };
        let begun = BeginModelRequestRequest {
            request_id: Uuid::now_v7().to_string(),
            session_id: session.to_owned(),
            gateway_id: self.gateway.to_string(),
            provider: provider.as_str().to_owned(),
            estimated_tokens: input.saturating_add(output),
            estimated_cost_micro_usd: self.prices.cost(provider, &asked.model, estimate),
            model: asked.model,
            key: key.to_owned(),
        };
        let at = Instant::now();
        // Told to have ended also where its client goes away while the scheduler is asked.
        let mut entry = Entry {
            ledger: self.clone(),
            begun,
            provider,
            estimate,
            at,
            is_sent: false,
            is_told: false,
        };
        let (started, mut attempt) = (Instant::now(), 0);
        loop {
            attempt += 1;
            // It may be recorded as soon as it is asked for, and is not where it was refused.
            entry.is_told = false;
            let asked = self.ask(&entry.begun).await;
            entry.is_told = matches!(asked, Ok(Some(Verdict::Refused(_) | Verdict::Waits(_))));
            match asked {
                Ok(Some(Verdict::Admitted(admitted))) => {
                    self.are_unlimited.insert(session.to_owned(), admitted.is_unlimited).await;
                    break;
                }
                Ok(Some(Verdict::Refused(refused))) => {
                    self.are_unlimited.insert(session.to_owned(), false).await;
                    return Err(refusal(refused));
                }
                Ok(_) if started.elapsed() < WAIT_MAX => {
                    tokio::time::sleep(WAIT.jittered(attempt)).await
                }
                Ok(_) => {
                    return Err(Refused::Rate(
                        "What is left of the budget is reserved by other requests".to_owned(),
                        5,
                    ));
                }
                // Nothing is to be kept: the request is told of later.
                Err(_) if self.are_unlimited.get(session).await == Some(true) => break,
                Err(error) => {
                    tracing::warn!(session, %error, "a model request cannot be checked");
                    return Err(Refused::Unavailable);
                }
            }
        }
        (entry.is_sent, entry.at) = (true, Instant::now());
        Ok(entry)
    }

    async fn ask(&self, begun: &BeginModelRequestRequest) -> Result<Option<Verdict>, RpcError> {
        if self.may_be_unlimited(&begun.session_id).await && self.batches.begin(begun.clone()).await
        {
            return Ok(Some(Verdict::Admitted(ModelRequestAdmitted { is_unlimited: true })));
        }
        Ok(self.bus.call::<rpc::BeginModelRequest>(begun, BEGIN_DEADLINE).await?.verdict)
    }

    async fn may_be_unlimited(&self, session: &str) -> bool {
        self.are_unlimited.get(session).await != Some(false)
    }

    /// Reports the end of a request, and retries until it arrives. If this gateway exits first, the
    /// request is settled as unknown.
    fn tell(&self, end: EndModelRequestRequest) {
        let Ok(permit) = self.ends.clone().try_acquire_owned() else {
            metrics::counter!("aod_model_ends_dropped_total").increment(1);
            return;
        };
        let ledger = self.clone();
        self.tasks.spawn(async move {
            let session = end.begun.as_ref().map_or("", |begun| &begun.session_id);
            if ledger.may_be_unlimited(session).await && ledger.batches.end(end.clone()).await {
                return drop(permit);
            }
            let bus = &ledger.bus;
            let mut attempt = 0;
            loop {
                attempt += 1;
                match bus.call::<rpc::EndModelRequest>(&end, END_DEADLINE).await {
                    Ok(_) => break,
                    // It is refused for good.
                    Err(error) if matches!(error.code, ErrorCode::InvalidArgument | ErrorCode::NotFound) => {
                        tracing::error!(%error, "a model request's end was refused");
                        break;
                    }
                    Err(error) => match RETRY.delay(attempt) {
                        Some(wait) => tokio::time::sleep(wait).await,
                        None => {
                            tracing::error!(%error, "failed to report the end of a model request; its usage is unknown");
                            metrics::counter!("aod_model_ends_dropped_total").increment(1);
                            break;
                        }
                    },
                }
            }
            drop(permit);
        });
    }
}

fn refusal(refused: ModelRequestRefused) -> Refused {
    match refused.reason.as_str() {
        "rate" => Refused::Rate(refused.message, refused.retry_after_seconds),
        _ => Refused::For(refused.message),
    }
}

impl Entry {
    pub fn end(mut self, outcome: Outcome) {
        self.tell(outcome);
    }

    fn tell(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.is_told, true) {
            return;
        }
        let Outcome { status, reported, is_cut, failure } = outcome;
        let is_ok = (200..300).contains(&status);
        let usage =
            reported.tokens.filter(|_| is_ok).map(|tokens| self.usage(tokens, &reported.model));
        let error = match failure.is_empty() {
            false => failure,
            true if is_ok && reported.error_message.is_empty() => String::new(),
            true if reported.error_message.is_empty() => format!("HTTP status {status}"),
            true => {
                format!("HTTP status {status}: {} {}", reported.error_type, reported.error_message)
            }
        };
        // A response without its last event is incomplete, whichever side closed it.
        let is_partial = !reported.is_whole && (is_ok || is_cut);
        let mut begun = std::mem::take(&mut self.begun);
        if is_partial || usage.is_none() {
            let generated = reported.generated_bytes / BYTES_PER_TOKEN;
            let least = Tokens { output: self.estimate.output.max(generated), ..self.estimate };
            begun.estimated_tokens = least.input.saturating_add(least.output);
            begun.estimated_cost_micro_usd =
                self.ledger.prices.cost(self.provider, &begun.model, least);
        }
        let error_kind = if error.is_empty() { "" } else { kind_of(status, &reported) };
        let end = EndModelRequestRequest {
            begun: Some(begun),
            status: status.into(),
            is_partial,
            usage,
            duration_ms: u64::try_from(self.at.elapsed().as_millis()).unwrap_or(u64::MAX),
            error,
            error_kind: error_kind.to_owned(),
        };
        if let Some(usage) = &end.usage {
            let count = |kind: &'static str, tokens: Option<u64>| {
                metrics::counter!("aod_model_tokens_total", "provider" => self.provider.as_str(), "kind" => kind)
                    .increment(tokens.unwrap_or_default());
            };
            count("input", usage.input_tokens);
            count("output", usage.output_tokens);
        }
        self.ledger.tell(end);
    }

    fn usage(&self, tokens: Tokens, model: &str) -> Usage {
        let prices = &self.ledger.prices;
        let cost = prices
            .cost(self.provider, &self.begun.model, tokens)
            .or_else(|| prices.cost(self.provider, model, tokens));
        let input =
            tokens.input.saturating_add(tokens.cache_read).saturating_add(tokens.cache_write);
        Usage {
            input_tokens: Some(input),
            output_tokens: Some(tokens.output),
            cost_micro_usd: cost,
            model: Some(if model.is_empty() { self.begun.model.clone() } else { model.to_owned() }),
            cache_read_tokens: Some(tokens.cache_read),
            cache_write_tokens: Some(tokens.cache_write),
            reasoning_tokens: Some(tokens.reasoning),
        }
    }
}

impl Drop for Entry {
    /// The client went away before there was an answer, or before the request was sent, which costs
    /// nothing then.
    fn drop(&mut self) {
        if !self.is_told {
            let failure = "The request was broken off".to_owned();
            self.tell(Outcome { is_cut: self.is_sent, failure, ..Outcome::default() });
        }
    }
}

/// By the names of the Managed Agents API.
fn kind_of(status: u16, reported: &Reported) -> &'static str {
    let says = |text: &str| {
        [&reported.error_type, &reported.error_code, &reported.error_message]
            .iter()
            .any(|said| said.contains(text))
    };
    match status {
        _ if says("insufficient_quota") || says("credit balance") || says("billing") => {
            "billing_error"
        }
        402 => "billing_error",
        429 => "model_rate_limited_error",
        503 | 529 => "model_overloaded_error",
        _ => "model_request_failed_error",
    }
}
