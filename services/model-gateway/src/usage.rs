//! Reads the model and limits of requests and the usage of responses, in each provider's format. No
//! I/O.

use serde::Deserialize;
use types::Provider;

use crate::scan::{Events, Scalar, Scanner, Visit};

/// Models have shorter names. Longer ones are not passed on to the scheduler.
const MODEL_BYTES_MAX: usize = 200;

/// What a request asks for, as far as its body says. Without a model where that cannot be read for
/// certain: such a request is refused where models or money are limited.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    pub model: String,
    /// The most that may be generated.
    pub output_max: Option<u64>,
}

/// A field that is given twice is an error: providers differ in which of them counts.
#[derive(Default, Deserialize)]
#[serde(default)]
struct AskedBody {
    model: Option<String>,
    max_tokens: Option<f64>,
    max_output_tokens: Option<f64>,
    max_completion_tokens: Option<f64>,
    #[serde(alias = "generation_config", rename = "generationConfig")]
    generation_config: Option<GenerationConfig>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct GenerationConfig {
    #[serde(alias = "max_output_tokens", rename = "maxOutputTokens")]
    max_output_tokens: Option<f64>,
}

/// Reads a request. Google's names its model in the path.
pub fn asked(path: &str, body: &[u8]) -> Asked {
    let Ok(body) = serde_json::from_slice::<AskedBody>(body) else { return Asked::default() };
    let in_path = path
        .split_once("/models/")
        .and_then(|(_, rest)| rest.split_once(':'))
        .map(|(model, _)| model.to_owned());
    let of_google = body.generation_config.and_then(|config| config.max_output_tokens);
    let most =
        body.max_tokens.or(body.max_output_tokens).or(body.max_completion_tokens).or(of_google);
    Asked {
        model: in_path
            .or(body.model)
            .filter(|model| model.len() <= MODEL_BYTES_MAX)
            .unwrap_or_default(),
        // Saturates.
        output_max: most.map(|most| most as u64),
    }
}

/// Tokens of one request. `input` is what was read neither from nor into a cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    pub input: u64,
    pub cache_read: u64,
    pub cache_write: u64,
    /// Part of `cache_write`: what is kept for an hour, which costs more.
    pub cache_write_hour: u64,
    pub output: u64,
    /// Part of `output`.
    pub reasoning: u64,
}

/// What a response said of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reported {
    pub model: String,
    /// Absent: the provider named no usage.
    pub tokens: Option<Tokens>,
    /// The response is whole, as far as it says so.
    pub is_whole: bool,
    /// A stream's last event was read.
    pub has_last_event: bool,
    pub error_type: String,
    pub error_code: String,
    pub error_message: String,
    /// Bytes of generated text that passed by.
    pub generated_bytes: u64,
}

#[derive(Debug)]
enum Shape {
    Events(Events),
    Document(Scanner),
}

/// Follows one response. Linear in its size, with bounded memory.
#[derive(Debug)]
pub struct Meter {
    shape: Shape,
    reader: Reader,
}

#[derive(Debug)]
struct Reader {
    provider: Provider,
    raw: Raw,
    reported: Reported,
}

/// Counts as the provider has them: of several in one response the last one holds.
#[derive(Clone, Copy, Debug, Default)]
struct Raw {
    input: Option<u64>,
    output: Option<u64>,
    cached: u64,
    cache_write: u64,
    cache_write_hour: u64,
    reasoning: u64,
    tool_input: u64,
}

impl Meter {
    pub fn new(provider: Provider, is_stream: bool) -> Self {
        let shape = if is_stream {
            Shape::Events(Events::default())
        } else {
            Shape::Document(Scanner::default())
        };
        // A whole document says so by being one.
        let reported = Reported { is_whole: !is_stream, ..Reported::default() };
        Self { shape, reader: Reader { provider, raw: Raw::default(), reported } }
    }

    pub fn feed(&mut self, bytes: &[u8]) {
        match &mut self.shape {
            Shape::Events(events) => events.feed(bytes, &mut self.reader),
            Shape::Document(scanner) => scanner.feed(bytes, &mut self.reader),
        }
    }

    pub fn end(mut self) -> Reported {
        match &mut self.shape {
            Shape::Events(events) => events.end(&mut self.reader),
            Shape::Document(scanner) => scanner.end(&mut self.reader),
        }
        Reported { tokens: self.reader.tokens(), ..self.reader.reported }
    }
}

