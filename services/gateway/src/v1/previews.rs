//! Texts that the agent is writing, as one connection of `…/events/stream?event_deltas[]=…` shows
//! them. Pure.
//!
//! They come at most once, and beside the log: what does not continue what was shown is left out,
//! and so is what comes after the whole text.

use contract::session::Preview;
use serde_json::{Value, json};

use crate::v1::ids::EventId;

/// A turn, and a text of it. Later ones are greater.
type Text = (u32, u32);

/// What was shown so far.
#[derive(Debug, Default)]
pub struct Previews {
    messages: bool,
    thinking: bool,
    /// The message that is being shown, and how many bytes of it were.
    message: Option<(Text, u64)>,
    /// The newest thought that was announced.
    thought: Option<Text>,
    /// The newest text that was shown as a whole.
    whole: Option<Text>,
}

impl Previews {
    /// Of the types that a query names.
    pub fn of(types: &[&str]) -> Self {
        Self {
            messages: types.contains(&"agent.message"),
            thinking: types.contains(&"agent.thinking"),
            ..Self::default()
        }
    }

    /// The text is shown as a whole.
    pub fn ended(&mut self, id: &str) {
        if let Some(EventId::Text { turn, text }) = EventId::decode(id) {
            self.whole = self.whole.max(Some((turn, text)));
        }
    }

    /// The events that a part of a text shows as, with their types; `running` is the turn whose
    /// begin was shown.
    pub fn show(&mut self, preview: &Preview, running: Option<u32>) -> Vec<(&'static str, Value)> {
        let (Ok(number), turn) = (u32::try_from(preview.text), preview.turn) else {
            return Vec::new();
        };
        let text = (turn, number);
        let is_wanted = if preview.is_thinking { self.thinking } else { self.messages };
        if !is_wanted || running != Some(turn) || Some(text) <= self.whole {
            return Vec::new();
        }
        let id = EventId::Text { turn, text: number }.encode();
        let start = |kind: &str| {
            ("event_start", json!({ "type": "event_start", "event": { "type": kind, "id": id } }))
        };
        if preview.is_thinking {
            // Thoughts have no text here.
            let is_new = Some(text) > self.thought;
            self.thought = self.thought.max(Some(text));
            return if is_new { vec![start("agent.thinking")] } else { Vec::new() };
        }
        let mut events = Vec::new();
        let shown = match self.message {
            Some((same, shown)) if same == text => shown,
            Some((later, _)) if later > text => return Vec::new(),
            _ if preview.offset == 0 => {
                events.push(start("agent.message"));
                0
            }
            // Its beginning was missed.
            _ => return Vec::new(),
        };
        // A runner that took the turn over tells some again.
        let known = usize::try_from(shown.saturating_sub(preview.offset)).unwrap_or(usize::MAX);
        let new =
            preview.content.get(known..).filter(|new| preview.offset <= shown && !new.is_empty());
        if let Some(new) = new {
            let delta = json!({ "type": "content_delta", "index": 0, "content": { "type": "text", "text": new } });
            events.push((
                "event_delta",
                json!({ "type": "event_delta", "event_id": id, "delta": delta }),
            ));
        }
        self.message = Some((text, shown + new.map_or(0, str::len) as u64));
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(text: u64, offset: u64, content: &str) -> Preview {
        Preview { turn: 2, text, is_thinking: false, offset, content: content.to_owned() }
    }

    fn texts(previews: &mut Previews, parts: &[Preview]) -> Vec<String> {
        let events = parts.iter().flat_map(|part| previews.show(part, Some(2))).collect::<Vec<_>>();
        events
            .iter()
            .map(|(kind, event)| match *kind {
                "event_start" => format!("+{}", event["event"]["type"].as_str().unwrap()),
                _ => event["delta"]["content"]["text"].as_str().unwrap().to_owned(),
            })
            .collect()
    }

    #[test]
    fn parts_are_shown_in_order_and_none_twice() {
        let mut previews = Previews::of(&["agent.message"]);
        let parts = [
            part(1, 0, "Hé"),
            part(1, 3, "llo"),
            part(1, 0, "Hé"),
            part(1, 3, "llo you"),
            part(1, 20, "lost"),
            part(1, 10, "!"),
        ];
        assert_eq!(texts(&mut previews, &parts), ["+agent.message", "Hé", "llo", " you", "!"]);
        // The next text, the end of the former, and one whose beginning was missed.
        assert_eq!(
            texts(
                &mut previews,
                &[part(2, 0, "a"), part(1, 11, "late"), part(1, 0, "late"), part(3, 4, "x")]
            ),
            ["+agent.message", "a"]
        );
    }

    #[test]
    fn nothing_follows_the_whole_text() {
        let mut previews = Previews::of(&["agent.message"]);
        assert_eq!(texts(&mut previews, &[part(1, 0, "a")]), ["+agent.message", "a"]);
        previews.ended(&EventId::Text { turn: 2, text: 1 }.encode());
        assert!(texts(&mut previews, &[part(1, 1, "b")]).is_empty());
        assert!(
            previews.show(&part(2, 0, "a"), None).is_empty()
                && previews.show(&part(2, 0, "a"), Some(1)).is_empty()
        );
    }

    #[test]
    fn a_thought_begins_and_has_no_text() {
        let thought = |text, offset| Preview { is_thinking: true, ..part(text, offset, "secret") };
        let mut previews = Previews::of(&["agent.thinking"]);
        assert_eq!(
            texts(&mut previews, &[thought(1, 0), thought(1, 6), part(2, 0, "a"), thought(3, 0)]),
            ["+agent.thinking", "+agent.thinking"]
        );
        assert!(texts(&mut Previews::of(&["agent.message"]), &[thought(1, 0)]).is_empty());
    }
}
