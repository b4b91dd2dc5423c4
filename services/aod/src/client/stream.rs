//! Follows a session: server-sent events, resumed by id after every interruption.

use std::time::Duration;

use futures::StreamExt as _;
use secrecy::ExposeSecret as _;
use serde_json::Value;
use types::Backoff;

use crate::client::{Api, ApiFailure};

/// The server sends a heartbeat every 15 s.
const SILENCE_MAX: Duration = Duration::from_secs(40);
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(200), max: Duration::from_secs(5), attempts: 20 };

/// Which stream of a session is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Output as the agent writes it, until the newest turn ends.
    Output,
    /// Typed events, from turn to turn.
    Events,
}

/// What became of an event's receiver.
pub enum Next {
    Continue,
    Stop,
}

/// Passes every event after `since` to `receive` exactly once, until it returns [`Next::Stop`] or
/// the session's turn ends. With `idle` set, also returns after that long without an event.
pub async fn follow(
    api: &Api,
    session: &str,
    source: Source,
    mut since: u64,
    idle: Option<Duration>,
    mut receive: impl FnMut(&Value) -> Next,
) -> Result<(), ApiFailure> {
    let mut attempt = 0;
    let (route, parameter) = match source {
        Source::Output => ("stream", "since"),
        Source::Events => ("events", "after"),
    };
    loop {
        let request = api
            .http
            .get(format!("{}/sessions/{session}/{route}", api.base_url))
            .bearer_auth(api.token.expose_secret());
        let request = request
            .header(reqwest::header::ACCEPT, "text/event-stream")
            .query(&[(parameter, since)]);
        let response = match api.checked(request.send().await).await {
            Ok(response) => response,
            Err(error @ ApiFailure::Refused { .. }) => return Err(error),
            Err(error) => {
                attempt += 1;
                match RETRY.delay(attempt) {
                    Some(delay) => tokio::time::sleep(delay).await,
                    None => return Err(error),
                }
                continue;
            }
        };
        let (mut body, mut buffer) = (response.bytes_stream(), Vec::new());
        loop {
            match tokio::time::timeout(idle.unwrap_or(SILENCE_MAX), body.next()).await {
                Ok(Some(Ok(bytes))) => buffer.extend_from_slice(&bytes),
                // The end of the stream is the server's word that nothing more comes now.
                Ok(None) if source == Source::Output => return Ok(()),
                Err(_) if idle.is_some() => return Ok(()),
                Ok(None | Some(Err(_))) | Err(_) => break,
            }
            while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
                let block: Vec<u8> = buffer.drain(..end + 2).collect();
                let Some(event) = parse(&block) else { continue };
                attempt = 0;
                let resumable = event.get("type").and_then(Value::as_str) != Some("turn_start");
                if let Some(id) = event.get("id").and_then(Value::as_u64).filter(|_| resumable) {
                    since = since.max(id);
                }
                if matches!(receive(&event), Next::Stop) {
                    return Ok(());
                }
            }
        }
        attempt += 1;
        let Some(delay) = RETRY.delay(attempt) else {
            return Err(ApiFailure::Unreachable {
                url: api.base_url.clone(),
                reason: "the stream was interrupted too often".to_owned(),
                hint: String::new(),
            });
        };
        tokio::time::sleep(delay).await;
    }
}

fn parse(block: &[u8]) -> Option<Value> {
    let text = std::str::from_utf8(block).ok()?;
    let data = text.lines().find_map(|line| line.strip_prefix("data:"))?;
    serde_json::from_str(data.trim()).ok()
}
