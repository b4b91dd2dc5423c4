//! What a turn used: tokens, cost and model, as the CLI itself reports them at its end. What it does not report stays unknown.

use std::time::Duration;

use contract::session::Usage;
use futures::StreamExt as _;
use serde_json::Value;
use sprites::Sprite;

/// CLIs report in their last records.
const TAIL_BYTES: u64 = 256 * 1024;
/// A turn's end does not wait longer for it.
const DEADLINE: Duration = Duration::from_secs(5);

/// What a CLI printed last.
#[derive(Debug)]
pub struct Printed {
    /// Its lines of JSON, in order.
    pub records: Vec<Value>,
    /// Whether that is all that it printed.
    pub whole: bool,
}

/// Reads a CLI's report.
pub type Reader = fn(&Printed) -> Option<Usage>;

/// Reads a CLI's report from the end of a spool of so many bytes; nothing where it cannot be read.
pub async fn read(sprite: &Sprite, spool: &str, bytes: u64, reader: Reader) -> Option<Usage> {
    let tail = tail(sprite, spool, bytes, TAIL_BYTES).await?;
    reader(&Printed { records: records(&tail), whole: bytes <= TAIL_BYTES })
}

/// The last bytes of a spool, at most so many; nothing where it cannot be read.
pub async fn tail(sprite: &Sprite, spool: &str, bytes: u64, most: u64) -> Option<String> {
    let tail = async {
        let from = bytes.saturating_sub(most);
        let wanted = usize::try_from(bytes - from).unwrap_or(usize::MAX);
        let (mut chunks, mut tail) = (sprite.read_from(spool, from).await?, Vec::new());
        // A file that has grown, or a server that sends more than was asked for, is read no further.
        while let Some(chunk) = chunks.next().await {
            tail.extend_from_slice(&chunk?);
            if tail.len() >= wanted {
                tail.truncate(wanted);
                break;
            }
        }
        Ok::<_, sprites::Error>(tail)
    };
    let tail = tokio::time::timeout(DEADLINE, tail).await.ok()?.ok()?;
    Some(String::from_utf8_lossy(&tail).into_owned())
}

fn records(text: &str) -> Vec<Value> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

impl Printed {
    /// The last record of a type.
    pub fn last(&self, kind: &str) -> Option<&Value> {
        self.records.iter().rev().find(|record| record.get("type").and_then(Value::as_str) == Some(kind))
    }
}

/// A number by its JSON pointer.
pub fn number(record: &Value, pointer: &str) -> Option<u64> {
    record.pointer(pointer)?.as_u64()
}

/// Dollars by their JSON pointer, in millionths.
pub fn micro_dollars(record: &Value, pointer: &str) -> Option<u64> {
    let dollars = record.pointer(pointer)?.as_f64().filter(|dollars| (0.0..1e9).contains(dollars))?;
    Some((dollars * 1e6).round() as u64)
}

/// The key, among an object's, under which a number is greatest: the model that did most of the work.
pub fn greatest(models: Option<&Value>, of: &str) -> Option<String> {
    let models = models?.as_object()?.iter();
    models.max_by_key(|(_, usage)| usage.get(of).and_then(Value::as_u64)).map(|(model, _)| model.clone())
}

#[cfg(test)]
mod tests {
    use types::Runtime;

    use super::*;
    use crate::runtimes;

    fn usage(runtime: Runtime, transcript: &str) -> Option<Usage> {
        runtimes::adapter(runtime).usage()?(&Printed { records: records(transcript), whole: true })
    }

    /// The records are from runs of the CLIs named in the README.
    #[test]
    fn each_cli_reports_in_its_own_way() {
        let claude = r#"{"type":"assistant"}
{"type":"result","subtype":"success","total_cost_usd":0.002145,"usage":{"input_tokens":200,"cache_creation_input_tokens":7,"cache_read_input_tokens":3,"output_tokens":2},"modelUsage":{"claude-haiku-4-5":{"outputTokens":1},"claude-sonnet-4-5":{"outputTokens":43}}}"#;
        let expected = |input, output, cost: Option<u64>, model: Option<&str>| {
            Some(Usage {
                input_tokens: Some(input),
                output_tokens: Some(output),
                cost_micro_usd: cost,
                model: model.map(str::to_owned),
                ..Usage::default()
            })
        };
        assert_eq!(usage(Runtime::Claude, claude), expected(210, 2, Some(2145), Some("claude-sonnet-4-5")));
        let codex = r#"{"type":"turn.completed","usage":{"input_tokens":300,"cached_input_tokens":0,"output_tokens":16,"reasoning_output_tokens":0}}"#;
        assert_eq!(usage(Runtime::Codex, codex), expected(300, 16, None, None));
        let gemini = r#"{"type":"result","status":"success","stats":{"total_tokens":228,"input_tokens":200,"output_tokens":28,"models":{"gemini-2.5-pro":{"total_tokens":228}}}}"#;
        assert_eq!(usage(Runtime::Gemini, gemini), expected(200, 28, None, Some("gemini-2.5-pro")));
        let opencode = r#"{"type":"step_finish","part":{"tokens":{"total":101,"input":100,"output":1,"reasoning":0,"cache":{"write":0,"read":0}},"cost":0.000189}}
{"type":"text","part":{}}
{"type":"step_finish","part":{"tokens":{"total":109,"input":100,"output":9,"reasoning":0,"cache":{"write":0,"read":0}},"cost":0.000301}}"#;
        assert_eq!(usage(Runtime::Opencode, opencode), expected(200, 10, Some(490), None));
        assert_eq!(usage(Runtime::Claude, "no JSON\n{\"type\":\"system\"}"), None);
    }

    /// What the CLIs of the versions that the set-up installs printed, byte by byte: `transcripts/RUNTIME-VERSION.NAME.jsonl`.
    fn transcript(runtime: Runtime, name: &str) -> String {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let versions = std::fs::read_to_string(root.join("../../scripts/versions.env")).unwrap();
        let variable = match runtime {
            Runtime::Claude => "CLAUDE_CODE_VERSION=",
            Runtime::Codex => "CODEX_VERSION=",
            Runtime::Gemini => "GEMINI_CLI_VERSION=",
            _ => "OPENCODE_VERSION=",
        };
        let version = versions.lines().find_map(|line| line.strip_prefix(variable)).unwrap();
        let path = root.join(format!("transcripts/{runtime}-{version}.{name}"));
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[test]
    fn the_transcripts_of_each_cli_are_understood() {
        for (runtime, output, cost, model) in [
            (Runtime::Claude, 55, Some(1725), Some("claude-sonnet-4-5")),
            (Runtime::Codex, 80, None, None),
            (Runtime::Gemini, 73, None, Some("gemini-2.5-pro")),
            (Runtime::Opencode, 55, Some(1295), None),
        ] {
            let expected = Usage {
                input_tokens: Some(300),
                output_tokens: Some(output),
                cost_micro_usd: cost,
                model: model.map(str::to_owned),
                ..Usage::default()
            };
            assert_eq!(usage(runtime, &transcript(runtime, "completed.jsonl")), Some(expected), "{runtime}");
        }
        for runtime in [Runtime::Codex, Runtime::Gemini, Runtime::Opencode] {
            let said = transcript(runtime, "refused.jsonl") + &transcript(runtime, "refused.stderr");
            assert_eq!(crate::diagnosis::of_agent(Some(1), &said), Some(crate::diagnosis::Cause::KeyRefused), "{runtime}");
        }
    }
}
