//! Fault injection: what the real service is known to do to its clients, for tests of clients
//! (docs/sprites-api.md §1.2, §3.8, §3.9, §11.3): given with `LOCAL_SPRITES_CHAOS` or `--chaos`,
//! nothing of it otherwise.

use std::{
    collections::VecDeque,
    fmt,
    str::FromStr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::http::StatusCode;
use serde_json::{Value, json};
use service::Lifecycle;

use crate::{
    sprites::{registry::Registry, sprite::Status},
    sync::locked,
};

/// The names of the switches, for `--help`.
pub const HELP: &str = "faults to inject, for tests, separated by commas: pause=SECONDS, cold=SECONDS, drop-sockets=PERCENT, lose-output=BYTES, \
                        slow-create=SECONDS, creates-per-minute=N, spurious=PERCENT, long-url=BYTES";

/// Which faults, and how much of each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chaos {
    /// An idle Sprite is stopped where it is, after so many seconds.
    pub pause: Option<f64>,
    /// A paused one loses its processes, so many seconds later.
    pub cold: Option<f64>,
    /// So many of a hundred exec sockets are dropped in their first second.
    pub drop_sockets: Option<f64>,
    /// Of a command's output behind so many bytes, three parts of four are lost.
    pub lose_output: Option<f64>,
    pub slow_create: Option<f64>,
    pub creates_per_minute: Option<f64>,
    /// So many of a hundred requests get a 404, a 500 or an HTML page instead; a creation then
    /// happens all the same.
    pub spurious: Option<f64>,
    /// Longer request lines are refused.
    pub long_url: Option<f64>,
}

impl Chaos {
    fn switch(&mut self, name: &str) -> Option<&mut Option<f64>> {
        Some(match name {
            "pause" => &mut self.pause,
            "cold" => &mut self.cold,
            "drop-sockets" => &mut self.drop_sockets,
            "lose-output" => &mut self.lose_output,
            "slow-create" => &mut self.slow_create,
            "creates-per-minute" => &mut self.creates_per_minute,
            "spurious" => &mut self.spurious,
            "long-url" => &mut self.long_url,
            _ => return None,
        })
    }
}

impl FromStr for Chaos {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut chaos = Self::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, amount) = part.split_once('=').ok_or(())?;
            let amount = amount
                .parse::<f64>()
                .ok()
                .filter(|amount| amount.is_finite() && *amount >= 0.0)
                .ok_or(())?;
            *chaos.switch(name).ok_or(())? = Some(amount);
        }
        Ok(chaos)
    }
}

impl fmt::Display for Chaos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::default() { "none" } else { "some" })
    }
}

/// The faults of a running server.
#[derive(Debug)]
pub struct FaultInjector {
    chaos: Chaos,
    creations: Mutex<VecDeque<Instant>>,
}

/// An answer instead of the right one.
#[derive(Clone, Copy, Debug)]
pub enum Spurious {
    NotFound,
    Failed,
    Page,
}

impl Spurious {
    pub fn answer(self) -> (StatusCode, &'static str) {
        match self {
            Self::NotFound => (StatusCode::NOT_FOUND, r#"{"error":"sprite not found"}"#),
            Self::Failed => (
                StatusCode::INTERNAL_SERVER_ERROR,
                r#"{"error":"service temporarily unavailable, please retry"}"#,
            ),
            Self::Page => {
                (StatusCode::BAD_GATEWAY, "<html><body><h1>502 Bad Gateway</h1></body></html>")
            }
        }
    }
}

impl FaultInjector {
    pub fn new(chaos: Chaos) -> Self {
        if chaos != Chaos::default() {
            tracing::warn!(?chaos, "fault injection is enabled");
        }
        Self { chaos, creations: Mutex::default() }
    }

    pub fn pauses(&self) -> bool {
        self.chaos.pause.is_some()
    }

    fn happens(percent: Option<f64>) -> bool {
        percent.is_some_and(|percent| fastrand::f64() * 100.0 < percent)
    }

