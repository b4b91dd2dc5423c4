//! What requests to MCP servers and to repositories share: finding the session, the destination and
//! the secrets to add.

use std::{
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use contract::vault::{Refreshable, RouteKind};
use futures::{FutureExt as _, Stream, StreamExt as _, stream};
use reqwest::Url;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use crate::{
    body::Memory,
    call::{Scheme, Shown},
    egress::Egress,
    oauth::Refresher,
    proxy,
    server::Connection,
    tokens::{Grant, TokenRefused, Tokens},
};

/// What every such request works with. Cheap to clone.
#[derive(Clone)]
pub struct Routed {
    pub tokens: Tokens,
    pub oauth: Refresher,
    /// Apart from what model requests have.
    pub memory: Memory,
    pub egress: Egress,
    /// Connects to what [`Egress`] allows.
    pub mcp: reqwest::Client,
    /// Connects to what the operator configured. Waits for ever: see [`answered`].
    pub git: reqwest::Client,
    pub github: Arc<Url>,
    pub push_bytes_max: u64,
    pub silence: Duration,
}

/// A session's way to a server or a repository. Cannot be printed; wiped when dropped.
pub struct GrantedRoute {
    pub kind: RouteKind,
    pub path: String,
    pub url: String,
    pub is_refused: bool,
    pub headers: Vec<(String, SecretString)>,
    /// Of the bearer token among the headers.
    pub refreshable: Option<Refreshable>,
}

impl GrantedRoute {
    pub fn has_headers_of(&self, other: &Self) -> bool {
        let pairs = |route: &Self| {
            route
                .headers
                .iter()
                .map(|(name, value)| (name.clone(), value.expose_secret().to_owned()))
                .collect()
        };
        let (own, others): (Vec<_>, Vec<_>) = (pairs(self), pairs(other));
        own == others
    }
}

/// Why a request is not passed on.
#[derive(Debug, PartialEq, Eq)]
pub enum NotRouted {
    NoToken,
    Token,
    Unavailable,
    Busy,
    NoRoute,
    /// By the session's network policy.
    Policy,
    /// A private address that the operator has not named.
    Private,
    Method,
    TooLarge,
    Body,
    /// The server's own answer, which the client must not see or follow.
    Upstream(&'static str),
    /// A repository whose token is refused.
    TokenOfRepository,
}

impl NotRouted {
    fn status(&self) -> StatusCode {
        match self {
            Self::NoToken => StatusCode::UNAUTHORIZED,
            // Git forgets a credential after 401.
            Self::Token | Self::Policy | Self::Private | Self::TokenOfRepository => {
                StatusCode::FORBIDDEN
            }
            Self::NoRoute => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Body => StatusCode::BAD_REQUEST,
            Self::Busy => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Upstream(_) => StatusCode::BAD_GATEWAY,
        }
    }

    fn message(&self) -> &'static str {
        match self {
            Self::NoToken => "the session's token is missing",
            Self::Token => "the session's token is not known, has expired or was revoked",
            Self::Unavailable => "the secret cannot be read at the moment; try again",
            Self::Busy => "too many requests at a time; try again",
            Self::NoRoute => "the session has no such server or repository",
            Self::Policy => {
                "refused by the network policy of the session's environment; allowed_hosts names what may be reached"
            }
            Self::Private => {
                "a private address; AOD_MODEL_GATEWAY_PRIVATE_HOSTS names those that may be reached"
            }
            Self::Method => "the method is not supported",
            Self::TooLarge => "the request is too large",
            Self::Body => "the request's body did not arrive",
            Self::Upstream(why) => why,
            Self::TokenOfRepository => {
                "there is no such repository, or its authorization_token is refused"
            }
        }
    }

    pub fn response(&self) -> Response {
        // Git shows plain text to its user.
        let mut response =
            (self.status(), format!("model gateway: {}\n", self.message())).into_response();
        if matches!(self, Self::Unavailable | Self::Busy) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// A request that may be passed on.
pub struct Admitted {
    pub shown: Shown,
    pub grant: Arc<Grant>,
    pub slot: OwnedSemaphorePermit,
}

impl Routed {
    /// Finds out whose request it is, and takes one of the session's slots.
    pub async fn admit(
        &self,
        token: Option<String>,
        connection: Option<&Connection>,
    ) -> Result<Admitted, NotRouted> {
        let shown = Shown {
            token: token.filter(|token| !token.is_empty()).ok_or(NotRouted::NoToken)?,
            scheme: Scheme::Bearer,
        };
        let grant = self.tokens.redeem(&shown).await.map_err(|refused| match refused {
            TokenRefused::Unknown => NotRouted::Token,
            TokenRefused::Unavailable => NotRouted::Unavailable,
        })?;
        if let Some(connection) = connection {
            connection.belongs_to(&grant.share);
        }
        let slot = grant.share.routed.clone().try_acquire_owned().map_err(|_| NotRouted::Busy)?;
        Ok(Admitted { shown, grant, slot })
    }

    /// Looks for a route. The session may have got it since its token was redeemed.
    pub async fn find(
        &self,
        admitted: &mut Admitted,
        kind: RouteKind,
        path: &str,
    ) -> Result<Arc<GrantedRoute>, NotRouted> {
        let mut route = admitted.grant.route(kind, path);
        if route.is_none() && self.renew(admitted).await {
            route = admitted.grant.route(kind, path);
        }
        let route = route.ok_or(NotRouted::NoRoute)?;
        if route.is_refused { Err(NotRouted::Policy) } else { Ok(route) }
    }

    /// Asks the vault again. False: it does not answer, or the token is not good any more.
    pub async fn renew(&self, admitted: &mut Admitted) -> bool {
        let renewed = self.tokens.renew(&admitted.shown).await;
        renewed.map(|grant| admitted.grant = grant).is_some()
    }

    /// The same, at once: what the token stands for was just changed.
    pub async fn renew_changed(&self, admitted: &mut Admitted) -> bool {
        let renewed = self.tokens.renew_changed(&admitted.shown).await;
        renewed.map(|grant| admitted.grant = grant).is_some()
    }
}

/// A client's headers without those that are the gateway's, and with the route's own.
pub fn headers(
    client: &HeaderMap,
    route: &GrantedRoute,
    kept: &[HeaderName],
) -> Result<HeaderMap, NotRouted> {
    let mut headers = proxy::forwarded(client, false);
    headers.remove(types::route::SESSION_HEADER);
    for name in kept {
        if let Some(value) = client.get(name) {
            headers.insert(name, value.clone());
        }
    }
    for (name, value) in route.headers.iter().filter(|(name, _)| !proxy::is_own(name)) {
        let malformed = || {
            NotRouted::Upstream(
                "a configured header has a name or a value that HTTP does not allow",
            )
        };
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| malformed())?;
        let mut value = HeaderValue::from_str(value.expose_secret()).map_err(|_| malformed())?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(headers)
}

pub fn failure(grant: &Grant, error: &reqwest::Error) -> NotRouted {
    let why = if error.is_connect() {
        "the server cannot be reached"
    } else if error.is_timeout() {
        "the server did not answer in time"
    } else {
        "the server closed the connection"
    };
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    tracing::info!(session = grant.session_id, why, cause, "a server of a session failed");
    NotRouted::Upstream(why)
}

/// Waits for the response to a request while its body is being sent. Returns `None` if nothing
/// moved for too long.
pub async fn answered<T>(
    answer: impl Future<Output = T>,
    sent: &AtomicU64,
    silence: Duration,
) -> Option<T> {
    let (mut answer, mut known) = (pin!(answer), sent.load(Ordering::Relaxed));
    loop {
        if let Ok(answer) = timeout(silence, &mut answer).await {
            return Some(answer);
        }
        let now = sent.load(Ordering::Relaxed);
        if std::mem::replace(&mut known, now) == now {
            return None;
        }
    }
}

impl Routed {
    /// The response as it comes. The session's slot is free when it has ended, or when its client
    /// has gone. It is cut off when the session's token is revoked: what streams may do so for
    /// ever.
    pub fn pass_back(&self, response: reqwest::Response, admitted: Admitted) -> Response {
        let (status, headers) = (response.status(), proxy::forwarded(response.headers(), true));
        let Admitted { shown, slot, .. } = admitted;
        let tokens = self.tokens.clone();
        let revoked = async move { tokens.revoked(&shown).await };
        let body = response
            .bytes_stream()
            .map(|chunk| chunk.map_err(|error| io::Error::other(error.without_url())));
        let body = cut_off(body, revoked, self.silence).map(move |chunk| {
            let _held = &slot;
            chunk
        });
        let mut passed = Response::new(Body::from_stream(body));
        *passed.status_mut() = status;
        *passed.headers_mut() = headers;
        passed
    }
}

/// What comes, until nothing came for too long or `end` is there.
fn cut_off(
    chunks: impl Stream<Item = io::Result<Bytes>> + Send,
    end: impl Future<Output = ()> + Send,
    silence: Duration,
) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(
        (Box::pin(chunks), Box::pin(end.fuse())),
        move |(mut chunks, mut end)| async move {
            let chunk = tokio::select! {
                biased;
                () = &mut end => Err(io::Error::other("the session's token was revoked")),
                chunk = timeout(silence, chunks.next()) => chunk.unwrap_or_else(|_| Some(Err(io::ErrorKind::TimedOut.into())))?,
            };
            Some((chunk, (chunks, end)))
        },
    )
}

/// Counts how a request ended.
pub fn count(kind: &'static str, answer: &Result<Response, NotRouted>) {
    let outcome = match answer {
        Ok(response) => response.status().as_str().to_owned(),
        Err(NotRouted::Upstream(_)) => "failed".to_owned(),
        Err(_) => "refused".to_owned(),
    };
    metrics::counter!("aod_model_routed_requests_total", "kind" => kind, "outcome" => outcome)
        .increment(1);
}

#[cfg(test)]
mod tests {
    use futures::future;

    use super::*;

    const SILENCE: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_request_may_take_as_long_as_it_makes_progress() {
        let sent = AtomicU64::new(0);
        let slow = async {
            for _ in 0..20 {
                tokio::time::sleep(SILENCE * 9 / 10).await;
                sent.fetch_add(1, Ordering::Relaxed);
            }
        };
        assert_eq!(answered(slow, &sent, SILENCE).await, Some(()));
        let stands_still =
            tokio::time::timeout(SILENCE * 3, answered(future::pending::<()>(), &sent, SILENCE));
        assert_eq!(stands_still.await, Ok(None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_ends_with_its_sessions_token_or_when_nothing_comes() {
        let ticking = || {
            stream::unfold((), |()| async {
                Some((Ok(Bytes::from_static(b"x")), tokio::time::sleep(SILENCE / 2).await))
            })
        };
        let chunks = cut_off(ticking(), tokio::time::sleep(SILENCE * 20), SILENCE)
            .take_while(|chunk| future::ready(chunk.is_ok()));
        assert!((39..=41).contains(&chunks.count().await));
        let silent = stream::once(future::ready(Ok(Bytes::new()))).chain(stream::pending());
        let chunks: Vec<_> = cut_off(silent, future::pending(), SILENCE).take(2).collect().await;
        assert!(
            chunks[0].is_ok()
                && chunks[1].as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
        );
        let whole: Vec<_> =
            cut_off(stream::iter([Ok(Bytes::from_static(b"x"))]), future::pending(), SILENCE)
                .collect()
                .await;
        assert_eq!(whole.len(), 1);
    }
}
