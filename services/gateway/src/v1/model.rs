//! `model` of an agent: which CLI runs it, and under which name (docs/managed-agents-api.md).

use serde::Serialize;
use serde_json::{Map, Value};
use types::{ModelRef, Provider, Runtime, limits::BODY_BYTES_MAX, model::quoted};
use utoipa::ToSchema;

use crate::body::Fields;

/// The key of an agent's metadata that names its runtime.
pub const RUNTIME_KEY: &str = "aod.runtime";

/// A model as this API shows it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Model {
    #[schema(example = "claude-sonnet-4-5")]
    id: String,
    effort: Effort,
    #[schema(value_type = Option<String>)]
    inference_geo: Value,
    #[schema(pattern = "^standard$")]
    speed: &'static str,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Effort {
    #[schema(pattern = "^high$")]
    r#type: &'static str,
}

/// What the CLIs use where no one says otherwise; no other can be asked for.
const EFFORT: &str = "high";
const SPEED: &str = "standard";

impl Model {
    /// Models are stored as `provider/model`. A bare name selects the provider's own CLI, a full
    /// name opencode.
    pub fn of(runtime: &str, model: &str) -> Self {
        let bare = match runtime.parse() {
            Ok(Runtime::Opencode | Runtime::Shell) | Err(()) => None,
            Ok(runtime) => {
                ModelRef::parse(runtime, model).ok().map(|parsed| parsed.model_id().to_owned())
            }
        };
        let id = bare.unwrap_or_else(|| model.to_owned());
        Self { id, effort: Effort { r#type: EFFORT }, inference_geo: Value::Null, speed: SPEED }
    }

    pub fn id(&self) -> &str {
        &self.id
    }
}

/// The id of a body's model: a text, or an object.
pub fn read(fields: &mut Fields) -> Option<String> {
    if fields.value("model").is_some_and(Value::is_object) {
        return fields.nested("model", |model| {
            model.allow_only(&["id", "effort", "inference_geo", "speed"]);
            let effort = match model.value("effort") {
                Some(Value::Object(effort)) => effort.get("type").cloned(),
                other => other.cloned(),
            };
            if effort.is_some_and(|effort| effort != EFFORT) {
                model
                    .refuse("effort", &format!("can only be '{EFFORT}': no runtime takes another"));
            }
            if model.value("speed").is_some_and(|speed| speed != SPEED) {
                model.refuse("speed", &format!("can only be '{SPEED}': no runtime takes another"));
            }
            if model.value("inference_geo").is_some() {
                model.refuse("inference_geo", "is not supported by any runtime");
            }
            model.named_string("id", BODY_BYTES_MAX)
        })?;
    }
    fields.optional_string("model", BODY_BYTES_MAX)
}

/// The runtime that a model id and an agent's metadata stand for, and the model as the scheduler
/// has it.
///
/// # Errors
/// Why there is none, in a sentence.
pub fn choose(
    id: &str,
    metadata: &Map<String, Value>,
    known: &[Runtime],
) -> Result<(Runtime, String), String> {
    let runtime = match metadata.get(RUNTIME_KEY).and_then(Value::as_str) {
        Some(name) => {
            let named = name.parse().ok().filter(|runtime| known.contains(runtime));
            let names = quoted(known.iter().map(|runtime| runtime.as_str()));
            named.ok_or_else(|| {
                format!("the runtime {name} of metadata[\"{RUNTIME_KEY}\"] must be one of: {names}")
            })?
        }
        None if id.contains('/') => Runtime::Opencode,
        None => match provider(id) {
            Some(Provider::Anthropic) => Runtime::Claude,
            Some(Provider::Openai) => Runtime::Codex,
            Some(Provider::Google) => Runtime::Gemini,
            None => {
                return Err(format!(
                    "no runtime is known for the model {id}: name it claude-*, gpt-*, o*, codex-*, gemini-* or provider/model, \
                     or set metadata[\"{RUNTIME_KEY}\"]"
                ));
            }
        },
    };
    let model = ModelRef::parse(runtime, id).map_err(|error| error.to_string())?;
    Ok((runtime, model.as_str().to_owned()))
}

/// The provider of a bare model id, by its family.
fn provider(id: &str) -> Option<Provider> {
    let is_o =
        id.strip_prefix('o').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| id.starts_with(prefix));
    if begins(&["claude-"]) {
        Some(Provider::Anthropic)
    } else if is_o || begins(&["gpt-", "codex-", "chatgpt-"]) {
        Some(Provider::Openai)
    } else if begins(&["gemini-"]) {
        Some(Provider::Google)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::body::Body;

    #[test]
    fn a_model_id_names_its_cli_and_comes_back_as_it_was_sent() {
        for (id, runtime) in [
            ("claude-sonnet-4-5", "claude"),
            ("gpt-5", "codex"),
            ("o3", "codex"),
            ("codex-mini", "codex"),
            ("gemini-2.5-pro", "gemini"),
            ("anthropic/claude-sonnet-4-5", "opencode"),
            ("google/gemini-2.5-pro", "opencode"),
        ] {
            let (chosen, model) = choose(id, &Map::new(), &Runtime::AGENTS).unwrap();
            assert_eq!((chosen.as_str(), Model::of(runtime, &model).id()), (runtime, id));
        }
        for id in ["llama-3", "omni", "acme/x", ""] {
            assert!(choose(id, &Map::new(), &Runtime::AGENTS).is_err(), "{id}");
        }
    }

    #[test]
    fn metadata_names_the_runtime() {
        let metadata = |name: &str| json!({ RUNTIME_KEY: name }).as_object().cloned().unwrap();
        let (runtime, model) = choose("mock", &metadata("claude"), &Runtime::AGENTS).unwrap();
        assert_eq!(
            (runtime, model.as_str(), Model::of("claude", &model).id()),
            (Runtime::Claude, "anthropic/mock", "mock")
        );
        assert!(choose("mock", &metadata("shell"), &Runtime::AGENTS).is_err());
        assert_eq!(choose("mock", &metadata("shell"), &Runtime::ALL).unwrap().0, Runtime::Shell);
        assert!(choose("gpt-5", &metadata("claude"), &Runtime::AGENTS).is_ok(), "a name is a name");
    }

    #[test]
    fn a_model_is_a_text_or_an_object() {
        let id = |body: Value| {
            let mut fields = Body::from_json(&body).fields().unwrap();
            let id = read(&mut fields);
            fields.finish().map(|()| id).map_err(|_| ())
        };
        assert_eq!(id(json!({ "model": "m" })), Ok(Some("m".to_owned())));
        let same = json!({ "id": "m", "effort": { "type": "high" }, "inference_geo": null, "speed": "standard" });
        assert_eq!(id(json!({ "model": same })), Ok(Some("m".to_owned())));
        assert_eq!(id(json!({})), Ok(None));
        for model in [
            json!({}),
            json!(5),
            json!({ "id": "m", "speed": "fast" }),
            json!({ "id": "m", "effort": "low" }),
            json!({ "id": "m", "x": 1 }),
        ] {
            assert!(id(json!({ "model": model })).is_err(), "{model}");
        }
    }
}
