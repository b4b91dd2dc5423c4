//! What a body may not name: responses, conversations, files and containers that are stored at the provider belong to the key's account,
//! which sessions share.

use std::fmt;

use memchr::memmem;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use types::Provider;

/// Names that are looked for: a body without them, and without escapes that could hide one, is not parsed.
const NAMES: [&str; 10] = [
    "previous_response_id",
    "conversation",
    "item_reference",
    "vector_store_ids",
    "file_id",
    "\"container\"",
    "\"prompt\"",
    "cachedContent",
    "cached_content",
    "/files/",
];

/// JSON, as far as it matters. An object with a name twice is none: who reads it could take either.
enum Tree {
    Null,
    Text(String),
    List(Vec<Tree>),
    Object(Vec<(String, Tree)>),
    Other,
}

impl Tree {
    fn get(&self, name: &str) -> &Self {
        match self {
            Self::Object(fields) => fields.iter().find(|(key, _)| key == name).map_or(&Self::Null, |(_, value)| value),
            _ => &Self::Null,
        }
    }

    fn items(&self) -> &[Self] {
        if let Self::List(items) = self { items } else { &[] }
    }

    fn text(&self) -> &str {
        if let Self::Text(text) = self { text } else { "" }
    }

    const fn is_set(&self) -> bool {
        !matches!(self, Self::Null)
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TreeVisitor)
    }
}

