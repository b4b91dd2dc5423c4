//! Heads of the requests that a proxy reads, and its own answers.

use std::io;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const HEAD_BYTES_MAX: usize = 32 * 1024;

/// What is asked of a proxy.
#[derive(Debug, PartialEq, Eq)]
pub struct Asked {
    pub host: String,
    pub port: u16,
    /// The head as the server gets it; none where a tunnel is wanted.
    pub forward: Option<Vec<u8>>,
}

/// The head of a request, and what came behind it.
pub async fn read_head(client: &mut TcpStream) -> io::Result<Option<(Asked, Vec<u8>)>> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            return Ok(parse_head(&bytes).map(|asked| (asked, rest)));
        }
        if bytes.len() > HEAD_BYTES_MAX || client.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
    }
}

fn parse_head(head: &[u8]) -> Option<Asked> {
    let head = std::str::from_utf8(head).ok()?;
    let (first, headers) = head.split_once("\r\n")?;
    let [method, target, version] = first.split(' ').collect::<Vec<_>>().try_into().ok()?;
    if method == "CONNECT" {
        let (host, port) = target.rsplit_once(':')?;
        return Some(Asked { host: host.to_owned(), port: port.parse().ok()?, forward: None });
    }
    let url = target.strip_prefix("http://")?;
    let (authority, path) = url.find('/').map_or((url, "/"), |slash| url.split_at(slash));
    let authority = authority.rsplit_once('@').map_or(authority, |(_, authority)| authority);
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
            (host, port.parse().ok()?)
        }
        _ => (authority, 80),
    };
    // One request for each connection: the next may be for another host.
    let kept = headers.split("\r\n").filter(|line| {
        let name = line.split(':').next().unwrap_or_default().to_ascii_lowercase();
        !line.is_empty()
            && !["connection", "proxy-connection", "proxy-authorization", "keep-alive"]
                .contains(&name.as_str())
    });
    let lines: Vec<String> =
        [format!("{method} {path} {version}")].into_iter().chain(kept.map(str::to_owned)).collect();
    let forward = format!("{}\r\nConnection: close\r\n\r\n", lines.join("\r\n"));
    Some(Asked { host: host.to_owned(), port, forward: Some(forward.into_bytes()) })
}

pub async fn answer(client: &mut TcpStream, status: &str, why: &str) -> io::Result<()> {
    let body = format!("{why}\n");
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    client.write_all(format!("{head}{body}").as_bytes()).await?;
    client.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_to_a_proxy_are_read() {
        let connect =
            parse_head(b"CONNECT api.x.org:443 HTTP/1.1\r\nHost: api.x.org\r\n\r\n").unwrap();
        assert_eq!(connect, Asked { host: "api.x.org".to_owned(), port: 443, forward: None });
        let get =
            parse_head(b"GET http://u:p@x.org:81/a?b HTTP/1.1\r\nHost: x.org\r\nProxy-Connection: keep-alive\r\nA: 1\r\n\r\n").unwrap();
        assert_eq!((get.host.as_str(), get.port), ("x.org", 81));
        let head = String::from_utf8(get.forward.unwrap()).unwrap();
        assert_eq!(head, "GET /a?b HTTP/1.1\r\nHost: x.org\r\nA: 1\r\nConnection: close\r\n\r\n");
        for bad in [
            "",
            "GET / HTTP/1.1\r\n\r\n",
            "CONNECT x HTTP/1.1\r\n\r\n",
            "CONNECT x:99999 HTTP/1.1\r\n\r\n",
            "\u{fffd}\r\n\r\n",
        ] {
            assert_eq!(parse_head(bad.as_bytes()), None, "{bad:?}");
        }
    }
}
