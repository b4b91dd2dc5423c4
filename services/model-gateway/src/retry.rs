//! What becomes of a provider's refusal: it is sent again here, once for all CLIs, or it is passed
//! on; a refused key and an exhausted quota as what no CLI sends again.

use std::time::Duration;

use axum::http::{self, StatusCode, header};
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use reqwest::Response;
use tokio::time::Instant;
use types::{Backoff, Provider, backoff::random_fraction};

use crate::usage::{Meter, Reported};

/// Of a refusal more is not read.
const REFUSAL_BYTES_MAX: usize = 64 * 1024;
const REFUSAL_TIME_MAX: Duration = Duration::from_secs(10);
/// A provider that asks for a longer wait is out of quota.
const USED_UP_AFTER: Duration = Duration::from_secs(600);

/// How often and how long a request is sent again. Copied into every request.
#[derive(Clone, Copy, Debug)]
pub struct Retries {
    /// 0: every response is passed on as it is.
    pub times: u32,
    /// All waits of one request together.
    pub wait_max: Duration,
}

/// A response of a provider, and whether it tells the client not to retry.
#[derive(Debug)]
pub struct Answer {
    pub response: Response,
    pub is_final: bool,
}

impl From<Response> for Answer {
    fn from(response: Response) -> Self {
        Self { response, is_final: false }
    }
}

/// What is known of a refusal.
#[derive(Clone, Copy, Debug)]
struct Facts {
    status: u16,
    retry_after: Option<Duration>,
    is_used_up: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    PassOn,
    /// After at least this time.
    Again(Duration),
    Final,
}

