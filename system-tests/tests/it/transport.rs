//! Between runner and sandbox: sockets that are cut at any byte, and sockets that nobody closes and nothing comes through.

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use reqwest::Method;
use serde_json::json;
use system_tests::{Options, Stack};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// Stands between the runners and the Sprites API, and cuts execs.
struct Cutter {
    target: OnceLock<SocketAddr>,
    execs: AtomicUsize,
    cut: AtomicUsize,
}

impl Cutter {
    async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut relays = JoinSet::new();
        while let Ok((client, _)) = listener.accept().await {
            relays.spawn(self.clone().relay(client));
        }
    }

    async fn relay(self: Arc<Self>, mut client: TcpStream) {
        let Some(target) = self.target.get() else { return };
        let Ok(mut server) = TcpStream::connect(target).await else { return };
        let mut head = vec![0; 16 * 1024];
        let Ok(count) = client.read(&mut head).await else { return };
        let is_exec = head[..count].windows(6).any(|bytes| bytes == b"/exec?");
        if server.write_all(&head[..count]).await.is_err() {
            return;
        }
        if !is_exec {
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            return;
        }
        let number = self.execs.fetch_add(1, Ordering::Relaxed);
        // The first one goes silent without being closed; of the others most are cut at some byte.
        let allowance = if number == 0 { 700 } else { fastrand::usize(1..6000) };
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        let down = async {
            let (mut left, mut buffer) = (allowance, vec![0; 4096]);
            loop {
                let count = from_server.read(&mut buffer).await.unwrap_or(0);
                if count == 0 {
                    return;
                }
                let forwarded = count.min(left);
                if to_client.write_all(&buffer[..forwarded]).await.is_err() {
                    return;
                }
                left -= forwarded;
                if left == 0 {
                    self.cut.fetch_add(1, Ordering::Relaxed);
                    if number == 0 {
                        tokio::time::sleep(Duration::from_secs(60)).await;
                    }
                    return;
                }
            }
        };
        tokio::select! {
            () = down => {}
            _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
        }
    }
}

#[tokio::test]
async fn whatever_becomes_of_the_sockets_the_spool_wins() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let cutter = Arc::new(Cutter { target: OnceLock::new(), execs: AtomicUsize::new(0), cut: AtomicUsize::new(0) });
    let mut serving = JoinSet::new();
    serving.spawn(cutter.clone().serve(listener));
    let settings: &'static [(&str, &str)] = Box::leak(Box::new([("SPRITES_BASE_URL", &*url.leak())]));
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    let target = stack.ready_text("/sprites_url").strip_prefix("http://").unwrap().parse().unwrap();
    cutter.target.set(target).unwrap();
    let token = json!({ "value": stack.ready_text("/sprites_token") });
    assert_eq!(stack.call(Method::PUT, "/credentials/backend:sprites", Some(token)).await.unwrap().status, 200);
    let lines = 1500;
    let script = format!("for i in $(seq {lines}); do echo line $i; [ $((i % 20)) = 0 ] && sleep 0.05; done; exit 9");
    let sessions = join_all((0..6).map(|_| stack.session("shell", &script))).await;
    let expected: String = (1..=lines).map(|i| format!("line {i}\n")).collect();
    let judged = sessions.into_iter().map(Result::unwrap).map(|session| async {
        let session = session;
        let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
        let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
        assert!(output == expected, "{} bytes of {}", output.len(), expected.len());
        assert_eq!(events.last().unwrap()["code"], 9);
    });
    join_all(judged).await;
    let (execs, cut) = (cutter.execs.load(Ordering::Relaxed), cutter.cut.load(Ordering::Relaxed));
    println!("{execs} execs, {cut} of them cut");
    assert!(cut >= 12, "{cut} of {execs} were cut");
}

#[tokio::test]
async fn a_sprites_token_that_does_not_work_is_said_to_be_that() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let wrong = json!({ "value": "wrong-token-123" });
    assert_eq!(stack.call(Method::PUT, "/credentials/backend:sprites", Some(wrong)).await.unwrap().status, 200);
    let session = stack.session("shell", "true").await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let message = events.last().unwrap()["message"].as_str().unwrap().to_owned();
    assert!(message.starts_with("Provisioning failed at create_sprite:") && message.contains("credentials"), "{message}");
    assert!(!message.contains("wrong-token"));
}
