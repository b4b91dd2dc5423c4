//! An HTTPS server on this machine's loopback that shows what it received.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::{Method, Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::tls::Tls;

/// How long a connection is kept for another request.
pub const KEPT: Duration = Duration::from_secs(1);

/// Answers a request with its head, or one that has a body with that. Ends when dropped.
#[derive(Debug)]
pub struct Https {
    pub port: u16,
    heads: Arc<Mutex<Vec<String>>>,
    _server: JoinSet<()>,
}

impl Https {
    /// # Errors
    /// When it cannot listen.
    pub async fn start(tls: &Tls) -> anyhow::Result<Self> {
        let certificate = CertificateDer::from_pem_file(tls.certificate_file())?;
        let key = PrivateKeyDer::from_pem_file(tls.key_file())?;
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)?;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let (heads, mut server) = (Arc::<Mutex<Vec<String>>>::default(), JoinSet::new());
        server.spawn(serve(listener, acceptor, heads.clone()));
        Ok(Self { port, heads, _server: server })
    }

    /// The heads of all requests so far.
    #[must_use]
    pub fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor, heads: Arc<Mutex<Vec<String>>>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, heads) = (acceptor.clone(), heads.clone());
        connections.spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let service = service_fn(|request| std::future::ready(shown(&heads, request)));
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(KEPT)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

type Shown = Response<Either<Incoming, Full<Bytes>>>;

fn shown(heads: &Mutex<Vec<String>>, request: Request<Incoming>) -> Result<Shown, Infallible> {
    let headers = request
        .headers()
        .iter()
        .map(|(name, value)| format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
    let head = format!("{} {}\n{}", request.method(), request.uri(), headers.collect::<String>());
    heads.lock().unwrap_or_else(PoisonError::into_inner).push(head.clone());
    let body = match *request.method() {
        Method::POST | Method::PUT => Either::Left(request.into_body()),
        _ => Either::Right(Full::from(head)),
    };
    Ok(Response::new(body))
}
