//! Explains common failures of set-up steps: a guess from the exit status and the last lines, which
//! are shown beside it.

use std::fmt;

/// Why something in a sandbox failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    DiskFull,
    OutOfMemory,
    PolicyBlocked,
    CloneDenied,
    PackageNotFound,
    KeyRefused,
    QuotaUsedUp,
    RateLimited,
    ModelRefused,
    ProviderFailed,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DiskFull => "the sandbox's disk is full",
            Self::OutOfMemory => "it was killed, most likely because the sandbox ran out of memory",
            Self::PolicyBlocked => "the environment's network policy blocks what it asked for; allowed_hosts names what may be reached",
            Self::CloneDenied => "there is no such repository, or its authorization_token is missing or may not read it",
            Self::PackageNotFound => "there is no such package",
            Self::KeyRefused => "the model's provider refused the API key",
            Self::QuotaUsedUp => "the account at the model's provider has no quota or credit left",
            Self::RateLimited => "the model's provider limits how often it may be asked",
            Self::ModelRefused => "the model's provider does not know the model, or the API key may not use it",
            Self::ProviderFailed => "the model's provider failed",
        })
    }
}

/// The exit status that a shell reports for a process that was killed by SIGKILL.
const KILLED: u8 = 137;

const DISK_FULL: &[&str] = &["no space left on device", "enospc", "disk quota exceeded"];
const OUT_OF_MEMORY: &[&str] = &["cannot allocate memory", "out of memory", "enomem"];
/// What clients print when a proxy refuses; the first is the message of our own server.
const REFUSED_BY_PROXY: &[&str] = &[
    "refused by the network policy",
    "connect tunnel failed, response 403",
    "tunnel connection failed: 403",
    "received http code 403 from proxy",
    "statuscode=403",
    "invalid response from proxy: http/1.1 403",
];
/// What clients print when a policy does not resolve a name, as Fly.io's does.
const NOT_RESOLVED: &[&str] = &[
    "could not resolve host",
    "temporary failure in name resolution",
    "temporary failure resolving",
    "name or service not known",
    "enotfound",
];
const CLONE_DENIED: &[&str] = &[
    "could not read username",
    "authentication failed for",
    "repository not found",
    "the requested url returned error: 403",
    "invalid username or token",
    "permission denied (publickey)",
];
const PACKAGE_NOT_FOUND: &[&str] = &[
    "unable to locate package",
    "has no installation candidate",
    "no matching distribution found",
    "npm error 404",
    "npm error code e404",
    "in registry `crates-io`",
    "could not find a valid gem",
    "no matching versions for query",
    "404 not found: module",
];

/// Of a script of the set-up that failed; `limited`: under a network policy.
pub fn of_script(code: u8, said: &str, limited: bool) -> Option<Cause> {
    let said = said.to_lowercase();
    let any = |texts: &[&str]| texts.iter().any(|text| said.contains(text));
    if any(DISK_FULL) {
        return Some(Cause::DiskFull);
    }
    if limited && (any(REFUSED_BY_PROXY) || any(NOT_RESOLVED)) {
        return Some(Cause::PolicyBlocked);
    }
    if any(CLONE_DENIED) {
        return Some(Cause::CloneDenied);
    }
    // Where no name is resolved, managers say that too.
    if any(PACKAGE_NOT_FOUND) && !any(NOT_RESOLVED) {
        return Some(Cause::PackageNotFound);
    }
    (code == KILLED || any(OUT_OF_MEMORY)).then_some(Cause::OutOfMemory)
}

const QUOTA_USED_UP: &[&str] = &[
    "insufficient_quota",
    "credit balance is too low",
    "exceeded your current quota",
    "billing_hard_limit",
    "quota exceeded",
];
const KEY_REFUSED: &[&str] = &[
    "authentication_error",
    "authentication_failed",
    "invalid x-api-key",
    "invalid api key",
    "incorrect api key",
    "api key not valid",
    "api_key_invalid",
    "invalid_api_key",
    "401 unauthorized",
    "error: 401",
    "\"statuscode\":401",
    "status 401",
];
const MODEL_REFUSED: &[&str] = &[
    "model_not_found",
    "not_found_error",
    "unknown model",
    "model is not supported",
    "model not found",
    "issue with the selected model",
];
const RATE_LIMITED: &[&str] = &[
    "rate_limit",
    "rate limit",
    "resource_exhausted",
    "too many requests",
    "error: 429",
    "status 429",
    "\"statuscode\":429",
    "\"code\":429",
];
const PROVIDER_FAILED: &[&str] = &[
    "overloaded",
    "server_error",
    "ai_apicallerror",
    "internal server error",
    "api_error",
    "error: 500",
    "error: 503",
    "status 500",
    "\"statuscode\":500",
    "\"code\":500",
    "\"code\":503",
    "high demand",
    // opencode asks again, in the provider's words alone.
    "\"status\":{\"type\":\"retry\"",
];

