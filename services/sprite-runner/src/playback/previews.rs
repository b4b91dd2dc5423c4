//! Texts that an agent is writing: parts of them are sent before the log has the whole.

use bytes::Bytes;
use contract::{
    host::{self as agent_host, event},
    session::Preview,
};

use crate::{mask::Masker, playback::place::EVENT_BYTES_MIN};

/// What previews cost at least, as they are sent: a program in the CLI's place may write as fast as
/// it prints.
pub fn sent_bytes(previews: &[Preview]) -> usize {
    previews.iter().map(|preview| preview.content.len().max(EVENT_BYTES_MIN)).sum()
}

/// A text that the agent is writing.
#[derive(Debug)]
struct Writing {
    text: u64,
    /// What may be the beginning of a secret.
    held: Bytes,
    /// How many bytes were sent, without secrets.
    sent: u64,
}

/// The message and the thought that are being written, and parts of them that are to be sent.
#[derive(Debug, Default)]
pub struct Drafts {
    writing: [Option<Writing>; 2],
    previews: Vec<Preview>,
}

impl Drafts {
    /// Adds to a text that is being written.
    pub fn write(&mut self, masker: &Masker, delta: agent_host::Delta) {
        let writing = &mut self.writing[usize::from(delta.thinking)];
        let is_same = writing.as_ref().is_some_and(|writing| writing.text == delta.text);
        if !is_same {
            *writing = Some(Writing { text: delta.text, held: Bytes::new(), sent: 0 });
        }
        let Some(writing) = writing else { return };
        writing.held = [&writing.held[..], delta.content.as_bytes()].concat().into();
        while let Some(piece) = masker.next(&mut writing.held, false) {
            let content = String::from_utf8_lossy(&piece.data).into_owned();
            let offset = writing.sent;
            writing.sent += content.len() as u64;
            self.previews.push(Preview {
                turn: 0,
                text: writing.text,
                is_thinking: delta.thinking,
                offset,
                content,
            });
        }
    }

    /// The number of the text that an event is the whole of; 0: no part of it was written before.
    pub fn written(&mut self, event: &agent_host::Event) -> u64 {
        let writing = match &event.kind {
            // A subagent's texts come whole.
            _ if event.parent != 0 => None,
            Some(event::Kind::Message(_)) => self.writing[0].take(),
            Some(event::Kind::Thinking(_)) => self.writing[1].take(),
            _ => None,
        };
        writing.map_or(0, |writing| writing.text)
    }

    /// Parts of texts that were written since this was called last.
    pub fn take_previews(&mut self) -> Vec<Preview> {
        std::mem::take(&mut self.previews)
    }
}
