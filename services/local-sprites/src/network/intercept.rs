//! Ends the TLS of connections to the hosts of a Sprite's secrets, so that the values of these
//! replace placeholders on their way out (docs/adr/0220-placeholders-of-credentials.md).
//!
//! HTTP/1.1 alone is spoken within. Bodies are streamed.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header::{self, HeaderValue},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use service::connection::{ConnectionLimits, serve_connection};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinSet};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{
    isolation::holder::Network,
    network::{
        CONNECT_MAX,
        authority::{Authority, PROTOCOL},
        head::answer,
        proxy::{EgressProxy, HEAD_TIME_MAX, Refused, https_proxy_variables},
        substitution::Secrets,
    },
    sync::locked,
};

const LIMITS: ConnectionLimits = ConnectionLimits {
    // A connection without a request is kept for as long.
    head_time: Duration::from_secs(120),
    head_bytes: 64 * 1024,
    headers: 100,
    write_time: Duration::from_secs(600),
};
/// How long a host may send nothing while a request to it is under way.
const SILENCE_MAX: Duration = Duration::from_secs(3600);
/// How long a host may take nothing of a request.
const WRITE_TIME_MAX: Duration = Duration::from_secs(600);

/// Certificates of public authorities, in the image that Sprites are made of.
const SYSTEM_BUNDLE: &str = "etc/ssl/certs/ca-certificates.crt";
/// Where a Sprite finds its authority's certificate, and it beside those of public authorities.
const CERTIFICATE: &str = "/.sprite/policy/ca.pem";
const BUNDLE: &str = "/.sprite/policy/ca-bundle.pem";
const KEY_FILE: &str = "authority.key";
/// The variables that programs look for a bundle by.
const BUNDLE_VARIABLES: [&str; 5] =
    ["SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO", "AWS_CA_BUNDLE"];

/// What a Sprite's connections are intercepted with. The values are in memory alone: a server that
/// takes the Sprite up has none until they are sent again.
#[derive(Debug)]
pub struct Interceptor {
    key_file: PathBuf,
    secrets: Mutex<Secrets>,
    authority: Mutex<Option<Arc<Authority>>>,
}

impl Interceptor {
    /// That of a Sprite whose state is in a directory.
    pub fn of(dir: &Path) -> Self {
        let key_file = dir.join(KEY_FILE);
        let authority = Authority::load(&key_file).ok().map(Arc::new);
        Self { key_file, secrets: Mutex::default(), authority: Mutex::new(authority) }
    }

    /// Whether it ever was needed.
    pub fn is_used(&self) -> bool {
        locked(&self.authority).is_some()
    }

    /// Replaces the secrets. With the first ones an authority is made, whose certificate is put
    /// beside those of the image into `inside`, the directory that the Sprite sees at `/.sprite`.
    ///
    /// # Errors
    /// When the authority cannot be made.
    pub fn set_secrets(&self, secrets: Secrets, inside: &Path, image: &Path) -> io::Result<()> {
        if !secrets.is_empty() && !self.is_used() {
            let authority = Authority::create(&self.key_file, |certificate| {
                let public = fs::read_to_string(image.join(SYSTEM_BUNDLE)).unwrap_or_default();
                let within = |path: &str| inside.join(path.trim_start_matches("/.sprite/"));
                fs::write(within(CERTIFICATE), certificate)?;
                fs::write(within(BUNDLE), public + certificate)
            })?;
            *locked(&self.authority) = Some(Arc::new(authority));
        }
        *locked(&self.secrets) = secrets;
        Ok(())
    }

