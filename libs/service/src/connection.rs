//! HTTP/1 connections, with limits on what one client may use.

use std::{error::Error, pin::Pin, time::Duration};

use hyper::{
    HeaderMap, Request, Response,
    body::{Body, Incoming},
    header,
    server::conn::http1,
    service::Service,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_io_timeout::TimeoutStream;

/// Headers that concern one connection alone (RFC 9110, 7.6.1), and `Expect`, which a proxy answers.
pub const HOP_BY_HOP: [&str; 10] = [
    "connection",
    "expect",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The names of headers that a proxy does not pass on with these: [`HOP_BY_HOP`], and those that
/// `Connection` names, but for the two that say where a request goes and where a body ends.
pub fn hop_by_hop(headers: &HeaderMap) -> Vec<String> {
    let connection = headers.get_all(header::CONNECTION).iter();
    let named = connection
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .filter(|name| !["host", "content-length"].contains(&name.as_str()));
    HOP_BY_HOP.into_iter().map(str::to_owned).chain(named).collect()
}

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

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn a_client_names_what_is_of_its_connection_but_not_where_a_request_goes() {
        let mut headers = HeaderMap::new();
        for value in ["Close, X-Own", "host,content-length", "\u{e4}"] {
            headers.append(header::CONNECTION, HeaderValue::from_str(value).unwrap());
        }
        let dropped = hop_by_hop(&headers);
        assert_eq!(dropped[HOP_BY_HOP.len()..], ["close", "x-own"]);
        assert!(dropped.iter().any(|name| name == "transfer-encoding"));
    }
}
