//! The rules of a Sprite's network policy. Pure.

use serde::{Deserialize, Serialize};

const RULES_MAX: usize = 1000;

/// What development needs: the meaning of `{"include":"defaults"}`.
const DEFAULTS: [&str; 24] = [
    "github.com",
    "*.github.com",
    "*.githubusercontent.com",
    "gitlab.com",
    "registry.npmjs.org",
    "registry.yarnpkg.com",
    "nodejs.org",
    "pypi.org",
    "files.pythonhosted.org",
    "crates.io",
    "*.crates.io",
    "static.rust-lang.org",
    "rubygems.org",
    "*.rubygems.org",
    "proxy.golang.org",
    "sum.golang.org",
    "deb.debian.org",
    "security.debian.org",
    "*.ubuntu.com",
    "registry-1.docker.io",
    "*.docker.io",
    "api.anthropic.com",
    "api.openai.com",
    "generativelanguage.googleapis.com",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Allow,
    Deny,
}

/// A host or a pattern of hosts, or a list that everybody knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Rule {
    Domain { domain: String, action: Action },
    Include { include: String },
}

/// The rules of a Sprite. None at all: everything is allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    pub rules: Vec<Rule>,
}

impl Policy {
    pub fn is_limited(&self) -> bool {
        !self.rules.is_empty()
    }

    /// What is wrong with the rules, if anything is.
    pub fn problem(&self) -> Option<String> {
        if self.rules.len() > RULES_MAX {
            return Some(format!("at most {RULES_MAX} rules"));
        }
        self.rules.iter().find_map(|rule| match rule {
            Rule::Include { include } => {
                (include != "defaults").then(|| format!("unknown include {include:?}"))
            }
            Rule::Domain { domain, .. } => {
                let name = domain.strip_prefix("*.").unwrap_or(domain);
                let known = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
                let fine =
                    domain == "*" || (1..=253).contains(&name.len()) && name.chars().all(known);
                (!fine).then(|| format!("invalid domain {domain:?}"))
            }
        })
    }

    /// The exact name wins over a pattern, the longer pattern over the shorter, and unnamed hosts
    /// are refused.
    pub fn allows(&self, host: &str) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let defaults = DEFAULTS.iter().map(|domain| (*domain, Action::Allow));
        let included = self.rules.iter().any(|rule| matches!(rule, Rule::Include { .. }));
        let own = self.rules.iter().filter_map(|rule| match rule {
            Rule::Domain { domain, action } => Some((domain.as_str(), *action)),
            Rule::Include { .. } => None,
        });
        let matching = own
            .chain(defaults.filter(|_| included))
            .filter_map(|(domain, action)| Some((weight(domain, &host)?, action)));
        // Of equals a refusal wins.
        let best = matching.max_by_key(|(weight, action)| (*weight, *action == Action::Deny));
        best.is_none_or(|(_, action)| action == Action::Allow)
            && (best.is_some() || !self.is_limited())
    }
}

/// How closely a domain of a rule names a host; none if it does not.
fn weight(domain: &str, host: &str) -> Option<usize> {
    let domain = domain.to_ascii_lowercase();
    if domain == "*" {
        return Some(0);
    }
    match domain.strip_prefix('*') {
        Some(suffix) => {
            (host.len() > suffix.len() && host.ends_with(suffix)).then_some(suffix.len())
        }
        None => (domain == host).then_some(usize::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: serde_json::Value) -> Policy {
        serde_json::from_value(serde_json::json!({ "rules": rules })).unwrap()
    }

    #[test]
    fn the_closest_rule_wins_and_unnamed_hosts_are_refused() {
        let rules = policy(serde_json::json!([
            { "domain": "*", "action": "deny" },
            { "domain": "*.example.org", "action": "allow" },
            { "domain": "secret.example.org", "action": "deny" },
            { "domain": "Exact.net", "action": "allow" },
        ]));
        for (host, expected) in [
            ("a.example.org", true),
            ("a.b.EXAMPLE.org.", true),
            ("secret.example.org", false),
            ("example.org", false),
            ("evilexample.org", false),
            ("exact.net", true),
            ("x.exact.net", false),
            ("", false),
        ] {
            assert_eq!(rules.allows(host), expected, "{host}");
        }
        let defaults = policy(
            serde_json::json!([{ "include": "defaults" }, { "domain": "pypi.org", "action": "deny" }]),
        );
        assert!(defaults.allows("github.com") && defaults.allows("api.github.com"));
        assert!(!defaults.allows("pypi.org") && !defaults.allows("example.org"));
        assert!(Policy::default().allows("anything") && !Policy::default().is_limited());
    }

    #[test]
    fn bad_rules_are_named() {
        assert!(
            policy(serde_json::json!([{ "domain": "a b", "action": "allow" }]))
                .problem()
                .unwrap()
                .contains("a b")
        );
        assert!(
            policy(serde_json::json!([{ "include": "everything" }]))
                .problem()
                .unwrap()
                .contains("everything")
        );
        assert_eq!(
            policy(serde_json::json!([{ "domain": "*.a-b.c", "action": "allow" }])).problem(),
            None
        );
        assert!(
            serde_json::from_value::<Policy>(
                serde_json::json!({ "rules": [{ "domain": "x", "action": "maybe" }] })
            )
            .is_err()
        );
    }
}
