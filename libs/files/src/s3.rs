//! A bucket of AWS S3, or of a store with the same API, as a store of objects.

use std::{error::Error as _, time::Duration};

use async_trait::async_trait;
use http_body_util::BodyExt as _;
use object_store::{
    BackoffConfig, ClientOptions, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
        HttpResponseBody, HttpService,
    },
};
use secrecy::{ExposeSecret as _, SecretString};
use settings::Env;
use url::Url;

use crate::Unusable;

/// How long a connection may take to be made.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Attempts after the first.
const RETRIES_MAX: usize = 3;
/// After this time no further attempt is made.
const RETRY_FOR: Duration = Duration::from_secs(60);

/// How a bucket is reached.
#[derive(Clone, Debug)]
pub struct S3Settings {
    /// Of a store other than AWS.
    pub endpoint: Option<Url>,
    pub region: String,
    /// Whether the bucket is in the path of URLs, not in their host name.
    pub path_style: bool,
    /// How long a request may be without progress: a part of 5 MiB has to be accepted in this time.
    pub silence_max: Duration,
    pub access_key_id: SecretString,
    pub secret_access_key: SecretString,
}

impl S3Settings {
    /// Reads `AOD_FILES_S3_*`, which are needed if `is_chosen`.
    pub(crate) fn from_env(env: &mut Env, is_chosen: bool) -> Option<Self> {
        let endpoint = env.optional(
            "AOD_FILES_S3_ENDPOINT",
            "URL of the store for s3://: http(s)://HOST[:PORT]; empty: AWS",
        );
        let region =
            env.parsed("AOD_FILES_S3_REGION", "region of the bucket", "us-east-1".to_owned());
        let path_style = env.parsed(
            "AOD_FILES_S3_PATH_STYLE",
            "whether requests name the bucket in the path (true) or in the host name (false)",
            true,
        );
        let silence_max = env.seconds(
            "AOD_FILES_S3_TIMEOUT_SECONDS",
            "how long a request to the bucket may be without progress; a part of 5 MiB has to be accepted within it",
            20,
        );
        let id = env.optional_secret(
            "AOD_FILES_S3_ACCESS_KEY_ID",
            "id of the access key for the bucket; required for s3://",
        );
        let key = env.optional_secret(
            "AOD_FILES_S3_SECRET_ACCESS_KEY",
            "secret access key for the bucket; required for s3://",
        );
        if !is_chosen {
            return None;
        }
        for (name, value) in
            [("AOD_FILES_S3_ACCESS_KEY_ID", &id), ("AOD_FILES_S3_SECRET_ACCESS_KEY", &key)]
        {
            if value.is_none() {
                env.refuse(format!("{name} or {name}_FILE must be set: AOD_FILES_URL is s3://"));
            }
        }
        let endpoint = match endpoint.as_deref().map(parse_endpoint) {
            Some(None) => {
                env.refuse("AOD_FILES_S3_ENDPOINT must be a URL like https://s3.example.com:9000");
                return None;
            }
            endpoint => endpoint.flatten(),
        };
        Some(Self {
            endpoint,
            region,
            path_style,
            silence_max,
            access_key_id: id?,
            secret_access_key: key?,
        })
    }

    /// Opens a bucket, without a request to it.
    pub(crate) fn open(&self, bucket: &str) -> Result<AmazonS3, Unusable> {
        let plain_http = self.endpoint.as_ref().is_some_and(|url| url.scheme() == "http");
        let retry = RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: RETRIES_MAX,
            retry_timeout: RETRY_FOR,
        };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_region(&self.region)
            .with_access_key_id(self.access_key_id.expose_secret())
            .with_secret_access_key(self.secret_access_key.expose_secret())
            .with_virtual_hosted_style_request(!self.path_style)
            .with_client_options(ClientOptions::new().with_allow_http(plain_http))
            // Not all stores have it, and objects are deleted one by one.
            .with_disable_bulk_delete(true)
            .with_retry(retry)
            .with_http_connector(Connector { silence_max: self.silence_max });
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(self.base_url(endpoint, bucket)?);
        }
        Ok(builder.build()?)
    }

    /// With the bucket's name in the host's, if that is where it belongs.
    fn base_url(&self, endpoint: &Url, bucket: &str) -> Result<String, Unusable> {
        let mut url = endpoint.clone();
        if !self.path_style {
            let host = format!("{bucket}.{}", url.host_str().unwrap_or_default());
            url.set_host(Some(&host)).map_err(|_| Unusable::NotAUrl)?;
        }
        Ok(url.as_str().trim_end_matches('/').to_owned())
    }
}

fn parse_endpoint(text: &str) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    let is_plain = url.path() == "/"
        && url.query().is_none()
        && url.fragment().is_none()
        && url.username().is_empty()
        && url.password().is_none();
    (is_plain && matches!(url.scheme(), "http" | "https")).then_some(url)
}

