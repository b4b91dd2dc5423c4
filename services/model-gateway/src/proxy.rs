//! Forwards a request to its provider with the user's credential, and streams the response back.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures::{
    FutureExt as _, StreamExt as _,
    stream::{self, BoxStream, Fuse},
};
use reqwest::Url;
use service::connection::{HOP_BY_HOP, hop_by_hop};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use types::Provider;

use crate::{
    Upstreams,
    body::Memory,
    call::{self, Call, NotACall},
    ledger::{Entry, Ledger, Outcome},
    refusal::Refusal,
    retry::{Answer, Retries},
    server::Connection,
    stored,
    tokens::{Credential, Grant, TokenRefused, Tokens},
    usage::{self, Meter},
};

/// The provider's own status, if the client receives another one.
const UPSTREAM_STATUS: HeaderName = HeaderName::from_static("x-upstream-status");
/// The SDKs of Anthropic and OpenAI read it.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Of a response, no more is held to be written at once.
const AT_ONCE_BYTES: usize = 64 * 1024;
/// How long more is gathered. A turn of the connection takes milliseconds while all cores are busy.
const AT_ONCE_FOR: Duration = Duration::from_millis(1);

/// What every request works with. Cheap to clone.
#[derive(Clone)]
pub struct Proxy {
    pub ledger: Ledger,
    pub tokens: Tokens,
    pub upstreams: Arc<Upstreams>,
    pub http: reqwest::Client,
    pub retries: Retries,
    pub memory: Memory,
}

pub async fn handle(State(proxy): State<Proxy>, request: Request) -> Response {
    match call::read(request.method(), request.uri().path()) {
        Ok(call) => {
            let provider = call.provider;
            let answer = Box::pin(pass_on(proxy, call, request)).await;
            let outcome = match &answer {
                Ok(response) => response.status().as_str().to_owned(),
                Err(Refusal::Provider(_)) => "failed".to_owned(),
                Err(_) => "refused".to_owned(),
            };
            metrics::counter!("aod_model_requests_total", "provider" => provider.as_str(), "outcome" => outcome).increment(1);
            answer.unwrap_or_else(|refusal| refusal.response(provider))
        }
        Err(NotACall::Unsupported(provider)) => Refusal::Unsupported.response(provider),
        Err(NotACall::UnknownProvider) => {
            (StatusCode::NOT_FOUND, "model gateway: no such provider\n").into_response()
        }
    }
}

async fn pass_on(proxy: Proxy, call: Call, request: Request) -> Result<Response, Refusal> {
    let shown = call::shown(request.headers(), request.uri().query()).ok_or(Refusal::Token)?;
    let grant = proxy.tokens.redeem(&shown).await.map_err(|refused| match refused {
        TokenRefused::Unknown => Refusal::Token,
        TokenRefused::Unavailable => Refusal::Unavailable,
    })?;
    if let Some(connection) = request.extensions().get::<Connection>() {
        connection.belongs_to(&grant.share);
    }
    let slot = grant.share.requests.clone().try_acquire_owned().map_err(|_| Refusal::Busy)?;
    let credential = grant.credential(call.provider, shown.scheme).ok_or(Refusal::NoCredential)?;
    let mut headers = forwarded(request.headers(), false);
    attach(&mut headers, credential)?;
    let url = url(&proxy.upstreams, &call, request.uri().query());
    let (parts, body) = request.into_parts();
    let announced = parts
        .headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    let body = proxy.memory.read(body, announced, &grant.share.bodies).await?;
    // A provider that can decode it would read other names in it than this gateway does.
    if !stored::is_readable(&parts.headers, &body.bytes) {
        return Err(Refusal::Encoded);
    }
    if let Some(name) = stored::named(call.provider, &body.bytes) {
        return Err(Refusal::Stored(name));
    }
    let entry = match call.is_metered() {
        true => {
            let asked = usage::asked(&call.path, &body.bytes);
            let key = credential.kind(call.provider);
            Some(
                proxy
                    .ledger
                    .begin(&grant.session_id, key, call.provider, asked, body.bytes.len())
                    .await?,
            )
        }
        false => None,
    };
    tracing::debug!(session = grant.session_id, provider = %call.provider, path = call.path, bytes = body.bytes.len(), "forwarding a request");
    let begun = Instant::now();
    let send = || {
        proxy
            .http
            .request(parts.method.clone(), url.clone())
            .headers(headers.clone())
            .body(body.bytes.clone())
            .send()
    };
    let sent = match call.is_metered() {
        true => proxy.retries.send(call.provider, send).await,
        false => send().await.map(Answer::from),
    };
    drop(body.memory);
    let answer = match sent {
        Ok(answer) => answer,
        Err(error) => {
            let refusal = failure(&grant, &error);
            if let Some(entry) = entry {
                // One that was sent may have been counted.
                let is_cut = !error.is_connect();
                entry.end(Outcome {
                    is_cut,
                    failure: refusal.message(call.provider),
                    ..Outcome::default()
                });
            }
            return Err(refusal);
        }
    };
    metrics::histogram!("aod_model_first_byte_seconds", "provider" => call.provider.as_str())
        .record(begun.elapsed());
    Ok(pass_back(answer, slot, entry.map(|entry| Metering::new(entry, call.provider))).await)
}

