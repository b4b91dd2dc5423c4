//! Follows a session's typed events in a terminal: prints them, asks for decisions, and interrupts
//! the turn on Ctrl-C.

use std::{collections::VecDeque, io::IsTerminal as _, process::ExitCode};

use serde_json::Value;
use tokio::sync::mpsc;

use super::{
    OnInterrupt, exit_code, interrupt_or_detach, text,
    typed::{Line, Renderer},
};
use crate::{
    cli::sessions::decide,
    client::{
        Api, ApiFailure,
        stream::{Next, Source, follow},
    },
    output::print,
};

/// How following ended.
pub struct Watched {
    pub code: ExitCode,
    /// Whether the agent's own events were among those that were printed: those of earlier releases
    /// have none.
    pub agent_seen: bool,
}

/// Prints a session's typed events: those of one turn until its end, or all until the session's
/// newest turn has ended.
pub async fn watch(
    api: &Api,
    session: &str,
    since: u64,
    only_turn: Option<u64>,
    mut on_interrupt: OnInterrupt,
) -> Result<Watched, ApiFailure> {
    // Unbounded, but a turn has only a few of these events.
    let (news, mut received) = mpsc::unbounded_channel();
    let mut renderer = Renderer::default();
    let mut asking = Asking::new();
    let code = {
        let following = follow(api, session, Source::Events, since, None, |event| {
            let is_shown = only_turn.is_none_or(|only| turn(event) == Some(only));
            let lines = if is_shown { renderer.render(event) } else { Vec::new() };
            show(lines);
            match text(event, "type") {
                "session.permission_requested"
                | "session.permission_settled"
                | "session.status_idle"
                    if is_shown =>
                {
                    let _ = news.send(event.clone());
                }
                "session.status_terminated" | "session.deleted" => return Next::Stop,
                _ => {}
            }
            Next::Continue
        });
        let mut following = std::pin::pin!(following);
        loop {
            tokio::select! {
                biased;
                Some(event) = received.recv() => match text(&event, "type") {
                    "session.status_idle" if only_turn.is_some() || is_settled(api, session, turn(&event)).await? => {
                        break exit_code(event.get("exit_code"));
                    }
                    "session.status_idle" => {}
                    _ => asking.learn(session, &event),
                },
                followed = &mut following => {
                    followed?;
                    break ExitCode::FAILURE;
                }
                Some(line) = asking.line() => asking.answer(api, session, &line).await,
                _ = tokio::signal::ctrl_c() => {
                    if !interrupt_or_detach(api, session, &mut on_interrupt).await {
                        return Ok(Watched { code: ExitCode::from(130), agent_seen: true });
                    }
                }
            }
        }
    };
    Ok(Watched { code, agent_seen: renderer.agent_seen })
}

/// Prints the typed events so far.
pub async fn list(api: &Api, session: &str, since: u64) -> Result<Watched, ApiFailure> {
    let mut renderer = Renderer::default();
    let (mut after, mut code) = (since, ExitCode::SUCCESS);
    loop {
        let page = api.get(&format!("/sessions/{session}/events?after={after}")).await?;
        for event in page.get("data").and_then(Value::as_array).into_iter().flatten() {
            show(renderer.render(event));
            match text(event, "type") {
                "session.status_idle" => code = exit_code(event.get("exit_code")),
                "session.status_terminated" => code = ExitCode::FAILURE,
                _ => {}
            }
        }
        after = page.get("last_id").and_then(Value::as_u64).unwrap_or(after);
        if page.get("has_more").and_then(Value::as_bool) != Some(true) {
            return Ok(Watched { code, agent_seen: renderer.agent_seen });
        }
    }
}

fn show(lines: Vec<Line>) {
    for line in lines {
        match line {
            Line::Out(line) => print(&line),
            Line::Note(line) => note!("{line}"),
        }
    }
}

fn turn(event: &Value) -> Option<u64> {
    event.get("turn").and_then(Value::as_u64)
}

/// Whether the session is settled after a turn's end: a queued message may have begun the next
/// turn.
async fn is_settled(api: &Api, session: &str, turn: Option<u64>) -> Result<bool, ApiFailure> {
    let session = api.get(&format!("/sessions/{session}")).await?;
    let is_active = matches!(text(&session, "status"), "pending" | "running");
    Ok(!is_active && session.get("turn_count").and_then(Value::as_u64) <= turn)
}

/// The permission requests that wait for an answer. The terminal asks about the first one.
struct Asking {
    open: VecDeque<(u64, String)>,
    /// Lines of a terminal, read from the first request on.
    lines: Option<mpsc::Receiver<String>>,
    is_terminal: bool,
}

impl Asking {
    fn new() -> Self {
        Self { open: VecDeque::new(), lines: None, is_terminal: std::io::stdin().is_terminal() }
    }

    fn learn(&mut self, session: &str, event: &Value) {
        let Some(request) = event.get("tool_use_id").and_then(Value::as_u64) else { return };
        if text(event, "type") == "session.permission_settled" {
            self.open.retain(|(open, _)| *open != request);
            return;
        }
        if !self.is_terminal {
            note!(
                "The agent waits for a decision: aod sessions approve {session} {request}, or deny"
            );
            return;
        }
        self.open.push_back((request, text(event, "name").to_owned()));
        if self.open.len() == 1 {
            self.ask();
        }
        self.lines.get_or_insert_with(read_lines);
    }

    fn ask(&self) {
        if let Some((_, tool)) = self.open.front() {
            note!(
                "Allow {tool}? y: once, a: for the session, n: no, n REASON: no, and tell the agent why"
            );
        }
    }

    /// Returns the next line that is typed; waits forever if nothing was asked.
    async fn line(&mut self) -> Option<String> {
        match &mut self.lines {
            Some(lines) => lines.recv().await,
            None => std::future::pending().await,
        }
    }

    async fn answer(&mut self, api: &Api, session: &str, line: &str) {
        let Some((request, _)) = self.open.front().cloned() else { return };
        let Some((decision, message)) = decision(line) else { return self.ask() };
        self.open.pop_front();
        if let Err(error) = decide(api, session, Some(request), decision, message).await {
            note!("{error}");
        }
        self.ask();
    }
}

fn decision(line: &str) -> Option<(&'static str, Option<&str>)> {
    let line = line.trim();
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = Some(rest.trim()).filter(|rest| !rest.is_empty());
    match (word.to_lowercase().as_str(), rest) {
        ("y" | "yes", None) => Some(("allow", None)),
        ("a" | "always", None) => Some(("allow_for_session", None)),
        ("n" | "no", message) => Some(("deny", message)),
        _ => None,
    }
}

/// Reads the terminal on a thread of its own, which ends with the process: a read cannot be
/// cancelled.
fn read_lines() -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_may_say_why() {
        assert_eq!(decision("y"), Some(("allow", None)));
        assert_eq!(decision(" Always "), Some(("allow_for_session", None)));
        assert_eq!(decision("n use the copy"), Some(("deny", Some("use the copy"))));
        assert_eq!(decision("no"), Some(("deny", None)));
        for line in ["", "yes please", "maybe"] {
            assert_eq!(decision(line), None, "{line}");
        }
    }
}