impl Reader {
    fn tokens(&self) -> Option<Tokens> {
        let raw = self.raw;
        if raw.input.is_none() && raw.output.is_none() {
            return None;
        }
        let (input, output) = (raw.input.unwrap_or_default(), raw.output.unwrap_or_default());
        let Raw { cached, cache_write, cache_write_hour, reasoning, tool_input, .. } = raw;
        Some(match self.provider {
            Provider::Anthropic => Tokens {
                input,
                cache_read: cached,
                cache_write,
                cache_write_hour: cache_write_hour.min(cache_write),
                output,
                reasoning,
            },
            Provider::Openai => Tokens {
                input: input.saturating_sub(cached).saturating_sub(cache_write),
                cache_read: cached,
                cache_write,
                cache_write_hour: 0,
                output,
                reasoning,
            },
            Provider::Google => Tokens {
                input: input.saturating_sub(cached).saturating_add(tool_input),
                cache_read: cached,
                cache_write: 0,
                cache_write_hour: 0,
                output: output.saturating_add(reasoning),
                reasoning,
            },
        })
    }

    fn end_of_stream(&mut self) {
        (self.reported.is_whole, self.reported.has_last_event) = (true, true);
    }

    fn count(&mut self, names: &[&str], number: u64) {
        match (self.provider, names) {
            (Provider::Anthropic, ["input_tokens"])
            | (Provider::Openai, ["input_tokens" | "prompt_tokens"]) => {
                self.raw.input = Some(number)
            }
            (Provider::Anthropic, ["output_tokens"])
            | (Provider::Openai, ["output_tokens" | "completion_tokens"]) => {
                self.raw.output = Some(number);
            }
            (Provider::Anthropic, ["cache_read_input_tokens"])
            | (
                Provider::Openai,
                ["input_tokens_details" | "prompt_tokens_details", "cached_tokens"],
            ) => self.raw.cached = number,
            (Provider::Anthropic, ["cache_creation_input_tokens"])
            | (
                Provider::Openai,
                ["input_tokens_details" | "prompt_tokens_details", "cache_write_tokens"],
            ) => self.raw.cache_write = number,
            (Provider::Anthropic, ["cache_creation", "ephemeral_1h_input_tokens"]) => {
                self.raw.cache_write_hour = number
            }
            (
                Provider::Openai,
                ["output_tokens_details" | "completion_tokens_details", "reasoning_tokens"],
            ) => self.raw.reasoning = number,
            (Provider::Google, ["promptTokenCount"]) => self.raw.input = Some(number),
            (Provider::Google, ["candidatesTokenCount"]) => self.raw.output = Some(number),
            (Provider::Google, ["cachedContentTokenCount"]) => self.raw.cached = number,
            (Provider::Google, ["thoughtsTokenCount"]) => self.raw.reasoning = number,
            (Provider::Google, ["toolUsePromptTokenCount"]) => self.raw.tool_input = number,
            _ => {}
        }
    }
}

/// The last event of a stream, by its type.
fn is_last(kind: &str) -> bool {
    matches!(
        kind,
        "message_stop" | "response.completed" | "response.incomplete" | "response.failed"
    )
}

impl Visit for Reader {
    fn field(&mut self, path: &[&str], value: Scalar<'_>) {
        // Anthropic's first event and OpenAI's last ones wrap what a whole response is.
        let path = match path {
            ["message", rest @ ..] if self.provider == Provider::Anthropic => rest,
            ["response", rest @ ..] if self.provider == Provider::Openai => rest,
            path => path,
        };
        match (path, value) {
            (["usage" | "usageMetadata", names @ ..], Scalar::Number(number)) => {
                self.count(names, number)
            }
            (["model" | "modelVersion"], Scalar::Text(model)) => {
                self.reported.model = model.to_owned()
            }
            (["type"], Scalar::Text(kind)) if is_last(kind) => self.end_of_stream(),
            // Chat completions and Google's chunks.
            (
                ["choices" | "candidates", "[]", "finish_reason" | "finishReason"],
                Scalar::Text(_),
            ) => self.end_of_stream(),
            (["error", "type" | "status"], Scalar::Text(kind)) => {
                self.reported.error_type = kind.to_owned()
            }
            (["error", "code"], Scalar::Text(code)) => self.reported.error_code = code.to_owned(),
            (["error", "message"], Scalar::Text(message)) => {
                self.reported.error_message = message.to_owned()
            }
            _ => {}
        }
    }

    fn text(&mut self, path: &[&str], bytes: u64) {
        if path.last().is_some_and(|name| GENERATED.contains(name)) {
            self.reported.generated_bytes = self.reported.generated_bytes.saturating_add(bytes);
        }
    }
}

