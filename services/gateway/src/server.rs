//! Connections: limits on their number and on the time that a client may take.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Request, State},
    http::{HeaderValue, header},
    middleware::Next,
    response::Response,
};
use futures::FutureExt as _;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::server::graceful::{GracefulConnection, GracefulShutdown};
use service::{
    Lifecycle,
    connection::{ConnectionLimits, serve_connection},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

/// A request's head has to be there within this time, and a connection without a request is closed
/// after it.
const HEAD_TIME_MAX: Duration = Duration::from_secs(30);
const HEAD_BYTES_MAX: usize = 64 * 1024;
const HEADERS_MAX: usize = 100;
/// After an accept that failed: for want of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What was the last to connect sends its request within this time, also on a busy machine.
const LAST_REQUESTS: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug)]
pub struct HttpLimits {
    /// Open connections; more wait to be accepted.
    pub connections: usize,
    /// How long a client may take nothing of what is sent to it. One that is cut so resumes by id
    /// (docs/api.md §7).
    pub write_timeout: Duration,
}

/// How a server shuts down.
#[derive(Clone)]
pub struct Shutdown {
    /// Says when the server is told to stop. Then it keeps answering and closes each connection
    /// after its answer, so that clients reconnect elsewhere.
    pub lifecycle: Lifecycle,
    /// How long it keeps answering.
    pub drain: Duration,
    /// No new requests are accepted; streams end, and clients resume them elsewhere.
    pub closing: CancellationToken,
}

impl Shutdown {
    async fn closed(&self) {
        self.lifecycle.stop_token().cancelled().await;
        // Ctrl-C skips the drain.
        if !self.lifecycle.was_interrupted() {
            tokio::time::sleep(self.drain).await;
        }
    }
}

/// Closes connections after their answer while the server shuts down.
pub async fn close_connections(
    State(shutdown): State<Shutdown>,
    request: Request<Body>,
    next: Next,
) -> Response {
    let mut response = next.run(request).await;
    if shutdown.lifecycle.stop_token().is_cancelled() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Serves until the end; then requests in flight are finished.
pub async fn serve(listener: TcpListener, router: Router, limits: HttpLimits, shutdown: Shutdown) {
    let mut closed = std::pin::pin!(shutdown.closed());
    let (slots, connections, graceful) =
        (Arc::new(Semaphore::new(limits.connections)), TaskTracker::new(), GracefulShutdown::new());
    let begin = |stream, addr, slot| {
        metrics::counter!("aod_http_connections_total").increment(1);
        let connection =
            graceful.watch(connection(stream, addr, router.clone(), limits.write_timeout));
        connections.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%addr, %error, "connection ended");
            }
            drop(slot);
        });
    };
    loop {
        let accepted = async {
            // The semaphore is never closed.
            let slot = slots.clone().acquire_owned().await.ok();
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            () = &mut closed => break,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok((stream, addr)) => begin(stream, addr, slot),
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    // A client's kernel has told it that these are connected.
    while let Some(Ok((stream, addr))) = listener.accept().now_or_never() {
        begin(stream, addr, None);
    }
    drop(listener);
    shutdown.closing.cancel();
    // The shutdown closes a connection that no request has come on.
    if !shutdown.lifecycle.was_interrupted() {
        tokio::time::sleep(LAST_REQUESTS).await;
    }
    graceful.shutdown().await;
    connections.close();
    connections.wait().await;
}

fn connection(
    stream: TcpStream,
    addr: SocketAddr,
    router: Router,
    write_timeout: Duration,
) -> impl GracefulConnection<Error = hyper::Error> {
    // Events leave at once.
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(addr));
        router.clone().oneshot(request.map(Body::new))
    });
    let limits = ConnectionLimits {
        head_time: HEAD_TIME_MAX,
        head_bytes: HEAD_BYTES_MAX,
        headers: HEADERS_MAX,
        write_time: write_timeout,
    };
    serve_connection(stream, limits, service)
}
