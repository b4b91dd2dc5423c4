//! Puts the values of secrets into requests whose sandbox knows placeholders alone. No I/O.

use std::{collections::BTreeSet, sync::Arc};

use aho_corasick::{AhoCorasick, MatchKind};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hyper::{
    HeaderMap, Method, Request, StatusCode, Uri, Version,
    header::{self, HeaderValue},
};
use serde::Deserialize;
use service::connection::hop_by_hop;
use types::vault::{CredentialHost, HOSTS_MAX, fits_header};
use zeroize::{Zeroize as _, Zeroizing};

const SECRETS_MAX: usize = 1000;
/// A shorter one might be found in what is none.
const PLACEHOLDER_BYTES_MIN: usize = 16;
const PLACEHOLDER_BYTES_MAX: usize = 200;
/// What the headers of a request may hold once values are in them.
const HEADERS_BYTES_MAX: usize = 64 * 1024;

/// A secret whose value is outside of its sandbox. Cannot be printed; wiped when dropped.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Secret {
    placeholder: String,
    value: String,
    hosts: Vec<String>,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Secret").field("hosts", &self.hosts).finish_non_exhaustive()
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.value.zeroize();
    }
}

impl Secret {
    fn is_for(&self, host: &str, port: u16) -> bool {
        let names = |text: &String| {
            CredentialHost::parse(text).is_some_and(|listed| listed.names(host, port))
        };
        self.hosts.iter().any(names)
    }
}

/// The secrets of a Sprite.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    all: Arc<[Secret]>,
    /// Finds their placeholders, in one pass however many there are.
    finder: Option<AhoCorasick>,
}

impl Secrets {
    /// # Errors
    /// What is wrong with them.
    pub fn new(secrets: Vec<Secret>) -> Result<Self, &'static str> {
        let placeholder = |text: &str| {
            (PLACEHOLDER_BYTES_MIN..=PLACEHOLDER_BYTES_MAX).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        if secrets.len() > SECRETS_MAX {
            return Err("too many secrets");
        }
        for secret in &secrets {
            if !placeholder(&secret.placeholder) {
                return Err("a placeholder is 16 to 200 letters, digits and _");
            }
            if !fits_header(&secret.value) {
                return Err("a value is at most 16 KiB of printable ASCII characters");
            }
            let is_host = |host: &String| CredentialHost::parse(host).is_some();
            if secret.hosts.len() > HOSTS_MAX || !secret.hosts.iter().all(is_host) {
                return Err("hosts are at most 16 names, which may begin with *. and have a port");
            }
        }
        let placeholders: BTreeSet<&str> =
            secrets.iter().map(|secret| secret.placeholder.as_str()).collect();
        if placeholders.len() < secrets.len() {
            return Err("each secret has a placeholder of its own");
        }
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(secrets.iter().map(|secret| &secret.placeholder))
            .map_err(|_| "the placeholders are too long together")?;
        Ok(Self { all: secrets.into(), finder: Some(finder) })
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether any of them is for a host.
    pub fn are_for(&self, host: &str, port: u16) -> bool {
        self.all.iter().any(|secret| secret.is_for(host, port))
    }

    /// Makes of a request what its host gets: without what concerns the sandbox's connection alone,
    /// and with the values of the secrets that are for the host in place of their placeholders, in
    /// values of headers.
    ///
    /// # Errors
    /// When the request is for another host, has a method that is no use with it, or its headers
    /// become too long.
    pub fn put_into<B>(
        &self,
        request: &mut Request<B>,
        host: &str,
        port: u16,
    ) -> Result<(), Refused> {
        // TRACE has the host repeat the headers, and a tunnel would not be this host's.
        if [Method::TRACE, Method::CONNECT].contains(request.method()) {
            return Err(Refused::Method);
        }
        // Servers of many hosts choose by this header: the value is for the listed one alone.
        if !is_addressed_to(request.headers(), request.uri(), host, port) {
            return Err(Refused::OtherHost);
        }
        *request.version_mut() = Version::HTTP_11;
        let headers = request.headers_mut();
        for name in hop_by_hop(headers) {
            headers.remove(name);
        }
        let values: Vec<Option<&str>> = self
            .all
            .iter()
            .map(|secret| secret.is_for(host, port).then_some(secret.value.as_str()))
            .collect();
        let mut room = HEADERS_BYTES_MAX;
        for (name, value) in headers.iter_mut() {
            let is_basic = *name == header::AUTHORIZATION;
            if let Some(replaced) = self.replaced(value.as_bytes(), is_basic, &values)? {
                *value = HeaderValue::from_bytes(&replaced).map_err(|_| Refused::TooLong)?;
                value.set_sensitive(true);
            }
            room = room.checked_sub(value.len()).ok_or(Refused::TooLong)?;
        }
        Ok(())
    }

    /// A header's value with secrets in place of placeholders; none where it holds no placeholder.
    /// `values`: that of each secret that is for the host.
    fn replaced(
        &self,
        header: &[u8],
        is_authorization: bool,
        values: &[Option<&str>],
    ) -> Result<Option<Zeroizing<Vec<u8>>>, Refused> {
        if is_authorization && let Some(pair) = basic(header) {
            // Password and user name are encoded together.
            let Some(pair) = self.substituted(&pair, values)? else { return Ok(None) };
            let encoded = Zeroizing::new(BASE64.encode(pair));
            return Ok(Some([&b"Basic "[..], encoded.as_bytes()].concat().into()));
        }
        self.substituted(header, values)
    }

    fn substituted(
        &self,
        text: &[u8],
        values: &[Option<&str>],
    ) -> Result<Option<Zeroizing<Vec<u8>>>, Refused> {
        let Some(finder) = &self.finder else { return Ok(None) };
        let (mut made, mut copied) = (Zeroizing::new(Vec::new()), 0);
        // One pass: a value is not searched for placeholders.
        for found in finder.find_iter(text) {
            let Some(value) = values.get(found.pattern().as_usize()).copied().flatten() else {
                continue;
            };
            made.extend_from_slice(text.get(copied..found.start()).unwrap_or_default());
            made.extend_from_slice(value.as_bytes());
            copied = found.end();
            if made.len() > HEADERS_BYTES_MAX {
                return Err(Refused::TooLong);
            }
        }
        if copied == 0 {
            return Ok(None);
        }
        made.extend_from_slice(text.get(copied..).unwrap_or_default());
        Ok(Some(made))
    }
}

/// Why a request is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the request is for another host than the connection")]
    OtherHost,
    #[error("TRACE and CONNECT are not passed on to hosts of credentials")]
    Method,
    #[error("the headers are too long")]
    TooLong,
}