/// Follows a response that streams through. Its usage is reported when it ends or its client
/// disconnects.
struct Metering {
    provider: Provider,
    status: u16,
    meter: Option<Meter>,
    /// Bytes to come, where the response said how many.
    left: Option<u64>,
    entry: Option<Entry>,
}

impl Metering {
    fn new(entry: Entry, provider: Provider) -> Self {
        Self { provider, status: 0, meter: None, left: None, entry: Some(entry) }
    }

    fn head(&mut self, response: &reqwest::Response) {
        let header = |name| {
            response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
        };
        // What is encoded cannot be read; providers do not encode what is not asked for.
        let is_plain = matches!(header(header::CONTENT_ENCODING), "" | "identity");
        let is_stream = header(header::CONTENT_TYPE).starts_with("text/event-stream");
        self.status = response.status().as_u16();
        self.left = response.content_length();
        self.meter = is_plain.then(|| Meter::new(self.provider, is_stream));
    }

    fn feed(&mut self, bytes: &[u8]) {
        self.left = self.left.map(|left| left.saturating_sub(bytes.len() as u64));
        if let Some(meter) = &mut self.meter {
            meter.feed(bytes);
        }
    }

    fn end(&mut self, is_cut: bool) {
        let Some(entry) = self.entry.take() else { return };
        let mut reported = self.meter.take().map(Meter::end).unwrap_or_default();
        // A response of known length is not asked for its end.
        let is_cut = is_cut && self.left != Some(0);
        reported.is_whole &= !is_cut || reported.has_last_event;
        entry.end(Outcome { status: self.status, reported, is_cut, failure: String::new() });
    }
}

impl Drop for Metering {
    fn drop(&mut self) {
        self.end(true);
    }
}

/// The response as it comes; the session's slot is free when it has ended, or when its client has
/// gone.
async fn pass_back(
    answer: Answer,
    slot: OwnedSemaphorePermit,
    mut metering: Option<Metering>,
) -> Response {
    let Answer { response, is_final } = answer;
    let (mut status, mut headers) = (response.status(), forwarded(response.headers(), true));
    if is_final {
        // Two of the CLIs send a request again for minutes after a 401, a 403 or a 429, and none
        // after a 400.
        headers.insert(UPSTREAM_STATUS, status.as_u16().into());
        headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        status = StatusCode::BAD_REQUEST;
    }
    if let Some(metering) = &mut metering {
        metering.head(&response);
    }
    let mut passing = Passing { body: response.bytes_stream().boxed().fuse(), metering };
    let first = passing.arrived().await;
    let rest = stream::unfold((passing, slot), |(mut passing, slot)| async move {
        let mut chunks = vec![passing.next().await?];
        chunks.append(&mut passing.arrived().await);
        Some((chunks, (passing, slot)))
    });
    let body = stream::iter([first]).chain(rest).flat_map(stream::iter);
    let mut passed = Response::new(Body::from_stream(body));
    *passed.status_mut() = status;
    *passed.headers_mut() = headers;
    passed
}

/// A response's body on its way to the client.
struct Passing {
    body: Fuse<BoxStream<'static, reqwest::Result<Bytes>>>,
    metering: Option<Metering>,
}

impl Passing {
    async fn next(&mut self) -> Option<reqwest::Result<Bytes>> {
        let next = self.body.next().await;
        if let Some(metering) = &mut self.metering {
            match &next {
                Some(Ok(bytes)) => metering.feed(bytes),
                Some(Err(_)) => metering.end(true),
                None => metering.end(false),
            }
        }
        next.map(|chunk| chunk.map_err(reqwest::Error::without_url))
    }

    /// What has arrived, to be written to the client at once. The provider's connection hands over
    /// a chunk at a time: it gets a turn for each, but is not waited for.
    async fn arrived(&mut self) -> Vec<reqwest::Result<Bytes>> {
        let (mut chunks, mut bytes, began) = (Vec::new(), 0, Instant::now());
        while bytes < AT_ONCE_BYTES && began.elapsed() < AT_ONCE_FOR {
            let mut next = self.next().now_or_never();
            if next.is_none() {
                tokio::task::yield_now().await;
                next = self.next().now_or_never();
            }
            let Some(Some(chunk)) = next else { break };
            bytes += chunk.as_ref().map_or(AT_ONCE_BYTES, Bytes::len);
            chunks.push(chunk);
        }
        chunks
    }
}

