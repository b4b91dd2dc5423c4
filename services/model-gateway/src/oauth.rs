//! Access tokens of MCP servers that expire: asks their token endpoint for new ones (RFC 6749,
//! section 6), one refresh at a time for each credential. The vault grants the right to it, and
//! stores what it brings before anyone uses it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bus::{Bus, RpcError, vault::AcceptedKeys};
use contract::{
    rpc,
    vault::{ClaimRefreshRequest, FinishRefreshRequest, RefreshState, Refreshable},
};
use reqwest::{StatusCode, Url, header};
use sealing::KeyPair;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio_util::task::TaskTracker;
use types::vault::{ClientAuthKind, DOCUMENT_KIND, Refresh};
use url::form_urlencoded;
use uuid::Uuid;
use zeroize::{Zeroize as _, Zeroizing};

use crate::{call::Shown, egress::Egress};

const DEADLINE: Duration = Duration::from_secs(10);
/// How long a token endpoint may take.
const ANSWER_MAX: Duration = Duration::from_secs(15);
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// How long a request waits for a refresh that another does.
const BUSY_MAX: Duration = Duration::from_secs(25);
/// How often the vault is told what a refresh brought, while it does not answer.
const STORE_ATTEMPTS: u32 = 4;
/// Errors with which an endpoint that answers 400 or 401 may be asked again.
const PASSING_ERRORS: [&str; 3] = ["temporarily_unavailable", "server_error", "slow_down"];
/// Errors that are final also where the status, against RFC 6749, is another; the last two are of
/// GitHub and Slack.
const REFUSALS: [&str; 8] = [
    "invalid_grant",
    "invalid_client",
    "invalid_request",
    "invalid_scope",
    "unauthorized_client",
    "unsupported_grant_type",
    "bad_refresh_token",
    "invalid_refresh_token",
];
/// A token is refreshed so long before it expires.
const EARLY_SECONDS: i64 = 30;

/// What came of a refresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refreshed {
    /// The vault has another access token.
    Renewed,
    /// The refresh token is not good, or there is none.
    Refused,
    /// The token endpoint or the vault does not answer.
    Failed,
}

/// Refreshes access tokens. Cheap to clone.
#[derive(Clone)]
pub struct Refresher {
    pub bus: Bus,
    pub vault_keys: AcceptedKeys,
    /// Connects to what [`Egress`] allows.
    pub http: reqwest::Client,
    pub egress: Egress,
    pub tasks: TaskTracker,
}

/// Whether a token has expired, or is about to.
pub fn is_due(token: &Refreshable) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    token.expires_at.is_some_and(|at| at.saturating_sub(EARLY_SECONDS) <= now)
}

impl Refresher {
    /// Has an access token replaced, by this process or another.
    pub async fn refresh(&self, shown: &Shown, token: &Refreshable) -> Refreshed {
        let hash = Sha256::digest(shown.token.as_bytes()).to_vec();
        let (refresher, token) = (self.clone(), token.clone());
        // A client that goes must not lose the refresh token that replaced the one that was used.
        let task = self.tasks.spawn(async move { refresher.claim(hash, token).await });
        match task.await {
            Ok(Ok(refreshed)) => refreshed,
            Ok(Err(error)) => {
                tracing::warn!(%error, "failed to refresh an access token");
                Refreshed::Failed
            }
            Err(_) => Refreshed::Failed,
        }
    }

