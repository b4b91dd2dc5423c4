//! Repositories over HTTP: git's own requests and those of Git LFS, for the repository that a token
//! belongs to and no other. Packs are streamed both ways.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    body::{Body, BodyDataStream},
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use contract::vault::RouteKind;
use futures::{StreamExt as _, stream};
use reqwest::Url;
use secrecy::ExposeSecret as _;
use tokio::time::timeout;
use types::repository::{HOST, RepositoryUrl};
use zeroize::Zeroizing;

use crate::{
    refusal::Refusal,
    routed::{self, Admitted, GrantedRoute, NotRouted, Routed},
    server::Connection,
};

/// The part of a fetch request that lists commits that the client has.
const FETCH_BYTES_MAX: u64 = 64 << 20;
/// A question of Git LFS. The answer is read whole, in the memory that bodies have.
const LFS_QUESTION_BYTES_MAX: u64 = 4 << 20;

/// A request of git for one repository.
#[derive(Clone, Debug, PartialEq, Eq)]
struct GitRequest<'a> {
    /// As routes have it.
    path: String,
    /// The repository at its host, as the client spells it.
    repository: &'a str,
    service: Service<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service<'a> {
    /// What begins each fetch and push, by its query.
    Refs(&'a str),
    Fetch,
    Push,
    /// Below `info/lfs`.
    Lfs(&'a str),
}

/// Reads `/git/github.com/{owner}/{name}/{service}`. None: it is no request that git sends.
fn read<'a>(method: &Method, path: &'a str, query: Option<&'a str>) -> Option<GitRequest<'a>> {
    let at_host = path.strip_prefix("/git/")?.strip_prefix(HOST)?.strip_prefix('/')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/".contains(c);
    let clean =
        at_host.chars().all(plain) && at_host.split('/').all(|part| part.chars().any(|c| c != '.'));
    let (owner, rest) = at_host.split_once('/').filter(|_| clean)?;
    let (name, service) = rest.split_once('/')?;
    let repository = at_host.get(..owner.len() + 1 + name.len())?;
    let url = format!("https://{HOST}/{repository}");
    let url = RepositoryUrl::parse(&url)?.to_string();
    let (get, post, query) =
        (method == Method::GET, method == Method::POST, query.unwrap_or_default());
    let service = match service {
        "info/refs"
            if get && matches!(query, "service=git-upload-pack" | "service=git-receive-pack") =>
        {
            Service::Refs(query)
        }
        "git-upload-pack" if post && query.is_empty() => Service::Fetch,
        "git-receive-pack" if post && query.is_empty() => Service::Push,
        service => {
            let lfs = service.strip_prefix("info/lfs/")?;
            let asks = matches!(lfs, "objects/batch" | "locks/verify" | "locks")
                || lfs.starts_with("locks/") && lfs.ends_with("/unlock");
            ((post && asks && query.is_empty()) || (get && lfs == "locks"))
                .then_some(Service::Lfs(lfs))?
        }
    };
    Some(GitRequest { path: format!("git/{}", url.strip_prefix("https://")?), repository, service })
}

impl GitRequest<'_> {
    /// Where it is sent: the repository is the route's, and nothing that the client wrote is below
    /// another.
    fn url(&self, base: &Url, query: Option<&str>) -> Url {
        let mut url = base.clone();
        let service = match self.service {
            Service::Refs(_) => "info/refs".to_owned(),
            Service::Fetch => "git-upload-pack".to_owned(),
            Service::Push => "git-receive-pack".to_owned(),
            Service::Lfs(lfs) => format!("info/lfs/{lfs}"),
        };
        url.set_path(&format!(
            "{}/{}/{service}",
            base.path().trim_end_matches('/'),
            self.repository
        ));
        url.set_query(match self.service {
            Service::Refs(query) => Some(query),
            _ => query.filter(|query| !query.is_empty()),
        });
        url
    }

    /// The repository itself, for one that the session has no token for: git's address of another
    /// repository may begin like the one that it was led here for.
    fn elsewhere(&self) -> Option<Response> {
        let Service::Refs(query) = self.service else { return None };
        let location =
            HeaderValue::from_str(&format!("https://{HOST}/{}/info/refs?{query}", self.repository))
                .ok()?;
        Some((StatusCode::FOUND, [(header::LOCATION, location)]).into_response())
    }
}

