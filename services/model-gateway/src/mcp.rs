//! MCP servers over HTTP: forwards a request to the configured URL and no other, with the
//! configured headers.

use axum::{
    extract::{Request, State},
    http::{HeaderName, Method, StatusCode, header},
    response::Response,
};
use bytes::Bytes;
use contract::vault::RouteKind;
use reqwest::Url;
use types::route::SESSION_HEADER;

use crate::{
    oauth::{self, Refreshed},
    refusal::Refusal,
    routed::{self, Admitted, GrantedRoute, NotRouted, Routed},
    server::Connection,
};

/// How often a server may redirect within its own origin.
const REDIRECTS_MAX: usize = 3;
/// What a client may show to the server, where its configuration refers to variables of the
/// sandbox.
const KEPT: [HeaderName; 2] = [header::AUTHORIZATION, HeaderName::from_static("x-api-key")];

pub async fn handle(State(routed): State<Routed>, request: Request) -> Response {
    let answer = Box::pin(pass_on(routed, request)).await;
    routed::count("mcp", &answer);
    answer.unwrap_or_else(|refused| refused.response())
}

async fn pass_on(routed: Routed, request: Request) -> Result<Response, NotRouted> {
    let (parts, body) = request.into_parts();
    if ![Method::GET, Method::POST, Method::DELETE].contains(&parts.method) {
        return Err(NotRouted::Method);
    }
    let token =
        parts.headers.get(SESSION_HEADER).and_then(|token| token.to_str().ok()).map(str::to_owned);
    let mut admitted = routed.admit(token, parts.extensions.get::<Connection>()).await?;
    let path = parts.uri.path().trim_start_matches('/').to_owned();
    let route = routed.find(&mut admitted, RouteKind::Mcp, &path).await?;
    let announced = parts
        .headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse().ok());
    let held =
        routed.memory.read(body, announced, &admitted.grant.share.routed_bodies).await.map_err(
            |refusal| match refusal {
                Refusal::TooLarge => NotRouted::TooLarge,
                Refusal::Busy => NotRouted::Busy,
                _ => NotRouted::Body,
            },
        )?;
    let asked = Asked { method: parts.method, headers: parts.headers, body: held.bytes };
    let mut route = route;
    // One request asks a token endpoint once.
    let mut refreshed = None;
    if route.refreshable.as_ref().is_some_and(oauth::is_due) {
        refreshed = Some(refresh(&routed, &mut admitted, &route).await);
        route = routed.find(&mut admitted, RouteKind::Mcp, &path).await?;
    }
    let mut response = asked.send(&routed, &admitted, &route).await?;
    // A secret that was replaced since it was redeemed: once more, where there is another.
    if response.status() == StatusCode::UNAUTHORIZED && routed.renew(&mut admitted).await {
        let renewed = routed.find(&mut admitted, RouteKind::Mcp, &path).await?;
        if !renewed.has_headers_of(&route) {
            response = asked.send(&routed, &admitted, &renewed).await?;
            (route, refreshed) = (renewed, None);
        }
    }
    // An access token that ended before its time, or whose time is not known.
    if response.status() == StatusCode::UNAUTHORIZED && route.refreshable.is_some() {
        let outcome = match refreshed {
            Some(outcome) => outcome,
            None => refresh(&routed, &mut admitted, &route).await,
        };
        match outcome {
            Refreshed::Renewed if refreshed.is_none() => {
                let renewed = routed.find(&mut admitted, RouteKind::Mcp, &path).await?;
                response = asked.send(&routed, &admitted, &renewed).await?;
            }
            // The client reports that it has to authenticate.
            Refreshed::Renewed | Refreshed::Refused => {}
            Refreshed::Failed => {
                return Err(NotRouted::Upstream(
                    "the server refuses the access token, and it cannot be refreshed at the moment; try again",
                ));
            }
        }
    }
    drop(held.memory);
    Ok(routed.pass_back(response, admitted))
}

async fn refresh(routed: &Routed, admitted: &mut Admitted, route: &GrantedRoute) -> Refreshed {
    let Some(refreshable) = &route.refreshable else { return Refreshed::Refused };
    let refreshed = routed.oauth.refresh(&admitted.shown, refreshable).await;
    if refreshed == Refreshed::Renewed && !routed.renew_changed(admitted).await {
        return Refreshed::Failed;
    }
    refreshed
}