    async fn claim(&self, session: Vec<u8>, token: Refreshable) -> Result<Refreshed, RpcError> {
        let begun = Instant::now();
        let claim = Uuid::new_v4();
        loop {
            let key = KeyPair::generate().map_err(RpcError::internal)?;
            let request = ClaimRefreshRequest {
                session_token_hash: session.clone(),
                secret_id: token.secret_id.clone(),
                token_hash: token.token_hash.clone(),
                claim_id: claim.to_string(),
                public_key: key.public().to_vec(),
            };
            let reply = self.bus.call::<rpc::ClaimRefresh>(&request, DEADLINE).await?;
            match reply.state() {
                RefreshState::Current => return Ok(Refreshed::Renewed),
                RefreshState::Refused => return Ok(Refreshed::Refused),
                RefreshState::Granted => {
                    let plaintext =
                        key.open(&reply.sealed, &session).map_err(RpcError::internal)?;
                    let refresh: Refresh =
                        serde_json::from_slice(&plaintext).map_err(RpcError::internal)?;
                    let finish = FinishRefreshRequest {
                        secret_id: token.secret_id,
                        claim_id: claim.to_string(),
                        ..FinishRefreshRequest::default()
                    };
                    return self.exchange(&refresh, &reply.user_id, finish).await;
                }
                _ if begun.elapsed() > BUSY_MAX => return Ok(Refreshed::Failed),
                _ => {
                    let [jitter, ..] = *Uuid::new_v4().as_bytes();
                    tokio::time::sleep(Duration::from_millis(100 + u64::from(jitter))).await;
                }
            }
        }
    }

    /// Asks the token endpoint, and tells the vault what it answered.
    async fn exchange(
        &self,
        refresh: &Refresh,
        user: &str,
        mut finish: FinishRefreshRequest,
    ) -> Result<Refreshed, RpcError> {
        let answered = self.ask(refresh).await;
        let refreshed = match &answered {
            Ok(_) => Refreshed::Renewed,
            Err(NotRefreshed::Refused(status)) => {
                tracing::info!(%status, "a token endpoint refused a refresh token");
                finish.is_refused = true;
                Refreshed::Refused
            }
            Err(NotRefreshed::Failed(why)) => {
                tracing::warn!(why, "a token endpoint did not refresh an access token");
                Refreshed::Failed
            }
        };
        let outcome = match refreshed {
            Refreshed::Renewed => "renewed",
            Refreshed::Refused => "refused",
            Refreshed::Failed => "failed",
        };
        metrics::counter!("aod_oauth_refreshes_total", "outcome" => outcome).increment(1);
        for attempt in 1.. {
            let told = self.tell(answered.as_ref().ok(), user, &mut finish).await;
            match told {
                Ok(()) => break,
                Err(error) if attempt == STORE_ATTEMPTS => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(200 << attempt)).await,
            }
        }
        Ok(refreshed)
    }

    async fn tell(
        &self,
        answer: Option<&Answer>,
        user: &str,
        finish: &mut FinishRefreshRequest,
    ) -> Result<(), RpcError> {
        if let Some(answer) = answer {
            let change = Zeroizing::new(answer.change().to_string());
            let sealed = self.bus.seal_for_vault(
                &self.vault_keys,
                user,
                DOCUMENT_KIND,
                change.as_bytes(),
                DEADLINE,
            );
            finish.sealed = Some(sealed.await?);
        }
        self.bus.call::<rpc::FinishRefresh>(finish, DEADLINE).await?;
        Ok(())
    }

    async fn ask(&self, refresh: &Refresh) -> Result<Answer, NotRefreshed> {
        let failed = |why: &'static str| NotRefreshed::Failed(why);
        let url = Url::parse(&refresh.token_endpoint).map_err(|_| failed("its URL is none"))?;
        if !self.egress.allows(&url) {
            return Err(failed("its address is private"));
        }
        let mut request = self
            .http
            .post(url)
            .timeout(ANSWER_MAX)
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header(header::ACCEPT, "application/json");
        if let Some(basic) = basic(refresh) {
            request = request.header(header::AUTHORIZATION, basic);
        }
        let mut response =
            request.body(form(refresh)).send().await.map_err(|_| failed("it does not answer"))?;
        let mut body = Zeroizing::new(Vec::new());
        while let Some(chunk) =
            response.chunk().await.map_err(|_| failed("its answer breaks off"))?
        {
            if body.len() + chunk.len() > ANSWER_BYTES_MAX {
                return Err(failed("its answer is too large"));
            }
            body.extend_from_slice(&chunk);
        }
        read_answer(response.status(), &body)
    }
}