    /// The variables that lead the Sprite's programs through the proxy and have them trust the
    /// authority.
    pub fn variables(&self, network: Network) -> BTreeMap<String, String> {
        if locked(&self.secrets).is_empty() {
            return BTreeMap::new();
        }
        let bundle = BUNDLE_VARIABLES.map(|name| (name, BUNDLE.to_owned()));
        let own = [("NODE_EXTRA_CA_CERTS", CERTIFICATE.to_owned())];
        // A limited Sprite's programs have them already, for all that they send.
        let proxy = https_proxy_variables().filter(|_| network == Network::Public);
        let all = bundle.into_iter().chain(own).chain(proxy);
        all.map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn secrets(&self) -> Secrets {
        locked(&self.secrets).clone()
    }

    /// The authority, where a secret is for this host.
    pub fn authority_for(&self, host: &str, port: u16) -> Option<Arc<Authority>> {
        locked(&self.secrets).are_for(host, port).then(|| locked(&self.authority).clone()).flatten()
    }
}

/// One intercepted connection.
struct Exchange {
    proxy: Arc<EgressProxy>,
    host: String,
    port: u16,
    /// The connection to the host. One request at a time is under way.
    upstream: tokio::sync::Mutex<Option<SendRequest<Incoming>>>,
    /// Carry it.
    carriers: Mutex<JoinSet<()>>,
}

type Body = Either<Incoming, Full<Bytes>>;

/// Serves a tunnel to a host by HTTP. `server` is connected to the host.
pub async fn serve(
    proxy: Arc<EgressProxy>,
    authority: &Authority,
    mut client: TcpStream,
    (host, port): (String, u16),
    server: TcpStream,
) -> io::Result<()> {
    let exchange = Exchange {
        proxy,
        host: host.trim_end_matches('.').to_ascii_lowercase(),
        port,
        upstream: tokio::sync::Mutex::default(),
        carriers: Mutex::default(),
    };
    let config = authority.server_of(&exchange.host)?;
    match tokio::time::timeout(CONNECT_MAX, exchange.secure(server)).await {
        Ok(Ok(sender)) => *exchange.upstream.lock().await = Some(sender),
        failed => {
            let why = failed.map_or("it does not answer".to_owned(), |failed| {
                failed.err().map(|error| error.to_string()).unwrap_or_default()
            });
            return answer(&mut client, "502 Bad Gateway", &cannot_reach(&host, &why)).await;
        }
    }
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
    let tls = tokio::time::timeout(HEAD_TIME_MAX, TlsAcceptor::from(config).accept(client));
    let tls = tls.await??;
    let exchange = Arc::new(exchange);
    let service = service_fn(move |request| {
        let exchange = exchange.clone();
        async move { Ok::<_, Infallible>(exchange.answer(request).await) }
    });
    serve_connection(tls, LIMITS, service).await.map_err(io::Error::other)
}

impl Exchange {
    async fn answer(&self, mut request: Request<Incoming>) -> Response<Body> {
        // Those of now: what was taken back is sent no more.
        let secrets = self.proxy.interceptor.secrets();
        if let Err(refused) = secrets.put_into(&mut request, &self.host, self.port) {
            return failure(refused.status(), &refused.to_string());
        }
        let mut upstream = self.upstream.lock().await;
        let mut sender = match self.connected(upstream.take()).await {
            Ok(sender) => sender,
            Err(why) => return failure(StatusCode::BAD_GATEWAY, &cannot_reach(&self.host, &why)),
        };
        match sender.send_request(request).await {
            Ok(response) => {
                *upstream = Some(sender);
                response.map(Either::Left)
            }
            Err(error) => {
                let why = cannot_reach(&self.host, &error.to_string());
                failure(StatusCode::BAD_GATEWAY, &why)
            }
        }
    }

    /// The connection as it is, or another one where the host has closed it.
    async fn connected(
        &self,
        current: Option<SendRequest<Incoming>>,
    ) -> Result<SendRequest<Incoming>, String> {
        let connect = async {
            if let Some(mut sender) = current
                && sender.ready().await.is_ok()
            {
                return Ok(sender);
            }
            let server =
                self.proxy.dial(&self.host, self.port).await.map_err(|refused| match refused {
                    Refused::Policy => "it is not allowed by this sandbox's network policy".into(),
                    Refused::Unreachable(why) => why,
                })?;
            self.secure(server).await.map_err(|error| error.to_string())
        };
        let late = |_| Err("it does not answer".to_owned());
        tokio::time::timeout(CONNECT_MAX, connect).await.unwrap_or_else(late)
    }

    /// TLS to the host, which has to prove who it is.
    async fn secure(&self, server: TcpStream) -> io::Result<SendRequest<Incoming>> {
        let name = ServerName::try_from(self.host.clone()).map_err(io::Error::other)?;
        let tls = TlsConnector::from(self.proxy.reach.tls.clone()).connect(name, server).await?;
        let mut stream = TimeoutStream::new(tls);
        stream.set_read_timeout(Some(SILENCE_MAX));
        stream.set_write_timeout(Some(WRITE_TIME_MAX));
        let stream: Pin<Box<TimeoutStream<_>>> = Box::pin(stream);
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(LIMITS.head_bytes)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        let mut carriers = locked(&self.carriers);
        while carriers.try_join_next().is_some() {}
        carriers.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an intercepted connection to a host broke");
            }
        });
        Ok(sender)
    }
}

/// Has hosts prove who they are by the authorities that this machine trusts, and by those in a
/// file.
///
/// # Errors
/// When the file holds no certificate.
pub fn trusting(file: Option<&Path>) -> io::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(file) = file {
        for certificate in CertificateDer::pem_file_iter(file).map_err(io::Error::other)? {
            roots.add(certificate.map_err(io::Error::other)?).map_err(io::Error::other)?;
        }
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(Arc::new(config))
}

fn cannot_reach(host: &str, why: &str) -> String {
    format!("{host} cannot be reached: {why}")
}

fn failure(status: StatusCode, why: &str) -> Response<Body> {
    let mut response = Response::new(Either::Right(Full::from(format!("{why}\n"))));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    // What is left of the request is not read.
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}
