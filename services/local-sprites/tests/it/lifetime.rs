//! Sprites outlive their server, however it ends.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::Signal;
use serde_json::{Value, json};
use sprites::ExecRequest;

use crate::server::{Server, TOKEN, bash, said};

async fn call(server: &Server, method: reqwest::Method, path: &str, body: Value) -> (u16, String) {
    let url = format!("{}/v1/sprites/{path}", server.url());
    let response = sprites::http_client()
        .unwrap()
        .request(method, url)
        .bearer_auth(TOKEN)
        .json(&body)
        .send()
        .await
        .unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

#[tokio::test]
async fn processes_in_a_sprite_survive_a_kill_and_a_stop_of_the_server() {
    let mut server = Server::start(&[]).await;
    let sprite = server.sprite("survivor").await;
    bash(&sprite, "(setsid sh -c 'n=0; while true; do n=$((n+1)); echo $n >> ticks; sleep 0.05; done' >/dev/null 2>&1 &)").await;
    let service = json!({ "cmd": "sh", "args": ["-c", "n=0; while true; do n=$((n+1)); echo line $n; sleep 0.002; done"] });
    let (status, _) =
        call(&server, reqwest::Method::PUT, "survivor/services/counter?duration=100ms", service)
            .await;
    assert_eq!(status, 200);
    let pid = said(&sprite, "pgrep -f 'echo line' | head -1").await;
    for signal in [Signal::KILL, Signal::TERM, Signal::KILL, Signal::KILL, Signal::KILL] {
        server.end(signal).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        server.run().await;
        assert_eq!(
            said(&sprite, "pgrep -f 'echo line' | head -1").await,
            pid,
            "the service is the same process"
        );
        let before: u64 = said(&sprite, "tail -1 ticks").await.trim().parse().unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(
            said(&sprite, "tail -1 ticks").await.trim().parse::<u64>().unwrap() > before,
            "the daemon keeps running"
        );
    }
    let log = said(&sprite, "cut -d' ' -f2- /.sprite/logs/services/counter.log").await;
    let numbers: Vec<u64> =
        log.lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert!(
        numbers.len() > 20 && numbers.iter().zip(1..).all(|(number, expected)| *number == expected),
        "no line is lost: {log}"
    );
    // Ended with the server when that is what its user means.
    server.end(Signal::INT).await;
    server.run().await;
    assert_eq!(
        said(&sprite, "pgrep -fc 'ech[o] $n'; ls ticks").await,
        "0\nticks\n",
        "its programs end, its disk stays"
    );
}

/// Where a server notes that sandboxes work, by the Sprite of that name.
fn proof_of(server: &Server, sprite: &str) -> PathBuf {
    let sprites = fs::read_dir(server.data.path().join("sprites")).unwrap().flatten();
    let names = sprites.map(|entry| entry.file_name().into_string().unwrap());
    let id = |name: String| Some(name.strip_prefix(sprite)?.strip_prefix('.')?.to_owned());
    let id = names.into_iter().find_map(id).unwrap();
    let places = fs::read_dir("/run").unwrap().flatten().map(|entry| entry.path());
    let place = places.into_iter().find(|place| place.join(&id).exists()).unwrap();
    place.with_extension("proof")
}

#[tokio::test]
async fn a_server_that_starts_again_tries_no_sandbox_unless_one_failed_or_its_settings_changed() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut server = Server::start(&[("LOCAL_SPRITES_DISK_MB", "200")]).await;
    let sprite = server.sprite("proven").await;
    let proof = proof_of(&server, "proven");
    let written = |proof: &Path| fs::metadata(proof).unwrap().ino();
    let first = written(&proof);
    server.end(Signal::KILL).await;
    server.run().await;
    assert_eq!(written(&proof), first, "it was not tried again");
    assert_eq!(said(&sprite, "echo reached").await, "reached\n");
    assert_eq!(said(&server.sprite("new").await, "echo made").await, "made\n");

    server.end(Signal::KILL).await;
    server.set("LOCAL_SPRITES_MEMORY_MB", "512");
    server.run().await;
    let second = written(&proof);
    assert_ne!(second, first, "other settings are tried");

    // Ends what runs in it, so that the next command starts it again, from a disk that is broken.
    server.end(Signal::INT).await;
    server.run().await;
    assert_eq!(written(&proof), second);
    let sprites = fs::read_dir(server.data.path().join("sprites")).unwrap().flatten();
    for sprite in sprites.filter(|entry| entry.file_name().to_str().unwrap().starts_with("new.")) {
        fs::write(sprite.path().join("disk.img"), "no file system").unwrap();
    }
    let broken = server.client().sprite("new".parse().unwrap());
    let answer = said(&broken, "true").await;
    assert!(answer.contains("cannot be mounted") && !proof.exists(), "{answer}");
    server.end(Signal::KILL).await;
    server.run().await;
    assert!(proof.exists());
    assert_eq!(said(&sprite, "echo reached").await, "reached\n");
}

