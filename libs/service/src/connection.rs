//! HTTP/1 connections, with limits on what one client may use.

use std::{error::Error, pin::Pin, time::Duration};

use hyper::{
    Request, Response,
    body::{Body, Incoming},
    server::conn::http1,
    service::Service,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_io_timeout::TimeoutStream;

/// Limits of a connection.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// Time within which a request's head must arrive; a connection without a request is closed
    /// after it.
    pub head_time: Duration,
    pub head_bytes: usize,
    pub headers: usize,
    /// How long a client may read nothing of what is sent to it.
    pub write_time: Duration,
}

/// Serves HTTP/1 on a connection.
pub fn serve_connection<I, S, B>(
    stream: I,
    limits: ConnectionLimits,
    service: S,
) -> http1::Connection<TokioIo<Pin<Box<TimeoutStream<I>>>>, S>
where
    I: AsyncRead + AsyncWrite,
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(limits.write_time));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_time)
        .max_buf_size(limits.head_bytes)
        .max_headers(limits.headers)
        .serve_connection(TokioIo::new(Box::pin(stream)), service)
}
