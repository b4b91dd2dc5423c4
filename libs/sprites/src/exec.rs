//! Exec over WebSocket, without a terminal (docs/sprites-api.md §3): binary frames with a stream
//! byte, JSON text frames for control.

use std::time::Duration;

use bytes::Bytes;
use futures::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use reqwest::StatusCode;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{
        self, Message, client::IntoClientRequest as _, http::HeaderValue, protocol::WebSocketConfig,
    },
};
use types::SpriteName;
use url::form_urlencoded;

use crate::{Error, error::retry_after};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(20);
const KEPT_BYTES: usize = 64 * 1024;
/// In front of bytes for standard input.
const STDIN: u8 = 0;
const STDIN_BYTES: usize = 64 * 1024;

/// A command: an argument vector, no shell.
#[derive(Clone, Debug, Default)]
pub struct ExecRequest<'a> {
    pub argv: &'a [&'a str],
    /// Absolute; the Sprite's home where empty.
    pub dir: &'a str,
    /// How long the command may keep running when its connection is lost; the server's default
    /// where none.
    pub max_run_after_disconnect: Option<Duration>,
    /// Whether the command reads what [`ExecInput::send`] sends; else it finds its standard input
    /// empty.
    pub stdin: bool,
}

/// An event of a running command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    Stdout(Bytes),
    Stderr(Bytes),
    Exit(u8),
}

/// The result of a command, with only the newest 64 KiB of each stream. Read complete output from a
/// file.
#[derive(Clone, Debug)]
pub struct Finished {
    pub code: u8,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// The connection of a running command. After it is dropped, `max_run_after_disconnect` applies.
pub struct Exec {
    output: ExecOutput,
    input: ExecInput,
}

/// Output and exit of a command.
pub struct ExecOutput {
    socket: SplitStream<Socket>,
}

/// Input of a command.
pub struct ExecInput {
    socket: SplitSink<Socket, Message>,
}

impl Exec {
    pub(crate) async fn connect(
        base_url: &str,
        token: &SecretString,
        name: &SpriteName,
        request: &ExecRequest<'_>,
    ) -> Result<Self, Error> {
        let url = format!(
            "{}/v1/sprites/{name}/exec?{}",
            base_url.replacen("http", "ws", 1),
            query(request)
        );
        let refused = |what: &str| Error::Transport(what.to_owned());
        let mut handshake =
            url.into_client_request().map_err(|_| refused("the request cannot be made"))?;
        let bearer = format!("Bearer {}", token.expose_secret());
        let mut bearer = HeaderValue::from_str(&bearer)
            .map_err(|_| refused("the token cannot be sent in a header"))?;
        bearer.set_sensitive(true);
        handshake.headers_mut().insert("authorization", bearer);
        let config = WebSocketConfig::default().max_message_size(Some(16 << 20));
        // Boxed: a TLS handshake's state is large, and so would be every future around it.
        let connect =
            Box::pin(tokio_tungstenite::connect_async_with_config(handshake, Some(config), true));
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, connect).await {
            Ok(Ok((socket, _))) => {
                let (sink, stream) = socket.split();
                Ok(Self {
                    output: ExecOutput { socket: stream },
                    input: ExecInput { socket: sink },
                })
            }
            Ok(Err(tungstenite::Error::Http(response))) => {
                let status = StatusCode::from_u16(response.status().as_u16())
                    .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                let body =
                    response.body().as_deref().map(String::from_utf8_lossy).unwrap_or_default();
                Err(Error::from_status(status, &body, retry_after(response.headers())))
            }
            Ok(Err(tungstenite::Error::Io(error))) => Err(Error::Transport(error.to_string())),
            Ok(Err(_)) => Err(refused("the WebSocket handshake failed")),
            Err(_) => Err(Error::Timeout),
        }
    }

    /// As [`ExecOutput::next`].
    ///
    /// # Errors
    /// As [`ExecOutput::next`].
    pub async fn next(&mut self) -> Result<ExecEvent, Error> {
        self.output.next().await
    }

    /// Both directions, for use side by side.
    #[must_use]
    pub fn split(self) -> (ExecOutput, ExecInput) {
        (self.output, self.input)
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// As [`ExecOutput::next`].
    pub async fn finish(mut self) -> Result<Finished, Error> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next().await? {
                ExecEvent::Stdout(data) => keep_newest(&mut stdout, &data),
                ExecEvent::Stderr(data) => keep_newest(&mut stderr, &data),
                ExecEvent::Exit(code) => {
                    self.input.close().await;
                    return Ok(Finished { code, stdout, stderr });
                }
            }
        }
    }
}

impl ExecOutput {
    /// The next event. After [`ExecEvent::Exit`] there is no other.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when the connection ends without an exit status: never taken for
    /// success.
    pub async fn next(&mut self) -> Result<ExecEvent, Error> {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Binary(frame))) => match frame.first() {
                    Some(1) => return Ok(ExecEvent::Stdout(frame.slice(1..))),
                    Some(2) => return Ok(ExecEvent::Stderr(frame.slice(1..))),
                    Some(3) => return Ok(ExecEvent::Exit(frame.get(1).copied().unwrap_or(0))),
                    _ => {}
                },
                // Control frames and pings; unknown ones are to be ignored.
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Error::Interrupted),
                Some(Ok(_)) => {}
            }
        }
    }
}

impl ExecInput {
    /// Sends bytes to the command's standard input; waits while the command does not read.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when the connection is lost.
    pub async fn send(&mut self, data: &[u8]) -> Result<(), Error> {
        for part in data.chunks(STDIN_BYTES) {
            let frame = [&[STDIN], part].concat();
            self.socket
                .send(Message::Binary(frame.into()))
                .await
                .map_err(|_| Error::Interrupted)?;
        }
        Ok(())
    }

    /// Closes the connection without waiting for the server.
    pub async fn close(mut self) {
        let _ = tokio::time::timeout(Duration::from_secs(1), self.socket.close()).await;
    }
}

fn keep_newest(kept: &mut Vec<u8>, data: &[u8]) {
    kept.extend_from_slice(data);
    let excess = kept.len().saturating_sub(KEPT_BYTES);
    kept.drain(..excess);
}

fn query(request: &ExecRequest<'_>) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    for arg in request.argv {
        query.append_pair("cmd", arg);
    }
    if let Some(executable) = request.argv.first() {
        query.append_pair("path", executable);
    }
    if !request.dir.is_empty() {
        query.append_pair("dir", request.dir);
    }
    if let Some(limit) = request.max_run_after_disconnect {
        query.append_pair("max_run_after_disconnect", &format!("{}s", limit.as_secs()));
    }
    query.append_pair("stdin", if request.stdin { "true" } else { "false" });
    query.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_query_equals_that_of_the_sdks() {
        let request = ExecRequest {
            argv: &["ok", "a b"],
            dir: "/w d",
            max_run_after_disconnect: Some(Duration::from_secs(1)),
            stdin: false,
        };
        assert_eq!(
            query(&request),
            "cmd=ok&cmd=a+b&path=ok&dir=%2Fw+d&max_run_after_disconnect=1s&stdin=false"
        );
    }
}