struct TreeVisitor;

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Tree;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree::Null)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Tree, E> {
        Ok(Tree::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Tree, E> {
        Ok(Tree::Other)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Tree, E> {
        Ok(Tree::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Tree, E> {
        Ok(Tree::Other)
    }

    fn visit_str<E>(self, text: &str) -> Result<Tree, E> {
        Ok(Tree::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Tree, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Tree::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Tree, A::Error> {
        let mut fields: Vec<(String, Tree)> = Vec::new();
        while let Some((key, value)) = entries.next_entry::<String, Tree>()? {
            fields.push((key, value));
        }
        let mut names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        match names.array_windows().any(|[one, other]| one == other) {
            true => Err(A::Error::custom("a name twice")),
            false => Ok(Tree::Object(fields)),
        }
    }
}

/// What of a stored thing a request names; or that it cannot be told.
pub fn named(provider: Provider, body: &[u8]) -> Option<&'static str> {
    let may_name = NAMES.iter().any(|name| memmem::find(body, name.as_bytes()).is_some()) || memmem::find(body, b"\\u00").is_some();
    if !may_name {
        return None;
    }
    let Ok(tree) = serde_json::from_slice::<Tree>(body) else { return Some("a body that is no JSON, or names a field twice") };
    match provider {
        Provider::Anthropic => in_anthropic(&tree),
        Provider::Openai => in_openai(&tree),
        Provider::Google => in_google(&tree),
    }
}

fn in_anthropic(tree: &Tree) -> Option<&'static str> {
    fn in_blocks(blocks: &Tree) -> bool {
        let names = |block: &Tree| {
            let is_upload = block.get("type").text() == "container_upload";
            block.get("source").get("file_id").is_set() || is_upload || in_blocks(block.get("content"))
        };
        blocks.items().iter().any(names)
    }
    if tree.get("container").is_set() {
        return Some("container");
    }
    (in_blocks(tree.get("messages")) || in_blocks(tree.get("system"))).then_some("file_id")
}

fn in_openai(tree: &Tree) -> Option<&'static str> {
    if let Some(name) = ["previous_response_id", "conversation"].into_iter().find(|name| tree.get(name).is_set()) {
        return Some(name);
    }
    // Of completions of old it is a text.
    if matches!(tree.get("prompt"), Tree::Object(_)) {
        return Some("prompt");
    }
    let has_file = |part: &Tree| part.get("file_id").is_set() || part.get("file").get("file_id").is_set();
    for item in tree.get("input").items().iter().chain(tree.get("messages").items()) {
        // The type may be left out.
        let is_reference = item.get("type").text() == "item_reference"
            || item.get("id").is_set() && !["type", "role"].iter().any(|name| item.get(name).is_set());
        if is_reference {
            return Some("item_reference");
        }
        if ["content", "output"].iter().flat_map(|name| item.get(name).items()).any(has_file) || has_file(item.get("output")) {
            return Some("file_id");
        }
    }
    for tool in tree.get("tools").items() {
        if tool.get("vector_store_ids").is_set() {
            return Some("vector_store_ids");
        }
        let container = tool.get("container");
        if !container.text().is_empty() || container.get("file_ids").is_set() {
            return Some("container");
        }
    }
    None
}

fn in_google(tree: &Tree) -> Option<&'static str> {
    fn in_parts(content: &Tree) -> bool {
        let is_stored = |uri: &str| uri.contains("/files/") || uri.starts_with("files/");
        let names = |part: &Tree| {
            let uris = ["fileData", "file_data"].map(|data| ["fileUri", "file_uri"].map(|uri| part.get(data).get(uri).text()));
            uris.iter().flatten().any(|uri| is_stored(uri))
                || ["functionResponse", "function_response"].iter().any(|response| in_parts(part.get(response)))
        };
        content.get("parts").items().iter().any(names)
    }
    if ["cachedContent", "cached_content"].iter().any(|name| tree.get(name).is_set()) {
        return Some("cachedContent");
    }
    let system = ["systemInstruction", "system_instruction"].map(|name| tree.get(name));
    tree.get("contents").items().iter().chain(system).any(in_parts).then_some("fileUri")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn what_is_stored_at_the_provider_is_found_wherever_a_request_may_name_it() {
        let name = |provider, body: Value| named(provider, body.to_string().as_bytes());
        let (anthropic, openai, google) = (Provider::Anthropic, Provider::Openai, Provider::Google);
        for (provider, body, expected) in [
            (openai, json!({ "previous_response_id": "resp_1" }), "previous_response_id"),
            (openai, json!({ "conversation": { "id": "conv_1" } }), "conversation"),
            (openai, json!({ "prompt": { "id": "pmpt_1" } }), "prompt"),
            (openai, json!({ "input": [{ "type": "item_reference", "id": "msg_1" }] }), "item_reference"),
            (openai, json!({ "input": [{ "content": [{ "type": "input_file", "file_id": "file-1" }] }] }), "file_id"),
            (openai, json!({ "messages": [{ "content": [{ "type": "file", "file": { "file_id": "file-1" } }] }] }), "file_id"),
            (openai, json!({ "tools": [{ "type": "file_search", "vector_store_ids": ["vs_1"] }] }), "vector_store_ids"),
            (openai, json!({ "tools": [{ "type": "code_interpreter", "container": "cntr_1" }] }), "container"),
            (anthropic, json!({ "container": "container_1" }), "container"),
            (anthropic, json!({ "messages": [{ "content": [{ "source": { "type": "file", "file_id": "f" } }] }] }), "file_id"),
            (
                anthropic,
                json!({ "messages": [{ "content": [{ "type": "tool_result", "content": [{ "source": { "file_id": "f" } }] }] }] }),
                "file_id",
            ),
            (google, json!({ "cachedContent": "cachedContents/1" }), "cachedContent"),
            (
                google,
                json!({ "contents": [{ "parts": [{ "fileData": { "fileUri": "https://generativelanguage.googleapis.com/v1beta/files/1" } }] }] }),
                "fileUri",
            ),
        ] {
            assert_eq!(name(provider, body.clone()), Some(expected), "{body}");
        }
        assert_eq!(named(openai, br#"{"\u0070revious_response_id":"resp_1"}"#), Some("previous_response_id"));
        assert!(named(openai, br#"{"previous_response_id":"resp_1","previous_response_id":null}"#).is_some());
        assert!(named(openai, br#"{"file_id"#).is_some());
    }

    #[test]
    fn what_agents_and_their_tools_say_is_not_mistaken_for_it() {
        let text = "previous_response_id file_id \"container\" /files/ \u{1}";
        for (provider, body) in [
            (
                Provider::Openai,
                json!({ "previous_response_id": null, "input": [{ "role": "user", "id": "m", "content": [{ "text": text }] }] }),
            ),
            (Provider::Openai, json!({ "input": "x", "tools": [{ "parameters": { "properties": { "file_id": {} } } }] })),
            (Provider::Openai, json!({ "tools": [{ "type": "code_interpreter", "container": { "type": "auto" } }] })),
            (
                Provider::Anthropic,
                json!({ "messages": [{ "content": [{ "type": "tool_use", "input": { "file_id": "1", "source": text } }] }] }),
            ),
            (
                Provider::Google,
                json!({ "contents": [{ "parts": [{ "text": text }, { "fileData": { "fileUri": "https://youtu.be/x" } }] }] }),
            ),
        ] {
            assert_eq!(named(provider, body.to_string().as_bytes()), None, "{body}");
        }
    }
}
