//! What an agent may do without asking (docs/api.md §4).

use serde::{Deserialize, Serialize};

use crate::session::named;

named! {
    #[derive(Serialize, Deserialize, Default)]
    #[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
    #[serde(rename_all = "lowercase")]
    Evaluation {
        #[default]
        Allow = "allow",
        /// The turn waits for a user's decision.
        Ask = "ask",
        Deny = "deny",
    }
}

/// The first rule that names a tool decides; `default` where none does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Permissions {
    #[serde(default)]
    pub default: Evaluation,
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(max_items = 100))]
    pub rules: Vec<PermissionRule>,
    /// Seconds after which an open request is decided by `on_timeout`. Absent: it waits for its
    /// user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(minimum = 1, maximum = 604_800))]
    pub timeout_seconds: Option<u32>,
    /// `allow` or `deny`; `deny` where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<TimeoutDecision>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct PermissionRule {
    /// A tool as the runtime calls it; `*` at the end matches any rest.
    #[cfg_attr(feature = "schema", schema(min_length = 1, max_length = 200, example = "Bash"))]
    pub tool: String,
    pub evaluation: Evaluation,
}

named! {
    #[derive(Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
    #[serde(rename_all = "lowercase")]
    TimeoutDecision {
        Allow = "allow",
        Deny = "deny",
    }
}

impl Permissions {
    /// What becomes of a use of a tool.
    #[must_use]
    pub fn evaluate(&self, tool: &str) -> Evaluation {
        let names = |pattern: &str| {
            pattern.strip_suffix('*').map_or(tool == pattern, |prefix| tool.starts_with(prefix))
        };
        self.rules
            .iter()
            .find(|rule| names(&rule.tool))
            .map_or(self.default, |rule| rule.evaluation)
    }

    /// Whether they can only yield "allow": runtimes that cannot ask support nothing else.
    #[must_use]
    pub fn restrict(&self) -> bool {
        self.default != Evaluation::Allow
            || self.rules.iter().any(|rule| rule.evaluation != Evaluation::Allow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_stricter_than_allow_restricts() {
        let permissions = |text: &str| serde_json::from_str::<Permissions>(text).unwrap();
        assert!(!permissions("{}").restrict());
        assert!(!permissions(r#"{"rules":[{"tool":"Bash","evaluation":"allow"}]}"#).restrict());
        assert!(permissions(r#"{"rules":[{"tool":"Bash","evaluation":"ask"}]}"#).restrict());
        assert!(permissions(r#"{"default":"deny"}"#).restrict());
    }
}