/// The token in what git sends as a password.
fn shown(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    if let Some(token) = value.strip_prefix("Bearer ") {
        return Some(token.trim().to_owned());
    }
    let pair = Zeroizing::new(BASE64.decode(value.strip_prefix("Basic ")?.trim()).ok()?);
    std::str::from_utf8(&pair).ok()?.split_once(':').map(|(_, token)| token.to_owned())
}

pub async fn handle(State(routed): State<Routed>, request: Request) -> Response {
    let answer = Box::pin(pass_on(routed, request)).await;
    routed::count("git", &answer);
    answer.unwrap_or_else(|refused| {
        let mut response = refused.response();
        if refused == NotRouted::NoToken {
            // Git sends no credential before it is asked for one.
            response.headers_mut().insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Basic realm=\"model gateway\""),
            );
        }
        response
    })
}

async fn pass_on(routed: Routed, request: Request) -> Result<Response, NotRouted> {
    let (parts, body) = request.into_parts();
    let mut admitted =
        routed.admit(shown(&parts.headers), parts.extensions.get::<Connection>()).await?;
    let asked =
        read(&parts.method, parts.uri.path(), parts.uri.query()).ok_or(NotRouted::NoRoute)?;
    let route = match routed.find(&mut admitted, RouteKind::Git, &asked.path).await {
        Err(NotRouted::NoRoute) => return asked.elsewhere().ok_or(NotRouted::NoRoute),
        found => found?,
    };
    let most = match asked.service {
        Service::Refs(_) => 0,
        Service::Fetch => FETCH_BYTES_MAX,
        Service::Push => routed.push_bytes_max,
        Service::Lfs(_) => LFS_QUESTION_BYTES_MAX,
    };
    let announced = parts
        .headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > most) {
        return Err(NotRouted::TooLarge);
    }
    let url = asked.url(&routed.github, parts.uri.query());
    let mut headers = routed::headers(&parts.headers, &route, &[])?;
    if let Some(bytes) = announced {
        headers.insert(header::CONTENT_LENGTH, bytes.into());
    }
    let (is_cut, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut request = routed.git.request(parts.method.clone(), url).headers(headers);
    if parts.method == Method::POST {
        request = request.body(bounded(body, most, routed.silence, is_cut.clone(), sent.clone()));
    }
    let answer = routed::answered(request.send(), &sent, routed.silence).await;
    let response = answer
        .ok_or(NotRouted::Upstream("the server did not answer in time"))?
        .map_err(|error| {
            if is_cut.load(Ordering::Relaxed) {
                NotRouted::TooLarge
            } else {
                routed::failure(&admitted.grant, &error)
            }
        })?;
    match response.status() {
        StatusCode::UNAUTHORIZED => Err(NotRouted::TokenOfRepository),
        status if status.is_redirection() && status != StatusCode::NOT_MODIFIED => {
            Err(NotRouted::Upstream(
                "the repository has moved, which is not followed; configure its new address",
            ))
        }
        _ if matches!(asked.service, Service::Lfs(_)) => {
            without_token(&routed, response, &route, admitted).await
        }
        _ => Ok(routed.pass_back(response, admitted)),
    }
}

/// A client's body as it comes, up to a size. Counts the pieces that were sent.
fn bounded(
    body: Body,
    most: u64,
    silence: Duration,
    is_cut: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
) -> reqwest::Body {
    let next = move |(mut chunks, left): (BodyDataStream, u64)| {
        let is_cut = is_cut.clone();
        sent.fetch_add(1, Ordering::Relaxed);
        async move {
            let chunk = match timeout(silence, chunks.next()).await {
                Ok(chunk) => chunk?.map_err(std::io::Error::other),
                Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
            };
            let (chunk, left) = match chunk {
                Ok(chunk) => match left.checked_sub(chunk.len() as u64) {
                    Some(left) => (Ok(chunk), left),
                    None => {
                        is_cut.store(true, Ordering::Relaxed);
                        (Err(std::io::Error::other("the request is too large")), 0)
                    }
                },
                Err(error) => (Err(error), 0),
            };
            Some((chunk, (chunks, left)))
        }
    };
    reqwest::Body::wrap_stream(stream::unfold((body.into_data_stream(), most), next))
}