impl Retries {
    /// Sends a request until it is answered by something else than a refusal that may pass.
    ///
    /// # Errors
    /// When the provider cannot be reached: its client decides.
    pub async fn send<F>(
        self,
        provider: Provider,
        send: impl Fn() -> F,
    ) -> Result<Answer, reqwest::Error>
    where
        F: Future<Output = Result<Response, reqwest::Error>>,
    {
        let begun = Instant::now();
        let mut attempt = 0;
        loop {
            attempt += 1;
            let response = send().await?;
            let status = response.status().as_u16();
            if self.times == 0 || !matches!(status, 401 | 402 | 403 | 429 | 503 | 529) {
                return Ok(response.into());
            }
            let retry_after = retry_after(&response);
            let (response, is_used_up) = read(provider, response).await;
            match self.next(Facts { status, retry_after, is_used_up }, attempt, begun.elapsed()) {
                Next::PassOn => return Ok(response.into()),
                Next::Final => return Ok(Answer { response, is_final: true }),
                Next::Again(wait) => {
                    metrics::counter!("aod_model_retries_total", "provider" => provider.as_str(), "status" => status.to_string())
                        .increment(1);
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    fn next(self, facts: Facts, attempt: u32, waited: Duration) -> Next {
        const WAIT: Backoff = Backoff {
            base: Duration::from_secs(1),
            max: Duration::from_secs(20),
            attempts: u32::MAX,
        };
        if matches!(facts.status, 401..=403)
            || facts.is_used_up
            || facts.retry_after.is_some_and(|wait| wait > USED_UP_AFTER)
        {
            return Next::Final;
        }
        // Never sooner than the provider asks for, and not all sessions at the same moment.
        let wait = match facts.retry_after {
            Some(wait) => wait + Duration::from_millis(500).mul_f64(random_fraction()),
            None => WAIT.jittered(attempt),
        };
        if attempt > self.times || waited + wait > self.wait_max {
            Next::PassOn
        } else {
            Next::Again(wait)
        }
    }
}

/// In seconds, or OpenAI's and Anthropic's milliseconds. A date is not read: no provider sends one.
fn retry_after(response: &Response) -> Option<Duration> {
    let number = |name: &str| response.headers().get(name)?.to_str().ok()?.parse::<f64>().ok();
    let seconds = number("retry-after-ms")
        .map(|millis| millis / 1000.0)
        .or_else(|| number(header::RETRY_AFTER.as_str()))?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// Reads the refusal whole and returns it as it was, and whether it says that the key's quota is
/// used up.
async fn read(provider: Provider, response: Response) -> (Response, bool) {
    let (status, headers) = (response.status(), response.headers().clone());
    let mut bytes = BytesMut::new();
    let mut chunks = Box::pin(response.bytes_stream());
    let deadline = Instant::now() + REFUSAL_TIME_MAX;
    // One that breaks off, or never ends, is passed on as far as it came.
    while let Ok(Some(Ok(chunk))) = tokio::time::timeout_at(deadline, chunks.next()).await {
        let room = REFUSAL_BYTES_MAX.saturating_sub(bytes.len());
        bytes.extend_from_slice(chunk.get(..room).unwrap_or(&chunk));
        if chunk.len() >= room {
            break;
        }
    }
    let bytes = bytes.freeze();
    let is_used_up = is_used_up(provider, &bytes);
    (whole(status, headers, bytes), is_used_up)
}

fn whole(status: StatusCode, mut headers: http::HeaderMap, bytes: Bytes) -> Response {
    headers.remove(header::CONTENT_LENGTH);
    headers.remove(header::TRANSFER_ENCODING);
    headers.insert(header::CONTENT_LENGTH, bytes.len().into());
    let mut response = http::Response::new(reqwest::Body::from(bytes));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response.into()
}

/// Whether waiting a minute does not help. Google says "quota" of limits per minute too: what
/// counts there is for how long.
fn is_used_up(provider: Provider, body: &[u8]) -> bool {
    let mut meter = Meter::new(provider, false);
    meter.feed(body);
    let Reported { error_type, error_code, error_message, .. } = meter.end();
    let says = |text: &str| {
        [&error_type, &error_code, &error_message].iter().any(|said| said.contains(text))
    };
    match provider {
        Provider::Google => std::str::from_utf8(body).is_ok_and(|body| body.contains("PerDay")),
        Provider::Openai => {
            says("insufficient_quota") || says("usage_limit_reached") || says("billing_hard_limit")
        }
        Provider::Anthropic => says("credit balance") || says("billing_error"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const RETRIES: Retries = Retries { times: 4, wait_max: Duration::from_secs(60) };

    fn facts(status: u16, retry_after: Option<u64>) -> Facts {
        Facts { status, retry_after: retry_after.map(Duration::from_secs), is_used_up: false }
    }

    proptest! {
        #[test]
        fn waits_are_bounded_and_never_shorter_than_asked_for(
            status in prop::sample::select(vec![429_u16, 503, 529]), asked in prop::option::of(0_u64..120), attempt in 1_u32..10, waited in 0_u64..90
        ) {
            match RETRIES.next(facts(status, asked), attempt, Duration::from_secs(waited)) {
                Next::Again(wait) => {
                    prop_assert!(attempt <= RETRIES.times && wait + Duration::from_secs(waited) <= RETRIES.wait_max);
                    prop_assert!(wait >= Duration::from_secs(asked.unwrap_or_default()) && !wait.is_zero() || asked == Some(0));
                }
                Next::PassOn => prop_assert!(attempt > RETRIES.times || waited + asked.unwrap_or(20) + 1 > 60),
                Next::Final => prop_assert!(false, "it may pass"),
            }
        }
    }

    #[test]
    fn refused_keys_and_exhausted_quotas_are_final() {
        for status in [401, 402, 403] {
            assert_eq!(RETRIES.next(facts(status, None), 1, Duration::ZERO), Next::Final);
        }
        assert_eq!(RETRIES.next(facts(429, Some(3600)), 1, Duration::ZERO), Next::Final);
        assert_eq!(
            RETRIES.next(Facts { is_used_up: true, ..facts(429, Some(1)) }, 1, Duration::ZERO),
            Next::Final
        );
        let used_up = |provider, body: Value| is_used_up(provider, body.to_string().as_bytes());
        let openai = |code: &str| json!({ "error": { "type": code, "code": code, "message": "Check your plan and billing details." } });
        assert!(used_up(Provider::Openai, openai("insufficient_quota")));
        assert!(!used_up(Provider::Openai, openai("rate_limit_exceeded")));
        let google = |id: &str| json!({ "error": { "status": "RESOURCE_EXHAUSTED", "message": "Check your plan and billing details.", "details": [{ "violations": [{ "quotaId": id }] }] } });
        assert!(used_up(Provider::Google, google("GenerateRequestsPerDayPerProjectPerModel")));
        assert!(!used_up(Provider::Google, google("GenerateRequestsPerMinutePerProjectPerModel")));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_that_passes_is_not_seen_and_one_that_stays_is_passed_on_as_it_was() {
        let refusal = |status: u16| {
            let status = StatusCode::from_u16(status).unwrap();
            whole(
                status,
                http::HeaderMap::new(),
                Bytes::from_static(b"{\"error\":{\"message\":\"busy\"}}"),
            )
        };
        let sent = AtomicU32::new(0);
        let busy_twice = || {
            let status = if sent.fetch_add(1, Ordering::SeqCst) < 2 { 529 } else { 200 };
            std::future::ready(Ok(refusal(status)))
        };
        let answer = RETRIES.send(Provider::Anthropic, busy_twice).await.unwrap();
        assert_eq!((answer.response.status().as_u16(), sent.swap(0, Ordering::SeqCst)), (200, 3));
        let always = || {
            sent.fetch_add(1, Ordering::SeqCst);
            std::future::ready(Ok(refusal(429)))
        };
        let answer = RETRIES.send(Provider::Anthropic, always).await.unwrap();
        assert_eq!(
            (answer.response.status().as_u16(), answer.is_final, sent.swap(0, Ordering::SeqCst)),
            (429, false, 5)
        );
        assert_eq!(answer.response.text().await.unwrap(), "{\"error\":{\"message\":\"busy\"}}");
        let none = Retries { times: 0, ..RETRIES };
        none.send(Provider::Anthropic, always).await.unwrap();
        assert_eq!(sent.into_inner(), 1);
    }
}
