//! Connections to a Sprite's ports, and the list of ports (docs/sprites-api.md §10, §6).

use std::{collections::BTreeSet, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    body::Bytes,
    extract::{
        Path, State,
        ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade},
    },
    response::Response,
};
use bytes::BytesMut;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{Api, ErrorResponse};
use crate::{
    isolation::holder::Holder,
    network::{
        namespace::connect_inside,
        ports::{self, Port},
    },
    sprites::sprite::Sprite,
};

/// How long a client has to say where to, and a port to answer.
const CONNECT_MAX: Duration = Duration::from_secs(10);
const CHUNK_BYTES: usize = 64 * 1024;
/// How often the ports are looked at for a client that watches them.
const CHECK: Duration = Duration::from_millis(500);
const KEEPALIVE: Duration = Duration::from_secs(15);

pub async fn proxy(
    State(api): State<Api>,
    Path(name): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, ErrorResponse> {
    let sprite = api.registry.get(&name)?;
    let holder = api.registry.wake(&sprite).await?;
    let connection = sprite.connect();
    Ok(upgrade.on_upgrade(move |mut socket| async move {
        let _connection = connection;
        match connect(&mut socket, holder).await {
            Ok((stream, target)) => {
                let connected = json!({ "status": "connected", "target": target.to_string() });
                if socket.send(Message::text(connected.to_string())).await.is_ok() {
                    let _ = carry(&mut socket, stream).await;
                }
            }
            Err(error) => {
                let failed = json!({ "status": "error", "error": error.to_string() });
                let _ = socket.send(Message::text(failed.to_string())).await;
            }
        }
        let _ =
            socket.send(Message::Close(Some(CloseFrame { code: 1000, reason: "".into() }))).await;
    }))
}

/// Connects where the client's first message says, from inside of the Sprite.
async fn connect(socket: &mut WebSocket, holder: Holder) -> io::Result<(TcpStream, SocketAddr)> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why.to_owned());
    let first = tokio::time::timeout(CONNECT_MAX, socket.recv()).await;
    let Ok(Some(Ok(Message::Text(asked)))) = first else {
        return Err(invalid("where to is expected"));
    };
    let asked: Value = serde_json::from_str(&asked).map_err(|_| invalid("where to is JSON"))?;
    let host = asked
        .get("host")
        .and_then(Value::as_str)
        .filter(|host| !host.is_empty())
        .unwrap_or("localhost")
        .to_owned();
    let port = asked.get("port").and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok());
    let port = port.ok_or_else(|| invalid("port is required"))?;
    let dial = async {
        if !holder.has_own_network() {
            return TcpStream::connect((host.as_str(), port)).await;
        }
        // Names are of no use where there is nothing but the Sprite itself.
        let host = if host == "localhost" { "127.0.0.1".to_owned() } else { host };
        let address: SocketAddr = format!("{host}:{port}")
            .parse()
            .map_err(|_| invalid("this Sprite reaches itself only"))?;
        connect_inside(holder.process.pid, address).await
    };
    let stream = tokio::time::timeout(CONNECT_MAX, dial)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    stream.set_nodelay(true)?;
    let target = stream.peer_addr()?;
    Ok((stream, target))
}

/// Both ways, until one side ends.
async fn carry(socket: &mut WebSocket, mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = BytesMut::with_capacity(CHUNK_BYTES);
    let mut keepalive = tokio::time::interval(KEEPALIVE);
    loop {
        let message = tokio::select! {
            read = stream.read_buf(&mut buffer) => match read? {
                0 => return Ok(()),
                _ => Message::Binary(buffer.split().freeze()),
            },
            message = socket.recv() => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    stream.write_all(&bytes).await?;
                    continue;
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return stream.shutdown().await,
                Some(Ok(_)) => continue,
            },
            _ = keepalive.tick() => Message::Ping(Bytes::new()),
        };
        buffer.reserve(CHUNK_BYTES);
        if socket.send(message).await.is_err() {
            return Ok(());
        }
    }
}

pub async fn watch_ports(
    State(api): State<Api>,
    Path(name): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, ErrorResponse> {
    let sprite = api.registry.get(&name)?;
    Ok(upgrade.on_upgrade(move |mut socket| async move {
        tell_ports(&mut socket, sprite).await;
        let _ = socket.send(Message::Close(None)).await;
    }))
}

fn describe(kind: &str, port: &Port) -> Value {
    json!({ "type": kind, "port": port.port, "address": port.address.to_string(), "pid": port.pid })
}

/// All ports once, then each that is opened or closed.
async fn tell_ports(socket: &mut WebSocket, sprite: Arc<Sprite>) {
    let look = || {
        let sprite = sprite.clone();
        async move {
            let look = move || sprite.holder().map(ports::listening).unwrap_or_default();
            tokio::task::spawn_blocking(look).await.unwrap_or_default()
        }
    };
    let mut known: BTreeSet<Port> = look().await;
    let list = json!({ "type": "port_list", "ports": known.iter().map(|port| describe("port_opened", port)).collect::<Vec<_>>() });
    let mut messages = vec![Message::text(list.to_string())];
    let (mut check, mut keepalive) =
        (tokio::time::interval(CHECK), tokio::time::interval(KEEPALIVE));
    loop {
        for message in messages {
            if socket.send(message).await.is_err() {
                return;
            }
        }
        messages = tokio::select! {
            _ = check.tick() => {
                let now = look().await;
                let opened = now.difference(&known).map(|port| describe("port_opened", port));
                let closed = known.difference(&now).map(|port| describe("port_closed", port));
                let told = closed.chain(opened).map(|change| Message::text(change.to_string())).collect();
                known = now;
                told
            }
            _ = keepalive.tick() => vec![Message::Ping(Bytes::new())],
            message = socket.recv() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => Vec::new(),
            },
        };
    }
}