/// An answer of Git LFS: where objects are, and with which headers. One that repeats the
/// repository's token is refused: some servers tell clients to use it for the objects.
async fn without_token(
    routed: &Routed,
    response: reqwest::Response,
    route: &GrantedRoute,
    admitted: Admitted,
) -> Result<Response, NotRouted> {
    let (status, headers) = (response.status(), crate::proxy::forwarded(response.headers(), true));
    let announced = response.content_length().and_then(|length| usize::try_from(length).ok());
    let body = Body::from_stream(response.bytes_stream());
    let held =
        routed.memory.read(body, announced, &admitted.grant.share.routed_bodies).await.map_err(
            |refusal| match refusal {
                Refusal::TooLarge => NotRouted::Upstream("the server's answer is too large"),
                Refusal::Busy => NotRouted::Busy,
                _ => NotRouted::Upstream("the server closed the connection"),
            },
        )?;
    if route.headers.iter().any(|(_, value)| repeats(&held.bytes, value.expose_secret())) {
        return Err(NotRouted::Upstream(
            "the Git LFS server repeats the repository's token, which may not enter the sandbox",
        ));
    }
    // Its memory and the session's slot are free once the client has it.
    let held = stream::unfold(
        (Some(held.bytes), held.memory, admitted),
        |(bytes, memory, admitted)| async move {
            Some((Ok::<_, Infallible>(bytes?), (None, memory, admitted)))
        },
    );
    let mut passed = Response::new(Body::from_stream(held));
    *passed.status_mut() = status;
    *passed.headers_mut() = headers;
    Ok(passed)
}

