//! Reads a few fields out of JSON as it passes by, in any pieces: linear in its size, with bounded
//! memory, whatever it holds. No I/O.
//!
//! A provider names what a request used in the midst of a response that may be megabytes long, some
//! of it in one line. So nothing is buffered but the key or the scalar at hand, cut at a bound.
//! What is not JSON yields no fields, or some; it is never an error.

/// Depth up to which fields are distinguished; deeper ones are only counted.
const DEPTH_MAX: usize = 8;
/// Longer keys are ignored.
const KEY_BYTES_MAX: usize = 32;
/// Longer texts are cut.
const TEXT_BYTES_MAX: usize = 400;

/// A scalar that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scalar<'a> {
    Number(u64),
    /// Without its escapes undone.
    Text(&'a str),
    Bool(bool),
}

/// Takes fields: their path, without the arrays around everything, and their values.
pub trait Visit {
    fn field(&mut self, path: &[&str], value: Scalar<'_>);

    /// A text of so many bytes as they are sent, however long it is. [`Self::field`] is called too.
    fn text(&mut self, _path: &[&str], _bytes: u64) {}
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between tokens.
    Between,
    Text,
    Escape,
    /// A number or a word.
    Bare,
}

#[derive(Clone, Copy, Debug, Default)]
struct Frame {
    is_object: bool,
    /// The next text is a key.
    awaits_key: bool,
    key: [u8; KEY_BYTES_MAX],
    key_len: usize,
}

impl Frame {
    fn key(&self) -> &str {
        let bytes = self.key.get(..self.key_len).unwrap_or_default();
        if self.is_object { std::str::from_utf8(bytes).unwrap_or_default() } else { "[]" }
    }
}

/// One JSON document after the other.
#[derive(Debug)]
pub struct Scanner {
    state: State,
    frames: [Frame; DEPTH_MAX],
    depth: usize,
    /// The token at hand, as far as it is kept.
    token: Vec<u8>,
    is_cut: bool,
    /// How long the token is.
    token_bytes: u64,
}

impl Default for Scanner {
    fn default() -> Self {
        Self {
            state: State::Between,
            frames: [Frame::default(); DEPTH_MAX],
            depth: 0,
            token: Vec::with_capacity(TEXT_BYTES_MAX),
            is_cut: false,
            token_bytes: 0,
        }
    }
}

impl Scanner {
    pub fn feed(&mut self, mut bytes: &[u8], visit: &mut impl Visit) {
        while let Some((&byte, rest)) = bytes.split_first() {
            match self.state {
                State::Text => {
                    let end = bytes
                        .iter()
                        .position(|byte| matches!(byte, b'"' | b'\\'))
                        .unwrap_or(bytes.len());
                    let (text, after) = bytes.split_at(end);
                    self.keep(text);
                    bytes = after;
                    match bytes.split_first() {
                        Some((b'"', rest)) => {
                            bytes = rest;
                            self.state = State::Between;
                            self.end_text(visit);
                        }
                        Some((_, rest)) => {
                            bytes = rest;
                            self.keep(b"\\");
                            self.state = State::Escape;
                        }
                        None => return,
                    }
                    continue;
                }
                State::Escape => {
                    self.keep(&[byte]);
                    self.state = State::Text;
                }
                State::Bare if byte.is_ascii_alphanumeric() || b"+-.".contains(&byte) => {
                    self.keep(&[byte])
                }
                State::Bare => {
                    self.end_bare(visit);
                    self.state = State::Between;
                    continue;
                }
                State::Between => self.begin(byte),
            }
            bytes = rest;
        }
    }

    /// The document is over, whole or not.
    pub fn end(&mut self, visit: &mut impl Visit) {
        if self.state == State::Bare {
            self.end_bare(visit);
        }
        (self.state, self.depth) = (State::Between, 0);
    }

    fn begin(&mut self, byte: u8) {
        match byte {
            b'"' => {
                self.clear();
                self.state = State::Text;
            }
            b'{' | b'[' => {
                if let Some(frame) = self.frames.get_mut(self.depth) {
                    *frame = Frame {
                        is_object: byte == b'{',
                        awaits_key: byte == b'{',
                        ..Frame::default()
                    };
                }
                self.depth += 1;
            }
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            b',' => {
                if let Some(frame) = self.innermost() {
                    frame.awaits_key = frame.is_object;
                }
            }
            byte if byte.is_ascii_alphanumeric() || byte == b'-' => {
                self.clear();
                self.keep(&[byte]);
                self.state = State::Bare;
            }
            _ => {}
        }
    }

    fn innermost(&mut self) -> Option<&mut Frame> {
        self.frames.get_mut(self.depth.checked_sub(1)?)
    }

