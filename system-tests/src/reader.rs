//! A reader of a session's stream that reconnects with the last id it has, and keeps what it was
//! shown.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use fastrand::Rng;
use reqwest::Method;
use serde_json::Value;

use crate::{Stack, Stuck};

const RECONNECT_AFTER: Duration = Duration::from_millis(100);
const AWAY_MAX_MS: u64 = 1500;

/// What of a session is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// Output and stages.
    Output,
    /// What the agent does.
    Typed,
}

impl Route {
    fn path(self, session: &str, since: u64) -> String {
        match self {
            Self::Output => format!("/sessions/{session}/stream?since={since}"),
            Self::Typed => format!("/sessions/{session}/events?stream=true&after={since}"),
        }
    }

    fn is_end(self, event: &Value) -> bool {
        let kind = event["type"].as_str().unwrap_or_default();
        match self {
            Self::Output => matches!(kind, "exit" | "error" | "terminated"),
            Self::Typed => matches!(kind, "session.status_idle" | "session.status_terminated"),
        }
    }

    /// Returns whether the session stays usable after its turn ended.
    fn goes_on(self, end: &Value) -> bool {
        match self {
            Self::Output => end["type"] == "exit" && end["code"] == 0,
            Self::Typed => {
                end["type"] == "session.status_idle" && end["stop_reason"]["type"] != "failed"
            }
        }
    }

    /// Connections of a restless reader are closed after at most so many events.
    fn events_max(self) -> usize {
        match self {
            Self::Output => 400,
            Self::Typed => 8,
        }
    }
}

/// An event that was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub id: u64,
    pub content: u64,
    /// A stream shows the ends of former turns only while these are the newest.
    pub is_end: bool,
}

pub(crate) struct Reader<'a> {
    stack: &'a Stack,
    session: &'a str,
    route: Route,
    /// Closes connections at random.
    restless: Option<Rng>,
    pub seen: Vec<Seen>,
    pub stdout: String,
    /// What agents said, by turn.
    pub said: BTreeMap<u64, String>,
    /// The longest time without output after the first.
    pub worst_pause: Duration,
    pub connections: usize,
    last_output: Option<Instant>,
}

impl<'a> Reader<'a> {
    pub fn new(stack: &'a Stack, session: &'a str, route: Route) -> Self {
        Self {
            stack,
            session,
            route,
            restless: None,
            seen: Vec::new(),
            stdout: String::new(),
            said: BTreeMap::new(),
            worst_pause: Duration::ZERO,
            connections: 0,
            last_output: None,
        }
    }

    /// Makes it close connections at random, stay away for a while, and continue on any gateway.
    pub fn restless(self, rng: Rng) -> Self {
        Self { restless: Some(rng), ..self }
    }

    /// Reads, over as many connections as it takes, to the end of this turn, or to an end after
    /// which the session does not continue.
    ///
    /// # Errors
    /// When there is no such end within the limit.
    pub async fn read_to_end_of(&mut self, turn: u64, limit: Duration) -> Result<Value> {
        let read = async {
            loop {
                if let Ok(Some(end)) = self.connection(turn).await {
                    return end;
                }
                let away = self.restless.as_mut().map_or(0, |rng| rng.u64(..AWAY_MAX_MS));
                tokio::time::sleep(RECONNECT_AFTER + Duration::from_millis(away)).await;
            }
        };
        if let Ok(end) = tokio::time::timeout(limit, read).await {
            return Ok(end);
        }
        let state =
            self.stack.get(&format!("/sessions/{}", self.session)).await.map(|answer| answer.body);
        let (session, route) = (self.session, self.route);
        Err(Stuck(format!("turn {turn} of session {session} has no end for a reader of {route:?} after {limit:?}: {state:?}")).into())
    }

    pub fn route(&self) -> Route {
        self.route
    }

    /// Reads typed events in pages, as they are persisted.
    ///
    /// # Errors
    /// When a page is refused.
    pub async fn read_pages(&mut self) -> Result<()> {
        let mut after = 0;
        loop {
            let path = format!("/sessions/{}/events?after={after}&limit=1000", self.session);
            let page = self.stack.insist(Method::GET, &path, None).await?;
            ensure!(page.status == 200, "{page:?}");
            for event in page.body["data"].as_array().into_iter().flatten() {
                self.note(event);
            }
            after = page.body["last_id"].as_u64().unwrap_or(after);
            if page.body["has_more"] != true {
                return Ok(());
            }
        }
    }

    /// Reads one connection; the end that was sought, if it was there.
    async fn connection(&mut self, turn: u64) -> Result<Option<Value>> {
        self.connections += 1;
        let since = self.seen.last().map_or(0, |seen| seen.id);
        let (mut gateway, mut left) = (0, usize::MAX);
        if let Some(rng) = &mut self.restless {
            (gateway, left) = (rng.usize(..), rng.usize(1..=self.route.events_max()));
        }
        let mut events = self.stack.events(gateway, &self.route.path(self.session, since)).await?;
        while let Some(event) = events.next().await? {
            self.note(&event);
            if self.route.is_end(&event) {
                let is_sought = event["turn"].as_u64() >= Some(turn) || !self.route.goes_on(&event);
                if is_sought {
                    return Ok(Some(event));
                }
            }
            left -= 1;
            if left == 0 {
                break;
            }
        }
        Ok(None)
    }

    fn note(&mut self, event: &Value) {
        let kind = event["type"].as_str().unwrap_or_default();
        // These two have the id of another event, or of none.
        if let (Some(id), true) = (event["id"].as_u64(), kind != "turn_start" && kind != "stale") {
            let mut hasher = DefaultHasher::new();
            event.to_string().hash(&mut hasher);
            self.seen.push(Seen { id, content: hasher.finish(), is_end: self.route.is_end(event) });
        }
        if kind == "output" && event["stream"] == "stdout" {
            self.stdout.push_str(event["data"].as_str().unwrap_or_default());
            let now = Instant::now();
            if let Some(last) = self.last_output.replace(now) {
                self.worst_pause = self.worst_pause.max(now - last);
            }
        }
        if self.route.is_end(event) {
            self.last_output = None;
        }
        if kind == "agent.message" && event["aborted"] != true {
            let said = self.said.entry(event["turn"].as_u64().unwrap_or_default()).or_default();
            for block in event["content"].as_array().into_iter().flatten() {
                said.push_str(block["text"].as_str().unwrap_or_default());
                said.push('\n');
            }
        }
    }

    pub fn ids_ascend(&self) -> bool {
        self.seen.is_sorted_by(|one, next| one.id < next.id)
    }
}