/// Whether a text holds a credential: as it is sent, or the token within.
fn repeats(text: &[u8], credential: &str) -> bool {
    let holds = |needle: &[u8]| {
        !needle.is_empty() && text.windows(needle.len()).any(|window| window == needle)
    };
    let encoded = credential.rsplit(' ').next().unwrap_or_default();
    let pair = Zeroizing::new(BASE64.decode(encoded).unwrap_or_default());
    let token = pair.splitn(2, |byte| *byte == b':').nth(1).unwrap_or_default();
    holds(encoded.as_bytes()) || holds(token)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_requests_of_git_are_forwarded() {
        let base = Url::parse("https://github.com").unwrap();
        let sent = |method: Method, path: &str, query: Option<&str>| {
            read(&method, path, query)
                .map(|asked| (asked.path.clone(), asked.url(&base, query).to_string()))
        };
        let passed =
            |to: &str| Some(("git/github.com/o/r".to_owned(), format!("https://github.com/{to}")));
        for (method, path, query, to) in [
            (
                Method::GET,
                "o/r/info/refs",
                Some("service=git-upload-pack"),
                "o/r/info/refs?service=git-upload-pack",
            ),
            (
                Method::GET,
                "o/r.git/info/refs",
                Some("service=git-receive-pack"),
                "o/r.git/info/refs?service=git-receive-pack",
            ),
            (Method::POST, "o/r/git-upload-pack", None, "o/r/git-upload-pack"),
            (Method::POST, "o/r.git/git-receive-pack", None, "o/r.git/git-receive-pack"),
            (
                Method::POST,
                "o/r.git/info/lfs/objects/batch",
                None,
                "o/r.git/info/lfs/objects/batch",
            ),
            (Method::GET, "o/r/info/lfs/locks", Some("path=a"), "o/r/info/lfs/locks?path=a"),
            (Method::POST, "o/r/info/lfs/locks/5/unlock", None, "o/r/info/lfs/locks/5/unlock"),
        ] {
            assert_eq!(
                sent(method, &format!("/git/github.com/{path}"), query),
                passed(to),
                "{path}"
            );
        }
        let upload = Some("service=git-upload-pack");
        for (method, path, query) in [
            (Method::GET, "/git/github.com/o/r/../s/info/refs", upload),
            (Method::GET, "/git/github.com/o/../r/info/refs", upload),
            (Method::GET, "/git/github.com/o/r%2f..%2fs/info/refs", upload),
            (Method::GET, "/git/github.com/o/r//info/refs", upload),
            (Method::GET, "/git/github.com/o/./info/refs", upload),
            (Method::GET, "/git/github.com/o/..git/info/refs", None),
            (Method::GET, "/git/github.com/o/r/info/refs", None),
            (Method::GET, "/git/github.com/o/r/info/refs", Some("service=git-upload-pack&x=1")),
            (Method::POST, "/git/github.com/o/r/info/refs", upload),
            (Method::GET, "/git/github.com/o/r/git-upload-pack", None),
            (Method::POST, "/git/github.com/o/r/git-upload-archive", None),
            (Method::GET, "/git/github.com/o/r/HEAD", None),
            (Method::GET, "/git/github.com/o/r/settings", None),
            (Method::GET, "/git/github.com.evil.example/o/r/info/refs", upload),
            (Method::GET, "/git/evil.example/o/r/info/refs", upload),
            (Method::GET, "/git/github.com/u:p@x/r/info/refs", upload),
            (Method::POST, "/git/github.com/o/r/info/lfs/locks/../../../s/unlock", None),
        ] {
            assert_eq!(sent(method, path, query), None, "{path} {query:?}");
        }
    }

    #[test]
    fn a_repository_without_a_token_is_where_it_is() {
        let asked = read(
            &Method::GET,
            "/git/github.com/o/r-two/info/refs",
            Some("service=git-upload-pack"),
        )
        .unwrap();
        let response = asked.elsewhere().unwrap();
        assert_eq!(
            response.headers()["location"],
            "https://github.com/o/r-two/info/refs?service=git-upload-pack"
        );
        let push = read(&Method::POST, "/git/github.com/o/r-two/git-receive-pack", None).unwrap();
        assert!(push.elsewhere().is_none());
    }

    #[test]
    fn a_token_is_read_from_gits_authorization_header() {
        let of = |value: &str| {
            shown(&HeaderMap::from_iter([(
                header::AUTHORIZATION,
                HeaderValue::from_str(value).unwrap(),
            )]))
        };
        assert_eq!(of(&format!("Basic {}", BASE64.encode("session:a:b"))).as_deref(), Some("a:b"));
        assert_eq!(of("Bearer t").as_deref(), Some("t"));
        assert_eq!(of("Basic !"), None);
        assert_eq!(shown(&HeaderMap::new()), None);
    }

    #[test]
    fn an_answer_that_repeats_a_token_is_known() {
        let credential = format!("Basic {}", BASE64.encode("x-access-token:SENTINEL"));
        assert!(repeats(
            format!(r#"{{"header":{{"Authorization":"{credential}"}}}}"#).as_bytes(),
            &credential
        ));
        assert!(repeats(b"https://x:SENTINEL@github.com/", &credential));
        assert!(!repeats(br#"{"objects":[]}"#, &credential));
    }

    proptest! {
        #[test]
        fn no_path_leaves_its_repository(path in "/git/github.com/(o/r|o/r.git|\\.\\.|[a-z%.]{1,4})(/[a-z%.]{0,12}){1,4}") {
            for (method, query) in [(Method::GET, Some("service=git-upload-pack")), (Method::POST, None)] {
                if let Some(asked) = read(&method, &path, query) {
                    let url = asked.url(&Url::parse("https://github.com/").unwrap(), query);
                    let base = format!("/{}/", asked.repository);
                    prop_assert!(url.path().starts_with(&base) && url.host_str() == Some("github.com"), "{url}");
                    let without_suffix = asked.repository.strip_suffix(".git").unwrap_or(asked.repository);
                    prop_assert_eq!(asked.path, format!("git/github.com/{without_suffix}"));
                }
            }
        }
    }
}