/// What an endpoint answered. The vault remembers a refusal, so what may pass, or is perhaps a
/// proxy's answer, is none.
fn read_answer(status: StatusCode, body: &[u8]) -> Result<Answer, NotRefreshed> {
    if status.is_success()
        && let Ok(answer) = serde_json::from_slice::<Answer>(body)
    {
        let is_header = answer.access_token.bytes().all(|byte| (b'!'..=b'~').contains(&byte));
        return match is_header && !answer.access_token.is_empty() {
            true => Ok(answer),
            false => Err(NotRefreshed::Failed("its access token cannot be sent")),
        };
    }
    let error = serde_json::from_slice::<ErrorAnswer>(body).unwrap_or_default().error;
    let is_refusal = match status {
        StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED => {
            !PASSING_ERRORS.contains(&error.as_str())
        }
        StatusCode::OK | StatusCode::FORBIDDEN => REFUSALS.contains(&error.as_str()),
        _ => false,
    };
    Err(match is_refusal {
        true => NotRefreshed::Refused(status),
        false if status.is_success() => NotRefreshed::Failed("its answer has no access token"),
        false => NotRefreshed::Failed("it answers with an error"),
    })
}

enum NotRefreshed {
    Refused(StatusCode),
    Failed(&'static str),
}

/// RFC 6749, section 5.2.
#[derive(Default, Deserialize)]
struct ErrorAnswer {
    error: String,
}

#[derive(Deserialize)]
struct Answer {
    access_token: String,
    /// A number of seconds; some endpoints send text or a fraction.
    #[serde(default)]
    expires_in: Value,
    /// The one that was used is not good any more.
    #[serde(default)]
    refresh_token: Option<String>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.access_token.zeroize();
        self.refresh_token.zeroize();
    }
}

impl Answer {
    /// What changes of the credential's document.
    fn change(&self) -> Value {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        let seconds = self.expires_in.to_string();
        let seconds =
            seconds.trim_matches('"').split('.').next().and_then(|text| text.parse().ok());
        // One that is over at once would be refreshed for each request.
        let expires_at =
            seconds.filter(|seconds: &i64| *seconds > 0).map(|seconds| now.saturating_add(seconds));
        let mut oauth = json!({ "expires_at": expires_at });
        if let Some(token) = self.refresh_token.as_ref().filter(|token| !token.is_empty()) {
            oauth["refresh"] = json!({ "refresh_token": token });
        }
        json!({ "value": self.access_token, "oauth": oauth })
    }
}

fn form(refresh: &Refresh) -> String {
    let auth = &refresh.token_endpoint_auth;
    let mut form = form_urlencoded::Serializer::new(String::new());
    form.append_pair("grant_type", "refresh_token")
        .append_pair("refresh_token", &refresh.refresh_token);
    if auth.r#type != ClientAuthKind::ClientSecretBasic {
        form.append_pair("client_id", &refresh.client_id);
    }
    if auth.r#type == ClientAuthKind::ClientSecretPost {
        form.append_pair("client_secret", auth.client_secret.as_deref().unwrap_or_default());
    }
    for (name, value) in [("scope", &refresh.scope), ("resource", &refresh.resource)] {
        if let Some(value) = value {
            form.append_pair(name, value);
        }
    }
    form.finish()
}

