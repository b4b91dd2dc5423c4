//! A client of the Sprites API, for Fly.io's service and for `local-sprites` alike
//! (docs/sprites-api.md).
//!
//! Idempotent calls are retried a bounded number of times, with jitter, after the time that the
//! server asks for (`Retry-After`). The client expects what the real service is known to do: 5xx
//! with an HTML page, a creation that fails and still takes effect, spurious 404s.

mod error;
mod exec;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use reqwest::{Method, RequestBuilder, Response, StatusCode, header};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize, Serializer};
use tracing::{Instrument as _, field};
use types::{Backoff, SpriteName};

pub use error::Error;
pub use exec::{Exec, ExecEvent, ExecInput, ExecOutput, ExecRequest, Finished};

/// Delays between attempts of one call: about 20 s in all.
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(250), max: Duration::from_secs(8), attempts: 6 };
/// Number of 404s after which a Sprite is considered gone: the API occasionally returns spurious
/// ones. Other errors do not count.
const SPURIOUS_NOT_FOUND_ATTEMPTS: u32 = 3;
/// The longest `Retry-After` that is honoured; a longer one fails the call.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A copy of a disk may take as long.
const COPY_TIMEOUT: Duration = Duration::from_secs(60);
/// A creation may wait for capacity.
const CREATE_TIMEOUT: Duration = Duration::from_secs(120);
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// For the content of a file.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(600);

/// A client for one account. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base_url: Arc<str>,
    token: SecretString,
}

/// The connections of a process, shared by all its accounts.
///
/// # Errors
/// When TLS cannot be set up.
pub fn http_client() -> Result<reqwest::Client, Error> {
    let builder = reqwest::Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .user_agent("agent-on-demand")
        .tcp_nodelay(true);
    builder.redirect(reqwest::redirect::Policy::none()).build().map_err(Error::transport)
}

#[derive(Debug, Deserialize)]
struct ListReply {
    sprites: Vec<Listed>,
    #[serde(default)]
    has_more: bool,
    #[serde(default)]
    next_continuation_token: Option<String>,
}

/// A secret of which a Sprite's programs know a placeholder alone.
#[derive(Clone, Debug, Serialize)]
pub struct OutsideSecret {
    pub placeholder: String,
    #[serde(serialize_with = "exposed")]
    pub value: SecretString,
    /// Receive the value in the placeholder's place (`types::vault::CredentialHost`).
    pub hosts: Vec<String>,
}

fn exposed<S: Serializer>(value: &SecretString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(value.expose_secret())
}

#[derive(Serialize)]
struct SecretsPolicy<'a> {
    secrets: &'a [OutsideSecret],
}

#[derive(Deserialize)]
struct SecretsReply {
    environment: BTreeMap<String, String>,
}

/// What a Sprite began from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Began {
    /// An image; how long its copy took.
    FromImage(Duration),
    /// An empty disk, on a server that keeps images.
    Empty,
    /// An empty disk, on a server that knows no images.
    WithoutImages,
}

#[derive(Default, Deserialize)]
struct Described {
    /// Null: none. Absent from a server that knows no images.
    #[serde(default, deserialize_with = "present")]
    from_image: Option<Option<FromImage>>,
}

#[derive(Deserialize)]
struct FromImage {
    copied_ms: u64,
}

/// Tells what is null from what is absent.
fn present<'de, D, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::<T>::deserialize(deserializer).map(Some)
}

#[derive(Deserialize)]
struct Drafted {
    draft: String,
}

/// A copy of a Sprite's disk that may become an image.
#[derive(Debug)]
pub struct ImageDraft(String);

#[derive(Debug, Deserialize)]
struct Listed {
    name: String,
}

/// Whether a 404 is believed at once: a file may well not be there; a Sprite may only seem not to
/// be, and a creation has nothing to miss.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Absence {
    Expected,
    Spurious,
}

impl Client {
    #[must_use]
    pub fn new(http: reqwest::Client, base_url: &str, token: SecretString) -> Self {
        Self { http, base_url: base_url.trim_end_matches('/').into(), token }
    }