/// Fields that hold what a model generates, in the responses of all providers.
const GENERATED: [&str; 8] = [
    "text",
    "thinking",
    "partial_json",
    "delta",
    "content",
    "arguments",
    "reasoning_content",
    "reasoning",
];

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::Index};
    use serde_json::{Value, json};

    use super::*;

    fn read<'a>(
        provider: Provider,
        is_stream: bool,
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Reported {
        let mut meter = Meter::new(provider, is_stream);
        pieces.into_iter().for_each(|piece| meter.feed(piece));
        meter.end()
    }

    fn stream(events: &[Value]) -> String {
        events
            .iter()
            .map(|event| {
                format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or("message"))
            })
            .collect()
    }

    /// Of each provider: a stream whose text is `text`, and what it used.
    fn streams(text: &str) -> Vec<(Provider, String, Tokens)> {
        // A text that looks like what is looked for.
        let trap =
            json!({ "usage": { "input_tokens": 9, "output_tokens": 9 }, "text": text }).to_string();
        let anthropic = stream(&[
            json!({ "type": "message_start", "message": { "model": "m", "content": [], "usage": {
                "input_tokens": 100, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 5, "output_tokens": 1,
                "cache_creation": { "ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": 3 } } } }),
            json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "text_delta", "text": trap } }),
            json!({ "type": "message_delta", "delta": { "stop_reason": "end_turn" }, "usage": { "output_tokens": 42 } }),
            json!({ "type": "message_stop" }),
        ]);
        let responses = stream(&[
            json!({ "type": "response.created", "response": { "model": "m", "usage": null } }),
            json!({ "type": "response.output_text.delta", "delta": trap }),
            json!({ "type": "response.completed", "response": { "model": "m", "output": [{ "content": [{ "text": trap }] }], "usage": {
                "input_tokens": 116, "input_tokens_details": { "cached_tokens": 12, "cache_write_tokens": 4 }, "output_tokens": 42,
                "output_tokens_details": { "reasoning_tokens": 2 }, "total_tokens": 158 } } }),
        ]);
        let chat = stream(&[
            json!({ "model": "m", "choices": [{ "delta": { "content": trap }, "finish_reason": null }], "usage": null }),
            json!({ "model": "m", "choices": [{ "delta": {}, "finish_reason": "stop" }] }),
            json!({ "model": "m", "choices": [], "usage": { "prompt_tokens": 112, "completion_tokens": 42,
                "prompt_tokens_details": { "cached_tokens": 12 }, "completion_tokens_details": { "reasoning_tokens": 2 } } }),
        ]) + "data: [DONE]\n\n";
        let google = stream(&[
            json!({ "candidates": [{ "content": { "parts": [{ "text": trap }] } }], "usageMetadata": { "promptTokenCount": 112 }, "modelVersion": "m" }),
            json!({ "candidates": [{ "finishReason": "STOP" }], "modelVersion": "m", "usageMetadata": {
                "promptTokenCount": 112, "cachedContentTokenCount": 12, "candidatesTokenCount": 40, "thoughtsTokenCount": 2 } }),
        ]);
        let anthropic_tokens = Tokens {
            input: 100,
            cache_read: 7,
            cache_write: 5,
            cache_write_hour: 3,
            output: 42,
            reasoning: 0,
        };
        let uncached =
            Tokens { input: 100, cache_read: 12, output: 42, reasoning: 2, ..Tokens::default() };
        let written = Tokens { cache_write: 4, ..uncached };
        vec![
            (Provider::Anthropic, anthropic, anthropic_tokens),
            (Provider::Openai, responses, written),
            (Provider::Openai, chat, uncached),
            (Provider::Google, google, uncached),
        ]
    }

    #[test]
    fn usage_is_the_same_at_every_cut_point_of_a_stream() {
        for (provider, text, tokens) in streams("hello") {
            let expected = Reported {
                model: "m".to_owned(),
                tokens: Some(tokens),
                is_whole: true,
                has_last_event: true,
                ..Reported::default()
            };
            for cut in 0..=text.len() {
                let (left, right) = text.as_bytes().split_at(cut);
                let reported = read(provider, true, [left, right]);
                assert_eq!(
                    Reported { generated_bytes: 0, ..reported },
                    expected,
                    "cut at {cut} of {text}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn no_text_changes_what_is_counted(text in "\\PC{0,40}", sizes in proptest::collection::vec(1_usize..30, 1..20)) {
            for (provider, stream, tokens) in streams(&text) {
                let (mut rest, mut pieces, mut next) = (stream.as_bytes(), Vec::new(), sizes.iter().cycle());
                while !rest.is_empty() {
                    let (piece, after) = rest.split_at(rest.len().min(*next.next().unwrap()));
                    pieces.push(piece);
                    rest = after;
                }
                prop_assert_eq!(read(provider, true, pieces).tokens, Some(tokens));
            }
        }

        #[test]
        fn a_stream_that_breaks_off_is_not_whole_and_reports_no_more_than_was_sent(at in any::<Index>()) {
            for (provider, stream, tokens) in streams("hello") {
                let cut = at.index(stream.len());
                let reported = read(provider, true, [&stream.as_bytes()[..cut]]);
                if let Some(partial) = reported.tokens {
                    prop_assert!(partial.output <= tokens.output && partial.input <= 116);
                }
                let last = stream.trim_end().rfind("data:").unwrap();
                let marks_end_early = matches!(provider, Provider::Openai if stream.contains("[DONE]"));
                prop_assert!(marks_end_early || cut > last || !reported.is_whole);
            }
        }
    }

    #[test]
    fn whole_answers_and_errors_are_read_too() {
        let whole = json!({ "type": "message", "model": "m", "usage": { "input_tokens": 3, "output_tokens": 4 } }).to_string();
        let reported = read(Provider::Anthropic, false, [whole.as_bytes()]);
        assert_eq!(reported.tokens, Some(Tokens { input: 3, output: 4, ..Tokens::default() }));
        assert!(reported.is_whole);
        // Without `alt=sse` Google sends a list.
        let list = json!([{ "candidates": [] }, { "usageMetadata": { "promptTokenCount": 3, "candidatesTokenCount": 4 } }]).to_string();
        assert_eq!(
            read(Provider::Google, false, [list.as_bytes()]).tokens,
            Some(Tokens { input: 3, output: 4, ..Tokens::default() })
        );
        let error = json!({ "error": { "message": "no quota", "type": "insufficient_quota", "code": "insufficient_quota" } }).to_string();
        let reported = read(Provider::Openai, false, [error.as_bytes()]);
        assert_eq!(
            (reported.error_code.as_str(), reported.error_message.as_str()),
            ("insufficient_quota", "no quota")
        );
        assert_eq!(reported.tokens, None);
    }

    #[test]
    fn requests_yield_model_and_limits() {
        let body = json!({ "messages": [{ "content": "\"model\":\"x\"" }], "model": "claude-x", "max_tokens": 64 }).to_string();
        assert_eq!(
            asked("/v1/messages", body.as_bytes()),
            Asked { model: "claude-x".to_owned(), output_max: Some(64) }
        );
        let body = json!({ "generationConfig": { "maxOutputTokens": 5 } }).to_string();
        let google = asked("/v1beta/models/gemini-x:streamGenerateContent", body.as_bytes());
        assert_eq!(google, Asked { model: "gemini-x".to_owned(), output_max: Some(5) });
    }

    #[test]
    fn no_request_names_one_model_to_the_gateway_and_another_to_its_provider() {
        let read = |body: &str| asked("/v1/messages", body.as_bytes()).model;
        assert_eq!(
            read(r#"{"mod\u0065l": "claude-opus\u002d4"}"#),
            "claude-opus-4",
            "escapes are undone"
        );
        for body in [
            r#"{"model": "claude-haiku", "model": "claude-opus"}"#,
            r#"{"model": "claude-haiku", "mod\u0065l": "claude-opus"}"#,
            r#"{"mod\u0065l": "claude-opus", "model": "claude-haiku"}"#,
            r#"{"model": "claude-haiku"} {"model": "claude-opus"}"#,
            r#"{"model": "claude-haiku""#,
            "",
        ] {
            assert_eq!(asked("/v1/messages", body.as_bytes()), Asked::default(), "{body}");
        }
        let long = "x".repeat(MODEL_BYTES_MAX + 1);
        assert_eq!(read(&json!({ "model": long }).to_string()), "");
        assert_eq!(asked(&format!("/v1beta/models/{long}:generateContent"), b"{}").model, "");
    }

    #[test]
    fn generated_text_is_counted_if_a_stream_is_cut() {
        for (provider, stream, _) in streams("hello") {
            // Up to the end of the event with the text.
            let at = stream.find("hello").unwrap();
            let cut = at + stream[at..].find("\n\n").unwrap();
            let reported = read(provider, true, [&stream.as_bytes()[..cut]]);
            let least = "{\"text\":\"hello\"".len() as u64;
            assert!(
                (least..1000).contains(&reported.generated_bytes),
                "{provider:?}: {}",
                reported.generated_bytes
            );
        }
    }
}