/// A request, as often as it has to be sent.
struct Asked {
    method: Method,
    headers: axum::http::HeaderMap,
    body: Bytes,
}

impl Asked {
    async fn send(
        &self,
        routed: &Routed,
        admitted: &Admitted,
        route: &GrantedRoute,
    ) -> Result<reqwest::Response, NotRouted> {
        let mut url =
            Url::parse(&route.url).map_err(|_| NotRouted::Upstream("the server's URL is none"))?;
        let headers = routed::headers(&self.headers, route, &KEPT)?;
        for _ in 0..=REDIRECTS_MAX {
            if !routed.egress.allows(&url) {
                return Err(NotRouted::Private);
            }
            let request = routed
                .mcp
                .request(self.method.clone(), url.clone())
                .headers(headers.clone())
                .body(self.body.clone());
            let response =
                request.send().await.map_err(|error| routed::failure(&admitted.grant, &error))?;
            match redirected(
                &url,
                &self.method,
                response.status(),
                response.headers().get(header::LOCATION).map(|to| to.as_bytes()),
            ) {
                None => return Ok(response),
                Some(target) => url = target?,
            }
        }
        Err(NotRouted::Upstream("the server redirects too often"))
    }
}

/// Where a response leads, if it leads anywhere. A client must not follow it itself: it would show
/// the session's token there.
fn redirected(
    from: &Url,
    method: &Method,
    status: StatusCode,
    location: Option<&[u8]>,
) -> Option<Result<Url, NotRouted>> {
    let keeps_request = matches!(status.as_u16(), 307 | 308) || *method == Method::GET;
    if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return None;
    }
    let target = location.and_then(|to| from.join(std::str::from_utf8(to).ok()?).ok());
    Some(match target {
        Some(target)
            if keeps_request
                && target.origin() == from.origin()
                && target.username() == from.username() =>
        {
            Ok(target)
        }
        _ => Err(NotRouted::Upstream(
            "the server redirects to another address, which is not followed; configure that address",
        )),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn target(status: u16, method: &Method, location: &str) -> Option<Result<String, NotRouted>> {
        let from = Url::parse("https://mcp.example/mcp").unwrap();
        let status = StatusCode::from_u16(status).unwrap();
        redirected(&from, method, status, Some(location.as_bytes()))
            .map(|target| target.map(String::from))
    }

    #[test]
    fn a_redirect_is_followed_within_its_origin_alone() {
        for location in ["/mcp/", "https://mcp.example/mcp/", "https://mcp.example:443/mcp/"] {
            assert_eq!(
                target(307, &Method::POST, location),
                Some(Ok("https://mcp.example/mcp/".to_owned())),
                "{location}"
            );
        }
        for location in [
            "https://evil.example/mcp",
            "http://mcp.example/mcp/",
            "https://mcp.example:8443/mcp",
            "//evil.example/",
            "https://u@mcp.example/",
            "",
        ] {
            let followed = target(308, &Method::POST, location);
            let is_itself =
                location.is_empty() && followed == Some(Ok("https://mcp.example/mcp".to_owned()));
            assert!(
                is_itself || matches!(followed, Some(Err(NotRouted::Upstream(_)))),
                "{location}: {followed:?}"
            );
        }
        // A message would become a request without one.
        assert!(matches!(target(302, &Method::POST, "/mcp/"), Some(Err(_))));
        assert!(matches!(target(302, &Method::GET, "/mcp/"), Some(Ok(_))));
        assert_eq!(target(200, &Method::POST, "/x"), None);
        assert_eq!(target(304, &Method::GET, "/x"), None);
    }

    proptest! {
        #[test]
        fn no_location_leaves_the_origin(location in "(https?:)?/{0,3}[a-z0-9.@:%\\\\/#?]{0,30}") {
            if let Some(Ok(target)) = target(307, &Method::POST, &location) {
                prop_assert!(target.starts_with("https://mcp.example/"), "{target}");
            }
        }
    }
}
