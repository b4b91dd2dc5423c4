//! Connections of sandboxes: limits on their number and on the time that one may take. Programs in
//! a sandbox are not trusted.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderValue, Request, header},
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use crate::share::Share;

/// A request's head has to be there within this time, and a connection without a request is closed
/// after it.
const HEAD_TIME_MAX: Duration = Duration::from_secs(120);
const HEAD_BYTES_MAX: usize = 64 * 1024;
const HEADERS_MAX: usize = 100;
/// How long a client may accept nothing of a response.
const WRITE_TIME_MAX: Duration = Duration::from_secs(300);
/// Of all connections, those that have shown no token that works may be one part of so many.
const STRANGERS_FRACTION: usize = 8;
/// After an accept that failed: for want of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections that have shown no token that works, oldest first. One more than there may be closes
/// the oldest: those that say nothing give way to those that are about to.
struct Strangers {
    max: usize,
    next: AtomicU64,
    waiting: Mutex<BTreeMap<u64, CancellationToken>>,
}

impl Strangers {
    fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, next: AtomicU64::new(0), waiting: Mutex::default() })
    }

    /// A new connection, and what is cancelled when it has to go.
    fn enter(self: &Arc<Self>) -> (Connection, CancellationToken) {
        let (number, closed) =
            (self.next.fetch_add(1, Ordering::Relaxed), CancellationToken::new());
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.insert(number, closed.clone());
        if waiting.len() > self.max
            && let Some((_, oldest)) = waiting.pop_first()
        {
            oldest.cancel();
        }
        drop(waiting);
        let known = Known {
            number,
            strangers: self.clone(),
            owner: OnceLock::new(),
            is_surplus: AtomicBool::new(false),
        };
        (Connection(Arc::new(known)), closed)
    }

    fn leave(&self, number: u64) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
    }
}

/// The connection that a request came by, among the request's extensions.
#[derive(Clone)]
pub struct Connection(Arc<Known>);

struct Known {
    number: u64,
    strangers: Arc<Strangers>,
    owner: OnceLock<[OwnedSemaphorePermit; 2]>,
    /// Its session or its user has as many as they may: it is closed after the response.
    is_surplus: AtomicBool,
}

impl Connection {
    /// It has shown a session's token.
    pub fn belongs_to(&self, share: &Share) {
        if self.0.owner.get().is_some() {
            return;
        }
        match share.connections.each_ref().map(|pool| pool.clone().try_acquire_owned()) {
            [Ok(of_session), Ok(of_user)] => {
                let _ = self.0.owner.set([of_session, of_user]);
            }
            _ => self.0.is_surplus.store(true, Ordering::Relaxed),
        }
        self.0.strangers.leave(self.0.number);
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        self.strangers.leave(self.number);
    }
}

/// Serves until the stop; requests in flight are finished.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    connections_max: usize,
    stop: CancellationToken,
) {
    let (slots, connections, graceful) =
        (Arc::new(Semaphore::new(connections_max)), TaskTracker::new(), GracefulShutdown::new());
    let strangers = Strangers::new((connections_max / STRANGERS_FRACTION).max(1));
    loop {
        let accepted = async {
            // The semaphore is never closed.
            let slot = slots.clone().acquire_owned().await.ok();
            (slot, listener.accept().await)
        };
        let Some((slot, accepted)) = stop.run_until_cancelled(accepted).await else { break };
        match accepted {
            Ok((stream, addr)) => {
                let (shown, closed) = strangers.enter();
                let connection = graceful.watch(connection(stream, router.clone(), shown));
                connections.spawn(async move {
                    match closed.run_until_cancelled(connection).await {
                        Some(Ok(())) => {}
                        Some(Err(error)) => log(addr, &error),
                        None => tracing::debug!(%addr, "closed a connection without a token: there are too many"),
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    graceful.shutdown().await;
    connections.close();
    connections.wait().await;
}

fn log(addr: SocketAddr, error: &hyper::Error) {
    tracing::debug!(%addr, %error, "connection ended");
}

fn connection(
    stream: TcpStream,
    router: Router,
    shown: Connection,
) -> impl hyper_util::server::graceful::GracefulConnection<Error = hyper::Error> {
    // Events leave at once.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIME_MAX));
    let service = service_fn(move |request: Request<Incoming>| {
        let (router, shown) = (router.clone(), shown.clone());
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(shown.clone());
        async move {
            let mut response = router.oneshot(request).await?;
            if shown.0.is_surplus.load(Ordering::Relaxed) {
                response
                    .headers_mut()
                    .insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(Box::pin(stream)), service)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "the runtime of a test owns its tasks")]
mod tests {
    use axum::{extract::Extension, routing::get};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::share::{Pools, ShareLimits, Shares};

    /// Serves 64 connections, 8 of them without a token; a request to `/` shows one of a session
    /// that may have two.
    async fn start() -> (SocketAddr, CancellationToken) {
        let pools = |connections| Pools { body_units: 1, routed_units: 1, connections };
        let share = Shares::new(ShareLimits { requests: 64, session: pools(2), user: pools(64) })
            .of("s", "u");
        let answer = move |Extension(connection): Extension<Connection>| {
            connection.belongs_to(&share);
            async { "hello" }
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        tokio::spawn(serve(listener, Router::new().route("/", get(answer)), 64, stop.clone()));
        (addr, stop)
    }

    async fn ask(stream: &mut TcpStream) -> String {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut response = String::new();
        while !response.ends_with("hello") {
            let mut bytes = [0; 1024];
            let count = stream.read(&mut bytes).await.unwrap();
            assert!(count > 0, "closed after {response:?}");
            response.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        }
        response
    }

    #[tokio::test]
    async fn silent_connections_without_a_token_keep_no_one_out() {
        let (addr, stop) = start().await;
        let mut owned = TcpStream::connect(addr).await.unwrap();
        ask(&mut owned).await;
        let mut silent = Vec::new();
        for _ in 0..200 {
            silent.push(TcpStream::connect(addr).await.unwrap());
        }
        let mut late = TcpStream::connect(addr).await.unwrap();
        assert!(ask(&mut late).await.starts_with("HTTP/1.1 200"));
        // The one that had shown its token is none of those that were closed.
        ask(&mut owned).await;
        assert_eq!(silent[0].read(&mut [0; 1]).await.unwrap_or(0), 0);
        stop.cancel();
    }

    #[tokio::test]
    async fn a_session_keeps_no_more_connections_than_its_share() {
        let (addr, stop) = start().await;
        let mut kept = Vec::new();
        for number in 0..4 {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            assert_eq!(ask(&mut stream).await.contains("connection: close"), number >= 2);
            kept.push(stream);
        }
        kept.truncate(1);
        let ends = || async {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            !ask(&mut stream).await.contains("connection: close")
        };
        for _ in 0..100 {
            if ends().await {
                stop.cancel();
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        unreachable!("the share of a closed connection was not free again");
    }
}
