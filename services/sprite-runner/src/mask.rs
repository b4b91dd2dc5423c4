//! A session's secrets, taken out of the event log: always out of our own messages, and out of the
//! agent's output where the deployment wants it (`AOD_MASK_SECRETS`).

use aho_corasick::{AhoCorasick, MatchKind};
use bytes::Bytes;
use types::limits::OUTPUT_EVENT_BYTES_MAX;

use crate::utf8::incomplete_tail;

/// Shorter values are words like "true" or "production": masking them would garble the output and
/// hide nothing.
const SECRET_BYTES_MIN: usize = 8;
/// Longer ones could never be seen whole in one event.
const SECRET_BYTES_MAX: usize = OUTPUT_EVENT_BYTES_MAX / 2;
const MASK: &[u8] = b"***";

/// Some bytes of a stream, as they go into the log.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// How many bytes of the stream these are.
    pub consumed: u64,
    pub data: Bytes,
}

/// Finds secrets. Cannot be printed; one without secrets lets everything through.
#[derive(Clone, Default)]
pub struct Masker {
    secrets: Vec<Vec<u8>>,
    finder: Option<AhoCorasick>,
}

impl std::fmt::Debug for Masker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Masker({})", self.secrets.len())
    }
}

impl Masker {
    /// Values that are too short or too long to be distinguished from other text are not masked.
    pub fn new<'a>(values: impl IntoIterator<Item = &'a str>) -> Self {
        let mut secrets: Vec<Vec<u8>> = Vec::new();
        for value in values.into_iter().flat_map(with_its_parts) {
            // Agents print JSON, in which some characters are written differently.
            let escaped = serde_json::to_string(value).unwrap_or_default();
            let escaped = escaped.trim_start_matches('"').strip_suffix('"').unwrap_or_default();
            secrets.extend([value, escaped].map(|text| text.as_bytes().to_vec()));
        }
        secrets.retain(|secret| (SECRET_BYTES_MIN..=SECRET_BYTES_MAX).contains(&secret.len()));
        secrets.sort();
        secrets.dedup();
        let finder = if secrets.is_empty() {
            None
        } else {
            AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&secrets).ok()
        };
        Self { secrets, finder }
    }

    pub const fn has_secrets(&self) -> bool {
        self.finder.is_some()
    }

    /// A text without any secret.
    pub fn text(&self, text: &str) -> String {
        match &self.finder {
            Some(finder) => finder.replace_all(text, &vec!["***"; self.secrets.len()]),
            None => text.to_owned(),
        }
    }

    /// The next piece of `data`, and takes it off. It ends inside no character and inside nothing
    /// that may still become a secret: such an end stays behind until more has come. At the end of
    /// the stream (`last`) nothing stays behind.
    pub fn next(&self, data: &mut Bytes, last: bool) -> Option<Piece> {
        let head = data.get(..data.len().min(OUTPUT_EVENT_BYTES_MAX)).unwrap_or_default();
        let last = last && head.len() == data.len();
        let whole = if last {
            head.len()
        } else {
            head.len() - incomplete_tail(head).max(self.open_tail(head))
        };
        let (mut masked, mut taken) = (Vec::new(), 0);
        for found in self
            .finder
            .iter()
            .flat_map(|finder| finder.find_iter(head))
            .take_while(|found| found.start() < whole)
        {
            masked.extend_from_slice(head.get(taken..found.start()).unwrap_or_default());
            masked.extend_from_slice(MASK);
            taken = found.end();
        }
        let end = whole.max(taken);
        if end == 0 {
            return None;
        }
        if taken == 0 {
            return Some(Piece { consumed: end as u64, data: data.split_to(end) });
        }
        masked.extend_from_slice(head.get(taken..end).unwrap_or_default());
        let _ = data.split_to(end);
        Some(Piece { consumed: end as u64, data: masked.into() })
    }

    /// How many bytes at the end are the beginning of a secret.
    fn open_tail(&self, data: &[u8]) -> usize {
        let open = |secret: &Vec<u8>| {
            (1..secret.len().min(data.len() + 1))
                .rev()
                .find(|length| data.ends_with(secret.get(..*length).unwrap_or_default()))
        };
        self.secrets.iter().filter_map(open).max().unwrap_or(0)
    }
}