/// Of an agent that left with another status than 0, or was ended when its time was up, from the
/// last that it printed.
pub fn of_agent(code: Option<u8>, said: &str) -> Option<Cause> {
    let said = said.to_lowercase();
    let causes = [
        (DISK_FULL, Cause::DiskFull),
        (QUOTA_USED_UP, Cause::QuotaUsedUp),
        (KEY_REFUSED, Cause::KeyRefused),
        (MODEL_REFUSED, Cause::ModelRefused),
        (RATE_LIMITED, Cause::RateLimited),
        (PROVIDER_FAILED, Cause::ProviderFailed),
    ];
    let found = causes
        .iter()
        .find(|(texts, _)| texts.iter().any(|text| said.contains(text)))
        .map(|(_, cause)| *cause);
    found.or_else(|| (code == Some(KILLED)).then_some(Cause::OutOfMemory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_diagnosed_by_what_their_tools_say() {
        for (code, said, limited, cause) in [
            (1, "dd: error writing 'x': No space left on device", false, Some(Cause::DiskFull)),
            (137, "", false, Some(Cause::OutOfMemory)),
            (1, "fork: Cannot allocate memory", false, Some(Cause::OutOfMemory)),
            (100, "E: Unable to locate package jqq", false, Some(Cause::PackageNotFound)),
            (
                1,
                "ERROR: No matching distribution found for nosuch",
                false,
                Some(Cause::PackageNotFound),
            ),
            (
                128,
                "fatal: could not read Username for 'https://github.com': terminal prompts disabled",
                false,
                Some(Cause::CloneDenied),
            ),
            (
                128,
                "fatal: unable to access 'https://x/': CONNECT tunnel failed, response 403",
                true,
                Some(Cause::PolicyBlocked),
            ),
            (6, "curl: (6) Could not resolve host: x", true, Some(Cause::PolicyBlocked)),
            (6, "curl: (6) Could not resolve host: x", false, None),
            (
                2,
                "Could not find a valid gem 'x', here is why: SocketError: getaddrinfo: Name or service not known",
                false,
                None,
            ),
            (1, "make: *** [all] Error 1", false, None),
        ] {
            assert_eq!(of_script(code, said, limited), cause, "{said}");
        }
    }

    #[test]
    fn an_agents_end_is_diagnosed_only_where_it_is_known() {
        assert_eq!(
            of_agent(
                Some(1),
                r#"{"type":"error","message":"401 Unauthorized: Incorrect API key"}"#
            ),
            Some(Cause::KeyRefused)
        );
        assert_eq!(
            of_agent(Some(1), "429 You exceeded your current quota"),
            Some(Cause::QuotaUsedUp)
        );
        assert_eq!(of_agent(Some(137), ""), Some(Cause::OutOfMemory));
        assert_eq!(
            of_agent(None, r#"{"subtype":"api_retry","error_status":500,"error":"server_error"}"#),
            Some(Cause::ProviderFailed)
        );
        assert_eq!(
            of_agent(None, r#"{"code":429,"status":"RESOURCE_EXHAUSTED"}"#),
            Some(Cause::RateLimited)
        );
        assert_eq!(
            of_agent(None, r#"{"error":{"code":500,"status":"INTERNAL"}}"#),
            Some(Cause::ProviderFailed)
        );
        assert_eq!(
            of_agent(None, r#"{"id":3,"error":{"code":429,"message":"no"}}"#),
            Some(Cause::RateLimited)
        );
        assert_eq!(of_agent(Some(1), "tests failed"), None);
    }
}
