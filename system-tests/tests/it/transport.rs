//! Between runner and sandbox: sockets that are cut at any byte, and half-open ones.

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
use rustix::process::Signal;
use serde_json::json;
use system_tests::{Options, Stack};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// Stands between the runners and the Sprites API, and cuts execs.
struct Cutter {
    target: OnceLock<SocketAddr>,
    execs: AtomicUsize,
    cut: AtomicUsize,
    lost: AtomicUsize,
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
        // And some lose a part of what was printed, without a word.
        if number > 0 && number.is_multiple_of(3) {
            tokio::select! {
                _ = self.lose_frames(&mut from_server, &mut to_client) => {}
                _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
            }
            return;
        }
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

impl Cutter {
    /// Forwards a WebSocket but for some of its frames.
    async fn lose_frames(
        &self,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> std::io::Result<()> {
        let (mut from, mut upgrade) = (BufReader::new(from), Vec::new());
        while !upgrade.ends_with(b"\r\n\r\n") {
            upgrade.push(from.read_u8().await?);
        }
        to.write_all(&upgrade).await?;
        loop {
            // A server's frames are not masked: RFC 6455, section 5.2.
            let mut frame = vec![from.read_u8().await?, from.read_u8().await?];
            let (opcode, extended) = (
                frame[0] & 0x0f,
                match frame[1] {
                    126 => 2,
                    127 => 8,
                    _ => 0,
                },
            );
            let start = frame.len();
            frame.resize(start + extended, 0);
            from.read_exact(&mut frame[start..]).await?;
            let length = if extended == 0 {
                u64::from(frame[1])
            } else {
                frame[start..].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
            };
            let start = frame.len();
            frame.resize(start + usize::try_from(length).unwrap(), 0);
            from.read_exact(&mut frame[start..]).await?;
            if opcode == 2 && fastrand::u8(..8) == 0 {
                self.lost.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            to.write_all(&frame).await?;
        }
    }
}

#[tokio::test]
async fn no_output_is_lost_when_sockets_are_cut() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let cutter = Arc::new(Cutter {
        target: OnceLock::new(),
        execs: AtomicUsize::new(0),
        cut: AtomicUsize::new(0),
        lost: AtomicUsize::new(0),
    });
    let mut serving = JoinSet::new();
    serving.spawn(cutter.clone().serve(listener));
    let settings: &'static [(&str, &str)] =
        Box::leak(Box::new([("SPRITES_BASE_URL", &*url.leak())]));
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    let target = stack.ready_text("/sprites_url").strip_prefix("http://").unwrap().parse().unwrap();
    cutter.target.set(target).unwrap();
    let token = json!({ "value": stack.ready_text("/sprites_token") });
    assert_eq!(
        stack.call(Method::PUT, "/credentials/backend:sprites", Some(token)).await.unwrap().status,
        200
    );
    let lines = 900;
    let script = format!(
        "for i in $(seq {lines}); do echo line $i; [ $((i % 20)) = 0 ] && sleep 0.05; done; exit 9"
    );
    let sessions = join_all((0..4).map(|_| stack.session("shell", &script))).await;
    let expected: String = (1..=lines).map(|i| format!("line {i}\n")).collect();
    let judged = sessions.into_iter().map(Result::unwrap).map(|session| async {
        let session = session;
        let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
        let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
        assert!(output == expected, "{} bytes of {}", output.len(), expected.len());
        assert_eq!(events.last().unwrap()["code"], 9);
    });
    join_all(judged).await;
    let [execs, cut, lost] =
        [&cutter.execs, &cutter.cut, &cutter.lost].map(|count| count.load(Ordering::Relaxed));
    println!("{execs} execs, {cut} of them cut; {lost} frames of others lost");
    assert!(cut >= 8 && lost >= 3, "{cut} of {execs} were cut, {lost} frames lost");
}

/// As the real service does with Sprites that seem idle: everything in it stands still, and no
/// socket says so.
#[tokio::test]
async fn a_sprite_that_was_paused_for_long_continues() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let session = stack
        .session("shell", "for i in $(seq 60); do echo line $i; sleep 0.05; done; exit 4")
        .await
        .unwrap();
    let mut events = stack.stream(&session, 0).await.unwrap();
    let mut output = events.until_output("line 20\n").await.unwrap();
    let paused = inside_sprites(&stack);
    assert!(paused.len() > 3, "{paused:?}");
    Stack::signal(&paused, Signal::STOP);
    // Longer than the runner waits for a sign of life.
    tokio::time::sleep(Duration::from_secs(22)).await;
    Stack::signal(&paused, Signal::CONT);
    let rest = events.all().await.unwrap();
    output.extend(rest.iter().filter_map(|event| event["data"].as_str()));
    assert_eq!(output, (1..=60).map(|i| format!("line {i}\n")).collect::<String>());
    assert_eq!(rest.last().unwrap()["code"], 4);
    let log = std::fs::read_to_string(stack.data_dir().join("logs/sprite-runner-1.log")).unwrap();
    assert!(log.contains("fell silent"), "{log}");
}

/// The processes that run in the stack's sandboxes: those of the namespaces of what its runner
/// started there.
fn inside_sprites(stack: &Stack) -> Vec<u32> {
    let processes = || {
        std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<u32>().ok())
    };
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let servers = stack.pids("local-sprites");
    let parent = |pid: u32| -> Option<u32> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
    };
    let of_stack = |pid: u32| {
        std::iter::successors(Some(pid), |pid| parent(*pid).filter(|pid| *pid > 1))
            .any(|pid| servers.contains(&pid))
    };
    let own = namespace(std::process::id());
    let sandboxes: Vec<_> = processes()
        .filter(|pid| of_stack(*pid))
        .map(namespace)
        .filter(|it| it.is_some() && *it != own)
        .collect();
    processes().filter(|pid| sandboxes.contains(&namespace(*pid))).collect()
}

#[tokio::test]
async fn a_sprites_token_that_does_not_work_is_said_to_be_that() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let wrong = json!({ "value": "wrong-token-123" });
    assert_eq!(
        stack.call(Method::PUT, "/credentials/backend:sprites", Some(wrong)).await.unwrap().status,
        200
    );
    let session = stack.session("shell", "true").await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let message = events.last().unwrap()["message"].as_str().unwrap().to_owned();
    assert!(
        message.starts_with("Provisioning failed at create_sprite:")
            && message.contains("credentials"),
        "{message}"
    );
    assert!(!message.contains("wrong-token"));
}