fn failure(grant: &Grant, error: &reqwest::Error) -> Refusal {
    let why = if error.is_connect() {
        "cannot be reached"
    } else if error.is_timeout() {
        "did not answer in time"
    } else {
        "closed the connection"
    };
    // Without its address, whose query the client wrote.
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    tracing::warn!(session = grant.session_id, why, cause, "a provider failed");
    Refusal::Provider(why)
}

fn url(upstreams: &Upstreams, call: &Call, query: Option<&str>) -> Url {
    let mut url = upstreams.of(call.provider).clone();
    let path = format!("{}{}", url.path().trim_end_matches('/'), call.path);
    url.set_path(&path);
    let query = query.map(call::without_key).filter(|query| !query.is_empty());
    url.set_query(query.as_deref());
    url
}

fn attach(headers: &mut HeaderMap, credential: Credential<'_>) -> Result<(), Refusal> {
    let (name, value) = match credential {
        Credential::ApiKey(name, key) => {
            (HeaderName::from_static(name), HeaderValue::from_str(key))
        }
        Credential::Bearer(token) => {
            (header::AUTHORIZATION, HeaderValue::from_str(&format!("Bearer {token}")))
        }
    };
    // A key that no header can hold is none.
    let mut value = value.map_err(|_| Refusal::NoCredential)?;
    value.set_sensitive(true);
    headers.insert(name, value);
    Ok(())
}

/// Whether the gateway sets a header itself, or it belongs to one connection.
pub fn is_own(name: &str) -> bool {
    HOP_BY_HOP
        .into_iter()
        .chain(["host", "content-length"])
        .any(|own| own.eq_ignore_ascii_case(name))
}

/// What a client shows, or would have its provider know of other sessions.
const FROM_CLIENT: [&str; 6] =
    ["authorization", "x-api-key", "x-goog-api-key", "cookie", "accept-encoding", "forwarded"];

pub fn forwarded(headers: &HeaderMap, is_response: bool) -> HeaderMap {
    let dropped = hop_by_hop(headers);
    let is_dropped = |name: &str| {
        let own = is_own(name) && !(is_response && name == "content-length");
        let other = if is_response {
            name == "set-cookie"
        } else {
            FROM_CLIENT.contains(&name) || name.starts_with("x-forwarded-")
        };
        own || other || dropped.iter().any(|dropped| dropped == name)
    };
    headers
        .iter()
        .filter(|(name, _)| !is_dropped(name.as_str()))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use futures::SinkExt as _;
    use tokio::task::JoinSet;

    use super::*;

    #[test]
    fn a_clients_token_and_its_connections_headers_are_not_passed_on() {
        let pairs = [
            ("x-api-key", "t"),
            ("authorization", "t"),
            ("connection", "x-own"),
            ("x-own", "1"),
            ("anthropic-version", "v"),
            ("accept-encoding", "gzip"),
        ];
        let headers = pairs
            .into_iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        let passed = forwarded(&headers, false);
        assert_eq!(
            passed.keys().map(HeaderName::as_str).collect::<Vec<_>>(),
            ["anthropic-version"]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_arrived_of_a_response_is_passed_on_at_once_and_no_more_is_waited_for() {
        // As a connection of hyper hands over a body.
        let (mut sender, body) = futures::channel::mpsc::channel(0);
        let mut connection = JoinSet::new();
        connection.spawn(async move {
            for chunk in ["a", "b", "c"] {
                sender.send(Ok(Bytes::from(chunk))).await.unwrap();
            }
            std::future::pending::<()>().await;
        });
        let mut passing = Passing { body: body.boxed().fuse(), metering: None };
        let chunks: Result<Vec<_>, _> = passing.arrived().await.into_iter().collect();
        assert_eq!(chunks.unwrap(), ["a", "b", "c"]);
        assert!(passing.arrived().await.is_empty());
        connection.shutdown().await;
        assert!(passing.next().await.is_none());
    }

    #[test]
    fn the_providers_address_keeps_its_own_path() {
        let upstreams = Upstreams::new(|provider| {
            (provider == Provider::Openai).then(|| "http://m:1/base/".to_owned())
        })
        .unwrap();
        let call = Call { provider: Provider::Openai, path: "/v1/responses".to_owned() };
        assert_eq!(
            url(&upstreams, &call, Some("key=t&a=1")).as_str(),
            "http://m:1/base/v1/responses?a=1"
        );
        let call = Call {
            provider: Provider::Google,
            path: "/v1beta/models/m:generateContent".to_owned(),
        };
        assert_eq!(
            url(&upstreams, &call, Some("key=t")).as_str(),
            "https://generativelanguage.googleapis.com/v1beta/models/m:generateContent"
        );
    }
}
