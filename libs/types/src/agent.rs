//! What an agent is made of beside its texts: skills, MCP servers, metadata (docs/api.md §4).

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Replaces a secret in answers; a change that sends it keeps the stored value.
pub const REDACTED: &str = "***";

/// Instructions for a task, given inline or fetched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(untagged)]
pub enum Skill {
    /// Fetched from a GitHub repository.
    Github(GithubSkill),
    /// Brought along in full.
    Inline(InlineSkill),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct GithubSkill {
    #[serde(rename = "type")]
    pub kind: GithubTag,
    /// `owner/repo`
    pub source: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(max_length = 1024))]
    pub description: Option<String>,
    /// One skill of the repository; all of them where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(pattern = "^[a-z0-9][a-z0-9-]{0,63}$"))]
    pub name: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum GithubTag {
    Github,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct InlineSkill {
    #[cfg_attr(feature = "schema", schema(pattern = "^[a-z0-9][a-z0-9-]{0,63}$"))]
    pub name: String,
    #[cfg_attr(feature = "schema", schema(max_length = 1024))]
    pub description: String,
    /// The text of its `SKILL.md`, at most 65,536 bytes.
    pub content: String,
}

impl Skill {
    /// The key that is unique among an agent's skills: the name, or the source of a skill without a
    /// name.
    #[must_use]
    pub fn identity(&self) -> (&'static str, &str) {
        match self {
            Self::Inline(skill) => ("name", &skill.name),
            Self::Github(GithubSkill { name: Some(name), .. }) => ("name", name),
            Self::Github(skill) => ("source", &skill.source),
        }
    }
}

/// `[a-z0-9][a-z0-9-]{0,63}`
#[must_use]
pub fn is_skill_name(text: &str) -> bool {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    (1..=64).contains(&text.len())
        && text.bytes().next().is_some_and(plain)
        && text.bytes().all(|c| plain(c) || c == b'-')
}

/// `owner/repo`, as GitHub spells them.
#[must_use]
pub fn is_skill_source(text: &str) -> bool {
    text.split_once('/').is_some_and(|(owner, repo)| {
        crate::repository::is_owner(owner) && crate::repository::is_name(repo)
    })
}

/// An MCP server that an agent may call. Its secrets cannot be printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct McpServer {
    pub name: String,
    #[serde(flatten)]
    pub transport: McpTransport,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum McpTransport {
    /// Reached over HTTP. The values of headers are secrets.
    Url {
        url: String,
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        headers: BTreeMap<String, String>,
    },
    /// Started in the sandbox. The values of variables are secrets.
    Stdio {
        command: String,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        args: Vec<String>,
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        env: BTreeMap<String, String>,
    },
}

impl fmt::Debug for McpServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("McpServer").field("name", &self.name).finish_non_exhaustive()
    }
}

impl McpServer {
    /// The values that are secrets, by their names.
    #[must_use]
    pub fn secrets(&self) -> &BTreeMap<String, String> {
        match &self.transport {
            McpTransport::Url { headers, .. } => headers,
            McpTransport::Stdio { env, .. } => env,
        }
    }

    pub fn secrets_mut(&mut self) -> &mut BTreeMap<String, String> {
        match &mut self.transport {
            McpTransport::Url { headers, .. } => headers,
            McpTransport::Stdio { env, .. } => env,
        }
    }

    /// The host of a server that is reached over HTTP.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        let McpTransport::Url { url, .. } = &self.transport else { return None };
        let (_, rest) = url.split_once("://")?;
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        let name = host
            .rsplit_once(':')
            .filter(|(_, port)| port.bytes().all(|c| c.is_ascii_digit()))
            .map_or(host, |(name, _)| name);
        Some(name).filter(|name| !name.is_empty())
    }

    /// The port of a server that is reached over HTTP.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        let McpTransport::Url { url, .. } = &self.transport else { return None };
        let (scheme, rest) = url.split_once("://")?;
        let usual = match scheme.to_ascii_lowercase().as_str() {
            "http" => 80,
            "https" => 443,
            _ => return None,
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let named = authority
            .rsplit_once(':')
            .map(|(_, port)| port)
            .filter(|port| !port.contains([']', '@']));
        named.map_or(Some(usual), |port| port.parse().ok())
    }

    /// The server as everybody may see it.
    #[must_use]
    pub fn redacted(mut self) -> Self {
        self.secrets_mut().values_mut().for_each(|value| REDACTED.clone_into(value));
        self
    }
}

/// A change of metadata: per key, `""` deletes one, keys that are not named stay.
#[must_use]
pub fn merge_metadata(
    mut current: Map<String, Value>,
    change: Map<String, Value>,
) -> Map<String, Value> {
    for (key, value) in change {
        if value.as_str() == Some("") {
            current.shift_remove(&key);
        } else {
            current.insert(key, value);
        }
    }
    current
}

/// How many keys metadata may have in the Managed Agents API.
pub const METADATA_KEYS_MAX: usize = 16;

/// As [`merge_metadata`], for resources of the Managed Agents API.
///
/// # Errors
/// When it would have more keys than allowed. What the original API has put there may stay.
pub fn merge_limited_metadata(
    current: Map<String, Value>,
    change: Map<String, Value>,
) -> Result<Map<String, Value>, String> {
    let before = current.len();
    let merged = merge_metadata(current, change);
    let is_allowed = merged.len() <= METADATA_KEYS_MAX.max(before);
    if is_allowed {
        Ok(merged)
    } else {
        Err(format!("metadata: must hold at most {METADATA_KEYS_MAX} keys"))
    }
}

