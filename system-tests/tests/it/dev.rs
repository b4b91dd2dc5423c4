//! `aod dev`: what it refuses, what it survives, and that it leaves nothing behind.

use std::process::{Command, Output};

use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::{Options, Stack};

fn dev(args: &[&str]) -> Output {
    Command::new(testkit::services::binary("aod").unwrap()).arg("dev").args(args).output().unwrap()
}

fn refusal(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

#[test]
fn start_up_errors_are_one_line() {
    let data = tempfile::tempdir().unwrap();
    let dir = data.path().to_str().unwrap();
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    assert!(
        refusal(&dev(&["--port", &port, "--data-dir", dir]))
            .contains(&format!("port {port} cannot be used"))
    );

    let aod = testkit::services::binary("aod").unwrap();
    let without_tools = Command::new(&aod)
        .args(["dev", "--port", "0", "--data-dir", dir])
        .env("PATH", "/nowhere")
        .output()
        .unwrap();
    assert!(refusal(&without_tools).contains("is not on PATH"));
    let old = data.path().join("nats-server");
    std::fs::write(&old, "#!/bin/sh\necho 'nats-server: v2.9.10'\n").unwrap();
    std::fs::set_permissions(&old, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let too_old = Command::new(&aod)
        .args(["dev", "--port", "0", "--data-dir", dir])
        .env("NATS_SERVER_BIN", &old)
        .output()
        .unwrap();
    assert!(refusal(&too_old).contains("is version 2.9.10; 2.12 or later is needed"));
}

/// Two of them, which would be in each other's way at any fixed port.
#[tokio::test]
async fn port_zero_chooses_a_free_port_and_reports_it() {
    let start = |data: &std::path::Path| {
        let mut aod = Command::new(testkit::services::binary("aod").unwrap());
        aod.args(["dev", "--port", "0", "--data-dir"])
            .arg(data)
            .arg("--ready-file")
            .arg(data.join("ready.json"));
        aod.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap()
    };
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut stacks = folders.each_ref().map(|data| start(data.path()));
    for data in &folders {
        let ready = || {
            std::fs::read(data.path().join("ready.json"))
                .ok()
                .and_then(|text| serde_json::from_slice::<Value>(&text).ok())
        };
        testkit::eventually("it is ready", || async { ready().is_some() }).await;
        let url = ready().unwrap()["api_url"].as_str().unwrap().to_owned();
        assert!(!url.ends_with(":0"), "{url}");
        assert_eq!(reqwest::get(format!("{url}/health")).await.unwrap().status(), 200);
    }
    for stack in &mut stacks {
        rustix::process::kill_process(rustix::process::Pid::from_child(stack), Signal::INT)
            .unwrap();
        assert!(stack.wait().unwrap().success());
    }
}

#[tokio::test]
async fn a_second_start_continues_with_the_data_and_a_stop_leaves_no_process() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let in_use = dev(&["--port", "0", "--data-dir", stack.data_dir().to_str().unwrap()]);
    assert!(refusal(&in_use).contains("is in use by another aod dev"));

    let session = stack.session("shell", "echo kept | tee ~/kept").await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let key = stack.ready_text("/api_key");
    let marker = stack.data_dir().to_str().unwrap().to_owned();
    let services = [
        "postgres",
        "nats",
        "auth",
        "credential-vault",
        "scheduler",
        "sprite-runner",
        "model-gateway",
        "gateway",
        "local-sprites",
    ];
    let pids: Vec<u32> = services.iter().flat_map(|service| stack.pids(service)).collect();
    assert_eq!(pids.len(), services.len());
    let data = stack.stop().unwrap();
    for pid in pids {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left");
    }
    assert_eq!(processes_of(&marker), Vec::<String>::new());

    let again = Stack::start_in(data, Options::default()).await.unwrap();
    assert_eq!(again.ready_text("/api_key"), key);
    assert_eq!(again.stream(&session, 0).await.unwrap().all().await.unwrap(), events);
    // The Sprite was put to sleep with the stack, and its conversation continues in it.
    let next = again
        .post(&format!("/sessions/{session}/prompt"), json!({ "prompt": "grep kept ~/kept" }))
        .await
        .unwrap();
    assert_eq!(next.status, 202, "{next:?}");
    let events = again
        .stream(&session, events.last().unwrap()["id"].as_u64().unwrap())
        .await
        .unwrap()
        .all()
        .await
        .unwrap();
    assert_eq!(events.last().unwrap()["code"], 0, "{events:?}");
}

#[tokio::test]
async fn processes_that_die_are_restarted_and_listed() {
    let stack = Stack::start(Options::default()).await.unwrap();
    for service in ["gateway", "nats", "postgres"] {
        let before = stack.pids(service);
        Stack::signal(&before, Signal::KILL);
        testkit::eventually(service, || async {
            let now = stack.pids(service);
            now.len() == 1 && now != before
        })
        .await;
    }
    testkit::eventually("all is well again", || async {
        stack.get("/health").await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
    let session = stack.session("shell", "echo after").await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    assert_eq!(events.last().unwrap()["code"], 0, "{events:?}");
}

#[tokio::test]
async fn the_children_of_a_killed_stack_end_with_it() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let marker = stack.data_dir().to_str().unwrap().to_owned();
    assert!(!processes_of(&marker).is_empty());
    Stack::signal(&[stack.pid()], Signal::KILL);
    testkit::eventually("no process is left", || async { processes_of(&marker).is_empty() }).await;
}

/// Command lines and environments that name a data directory.
fn processes_of(marker: &str) -> Vec<String> {
    let own = std::process::id().to_string();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let processes = processes.filter(|process| {
        process.file_name().to_str().is_some_and(|name| name != own && name.parse::<u32>().is_ok())
    });
    processes
        .filter_map(|process| {
            let read = |file: &str| std::fs::read(process.path().join(file)).unwrap_or_default();
            let (line, env) = (read("cmdline"), read("environ"));
            let names = |bytes: &[u8]| {
                bytes.windows(marker.len()).any(|window| window == marker.as_bytes())
            };
            (names(&line) || names(&env)).then(|| String::from_utf8_lossy(&line).replace('\0', " "))
        })
        .collect()
}

#[tokio::test]
async fn sandboxes_leave_no_mounts_behind() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let marker = stack.data_dir().to_str().unwrap().to_owned();
    let mounts = || {
        std::fs::read_to_string("/proc/mounts")
            .unwrap()
            .lines()
            .filter(|line| line.contains(&marker))
            .count()
    };
    let session = stack.session("shell", "touch /usr/changed-by-a-test; true").await.unwrap();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    assert_eq!(events.last().unwrap()["code"], 0, "{events:?}");
    assert!(!std::path::Path::new("/usr/changed-by-a-test").exists());
    assert_eq!(mounts(), 0);
    // Stopped in the midst of things.
    for _ in 0..3 {
        stack.session("shell", "sleep 100").await.unwrap();
    }
    drop(stack.stop().unwrap());
    assert_eq!(processes_of(&marker), Vec::<String>::new());
}
