//! What an environment is made of: packages, variables, networking (docs/api.md §5).

use serde::{Deserialize, Serialize};

use crate::{McpServer, session::named};

named! {
    /// In the order in which they install.
    PackageManager {
        Apt = "apt",
        Cargo = "cargo",
        Gem = "gem",
        Go = "go",
        Npm = "npm",
        Pip = "pip",
    }
}

impl PackageManager {
    /// The hosts that it installs from.
    #[must_use]
    pub const fn hosts(self) -> &'static [&'static str] {
        match self {
            Self::Apt => &[
                "deb.debian.org",
                "security.debian.org",
                "archive.ubuntu.com",
                "security.ubuntu.com",
                "ports.ubuntu.com",
            ],
            Self::Cargo => &["crates.io", "index.crates.io", "static.crates.io"],
            Self::Gem => &["rubygems.org", "index.rubygems.org"],
            Self::Go => &["proxy.golang.org", "sum.golang.org", "storage.googleapis.com"],
            Self::Npm => &["registry.npmjs.org"],
            Self::Pip => &["pypi.org", "files.pythonhosted.org"],
        }
    }
}

/// A package with its version, as a package manager takes it: never an option, never shell syntax.
#[must_use]
pub fn is_package(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "@/._+-=~^<>[],:".contains(c);
    !text.is_empty() && !text.starts_with('-') && text.chars().all(allowed)
}

/// `[A-Za-z_][A-Za-z0-9_]*`
#[must_use]
pub fn is_variable(text: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.chars().all(word) && text.chars().next().is_some_and(|first| !first.is_ascii_digit())
}

/// Set by the supervisor of an agent, or by every shell: a value of the user's would not reach the
/// agent.
const RESERVED_VARIABLES: [&str; 2] = ["AOD_TURN", "_"];
/// The kernel starts no program with a longer `NAME=value`, its NUL included (`MAX_ARG_STRLEN`).
const VARIABLE_BYTES_MAX: usize = 128 * 1024;
/// All variables of an environment, and all of a session: both fit into the 2 MiB that the kernel
/// takes, with room for arguments.
pub const VARIABLES_BYTES_MAX: usize = 512 * 1024;

/// Why a variable cannot be given to an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VariableError {
    #[error("is set by the service")]
    Reserved,
    #[error("is too large: name and value must be at most {} bytes together", VARIABLE_BYTES_MAX - 2)]
    TooLarge,
    #[error("holds a NUL")]
    Nul,
}

/// # Errors
/// Why no program can be started with this variable.
pub fn check_variable(name: &str, value: &str) -> Result<(), VariableError> {
    if RESERVED_VARIABLES.contains(&name) {
        return Err(VariableError::Reserved);
    }
    if name.len() + value.len() + "=\0".len() > VARIABLE_BYTES_MAX {
        return Err(VariableError::TooLarge);
    }
    if value.contains('\0') { Err(VariableError::Nul) } else { Ok(()) }
}

/// The network access of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Networking {
    /// Where it is absent: `unrestricted`.
    #[serde(rename = "type", default)]
    pub kind: NetworkingKind,
    /// Host names; `*.x` stands for every name below `x`. Of `limited` networks alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_hosts: Option<Vec<String>>,
    /// The registries of package managers may be reached too. Set under `/v1`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_package_managers: bool,
    /// The hosts of the agent's MCP servers may be reached too. Set under `/v1`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_mcp_servers: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum NetworkingKind {
    /// Everything.
    #[default]
    Unrestricted,
    /// The allowed hosts and no other.
    Limited,
}

impl Default for Networking {
    fn default() -> Self {
        Self {
            kind: NetworkingKind::Unrestricted,
            allowed_hosts: None,
            allow_package_managers: false,
            allow_mcp_servers: false,
        }
    }
}

impl Networking {
    /// The hosts that alone may be reached, where not all may.
    #[must_use]
    pub fn hosts(&self, mcp_servers: &[McpServer]) -> Option<Vec<String>> {
        if self.kind == NetworkingKind::Unrestricted {
            return None;
        }
        let mut hosts = self.allowed_hosts.clone().unwrap_or_default();
        if self.allow_package_managers {
            hosts.extend(
                PackageManager::ALL
                    .into_iter()
                    .flat_map(PackageManager::hosts)
                    .map(|host| (*host).to_owned()),
            );
        }
        if self.allow_mcp_servers {
            hosts.extend(mcp_servers.iter().filter_map(McpServer::host).map(str::to_owned));
        }
        Some(hosts)
    }
}