    /// Creates the Sprite, or succeeds if it exists: names are unique to the caller, so an existing
    /// one is its own.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn ensure(&self, name: &SpriteName) -> Result<(), Error> {
        let body = serde_json::json!({ "name": name.as_str(), "wait_for_capacity": true });
        let request =
            || self.request(Method::POST, "/v1/sprites").timeout(CREATE_TIMEOUT).json(&body);
        match self.send("create", Absence::Spurious, request).await {
            Ok(_) | Err(Error::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Creates the Sprite as [`Self::ensure`] does, from an image where the server has it.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn ensure_from(&self, name: &SpriteName, image: &str) -> Result<Began, Error> {
        let body = serde_json::json!({
            "name": name.as_str(),
            "wait_for_capacity": true,
            "from_image": image,
        });
        let request =
            || self.request(Method::POST, "/v1/sprites").timeout(CREATE_TIMEOUT).json(&body);
        let described = match self.send("create", Absence::Spurious, request).await {
            // The Sprite says itself what an earlier attempt made it from.
            Err(Error::Conflict { .. }) => {
                let path = format!("/v1/sprites/{name}");
                self.send("get", Absence::Spurious, || self.request(Method::GET, &path)).await?
            }
            // By a server that takes no unknown fields.
            Err(Error::Rejected { .. }) => {
                self.ensure(name).await?;
                return Ok(Began::WithoutImages);
            }
            created => created?,
        };
        // A Sprite that cannot be described is there all the same.
        let described: Described = described.json().await.unwrap_or_default();
        Ok(match described.from_image {
            Some(Some(image)) => Began::FromImage(Duration::from_millis(image.copied_ms)),
            Some(None) => Began::Empty,
            None => Began::WithoutImages,
        })
    }

    /// Deletes the Sprite; one that is not there is deleted already.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn delete(&self, name: &SpriteName) -> Result<(), Error> {
        match self
            .send("delete", Absence::Spurious, || {
                self.request(Method::DELETE, &format!("/v1/sprites/{name}"))
            })
            .await
        {
            Ok(_) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether the Sprite is there.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn exists(&self, name: &SpriteName) -> Result<bool, Error> {
        match self
            .send("get", Absence::Spurious, || {
                self.request(Method::GET, &format!("/v1/sprites/{name}"))
            })
            .await
        {
            Ok(_) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The names of the Sprites that begin with `prefix`.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn list(&self, prefix: &str) -> Result<Vec<String>, Error> {
        let (mut names, mut token) = (Vec::new(), None::<String>);
        loop {
            let request = || {
                let request = self
                    .request(Method::GET, "/v1/sprites")
                    .query(&[("prefix", prefix), ("max_results", "100")]);
                match &token {
                    Some(token) => request.query(&[("continuation_token", token)]),
                    None => request,
                }
            };
            let reply: ListReply = self
                .send("list", Absence::Spurious, request)
                .await?
                .json()
                .await
                .map_err(Error::transport)?;
            names.extend(reply.sprites.into_iter().map(|listed| listed.name));
            token = reply.next_continuation_token.filter(|_| reply.has_more);
            if token.is_none() {
                return Ok(names);
            }
        }
    }

    #[must_use]
    pub fn sprite(&self, name: SpriteName) -> Sprite {
        Sprite { client: self.clone(), name }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request =
            self.http.request(method, format!("{}{path}", self.base_url)).timeout(CALL_TIMEOUT);
        request.bearer_auth(self.token.expose_secret())
    }

    /// Sends a request that may be sent twice, until it is answered or the attempts are used up.
    async fn send(
        &self,
        operation: &'static str,
        absence: Absence,
        request: impl Fn() -> RequestBuilder,
    ) -> Result<Response, Error> {
        observed(operation, self.send_repeatedly(operation, absence, request)).await
    }

    async fn send_repeatedly(
        &self,
        operation: &'static str,
        absence: Absence,
        request: impl Fn() -> RequestBuilder,
    ) -> Result<Response, Error> {
        let (mut attempt, mut not_found) = (1, 0);
        loop {
            let error = match request().send().await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => Error::from_response(response).await,
                Err(error) => Error::transport(error),
            };
            let delay = match &error {
                Error::NotFound { .. } if absence == Absence::Spurious => {
                    not_found += 1;
                    (not_found < SPURIOUS_NOT_FOUND_ATTEMPTS).then(|| RETRY.jittered(not_found))
                }
                error if error.is_transient() => RETRY
                    .delay(attempt)
                    .map(|delay| delay.max(error.retry_after().unwrap_or_default())),
                _ => None,
            };
            let Some(delay) = delay.filter(|delay| *delay <= RETRY_AFTER_MAX) else {
                return Err(error);
            };
            metrics::counter!("aod_sprites_retries_total", "operation" => operation).increment(1);
            tracing::debug!(%error, attempt, ?delay, "Sprites API call failed; will retry");
            tokio::time::sleep(delay).await;
            attempt += 1;
        }
    }
}

async fn sent_once(request: RequestBuilder) -> Result<Response, Error> {
    match request.send().await {
        Ok(response) if response.status().is_success() => Ok(response),
        Ok(response) => Err(Error::from_response(response).await),
        Err(error) => Err(Error::transport(error)),
    }
}

/// Counts and times a call, its repetitions included, and gives it a span.
async fn observed<T>(
    operation: &'static str,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let span = tracing::info_span!(
        "sprites",
        otel.kind = "client",
        otel.name = format!("sprites {operation}"),
        outcome = field::Empty
    );
    let begun = Instant::now();
    // Boxed: a call's state is large, and so would be every future around it.
    let result = Box::pin(call).instrument(span.clone()).await;
    let outcome = result.as_ref().err().map_or("ok", Error::kind);
    span.record("outcome", outcome);
    metrics::counter!("aod_sprites_requests_total", "operation" => operation, "outcome" => outcome)
        .increment(1);
    metrics::histogram!("aod_sprites_request_seconds", "operation" => operation)
        .record(begun.elapsed());
    result
}

/// One Sprite of an account.
#[derive(Clone, Debug)]
pub struct Sprite {
    client: Client,
    name: SpriteName,
}

impl Sprite {
    #[must_use]
    pub fn name(&self) -> &SpriteName {
        &self.name
    }

    /// Writes a file, with its parents, at an absolute path.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn write(
        &self,
        path: &str,
        content: impl Into<Bytes>,
        mode: u32,
    ) -> Result<(), Error> {
        let (content, mode) = (content.into(), format!("{mode:04o}"));
        let query = [
            ("path", path),
            ("workingDir", "/"),
            ("mode", mode.as_str()),
            ("mkdirParents", "true"),
        ];
        let url = format!("/v1/sprites/{}/fs/write", self.name);
        self.client
            .send("write", Absence::Spurious, || {
                self.client.request(Method::PUT, &url).query(&query).body(content.clone())
            })
            .await?;
        Ok(())
    }

    /// Writes a file of a known size, with its parents, as its content comes. Not repeated: the
    /// content is used up.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn write_stream<S>(
        &self,
        path: &str,
        content: S,
        bytes: u64,
        mode: u32,
    ) -> Result<(), Error>
    where
        S: Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static,
    {
        let mode = format!("{mode:04o}");
        let query = [
            ("path", path),
            ("workingDir", "/"),
            ("mode", mode.as_str()),
            ("mkdirParents", "true"),
        ];
        let request =
            self.client.request(Method::PUT, &format!("/v1/sprites/{}/fs/write", self.name));
        let request =
            request.timeout(TRANSFER_TIMEOUT).query(&query).header(header::CONTENT_LENGTH, bytes);
        let request = request.body(reqwest::Body::wrap_stream(content));
        observed("write", sent_once(request)).await?;
        Ok(())
    }

    /// Reads a file from an offset to its end; empty at or past the end.
    ///
    /// # Errors
    /// [`Error`]; [`Error::NotFound`] for a file that is not there.
    pub async fn read_from(
        &self,
        path: &str,
        offset: u64,
    ) -> Result<impl Stream<Item = Result<Bytes, Error>> + Unpin + use<>, Error> {
        let query = [("path", path), ("workingDir", "/")];
        let url = format!("/v1/sprites/{}/fs/read", self.name);
        let request = || {
            let request =
                self.client.request(Method::GET, &url).timeout(TRANSFER_TIMEOUT).query(&query);
            if offset > 0 {
                request.header(header::RANGE, format!("bytes={offset}-"))
            } else {
                request
            }
        };
        let response = match self.client.send("read", Absence::Expected, request).await {
            Ok(response) => response,
            Err(Error::Rejected { status: StatusCode::RANGE_NOT_SATISFIABLE, .. }) => {
                return Ok(futures::stream::empty().boxed());
            }
            Err(error) => return Err(error),
        };
        // A server that ignores ranges sends the whole file: its head is skipped here.
        let mut skip = if response.status() == StatusCode::PARTIAL_CONTENT { 0 } else { offset };
        let chunks = response.bytes_stream().filter_map(move |chunk| {
            let chunk = chunk.map_err(Error::transport).map(|mut chunk| {
                let skipped = skip.min(chunk.len() as u64);
                skip -= skipped;
                chunk.split_off(usize::try_from(skipped).unwrap_or(usize::MAX))
            });
            std::future::ready(
                Some(chunk).filter(|chunk| !matches!(chunk, Ok(chunk) if chunk.is_empty())),
            )
        });
        Ok(chunks.boxed())
    }

    /// Reads a small file whole.
    ///
    /// # Errors
    /// [`Error`]; [`Error::NotFound`] for a file that is not there.
    pub async fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
        Ok(self.read_at_most(path, usize::MAX).await?.unwrap_or_default())
    }

