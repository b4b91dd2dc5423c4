//! A small HTTP/1.1 client: to a CLI's server on the loopback interface, and to the sandbox's task
//! API. Each request has a thread of its own, which ends with its answer or its time limit.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::mpsc::SyncSender,
    time::Duration,
};

use crate::http::{Reply, Request};

const TIMEOUT: Duration = Duration::from_secs(60);
/// Servers send a heartbeat more often than this.
const STREAM_TIMEOUT: Duration = Duration::from_secs(90);
const BODY_BYTES_MAX: u64 = 32 << 20;
const TASK: &str = "/v1/tasks/aod";

/// Where replies go; `wake` is written to after each.
pub struct Replies {
    pub sender: SyncSender<Reply>,
    pub wake: OwnedFd,
}

impl Replies {
    fn tell(&self, reply: Reply) {
        // The host is ending where no one receives.
        let _ = self.sender.send(reply);
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    // A thread that cannot be started is a request without an answer: adapters have time limits
    // above them.
    let _ = std::thread::Builder::new().name(name.to_owned()).stack_size(256 << 10).spawn(work);
}

pub fn send(request: Request, replies: Replies) {
    spawn("http", move || {
        let tag = request.tag.clone();
        match exchange(&request, &replies) {
            Ok(reply) => replies.tell(reply),
            Err(error) => replies.tell(Reply::Failed { tag, message: error.to_string() }),
        }
    });
}

fn exchange(request: &Request, replies: &Replies) -> io::Result<Reply> {
    let mut stream =
        TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, request.port).into(), TIMEOUT)?;
    stream.set_read_timeout(Some(if request.stream { STREAM_TIMEOUT } else { TIMEOUT }))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let body = request.body.as_deref().unwrap_or_default();
    let authorization = if request.password.is_empty() {
        String::new()
    } else {
        format!(
            "Authorization: Basic {}\r\n",
            base64(format!("opencode:{}", request.password).as_bytes())
        )
    };
    let head = format!(
        "{} {} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{authorization}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        request.method,
        request.path,
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    let mut reader = BufReader::new(stream);
    let (status, chunked, length) = read_head(&mut reader)?;
    let mut body: Box<dyn BufRead> = match (chunked, length) {
        (true, _) => Box::new(BufReader::new(Chunks { reader, left: 0, done: false })),
        (false, Some(length)) => Box::new(reader.take(length)),
        (false, None) => Box::new(reader),
    };
    let tag = request.tag.clone();
    if request.stream && status == 200 {
        read_events(&mut body, |data| replies.tell(Reply::Event { tag: tag.clone(), data }))?;
        return Err(io::Error::other("the stream of events ended"));
    }
    let mut text = Vec::new();
    body.take(BODY_BYTES_MAX).read_to_end(&mut text)?;
    Ok(Reply::Answer { tag, status, body: String::from_utf8_lossy(&text).into_owned() })
}

/// Status, whether the body is chunked, and its length.
fn read_head(reader: &mut impl BufRead) -> io::Result<(u16, bool, Option<u64>)> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| io::Error::other("the answer is not HTTP"))?;
    let (mut chunked, mut length) = (false, None);
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else {
            return Ok((status, chunked, length));
        };
        if name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = value.to_ascii_lowercase().contains("chunked");
        } else if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().ok();
        }
    }
}

/// The body of a chunked answer.
struct Chunks<R> {
    reader: R,
    left: u64,
    done: bool,
}

impl<R: BufRead> Read for Chunks<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 && !self.done {
            let mut line = String::new();
            if self.reader.read_line(&mut line)? == 0 {
                self.done = true;
            } else if !line.trim().is_empty() {
                let size = line.trim().split(';').next().unwrap_or_default();
                self.left = u64::from_str_radix(size, 16)
                    .map_err(|_| io::Error::other("a chunk has no size"))?;
                self.done = self.left == 0;
            }
        }
        let bytes = (&mut self.reader).take(self.left).read(buffer)?;
        self.left -= bytes as u64;
        Ok(bytes)
    }
}

/// The data of each server-sent event; a field's lines are joined.
fn read_events(reader: &mut impl BufRead, mut tell: impl FnMut(String)) -> io::Result<()> {
    let (mut line, mut data) = (String::new(), String::new());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let text = line.trim_end_matches(['\r', '\n']);
        if text.is_empty() {
            if !data.is_empty() {
                tell(std::mem::take(&mut data));
            }
        } else if let Some(more) = text.strip_prefix("data:") {
            if !data.is_empty() {
                data.push('\n');
            }
            data.push_str(more.strip_prefix(' ').unwrap_or(more));
        }
    }
}

/// Keeps the sandbox awake for five minutes.
pub fn stay_awake(socket: &str) {
    task(socket, "PUT", r#"{"expire":"5m"}"#);
}

pub fn let_sleep(socket: &str) {
    task(socket, "DELETE", "");
}

fn task(socket: &str, method: &'static str, body: &'static str) {
    let socket = socket.to_owned();
    spawn("awake", move || {
        let call = || -> io::Result<()> {
            let mut stream = UnixStream::connect(&socket)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.set_write_timeout(Some(Duration::from_secs(5)))?;
            let length = body.len();
            let head = format!(
                "{method} {TASK} HTTP/1.1\r\nHost: sprite\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
            );
            stream.write_all(head.as_bytes())?;
            stream.take(4096).read_to_end(&mut Vec::new())?;
            Ok(())
        };
        // Tried again in a minute; the sandbox stays awake for five.
        let _ = call();
    });
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let group = chunk
            .iter()
            .enumerate()
            .fold(0_u32, |group, (index, byte)| group | u32::from(*byte) << (16 - 8 * index));
        for index in 0..4 {
            let letter = ALPHABET
                .get((group >> (18 - 6 * index)) as usize & 63)
                .copied()
                .unwrap_or_default();
            text.push(if index <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunked_events_are_read_however_they_are_cut() {
        let body = "data: {\"a\":1}\n\ndata: two\ndata: lines\n\n: comment\n\ndata: cut off";
        for size in 1..body.len() {
            let chunks = body.as_bytes().chunks(size).map(|chunk| {
                [format!("{:x}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat()
            });
            let text = [
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec(),
                chunks.collect::<Vec<_>>().concat(),
                b"0\r\n\r\n".to_vec(),
            ]
            .concat();
            let mut reader = BufReader::new(text.as_slice());
            let (status, chunked, _) = read_head(&mut reader).unwrap();
            assert!(status == 200 && chunked);
            let mut events = Vec::new();
            read_events(&mut BufReader::new(Chunks { reader, left: 0, done: false }), |data| {
                events.push(data)
            })
            .unwrap();
            assert_eq!(events, ["{\"a\":1}", "two\nlines"]);
        }
    }

    #[test]
    fn base64_is_padded() {
        assert_eq!(
            ["", "f", "fo", "foo", "foob"].map(|text| base64(text.as_bytes())),
            ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg=="]
        );
    }
}