/// A host name that may begin with `*.`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPattern<'a> {
    wildcard: bool,
    name: &'a str,
}

impl<'a> HostPattern<'a> {
    /// `None` for what cannot name a host: a URL, a port, an empty label.
    #[must_use]
    pub fn parse(text: &'a str) -> Option<Self> {
        let (wildcard, name) = text.strip_prefix("*.").map_or((false, text), |name| (true, name));
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        (text.len() <= 253 && name.split('.').all(label)).then_some(Self { wildcard, name })
    }

    /// Whether a host may be reached by this pattern. `*.x` does not stand for `x` itself.
    #[must_use]
    pub fn allows(&self, host: &str) -> bool {
        let host = host.strip_suffix('.').unwrap_or(host);
        if !self.wildcard {
            return host.eq_ignore_ascii_case(self.name);
        }
        let Some(at) = host
            .len()
            .checked_sub(self.name.len() + 1)
            .filter(|at| *at > 0 && host.is_char_boundary(*at))
        else {
            return false;
        };
        let (_, tail) = host.split_at(at);
        tail.strip_prefix('.').is_some_and(|tail| tail.eq_ignore_ascii_case(self.name))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn packages_are_no_options_and_no_shell() {
        for good in [
            "ripgrep@14.0.0",
            "requests>=2,<3",
            "uvicorn[standard]",
            "@scope/pkg",
            "golang.org/x/tools/cmd/goimports@latest",
        ] {
            assert!(is_package(good), "{good}");
        }
        for bad in ["", "-y", "--pre", "a b", "a;b", "$(x)", "a\nb", "é", "a|b", "a&b", "'a'"] {
            assert!(!is_package(bad), "{bad:?}");
        }
    }

    #[test]
    fn variables_have_the_names_that_shells_take() {
        assert!(is_variable("_A1") && is_variable("PATH"));
        assert!(!is_variable("") && !is_variable("1A") && !is_variable("A-B") && !is_variable("É"));
    }

    #[test]
    fn variables_that_prevent_programs_from_starting_are_refused() {
        assert_eq!(check_variable("PATH", "/x:$PATH"), Ok(()));
        assert_eq!(check_variable("AOD_TURN", ""), Err(VariableError::Reserved));
        assert_eq!(check_variable("A", "a\0b"), Err(VariableError::Nul));
        let longest = "x".repeat(131_072 - "BIG=".len() - 1);
        assert_eq!(check_variable("BIG", &longest), Ok(()));
        assert_eq!(check_variable("BIG_", &longest), Err(VariableError::TooLarge));
        // The kernel agrees.
        let runs =
            |name: &str| std::process::Command::new("true").env(name, &longest).status().is_ok();
        assert!(runs("BIG") && !runs("BIG_"));
    }

    #[test]
    fn a_wildcard_stands_for_names_below() {
        let pattern = HostPattern::parse("*.github.com").unwrap();
        assert!(pattern.allows("api.github.com") && pattern.allows("A.B.GitHub.com."));
        for host in [
            "github.com",
            "evilgithub.com",
            ".github.com",
            "github.com.evil.org",
            "",
            "ü.github.org",
        ] {
            assert!(!pattern.allows(host), "{host}");
        }
        assert!(HostPattern::parse("Example.com").unwrap().allows("example.COM"));
        for bad in [
            "", "*", "*.", "a..b", "http://x", "x:80", "a*.b", "-a.b", "a b", "x/y", "*.*.x",
            "é.fr",
        ] {
            assert_eq!(HostPattern::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_pattern_and_no_host_panics(pattern: String, host: String) {
            if let Some(pattern) = HostPattern::parse(&pattern) {
                let _ = pattern.allows(&host);
            }
        }

        #[test]
        fn a_wildcard_is_one_or_more_labels(name in "[a-z]{1,5}(\\.[a-z]{1,5}){0,2}", below in "[a-z]{1,5}(\\.[a-z]{1,5}){0,2}") {
            let text = format!("*.{name}");
            let pattern = HostPattern::parse(&text).unwrap();
            let (deeper, glued) = (format!("{below}.{name}"), format!("{below}{name}"));
            prop_assert!(pattern.allows(&deeper));
            let is_below = glued.ends_with(&format!(".{name}"));
            prop_assert_eq!(pattern.allows(&glued), is_below);
            prop_assert!(!HostPattern::parse(&name).unwrap().allows(&deeper));
        }
    }
}