/// A new version of a document of secrets: where it says `***`, the old one's value stays. `None`
/// when there is nothing to keep.
#[must_use]
pub fn keep_redacted(new: Value, base: Option<&Value>) -> Option<Value> {
    match new {
        Value::String(text) if text == REDACTED => base.cloned(),
        Value::Object(object) => {
            let kept = |(key, value)| {
                let old = base.and_then(|base| base.get(&key));
                keep_redacted(value, old).map(|value| (key, value))
            };
            object.into_iter().map(kept).collect::<Option<Map<_, _>>>().map(Value::Object)
        }
        other => Some(other),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn an_mcp_server_reads_and_writes_as_the_contract_has_it() {
        let text = json!({ "name": "a", "type": "url", "url": "https://x", "headers": { "Authorization": "Bearer t" } });
        let server: McpServer = serde_json::from_value(text.clone()).unwrap();
        assert_eq!(serde_json::to_value(&server).unwrap(), text);
        assert!(!format!("{server:?}").contains("Bearer"));
        assert_eq!(
            serde_json::to_value(server.redacted()).unwrap()["headers"]["Authorization"],
            "***"
        );
    }

    #[test]
    fn a_servers_host_is_found_in_its_url() {
        let host = |url: &str| {
            let server: McpServer =
                serde_json::from_value(json!({ "name": "a", "type": "url", "url": url })).unwrap();
            server.host().map(str::to_owned)
        };
        for (url, expected) in [
            ("https://mcp.example.com/mcp?x=/", Some("mcp.example.com")),
            ("http://u:p@mcp.example.com:8080", Some("mcp.example.com")),
            ("https:///x", None),
            ("mcp.example.com", None),
        ] {
            assert_eq!(host(url).as_deref(), expected, "{url}");
        }
        let port = |url: &str| {
            let server: McpServer =
                serde_json::from_value(json!({ "name": "a", "type": "url", "url": url })).unwrap();
            server.port()
        };
        for (url, expected) in [
            ("https://x/", Some(443)),
            ("http://x", Some(80)),
            ("HTTP://u:p@x:8080/a:b", Some(8080)),
            ("http://u:p@x", Some(80)),
            ("http://[::1]/", Some(80)),
            ("http://[::1]:5", Some(5)),
            ("ftp://x", None),
            ("http://x:99999", None),
        ] {
            assert_eq!(port(url), expected, "{url}");
        }
    }

    #[test]
    fn skills_have_two_shapes() {
        let github = json!({ "type": "github", "source": "o/r" });
        assert_eq!(
            serde_json::to_value(serde_json::from_value::<Skill>(github.clone()).unwrap()).unwrap(),
            github
        );
        let inline = json!({ "name": "n", "description": "d", "content": "c" });
        let skill: Skill = serde_json::from_value(inline.clone()).unwrap();
        assert_eq!(
            (skill.identity(), serde_json::to_value(&skill).unwrap()),
            (("name", "n"), inline)
        );
    }

    #[test]
    fn names_of_skills_and_sources() {
        assert!(is_skill_name("a") && is_skill_name("0-a") && is_skill_name(&"a".repeat(64)));
        for bad in ["", "-a", "A", "a_b", "a/b", "é"] {
            assert!(!is_skill_name(bad), "{bad}");
        }
        assert!(!is_skill_name(&"a".repeat(65)));
        assert!(is_skill_source("vercel-labs/agent.skills"));
        for bad in ["", "o", "o/", "/r", "o/r/x", "o/..", "o r/x", "-o/r; rm"] {
            assert!(!is_skill_source(bad), "{bad}");
        }
    }

    fn metadata() -> impl Strategy<Value = Map<String, Value>> {
        let value = prop_oneof![
            Just(json!("")),
            "[a-z]{1,3}".prop_map(Value::from),
            any::<i32>().prop_map(Value::from)
        ];
        prop::collection::btree_map("[a-d]", value, 0..4).prop_map(|map| map.into_iter().collect())
    }

    proptest! {
        #[test]
        fn a_merge_is_per_key(current in metadata(), change in metadata()) {
            let merged = merge_metadata(current.clone(), change.clone());
            for key in ["a", "b", "c", "d"] {
                let expected = match change.get(key) {
                    Some(value) if value == "" => None,
                    Some(value) => Some(value),
                    None => current.get(key),
                };
                prop_assert_eq!(merged.get(key), expected);
            }
            // Twice is once.
            prop_assert_eq!(merge_metadata(merged.clone(), change), merged);
        }

        #[test]
        fn values_that_are_not_redacted_are_unchanged(value in metadata()) {
            prop_assert_eq!(keep_redacted(Value::Object(value.clone()), None), Some(Value::Object(value)));
        }
    }

    #[test]
    fn a_redacted_value_stays_and_one_that_never_was_is_refused() {
        let base = json!({ "s": { "A": "1", "B": "2" } });
        assert_eq!(
            keep_redacted(json!({ "s": { "A": "***", "C": "3" } }), Some(&base)),
            Some(json!({ "s": { "A": "1", "C": "3" } }))
        );
        assert_eq!(keep_redacted(json!({ "s": { "C": "***" } }), Some(&base)), None);
        assert_eq!(keep_redacted(json!({ "t": { "A": "***" } }), Some(&base)), None);
        assert_eq!(keep_redacted(json!({ "s": { "A": "***" } }), None), None);
    }
}
