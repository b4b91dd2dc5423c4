//! Which of a session's requests go by way of the model gateway, which adds their secrets: those to
//! MCP servers over HTTP and to repositories (docs/adr/0160-secrets-of-routes.md).

use std::net::IpAddr;

use sha2::{Digest as _, Sha256};

use crate::{
    McpServer, Networking, Repository,
    agent::McpTransport,
    environment::HostPattern,
    repository::{HOST as REPOSITORY_HOST, RepositoryUrl},
};

/// The header that shows a session's token to the model gateway, beside headers that are the
/// server's.
pub const SESSION_HEADER: &str = "aod-session-token";

/// How much of a server's name its path has.
const NAME_CHARS_MAX: usize = 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    Mcp,
    Git,
}

/// Where the model gateway sends requests of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub kind: RouteKind,
    /// At the model gateway, without a leading slash. Another URL has another path.
    pub path: String,
    /// What its secrets are stored under: a server's name, or the path that a repository lies at.
    pub name: String,
    pub url: String,
    /// The session's network policy refuses its host.
    pub is_refused: bool,
}

/// The routes of a session. A server at a loopback address is one inside of the sandbox, but for
/// `private_hosts` (`host:port`), and one whose URL holds a variable of the sandbox is known there
/// alone: neither has a route.
#[must_use]
pub fn of_session(
    servers: &[McpServer],
    repositories: &[Repository],
    networking: &Networking,
    private_hosts: &[String],
) -> Vec<Route> {
    let allowed = networking.hosts(servers);
    let is_refused = |host: &str| {
        let pattern_allows = |pattern: &String| {
            HostPattern::parse(pattern).is_some_and(|pattern| pattern.allows(host))
        };
        allowed.as_ref().is_some_and(|allowed| !allowed.iter().any(pattern_allows))
    };
    let of_server = |server: &McpServer| {
        let McpTransport::Url { url, .. } = &server.transport else { return None };
        let (host, port) = (server.host()?, server.port()?);
        let is_named = || {
            private_hosts.iter().any(|named| named.eq_ignore_ascii_case(&format!("{host}:{port}")))
        };
        let is_elsewhere = !is_loopback(host) || is_named();
        (is_elsewhere && !holds_variable(url)).then(|| Route {
            kind: RouteKind::Mcp,
            path: mcp_path(&server.name, url),
            name: server.name.clone(),
            url: url.clone(),
            is_refused: is_refused(host),
        })
    };
    let of_repository = |repository: &Repository| {
        let url = RepositoryUrl::parse(&repository.url)?.to_string();
        let path = format!("git/{}", url.strip_prefix("https://")?);
        Some(Route {
            kind: RouteKind::Git,
            path,
            name: repository.mount_path.clone(),
            url,
            is_refused: is_refused(REPOSITORY_HOST),
        })
    };
    servers
        .iter()
        .filter_map(of_server)
        .chain(repositories.iter().filter_map(of_repository))
        .collect()
}

/// The addresses of a comma-separated list.
#[must_use]
pub fn hosts(list: &str) -> Vec<String> {
    list.split(',')
        .map(|host| host.trim().to_ascii_lowercase())
        .filter(|host| !host.is_empty())
        .collect()
}

/// Whether a text refers to a variable of the sandbox, as CLIs write it in their configuration:
/// `${NAME}`.
#[must_use]
pub fn holds_variable(text: &str) -> bool {
    text.split_once("${").is_some_and(|(_, rest)| rest.contains('}'))
}