    fn clear(&mut self) {
        self.token.clear();
        (self.is_cut, self.token_bytes) = (false, 0);
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.token_bytes = self.token_bytes.saturating_add(bytes.len() as u64);
        let room = TEXT_BYTES_MAX - self.token.len();
        self.is_cut |= bytes.len() > room;
        self.token.extend_from_slice(bytes.get(..bytes.len().min(room)).unwrap_or_default());
    }

    fn end_text(&mut self, visit: &mut impl Visit) {
        let token = std::mem::take(&mut self.token);
        match self.innermost() {
            Some(frame) if frame.awaits_key => {
                frame.awaits_key = false;
                // A key that is too long is kept as none.
                frame.key_len = if token.len() <= KEY_BYTES_MAX { token.len() } else { 0 };
                if let (Some(to), Some(from)) =
                    (frame.key.get_mut(..frame.key_len), token.get(..frame.key_len))
                {
                    to.copy_from_slice(from);
                }
            }
            _ => {
                // A text that was cut inside a character is valid up to there.
                let valid =
                    std::str::from_utf8(&token).map_or_else(|error| error.valid_up_to(), str::len);
                self.tell(
                    Scalar::Text(
                        std::str::from_utf8(token.get(..valid).unwrap_or_default())
                            .unwrap_or_default(),
                    ),
                    visit,
                );
            }
        }
        self.token = token;
    }

    fn end_bare(&mut self, visit: &mut impl Visit) {
        let token = std::mem::take(&mut self.token);
        let text = std::str::from_utf8(&token).unwrap_or_default();
        let value = match text {
            "true" => Some(Scalar::Bool(true)),
            "false" => Some(Scalar::Bool(false)),
            // Some write whole numbers with a fraction.
            text => text.parse::<u64>().ok().or_else(|| whole(text)).map(Scalar::Number),
        };
        if let Some(value) = value.filter(|_| !self.is_cut) {
            self.tell(value, visit);
        }
        self.token = token;
    }

    fn tell(&self, value: Scalar<'_>, visit: &mut impl Visit) {
        if self.depth == 0 || self.depth > DEPTH_MAX {
            return;
        }
        let mut path = [""; DEPTH_MAX];
        let mut len = 0;
        for frame in self.frames.iter().take(self.depth).skip_while(|frame| !frame.is_object) {
            if let Some(key) = path.get_mut(len) {
                *key = frame.key();
                len += 1;
            }
        }
        let path = path.get(..len).unwrap_or_default();
        if matches!(value, Scalar::Text(_)) {
            visit.text(path, self.token_bytes);
        }
        visit.field(path, value);
    }
}

fn whole(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.')?;
    fraction.bytes().all(|digit| digit == b'0').then(|| whole.parse().ok())?
}

/// The data of server-sent events, as documents of JSON.
#[derive(Debug, Default)]
pub struct Events {
    line: Line,
    after_cr: bool,
    scanner: Scanner,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Line {
    /// So many bytes of `data:` were read.
    Name(usize),
    Data,
    Other,
    #[default]
    Start,
}

const DATA: &[u8] = b"data:";

impl Events {
    pub fn feed(&mut self, mut bytes: &[u8], visit: &mut impl Visit) {
        if bytes.is_empty() {
            return;
        }
        if std::mem::take(&mut self.after_cr) && bytes.first() == Some(&b'\n') {
            bytes = bytes.get(1..).unwrap_or_default();
        }
        while let Some(&byte) = bytes.first() {
            let is_end = matches!(byte, b'\n' | b'\r');
            match self.line {
                // An empty line ends an event.
                Line::Start if is_end => self.scanner.end(visit),
                Line::Start => {
                    self.line = Line::Name(0);
                    continue;
                }
                Line::Name(read) if Some(&byte) == DATA.get(read) => {
                    self.line =
                        if read + 1 == DATA.len() { Line::Data } else { Line::Name(read + 1) };
                    bytes = bytes.get(1..).unwrap_or_default();
                    continue;
                }
                Line::Name(_) if !is_end => {
                    self.line = Line::Other;
                    continue;
                }
                Line::Data | Line::Other if !is_end => {
                    let end = bytes
                        .iter()
                        .position(|byte| matches!(byte, b'\n' | b'\r'))
                        .unwrap_or(bytes.len());
                    let (text, after) = bytes.split_at(end);
                    if self.line == Line::Data {
                        self.scanner.feed(text, visit);
                    }
                    bytes = after;
                    continue;
                }
                _ => {
                    // A line's end stands between two parts of one document.
                    if self.line == Line::Data {
                        self.scanner.feed(b"\n", visit);
                    }
                    self.line = Line::Start;
                }
            }
            // A line's end, of one byte or of two.
            bytes = bytes.get(1..).unwrap_or_default();
            if byte == b'\r' {
                match bytes.first() {
                    Some(b'\n') => bytes = bytes.get(1..).unwrap_or_default(),
                    Some(_) => {}
                    None => self.after_cr = true,
                }
            }
        }
    }