/// RFC 6749, section 2.3.1: both parts are encoded as in a form.
fn basic(refresh: &Refresh) -> Option<String> {
    let auth = &refresh.token_endpoint_auth;
    let encoded = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
    (auth.r#type == ClientAuthKind::ClientSecretBasic).then(|| {
        let secret = auth.client_secret.as_deref().unwrap_or_default();
        let pair = Zeroizing::new(format!("{}:{}", encoded(&refresh.client_id), encoded(secret)));
        format!("Basic {}", STANDARD.encode(pair.as_bytes()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(status: u16, body: &str) -> Result<Value, &'static str> {
        match read_answer(StatusCode::from_u16(status).unwrap(), body.as_bytes()) {
            Ok(answer) => Ok(answer.change()),
            Err(NotRefreshed::Refused(_)) => Err("refused"),
            Err(NotRefreshed::Failed(_)) => Err("failed"),
        }
    }

    #[test]
    fn a_grant_is_given_up_only_for_what_its_endpoint_says_of_it() {
        for (status, body, outcome) in [
            (400, r#"{"error":"invalid_grant"}"#, "refused"),
            (401, r#"{"error":"invalid_client"}"#, "refused"),
            (401, "", "refused"),
            (403, r#"{"error":"invalid_grant"}"#, "refused"),
            (200, r#"{"error":"bad_refresh_token","error_description":"x"}"#, "refused"),
            (200, r#"{"ok":false,"error":"invalid_refresh_token"}"#, "refused"),
            (400, r#"{"error":"temporarily_unavailable"}"#, "failed"),
            (403, "<html>Are you a robot?</html>", "failed"),
            (200, r#"{"ok":false,"error":"ratelimited"}"#, "failed"),
            (200, "<html>", "failed"),
            (200, "[]", "failed"),
            (200, r#"{"access_token":7}"#, "failed"),
            (200, r#"{"access_token":""}"#, "failed"),
            (200, r#"{"access_token":"a b"}"#, "failed"),
            (302, r#"{"access_token":"a"}"#, "failed"),
            (429, r#"{"error":"invalid_grant"}"#, "failed"),
            (500, r#"{"error":"invalid_grant"}"#, "failed"),
        ] {
            assert_eq!(read(status, body), Err(outcome), "{status} {body}");
        }
    }

    #[test]
    fn a_replaced_refresh_token_is_not_lost_to_an_odd_life_of_the_access_token() {
        let expires_at = |expires_in: &str| {
            let body =
                format!(r#"{{"access_token":"a","refresh_token":"r","expires_in":{expires_in}}}"#);
            let change = read(200, &body).unwrap();
            assert_eq!(
                (&change["value"], &change["oauth"]["refresh"]["refresh_token"]),
                (&json!("a"), &json!("r"))
            );
            change["oauth"]["expires_at"].as_i64()
        };
        for in_an_hour in ["3600", "\"3600\"", "3600.5"] {
            let token =
                Refreshable { expires_at: expires_at(in_an_hour), ..Refreshable::default() };
            assert!(token.expires_at.is_some() && !is_due(&token), "{in_an_hour}");
        }
        for unknown in ["null", "0", "-1", "\"soon\"", "{}", "[1]", "true"] {
            assert_eq!(expires_at(unknown), None, "{unknown}");
        }
        assert_eq!(expires_at("9223372036854775807"), Some(i64::MAX));
    }

    #[test]
    fn a_client_authenticates_as_its_credential_says() {
        let refresh = |kind: &str, secret: Value| {
            let auth = json!({ "type": kind, "client_secret": secret });
            serde_json::from_value::<Refresh>(json!({
                "client_id": "c&d",
                "refresh_token": "r+1",
                "token_endpoint": "https://auth.example/token",
                "token_endpoint_auth": auth,
                "resource": "https://mcp.example/mcp",
            }))
            .unwrap()
        };
        let always = "grant_type=refresh_token&refresh_token=r%2B1";
        let resource = "&resource=https%3A%2F%2Fmcp.example%2Fmcp";
        let none = refresh("none", Value::Null);
        assert_eq!(form(&none), format!("{always}&client_id=c%26d{resource}"));
        assert_eq!(basic(&none), None);
        let post = refresh("client_secret_post", json!("s=/"));
        assert_eq!(
            form(&post),
            format!("{always}&client_id=c%26d&client_secret=s%3D%2F{resource}")
        );
        assert_eq!(basic(&post), None);
        let in_header = refresh("client_secret_basic", json!("s=/"));
        assert_eq!(form(&in_header), format!("{always}{resource}"));
        let expected = format!("Basic {}", STANDARD.encode("c%26d:s%3D%2F"));
        assert_eq!(basic(&in_header), Some(expected));
    }
}