    pub fn spurious(&self) -> Option<Spurious> {
        let which = [Spurious::NotFound, Spurious::Failed, Spurious::Page];
        Self::happens(self.chaos.spurious).then(|| which[fastrand::usize(..which.len())])
    }

    pub fn refuses_url(&self, bytes: usize) -> bool {
        self.chaos.long_url.is_some_and(|max| bytes as f64 > max)
    }

    /// When an exec socket is to be dropped.
    pub fn drop_after(&self) -> Option<Duration> {
        Self::happens(self.chaos.drop_sockets).then(|| Duration::from_secs_f64(fastrand::f64()))
    }

    /// Whether output is lost, behind so much of it.
    pub fn loses_output(&self, sent: usize) -> bool {
        self.chaos.lose_output.is_some_and(|kept| sent as f64 > kept) && fastrand::usize(..4) > 0
    }

    pub async fn before_creation(&self) {
        if let Some(seconds) = self.chaos.slow_create {
            tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
        }
    }

    /// The body of a refusal, when too many Sprites were made in the last minute.
    pub fn refuse_creation(&self) -> Option<(u64, Value)> {
        const WINDOW: Duration = Duration::from_secs(60);
        let limit = self.chaos.creates_per_minute? as usize;
        let mut creations = locked(&self.creations);
        creations.retain(|at| at.elapsed() < WINDOW);
        if creations.len() < limit {
            creations.push_back(Instant::now());
            return None;
        }
        let wait = creations
            .front()
            .map_or(WINDOW, |oldest| WINDOW.saturating_sub(oldest.elapsed()))
            .as_secs()
            + 1;
        let body = json!({
            "error": "sprite_creation_rate_limited",
            "message": format!("at most {limit} Sprites are created in a minute"),
            "limit": limit,
            "window_seconds": WINDOW.as_secs(),
            "retry_after_seconds": wait,
            "current_count": creations.len(),
        });
        Some((wait, body))
    }

    /// Pauses unused Sprites, until the server stops.
    pub async fn pause_idle(self: Arc<Self>, registry: Arc<Registry>, lifecycle: Lifecycle) {
        const CHECK: Duration = Duration::from_millis(200);
        let stop = lifecycle.stop_token();
        let Some(pause) = self.chaos.pause else { return };
        while stop.run_until_cancelled(tokio::time::sleep(CHECK)).await.is_some() {
            for sprite in registry.all() {
                let idle = sprite.idle().as_secs_f64();
                let done = match sprite.status() {
                    Status::Running if idle > pause => {
                        registry.pause(&sprite, Duration::from_secs_f64(pause)).await
                    }
                    Status::Warm if self.chaos.cold.is_some_and(|cold| idle > pause + cold) => {
                        registry.stop(&sprite).await
                    }
                    _ => Ok(()),
                };
                if let Err(error) = done {
                    tracing::debug!(%error, "a Sprite is not paused");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_are_parsed_and_typos_refused() {
        let chaos: Chaos = "pause=1.5, lose-output=65536,creates-per-minute=10".parse().unwrap();
        assert_eq!(
            (chaos.pause, chaos.lose_output, chaos.creates_per_minute),
            (Some(1.5), Some(65536.0), Some(10.0))
        );
        assert_eq!("".parse(), Ok(Chaos::default()));
        for wrong in ["pause", "pause=x", "paws=1", "pause=-1"] {
            assert_eq!(wrong.parse::<Chaos>(), Err(()), "{wrong}");
        }
    }

    #[test]
    fn the_rate_limit_of_creations_has_the_form_of_the_real_service() {
        let faults = FaultInjector::new("creates-per-minute=2".parse().unwrap());
        assert!(faults.refuse_creation().is_none() && faults.refuse_creation().is_none());
        let (wait, body) = faults.refuse_creation().unwrap();
        assert!((1..=61).contains(&wait));
        assert_eq!(
            (&body["error"], &body["retry_after_seconds"]),
            (&json!("sprite_creation_rate_limited"), &json!(wait))
        );
    }
}