/// Sends requests with the HTTP client that the services have anyway; the crate's own choice of it
/// adds HTTP/2.
#[derive(Debug)]
struct Connector {
    silence_max: Duration,
}

#[derive(Debug)]
struct Client(reqwest::Client);

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_MAX)
            .read_timeout(self.silence_max)
            .user_agent("agent-on-demand")
            // A signature is for one host.
            .redirect(reqwest::redirect::Policy::none());
        match builder.build() {
            Ok(client) => Ok(HttpClient::new(Client(client))),
            Err(error) => {
                Err(object_store::Error::Generic { store: "S3", source: Box::new(error) })
            }
        }
    }
}

#[async_trait]
impl HttpService for Client {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let url = Url::parse(&parts.uri.to_string())
            .map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        let mut request = reqwest::Request::new(parts.method, url);
        *request.headers_mut() = parts.headers;
        *request.body_mut() = Some(reqwest::Body::wrap(body));
        let mut response = self.0.execute(request).await.map_err(failure)?;
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        let body = reqwest::Body::from(response).map_err(failure);
        let mut response = HttpResponse::new(HttpResponseBody::new(body));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }
}

/// Its kind decides whether the request is sent again.
fn failure(error: reqwest::Error) -> HttpError {
    let kind = if error.is_connect() {
        HttpErrorKind::Connect
    } else if error.is_timeout() {
        HttpErrorKind::Timeout
    } else if error.is_builder() {
        HttpErrorKind::Unknown
    } else {
        HttpErrorKind::Interrupted
    };
    // The crate adds the URL.
    let error = error.without_url();
    // Only the cause says what happened, such as a connection that was refused.
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    HttpError::new(kind, std::io::Error::other(text))
}

#[cfg(test)]
mod tests {
    use settings::Verdict;

    use super::*;
    use crate::Files;

    fn read(variables: &[(&str, &str)]) -> (Option<Files>, Verdict) {
        let variables = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let mut env = Env::from_variables("test", "a test", variables.collect());
        (Files::from_env(&mut env), env.finish())
    }

    const KEYS: [(&str, &str); 2] =
        [("AOD_FILES_S3_ACCESS_KEY_ID", "id"), ("AOD_FILES_S3_SECRET_ACCESS_KEY", "SENTINEL")];

    #[test]
    fn a_bucket_needs_a_name_and_both_keys() {
        let (files, verdict) = read(&[("AOD_FILES_URL", "s3://bucket/p")]);
        let Verdict::Refused(text) = verdict else { panic!("{verdict:?}") };
        assert!(files.is_none());
        for name in ["AOD_FILES_S3_ACCESS_KEY_ID or", "AOD_FILES_S3_SECRET_ACCESS_KEY or"] {
            assert!(text.contains(name), "{text}");
        }
        for url in ["s3://", "s3:bucket", "s3:///p", "s3://u@bucket", "s3://bucket:9/", "s3://B"] {
            let (files, verdict) = read(&[&[("AOD_FILES_URL", url)], &KEYS[..]].concat());
            assert!(files.is_none() && matches!(verdict, Verdict::Refused(_)), "{url}");
        }
        for endpoint in
            ["s3.example.com", "ftp://x", "http://u:p@x", "http://x/path", "http://x/?q"]
        {
            let given = [("AOD_FILES_URL", "s3://bucket"), ("AOD_FILES_S3_ENDPOINT", endpoint)];
            let (files, verdict) = read(&[&given, &KEYS[..]].concat());
            let Verdict::Refused(text) = verdict else { panic!("{endpoint}: {verdict:?}") };
            assert!(files.is_none() && text.contains("AOD_FILES_S3_ENDPOINT"), "{text}");
        }
        let (files, verdict) =
            read(&[&[("AOD_FILES_URL", "s3://bucket/a/b/")], &KEYS[..]].concat());
        assert_eq!(verdict, Verdict::Ready);
        assert!(!format!("{files:?}").contains("SENTINEL"), "{files:?}");
    }

    #[test]
    fn a_directory_needs_no_keys() {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("file://{}", directory.path().display());
        let (files, verdict) = read(&[("AOD_FILES_URL", &url)]);
        assert!(files.is_some() && verdict == Verdict::Ready);
        assert!(matches!(read(&[]), (None, Verdict::Ready)));
    }

    #[test]
    fn the_bucket_is_in_the_path_or_in_the_host_name() {
        let endpoint = parse_endpoint("https://s3.example.com:9000").unwrap();
        let of = |path_style| S3Settings {
            endpoint: None,
            region: String::new(),
            path_style,
            silence_max: Duration::ZERO,
            access_key_id: SecretString::default(),
            secret_access_key: SecretString::default(),
        };
        let url = |path_style| of(path_style).base_url(&endpoint, "bucket").unwrap();
        assert_eq!(url(true), "https://s3.example.com:9000");
        assert_eq!(url(false), "https://bucket.s3.example.com:9000");
    }
}