impl Refused {
    pub fn status(self) -> StatusCode {
        match self {
            Self::OtherHost => StatusCode::MISDIRECTED_REQUEST,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLong => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        }
    }
}

fn is_addressed_to(headers: &HeaderMap, uri: &Uri, host: &str, port: u16) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(named), None) = (hosts.next(), hosts.next()) else { return false };
    let Ok(named) = named.to_str() else { return false };
    let (name, named_port) = match named.rsplit_once(':') {
        Some((name, port)) => (name, port.parse().ok()),
        None => (named, Some(443)),
    };
    let plain = |name: &str| name.trim_end_matches('.').to_ascii_lowercase();
    let is_of_connection = plain(name) == plain(host) && named_port == Some(port);
    is_of_connection && uri.authority().is_none() && uri.path().starts_with('/')
}

fn basic(value: &[u8]) -> Option<Vec<u8>> {
    let (scheme, encoded) = value.split_at_checked("Basic ".len())?;
    scheme.eq_ignore_ascii_case(b"basic ").then(|| BASE64.decode(encoded.trim_ascii()).ok())?
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    const ONE: &str = "aod_placeholder_1";
    const OTHER: &str = "aod_placeholder_2";

    fn secrets() -> Secrets {
        let secret = |placeholder: &str, value: &str, hosts: &[&str]| Secret {
            placeholder: placeholder.to_owned(),
            value: value.to_owned(),
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
        };
        Secrets::new(vec![
            secret(ONE, "SENTINEL one", &["api.example.com", "*.one.example:8443"]),
            secret(OTHER, "SENTINEL two", &["api.two.example"]),
        ])
        .unwrap()
    }

    fn request(uri: &str, headers: &[(&str, &str)]) -> Request<()> {
        let request = Request::builder().method("POST").uri(uri);
        let with = |request: hyper::http::request::Builder, (name, value): &(&str, &str)| {
            request.header(*name, *value)
        };
        headers.iter().fold(request, with).body(()).unwrap()
    }

    fn sent(headers: &[(&str, &str)]) -> Result<Request<()>, Refused> {
        let host = ("host", "api.example.com");
        let mut request = request("/a?b=aod_placeholder_1", &[&[host], headers].concat());
        secrets().put_into(&mut request, "api.example.com", 443).map(|()| request)
    }

    #[test]
    fn placeholders_are_replaced_in_headers_and_nowhere_else() {
        let basic = |text: &str| format!("Basic {}", BASE64.encode(text));
        let bearer = format!("Bearer {ONE}");
        let request = sent(&[
            ("authorization", &bearer),
            ("x-twice", &format!("{ONE},{ONE}x")),
            ("x-plain", "plain"),
        ])
        .unwrap();
        let header = |name: &str| request.headers()[name].to_str().unwrap();
        assert_eq!(header("authorization"), "Bearer SENTINEL one");
        assert_eq!(header("x-twice"), "SENTINEL one,SENTINEL onex");
        assert_eq!(header("x-plain"), "plain");
        assert_eq!(request.uri(), "/a?b=aod_placeholder_1");
        assert!(!format!("{:?} {:?}", request.headers(), secrets()).contains("SENTINEL"));
        let request = sent(&[("authorization", &basic(&format!("user:{ONE}")))]).unwrap();
        assert_eq!(request.headers()["authorization"], basic("user:SENTINEL one"));
    }

    #[test]
    fn a_secret_of_another_host_stays_a_placeholder() {
        let request = sent(&[("x-key", OTHER)]).unwrap();
        assert_eq!(request.headers()["x-key"], OTHER);
        let secrets = secrets();
        assert!(secrets.are_for("API.example.com.", 443));
        assert!(secrets.are_for("a.one.example", 8443) && !secrets.are_for("a.one.example", 443));
        assert!(!secrets.are_for("example.com", 443) && !secrets.are_for("x.api.example.com", 443));
    }

    #[test]
    fn a_request_for_another_host_than_the_connections_gets_no_value() {
        let key = ("x-key", ONE);
        for (uri, headers) in [
            ("/", vec![key]),
            ("/", vec![("host", "evil.example"), key]),
            ("/", vec![("host", "api.example.com:8443"), key]),
            ("/", vec![("host", "api.example.com"), ("host", "evil.example"), key]),
            ("https://evil.example/", vec![("host", "api.example.com"), key]),
            ("*", vec![("host", "api.example.com"), key]),
        ] {
            let mut request = request(uri, &headers);
            let refused = secrets().put_into(&mut request, "api.example.com", 443);
            assert_eq!(refused, Err(Refused::OtherHost), "{uri} {headers:?}");
            assert_eq!(request.headers()["x-key"], ONE);
        }
    }

    #[test]
    fn no_method_has_a_host_repeat_headers_or_open_a_tunnel() {
        for method in [Method::TRACE, Method::CONNECT] {
            let mut request = request("/", &[("host", "api.example.com"), ("x-key", ONE)]);
            *request.method_mut() = method;
            let refused = secrets().put_into(&mut request, "api.example.com", 443);
            assert_eq!(refused, Err(Refused::Method));
            assert_eq!(request.headers()["x-key"], ONE);
        }
    }

    /// A search for each placeholder of each secret takes minutes here.
    #[test]
    fn many_placeholders_in_a_header_cost_little() {
        let secret = |number: usize| Secret {
            placeholder: format!("aod_placeholder_{number:032}"),
            value: "v".to_owned(),
            hosts: vec!["api.example.com".to_owned()],
        };
        let secrets = Secrets::new((0..SECRETS_MAX).map(secret).collect()).unwrap();
        let many = secret(0).placeholder.repeat(1300);
        let mut request = request("/", &[("host", "api.example.com"), ("x", &many)]);
        let begun = Instant::now();
        assert_eq!(secrets.put_into(&mut request, "api.example.com", 443), Ok(()));
        assert_eq!(request.headers()["x"].len(), 1300);
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }

    #[test]
    fn what_concerns_the_sandboxs_connection_stays_there() {
        let request = sent(&[
            ("connection", "keep-alive, X-Hop, host"),
            ("x-hop", "1"),
            ("upgrade", "websocket"),
            ("transfer-encoding", "chunked"),
            ("x-end", "1"),
        ])
        .unwrap();
        let mut names: Vec<&str> = request.headers().keys().map(|name| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["host", "x-end"]);
    }

    #[test]
    fn headers_do_not_grow_without_bound() {
        let secret = Secret {
            placeholder: ONE.to_owned(),
            value: "x".repeat(16 * 1024),
            hosts: vec!["api.example.com".to_owned()],
        };
        let secrets = Secrets::new(vec![secret]).unwrap();
        for (number, refused) in [(3, Ok(())), (5, Err(Refused::TooLong))] {
            let (many, host) = (ONE.repeat(number), ("host", "api.example.com"));
            let mut one = request("/", &[host, ("x", &many)]);
            assert_eq!(secrets.put_into(&mut one, "api.example.com", 443), refused);
            let mut several = vec![host];
            several.extend(std::iter::repeat_n(("x", ONE), number));
            let mut several = request("/", &several);
            assert_eq!(secrets.put_into(&mut several, "api.example.com", 443), refused);
        }
    }

    #[test]
    fn wrong_secrets_are_refused() {
        let secret = |placeholder: &str, value: &str, host: &str| Secret {
            placeholder: placeholder.to_owned(),
            value: value.to_owned(),
            hosts: vec![host.to_owned()],
        };
        for bad in [
            secret("short", "v", "a.example"),
            secret("a placeholder with spaces", "v", "a.example"),
            secret(ONE, "", "a.example"),
            secret(ONE, "a\r\nInjected: b", "a.example"),
            secret(ONE, "v", "*"),
            secret(ONE, "v", "https://a.example"),
        ] {
            assert!(Secrets::new(vec![bad]).is_err());
        }
        let twice = ["a.example", "b.example"].map(|host| secret(ONE, "v", host));
        assert!(Secrets::new(twice.into()).is_err());
    }
}