/// A value, and what follows `Bearer` in it.
fn with_its_parts(value: &str) -> impl Iterator<Item = &str> {
    let token = value.split_once(' ').map(|(_, token)| token.trim());
    std::iter::once(value).chain(token.filter(|_| value.split(' ').count() == 2))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is logged when the bytes come in these parts.
    fn record(masker: &Masker, parts: &[&[u8]]) -> (Vec<u8>, u64) {
        let (mut out, mut consumed, mut carry) = (Vec::new(), 0, Vec::new());
        for (index, part) in parts.iter().enumerate() {
            carry.extend_from_slice(part);
            let mut data = Bytes::from(std::mem::take(&mut carry));
            while let Some(piece) = masker.next(&mut data, index + 1 == parts.len()) {
                consumed += piece.consumed;
                out.extend_from_slice(&piece.data);
            }
            carry = data.to_vec();
        }
        assert!(carry.is_empty(), "left: {carry:?}");
        (out, consumed)
    }

    #[test]
    fn a_secret_is_masked_however_it_is_cut() {
        let masker = Masker::new([
            "sk-sentinel-1",
            "sk-sentinel-12345",
            "Bearer abcdefghijkl",
            "quote\"d secret",
            "short",
        ]);
        let text = "a sk-sentinel-12345 sk-sentinel-1. abcdefghijkl {\"k\":\"quote\\\"d secret\"} short sk-senti sk-sentinel-1";
        let expected = "a *** ***. *** {\"k\":\"***\"} short sk-senti ***";
        for first in 0..text.len() {
            for second in first..text.len() {
                let parts = [
                    &text.as_bytes()[..first],
                    &text.as_bytes()[first..second],
                    &text.as_bytes()[second..],
                ];
                let (out, consumed) = record(&masker, &parts);
                assert_eq!(String::from_utf8(out).unwrap(), expected, "{first} {second}");
                assert_eq!(consumed, text.len() as u64);
            }
        }
        assert_eq!(masker.text(text), expected);
    }

    #[test]
    fn only_a_possible_beginning_of_a_secret_is_held_back() {
        let masker = Masker::new(["sk-sentinel-1"]);
        let mut data = Bytes::from_static(b"hello sk-sen");
        assert_eq!(
            masker.next(&mut data, false),
            Some(Piece { consumed: 6, data: Bytes::from_static(b"hello ") })
        );
        assert_eq!(masker.next(&mut data, false), None);
        assert_eq!(
            masker.next(&mut data, true),
            Some(Piece { consumed: 6, data: Bytes::from_static(b"sk-sen") })
        );
        assert_eq!(
            Masker::default().next(&mut Bytes::from_static(b"sk-sen"), false).unwrap().consumed,
            6
        );
    }

    #[test]
    fn a_secret_across_the_largest_event_is_masked() {
        let masker = Masker::new(["sk-sentinel-1"]);
        let text = ["x".repeat(OUTPUT_EVENT_BYTES_MAX - 5).as_str(), "sk-sentinel-1", "y"].concat();
        let (out, consumed) = record(&masker, &[text.as_bytes()]);
        assert_eq!((out.len(), consumed), (text.len() - 10, text.len() as u64));
        assert!(out.ends_with(b"x***y"));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_shown(parts in proptest::collection::vec("(ab|abc|secretab|cabsecre|t|é|x){0,6}", 1..6)) {
            let masker = Masker::new(["secretab", "absecret", "cabsecreté"]);
            let parts: Vec<&[u8]> = parts.iter().map(|part| part.as_bytes()).collect();
            let whole = parts.concat();
            let (out, consumed) = record(&masker, &parts);
            prop_assert_eq!(consumed, whole.len() as u64);
            prop_assert_eq!(String::from_utf8(out).unwrap(), masker.text(std::str::from_utf8(&whole).unwrap()));
            let mut plain = Vec::new();
            record(&Masker::default(), &parts).0.clone_into(&mut plain);
            prop_assert_eq!(plain, whole);
        }
    }
}