#[tokio::test]
async fn a_service_that_prints_a_lot_loses_and_doubles_no_line_when_the_server_is_killed() {
    const LINES: usize = 150_000;
    let mut server = Server::start(&[]).await;
    let sprite = server.sprite("printer").await;
    let service = json!({ "cmd": "sh", "args": ["-c", format!("seq 1 {LINES}; exec sleep 1000")] });
    let (status, _) =
        call(&server, reqwest::Method::PUT, "printer/services/burst?duration=1ms", service).await;
    assert_eq!(status, 200);
    for delay in [1, 20, 50, 100, 200].map(Duration::from_millis) {
        server.end(Signal::KILL).await;
        server.run().await;
        tokio::time::sleep(delay).await;
    }
    let log = "/.sprite/logs/services/burst.log";
    let last = format!("tail -1 {log}");
    testkit::eventually("the last line is logged", async || {
        said(&sprite, &last).await.ends_with(&format!(" {LINES}\n"))
    })
    .await;
    assert_eq!(
        said(&sprite, &format!("cut -d' ' -f3 {log} | diff - <(seq 1 {LINES}) | head -20")).await,
        ""
    );
}

#[tokio::test]
async fn a_service_that_prints_without_end_is_stopped_and_so_is_one_that_leaves_such_a_program_behind()
 {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("endless").await;
    let left_behind = "setsid yes left & exec sleep 1000";
    for (name, script) in [("yes", "exec yes"), ("parent", left_behind)] {
        let service = json!({ "cmd": "sh", "args": ["-c", script] });
        let (status, _) = call(
            &server,
            reqwest::Method::PUT,
            &format!("endless/services/{name}?duration=100ms"),
            service,
        )
        .await;
        assert_eq!(status, 200);
        let begun = std::time::Instant::now();
        let (status, told) = call(
            &server,
            reqwest::Method::POST,
            &format!("endless/services/{name}/stop?timeout=1s"),
            json!({}),
        )
        .await;
        assert!(status == 200 && told.contains("\"type\":\"stopped\""), "{name}: {told}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{name}: {:?}", begun.elapsed());
        let (_, state) =
            call(&server, reqwest::Method::GET, &format!("endless/services/{name}"), json!({}))
                .await;
        assert!(state.contains("\"status\":\"stopped\""), "{name}: {state}");
    }
    assert_eq!(said(&sprite, "pgrep -fc 'slee[p] 1000|exec ye[s]'").await, "0\n");
}

#[tokio::test]
async fn a_stop_does_not_wait_for_commands_and_their_clients_hear_no_false_exit() {
    let mut server = Server::start(&[]).await;
    let sprite = server.sprite("busy").await;
    let request = ExecRequest { argv: &["sleep", "1000"], ..ExecRequest::default() };
    let exec = sprite.exec(&request).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = std::time::Instant::now();
    server.end(Signal::TERM).await;
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert!(matches!(exec.finish().await, Err(sprites::Error::Interrupted)));
    server.run().await;
}

#[tokio::test]
async fn nothing_is_left_of_a_deleted_sprite() {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("gone").await;
    bash(&sprite, "(setsid sleep 4242 >/dev/null 2>&1 &)").await;
    server.client().delete(sprite.name()).await.unwrap();
    assert_eq!(server.status("/v1/sprites/gone").await, 404);
    let left = |dir: &Path| fs::read_dir(dir).unwrap().count();
    assert_eq!(left(&server.data.path().join("sprites")), 0);
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
    assert_eq!(lines.filter(|line| line.contains("4242")).count(), 0);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(server.data.path().to_str().unwrap()), "{mounts}");
}

#[tokio::test]
async fn a_checkpoint_is_whole_while_the_sprite_writes() {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("writer").await;
    // A writer that keeps two files equal, one behind the other.
    bash(&sprite, "(setsid sh -c 'n=0; while true; do n=$((n+1)); echo $n >> a; echo $n >> b; done' >/dev/null 2>&1 &)").await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (status, told) = call(&server, reqwest::Method::POST, "writer/checkpoint", json!({})).await;
    assert!(status == 200 && told.contains("Checkpoint v0 created"), "{told}");
    assert!(
        said(&sprite, "x=$(wc -l < a); sleep 0.2; y=$(wc -l < a); [ $y -gt $x ] && echo goes on")
            .await
            .contains("goes on")
    );
    let (_, told) =
        call(&server, reqwest::Method::POST, "writer/checkpoints/v0/restore", json!({})).await;
    assert!(told.contains("Restored to v0"), "{told}");
    let lines =
        said(&sprite, "echo $(( $(wc -l < a) - $(wc -l < b) )); seq 1 $(wc -l < a) | cmp - a")
            .await;
    assert!(["0\n", "1\n"].contains(&lines.as_str()), "{lines}");
}
