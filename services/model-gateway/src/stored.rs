//! References that a body must not contain: responses, conversations, files and containers that are
//! stored at the provider belong to the key's account, which sessions share.

use std::{cell::Cell, fmt};

use axum::http::{HeaderMap, header};
use memchr::memmem;
use serde::de::{
    self, Deserialize, DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess,
    Visitor,
};
use types::Provider;

/// Names that are looked for: a body without them, and without escapes that could hide one, is not
/// parsed.
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

/// Fields that are looked at; others are skipped, whatever they hold.
const FIELDS: [&str; 30] = [
    "cachedContent",
    "cached_content",
    "container",
    "content",
    "contents",
    "conversation",
    "file",
    "fileData",
    "fileUri",
    "file_data",
    "file_id",
    "file_ids",
    "file_uri",
    "functionResponse",
    "function_response",
    "id",
    "input",
    "messages",
    "output",
    "parts",
    "previous_response_id",
    "prompt",
    "role",
    "source",
    "system",
    "systemInstruction",
    "system_instruction",
    "tools",
    "type",
    "vector_store_ids",
];
/// How many of them one body may have: what is kept of a body is no larger than the body.
const KEPT_MAX: usize = 1 << 18;

/// JSON, as far as it matters. An object that contains a field twice is refused, because readers
/// could use either value.
enum Tree {
    Null,
    Text(String),
    /// The objects of a list.
    List(Vec<Tree>),
    Object(Vec<(&'static str, Tree)>),
    Other,
}

impl Tree {
    fn get(&self, name: &str) -> &Self {
        match self {
            Self::Object(fields) => {
                fields.iter().find(|(key, _)| *key == name).map_or(&Self::Null, |(_, value)| value)
            }
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

/// Reads a tree. Holds how much more may be kept.
#[derive(Clone, Copy)]
struct Reader<'a>(&'a Cell<usize>);

impl Reader<'_> {
    fn keep<E: de::Error>(self) -> Result<(), E> {
        self.0.set(self.0.get().checked_sub(1).ok_or_else(|| E::custom("too many fields"))?);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Tree;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Tree, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
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
        while let Some(item) = items.next_element_seed(self)? {
            if matches!(item, Tree::Object(_)) {
                self.keep()?;
                list.push(item);
            }
        }
        Ok(Tree::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Tree, A::Error> {
        let mut fields: Vec<(&'static str, Tree)> = Vec::new();
        while let Some(Field(field)) = entries.next_key()? {
            let Some(name) = field else {
                entries.next_value::<IgnoredAny>()?;
                continue;
            };
            if fields.iter().any(|(known, _)| *known == name) {
                return Err(A::Error::custom("a field twice"));
            }
            self.keep()?;
            fields.push((name, entries.next_value_seed(self)?));
        }
        Ok(Tree::Object(fields))
    }
}

/// The name of a field, if it is one of [`FIELDS`].
struct Field(Option<&'static str>);

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;

        impl Visitor<'_> for Name {
            type Value = Field;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a name")
            }

            fn visit_str<E>(self, name: &str) -> Result<Field, E> {
                Ok(Field(FIELDS.into_iter().find(|field| *field == name)))
            }
        }

        deserializer.deserialize_str(Name)
    }
}

fn parse(body: &[u8]) -> Option<Tree> {
    let left = Cell::new(KEPT_MAX);
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let tree = Reader(&left).deserialize(&mut deserializer).ok()?;
    deserializer.end().is_ok().then_some(tree)
}

/// Returns which field of a request refers to something stored at the provider, or that the body
/// cannot be read.
pub fn named(provider: Provider, body: &[u8]) -> Option<&'static str> {
    let may_name = NAMES.iter().any(|name| memmem::find(body, name.as_bytes()).is_some())
        || memmem::find(body, b"\\u00").is_some();
    if !may_name {
        return None;
    }
    let Some(tree) = parse(body) else {
        return Some("a body that is no JSON, names a field twice, or has too many fields");
    };
    match provider {
        Provider::Anthropic => in_anthropic(&tree),
        Provider::Openai => in_openai(&tree),
        Provider::Google => in_google(&tree),
    }
}

/// Whether a body can be read as it is: JSON in UTF-8. In UTF-16 and UTF-32 every name has bytes
/// that are zero, which JSON has nowhere.
pub fn is_readable(headers: &HeaderMap, body: &[u8]) -> bool {
    let texts = |name| {
        headers.get_all(name).iter().map(|value| value.to_str().unwrap_or("?").to_ascii_lowercase())
    };
    let is_plain = texts(header::CONTENT_ENCODING)
        .all(|encoding| matches!(encoding.as_str(), "" | "identity"));
    let charset = |kind: String| {
        kind.split_once("charset=").map(|(_, rest)| rest.trim_matches([' ', '"', ';']).to_owned())
    };
    let is_utf8 = texts(header::CONTENT_TYPE)
        .filter_map(charset)
        .all(|charset| matches!(charset.as_str(), "utf-8" | "utf8"));
    is_plain && is_utf8 && memchr::memchr(0, body).is_none()
}

fn in_anthropic(tree: &Tree) -> Option<&'static str> {
    fn in_blocks(blocks: &Tree) -> bool {
        let names = |block: &Tree| {
            let is_upload = block.get("type").text() == "container_upload";
            block.get("source").get("file_id").is_set()
                || is_upload
                || in_blocks(block.get("content"))
        };
        blocks.items().iter().any(names)
    }
    if tree.get("container").is_set() {
        return Some("container");
    }
    (in_blocks(tree.get("messages")) || in_blocks(tree.get("system"))).then_some("file_id")
}

fn in_openai(tree: &Tree) -> Option<&'static str> {
    if let Some(name) =
        ["previous_response_id", "conversation"].into_iter().find(|name| tree.get(name).is_set())
    {
        return Some(name);
    }
    // Of completions of old it is a text.
    if matches!(tree.get("prompt"), Tree::Object(_)) {
        return Some("prompt");
    }
    let has_file =
        |part: &Tree| part.get("file_id").is_set() || part.get("file").get("file_id").is_set();
    for item in tree.get("input").items().iter().chain(tree.get("messages").items()) {
        // The type may be left out.
        let is_reference = item.get("type").text() == "item_reference"
            || item.get("id").is_set()
                && !["type", "role"].iter().any(|name| item.get(name).is_set());
        if is_reference {
            return Some("item_reference");
        }
        if ["content", "output"].iter().flat_map(|name| item.get(name).items()).any(has_file)
            || has_file(item.get("output"))
        {
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
            let uris = ["fileData", "file_data"]
                .map(|data| ["fileUri", "file_uri"].map(|uri| part.get(data).get(uri).text()));
            uris.iter().flatten().any(|uri| is_stored(uri))
                || ["functionResponse", "function_response"]
                    .iter()
                    .any(|response| in_parts(part.get(response)))
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
    fn references_to_stored_objects_are_found_anywhere_in_a_request() {
        let name = |provider, body: Value| named(provider, body.to_string().as_bytes());
        let (anthropic, openai, google) = (Provider::Anthropic, Provider::Openai, Provider::Google);
        for (provider, body, expected) in [
            (openai, json!({ "previous_response_id": "resp_1" }), "previous_response_id"),
            (openai, json!({ "conversation": { "id": "conv_1" } }), "conversation"),
            (openai, json!({ "prompt": { "id": "pmpt_1" } }), "prompt"),
            (
                openai,
                json!({ "input": [{ "type": "item_reference", "id": "msg_1" }] }),
                "item_reference",
            ),
            (
                openai,
                json!({ "input": [{ "content": [{ "type": "input_file", "file_id": "file-1" }] }] }),
                "file_id",
            ),
            (
                openai,
                json!({ "messages": [{ "content": [{ "type": "file", "file": { "file_id": "file-1" } }] }] }),
                "file_id",
            ),
            (
                openai,
                json!({ "tools": [{ "type": "file_search", "vector_store_ids": ["vs_1"] }] }),
                "vector_store_ids",
            ),
            (
                openai,
                json!({ "tools": [{ "type": "code_interpreter", "container": "cntr_1" }] }),
                "container",
            ),
            (anthropic, json!({ "container": "container_1" }), "container"),
            (
                anthropic,
                json!({ "messages": [{ "content": [{ "source": { "type": "file", "file_id": "f" } }] }] }),
                "file_id",
            ),
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
        assert_eq!(
            named(openai, br#"{"\u0070revious_response_id":"resp_1"}"#),
            Some("previous_response_id")
        );
        assert!(
            named(openai, br#"{"previous_response_id":"resp_1","previous_response_id":null}"#)
                .is_some()
        );
        assert!(named(openai, br#"{"file_id"#).is_some());
    }

    #[test]
    fn a_body_of_many_values_takes_no_more_memory_than_it_is_large() {
        // What is skipped costs nothing, however much it is.
        let skipped = format!(
            r#"{{"input":[{}0],"x":[{}0],"previous_response_id":"resp_1"}}"#,
            "0,".repeat(1 << 20),
            "{},".repeat(1 << 20)
        );
        assert_eq!(named(Provider::Openai, skipped.as_bytes()), Some("previous_response_id"));
        for value in ["{},", r#"{"id":0},"#, r#"[{"id":0}],"#] {
            let many = format!(r#"{{"file_id":[{}0]}}"#, value.repeat(KEPT_MAX + 1));
            assert!(parse(many.as_bytes()).is_none(), "{value}");
            assert!(
                named(Provider::Openai, many.as_bytes())
                    .is_some_and(|why| why.contains("too many fields")),
                "{value}"
            );
        }
        assert!(parse(br#"{"file_id":1} x"#).is_none());
    }

    #[test]
    fn only_plain_json_in_utf_8_is_readable() {
        let readable = |headers: &[(header::HeaderName, &str)], body: &[u8]| {
            let headers =
                headers.iter().map(|(name, value)| (name.clone(), value.parse().unwrap()));
            is_readable(&HeaderMap::from_iter(headers), body)
        };
        let (body, encoding, kind) =
            (br#"{"previous_response_id":"r"}"#, header::CONTENT_ENCODING, header::CONTENT_TYPE);
        for plain in [
            &[][..],
            &[
                (encoding.clone(), "identity"),
                (kind.clone(), "application/json; charset=\"UTF-8\""),
            ],
        ] {
            assert!(readable(plain, body), "{plain:?}");
        }
        for encoded in [
            (encoding.clone(), "gzip"),
            (kind.clone(), "application/json; Charset=utf-16"),
            (kind, "text/x; charset=cp037"),
        ] {
            assert!(!readable(std::slice::from_ref(&encoded), body), "{encoded:?}");
        }
        let mut two = HeaderMap::new();
        two.append(&encoding, "identity".parse().unwrap());
        two.append(&encoding, "br".parse().unwrap());
        assert!(!is_readable(&two, body));
        let utf_16: Vec<u8> =
            String::from_utf8_lossy(body).encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(!readable(&[], &utf_16));
    }

    #[test]
    fn text_of_agents_is_not_mistaken_for_a_reference() {
        let text = "previous_response_id file_id \"container\" /files/ \u{1}";
        for (provider, body) in [
            (
                Provider::Openai,
                json!({ "previous_response_id": null, "input": [{ "role": "user", "id": "m", "content": [{ "text": text }] }] }),
            ),
            (
                Provider::Openai,
                json!({ "input": "x", "tools": [{ "parameters": { "properties": { "file_id": {} } } }] }),
            ),
            (
                Provider::Openai,
                json!({ "tools": [{ "type": "code_interpreter", "container": { "type": "auto" } }] }),
            ),
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