    /// Reads a file whose content and size the agent may control. None: it is larger than
    /// `bytes_max`.
    ///
    /// # Errors
    /// [`Error`]; [`Error::NotFound`] for a file that is not there.
    pub async fn read_at_most(
        &self,
        path: &str,
        bytes_max: usize,
    ) -> Result<Option<Vec<u8>>, Error> {
        let (mut chunks, mut content) = (self.read_from(path, 0).await?, Vec::new());
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk?;
            if chunk.len() > bytes_max - content.len() {
                return Ok(None);
            }
            content.extend_from_slice(&chunk);
        }
        Ok(Some(content))
    }

    /// Lets the Sprite reach these hosts and no other, from now on. `*.x` stands for every name
    /// below `x`.
    ///
    /// # Errors
    /// [`Error`]; [`Error::NotFound`] also from a server that knows no policies.
    pub async fn limit_network(&self, hosts: &[String]) -> Result<(), Error> {
        let allowed =
            hosts.iter().map(|host| serde_json::json!({ "domain": host, "action": "allow" }));
        let rules: Vec<_> =
            allowed.chain([serde_json::json!({ "domain": "*", "action": "deny" })]).collect();
        let (url, body) = (
            format!("/v1/sprites/{}/policy/network", self.name),
            serde_json::json!({ "rules": rules }),
        );
        self.client
            .send("limit_network", Absence::Spurious, || {
                self.client.request(Method::POST, &url).json(&body)
            })
            .await?;
        Ok(())
    }

    /// Keeps the values of these secrets outside of the Sprite, in place of those before. Returns
    /// the variables that its programs need for that.
    ///
    /// # Errors
    /// [`Error`]; [`Error::NotFound`] also from a server that cannot do it, at once.
    pub async fn set_secrets(
        &self,
        secrets: &[OutsideSecret],
    ) -> Result<BTreeMap<String, String>, Error> {
        let url = format!("/v1/sprites/{}/policy/secrets", self.name);
        let body = SecretsPolicy { secrets };
        let request = || self.client.request(Method::POST, &url).json(&body);
        let reply: SecretsReply = self
            .client
            .send("set_secrets", Absence::Expected, request)
            .await?
            .json()
            .await
            .map_err(Error::transport)?;
        Ok(reply.environment)
    }

    /// Copies the Sprite's disk as it is, for an image without these directories. Tried once: what
    /// is on the disk later is not what the caller meant.
    ///
    /// # Errors
    /// [`Error`]; [`Error::Conflict`] where there is an image with this key, [`Error::NotFound`] from a
    /// server that keeps none.
    pub async fn draft_image(&self, key: &str, without: &[&str]) -> Result<ImageDraft, Error> {
        let url = format!("/v1/sprites/{}/image", self.name);
        let body = serde_json::json!({ "key": key, "without": without });
        let request = self.client.request(Method::POST, &url).timeout(COPY_TIMEOUT).json(&body);
        let drafted: Drafted = observed("draft_image", sent_once(request))
            .await?
            .json()
            .await
            .map_err(Error::transport)?;
        Ok(ImageDraft(drafted.draft))
    }

    /// Makes a draft an image, unless there is one with its key.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn keep_image(&self, draft: ImageDraft) -> Result<(), Error> {
        let url = format!("/v1/sprites/{}/image/{}", self.name, draft.0);
        observed("keep_image", sent_once(self.client.request(Method::PUT, &url))).await?;
        Ok(())
    }

    /// Starts a command. Not repeated by itself: the caller knows whether that is harmless.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn exec(&self, request: &ExecRequest<'_>) -> Result<Exec, Error> {
        observed(
            "exec",
            Exec::connect(&self.client.base_url, &self.client.token, &self.name, request),
        )
        .await
    }

    /// Runs a command that may run twice, and waits for its end, at most `limit`; the newest 64 KiB
    /// of each stream are kept.
    ///
    /// # Errors
    /// [`Error`], after a bounded number of attempts.
    pub async fn run(&self, request: &ExecRequest<'_>, limit: Duration) -> Result<Finished, Error> {
        let (mut attempt, mut not_found) = (1, 0);
        loop {
            let once = Box::pin(async { self.exec(request).await?.finish().await });
            let error = match tokio::time::timeout(limit, once).await {
                Ok(Ok(finished)) => return Ok(finished),
                Ok(Err(error)) => error,
                Err(_) => return Err(Error::Timeout),
            };
            not_found += u32::from(matches!(error, Error::NotFound { .. }));
            let spurious =
                matches!(error, Error::NotFound { .. }) && not_found < SPURIOUS_NOT_FOUND_ATTEMPTS;
            let delay = if spurious || error.is_transient() { RETRY.delay(attempt) } else { None };
            let Some(delay) = delay else { return Err(error) };
            metrics::counter!("aod_sprites_retries_total", "operation" => "exec").increment(1);
            tokio::time::sleep(
                delay.max(error.retry_after().unwrap_or_default()).min(RETRY_AFTER_MAX),
            )
            .await;
            attempt += 1;
        }
    }
}