fn mcp_path(name: &str, url: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '_' };
    let digest = Sha256::new().chain_update(name).chain_update([0]).chain_update(url).finalize();
    let digest: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("mcp/{}-{digest}", name.chars().take(NAME_CHARS_MAX).map(plain).collect::<String>())
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let address = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>()
        .map(|address| address.to_canonical());
    host == "localhost"
        || host.ends_with(".localhost")
        || address.is_ok_and(|address| address.is_loopback() || address.is_unspecified())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn server(name: &str, url: &str) -> McpServer {
        serde_json::from_value(json!({ "name": name, "type": "url", "url": url })).unwrap()
    }

    fn repository() -> Repository {
        serde_json::from_value(json!({ "type": "github_repository", "url": "https://github.com/o/r", "mount_path": "/w/r" })).unwrap()
    }

    fn limited(hosts: &[&str], allow_mcp_servers: bool) -> Networking {
        serde_json::from_value(json!({ "type": "limited", "allowed_hosts": hosts, "allow_mcp_servers": allow_mcp_servers })).unwrap()
    }

    #[test]
    fn servers_inside_of_the_sandbox_have_no_route() {
        let of = |url: &str, private: &[&str]| {
            let private: Vec<String> = private.iter().map(|host| (*host).to_owned()).collect();
            of_session(&[server("a", url)], &[], &Networking::default(), &private).len()
        };
        for inside in [
            "http://localhost:1/mcp",
            "http://127.0.0.1/mcp",
            "http://[::1]:5/",
            "http://x.localhost/",
            "http://0.0.0.0:1/",
        ] {
            assert_eq!(of(inside, &["127.0.0.1:9"]), 0, "{inside}");
        }
        assert_eq!(of("http://127.0.0.1:9/mcp", &["127.0.0.1:9"]), 1);
        assert_eq!(of("http://127.0.0.1/mcp", &["127.0.0.1:80"]), 1);
        assert_eq!(of("https://mcp.example/mcp", &[]), 1);
        for direct in ["https://${HOST}/mcp", "ftp://a/", "mcp.example"] {
            assert_eq!(of(direct, &[]), 0, "{direct}");
        }
        let stdio = serde_json::from_value(json!({ "name": "a", "type": "stdio", "command": "x" }))
            .unwrap();
        assert!(of_session(&[stdio], &[], &Networking::default(), &[]).is_empty());
    }

    #[test]
    fn a_network_policy_holds_for_routes_too() {
        let servers = [
            server("one", "https://one.example/mcp"),
            server("two", "https://mcp.two.example:8443/"),
        ];
        let refused = |networking: &Networking| {
            of_session(&servers, &[repository()], networking, &[])
                .iter()
                .map(|route| route.is_refused)
                .collect::<Vec<_>>()
        };
        assert_eq!(refused(&Networking::default()), [false, false, false]);
        assert_eq!(refused(&limited(&[], false)), [true, true, true]);
        assert_eq!(refused(&limited(&["*.two.example"], false)), [true, false, true]);
        assert_eq!(refused(&limited(&["github.com"], true)), [false, false, false]);
    }

    #[test]
    fn another_url_or_name_is_another_path_and_a_repositorys_path_is_its_address() {
        let path = |name: &str, url: &str| {
            of_session(&[server(name, url)], &[], &Networking::default(), &[]).remove(0).path
        };
        let paths = [("a b", "https://x/1"), ("a b", "https://x/2"), ("a_b", "https://x/1")]
            .map(|(name, url)| path(name, url));
        assert!(paths.iter().all(|path| path.starts_with("mcp/a_b-")), "{paths:?}");
        assert!(paths[0] != paths[1] && paths[0] != paths[2]);
        let routes = of_session(&[], &[repository()], &Networking::default(), &[]);
        assert_eq!(
            (routes[0].path.as_str(), routes[0].url.as_str()),
            ("git/github.com/o/r", "https://github.com/o/r")
        );
    }

    proptest! {
        #[test]
        fn a_path_is_two_plain_segments(name in "\\PC{1,60}", url in "https://[a-z]{1,9}/\\PC{0,9}") {
            for route in of_session(&[server(&name, &url)], &[], &Networking::default(), &[]) {
                let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                let (folder, rest) = route.path.split_once('/').unwrap();
                prop_assert!(folder == "mcp" && rest.chars().all(plain) && rest.len() < 64);
            }
        }
    }
}