    pub fn end(&mut self, visit: &mut impl Visit) {
        self.scanner.end(visit);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[derive(Debug, Default, PartialEq)]
    struct Fields(Vec<(String, String)>);

    impl Visit for Fields {
        fn field(&mut self, path: &[&str], value: Scalar<'_>) {
            self.0.push((path.join("."), format!("{value:?}")));
        }
    }

    fn scanned<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Fields {
        let (mut scanner, mut fields) = (Scanner::default(), Fields::default());
        pieces.into_iter().for_each(|piece| scanner.feed(piece, &mut fields));
        scanner.end(&mut fields);
        fields
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<u64>().prop_map(Value::from),
            any::<bool>().prop_map(Value::from),
            "[a-z\"\\\\{}\\[\\]:,\u{e9} \n]{0,12}".prop_map(Value::from),
            Just(Value::Null)
        ];
        leaf.prop_recursive(8, 40, 5, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::vec(("[a-z\"\\\\]{1,6}", inner), 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    /// The numbers of a document that are not too deep, by their paths.
    fn numbers(value: &Value, depth: usize, path: &[String], found: &mut Vec<(String, String)>) {
        match value {
            Value::Object(fields) => {
                for (key, value) in fields {
                    let escaped = serde_json::to_string(key).unwrap();
                    let path = [path, &[escaped[1..escaped.len() - 1].to_owned()]].concat();
                    numbers(value, depth + 1, &path, found);
                }
            }
            Value::Array(values) => {
                let path =
                    if path.is_empty() { Vec::new() } else { [path, &["[]".to_owned()]].concat() };
                values.iter().for_each(|value| numbers(value, depth + 1, &path, found));
            }
            Value::Number(number) if (1..=DEPTH_MAX).contains(&depth) => {
                found.push((
                    path.join("."),
                    format!("{:?}", Scalar::Number(number.as_u64().unwrap())),
                ));
            }
            _ => {}
        }
    }

    proptest! {
        #[test]
        fn every_number_is_found_wherever_the_document_is_cut(value in value(), cut in any::<prop::sample::Index>(), pretty in any::<bool>()) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.unwrap();
            let whole = scanned([text.as_bytes()]);
            let (left, right) = text.as_bytes().split_at(cut.index(text.len() + 1));
            prop_assert_eq!(&scanned([left, right]), &whole);
            prop_assert_eq!(&scanned(text.as_bytes().chunks(1)), &whole);
            let mut expected = Vec::new();
            numbers(&value, 0, &[], &mut expected);
            let found: Vec<_> = whole.0.into_iter().filter(|(_, value)| value.starts_with("Number")).collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn any_bytes_in_any_pieces_are_read_alike(bytes in proptest::collection::vec(any::<u8>(), 0..300), size in 1_usize..20) {
            prop_assert_eq!(scanned(bytes.chunks(size)), scanned([bytes.as_slice()]));
            let events = |pieces: Vec<&[u8]>| {
                let (mut events, mut fields) = (Events::default(), Fields::default());
                pieces.into_iter().for_each(|piece| events.feed(piece, &mut fields));
                events.end(&mut fields);
                fields
            };
            prop_assert_eq!(events(bytes.chunks(size).collect()), events(vec![&bytes]));
        }

        #[test]
        fn events_are_documents_of_their_own(
            values in proptest::collection::vec(value(), 0..4), newline in prop_oneof![Just("\n"), Just("\r\n"), Just("\r")], size in 1_usize..9,
        ) {
            let text: String = values.iter().map(|value| format!("event: x{newline}data: {value}{newline}{newline}")).collect();
            let (mut events, mut fields) = (Events::default(), Fields::default());
            text.as_bytes().chunks(size).for_each(|piece| events.feed(piece, &mut fields));
            events.end(&mut fields);
            let expected: Vec<_> = values.iter().flat_map(|value| scanned([value.to_string().as_bytes()]).0).collect();
            prop_assert_eq!(fields.0, expected);
        }
    }

    #[test]
    fn a_text_of_any_length_costs_no_memory() {
        let (mut scanner, mut fields) = (Scanner::default(), Fields::default());
        scanner.feed(b"{\"a\":\"", &mut fields);
        for _ in 0..1000 {
            scanner.feed(&[b'x'; 10_000], &mut fields);
        }
        scanner.feed(b"\",\"b\":7}", &mut fields);
        assert_eq!(scanner.token.capacity(), TEXT_BYTES_MAX);
        assert_eq!(fields.0.last().unwrap(), &("b".to_owned(), "Number(7)".to_owned()));
        assert_eq!(json!({ "b": 7.0 }).to_string(), r#"{"b":7.0}"#);
        assert_eq!(scanned([br#"{"b":7.0}"#.as_slice()]).0.len(), 1);
    }
}
