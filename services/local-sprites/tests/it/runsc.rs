//! Sandboxes with a kernel of their own: gVisor, where `runsc` is installed.

use std::{fs, time::Duration};

use serde_json::{Value, json};
use sprites::ExecRequest;

use crate::server::{Server, TOKEN, bash, said};

/// The first release whose kernel runs the programs of our root file system is later than Debian
/// 12's.
const OLDEST_RELEASE: u32 = 20_230_501;

/// Whether a `runsc` is there that can be used.
fn is_there() -> bool {
    let version = std::process::Command::new("runsc").arg("--version").output();
    let text = version
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let release = text
        .split(|c: char| !c.is_ascii_digit())
        .find(|part| part.len() == 8)
        .and_then(|part| part.parse::<u32>().ok());
    let usable = release.is_some_and(|release| release >= OLDEST_RELEASE);
    if !usable {
        eprintln!("skipped: no runsc of {OLDEST_RELEASE} or later is installed");
    }
    usable
}

async fn call(server: &Server, method: &str, path: &str, body: &Value) -> (u16, String) {
    let url = format!("{}/v1/sprites/{path}", server.url());
    let request = sprites::http_client()
        .unwrap()
        .request(method.parse().unwrap(), url)
        .bearer_auth(TOKEN)
        .json(body);
    let response = request.send().await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

#[tokio::test]
async fn a_sprite_runs_on_a_kernel_of_its_own() {
    if !is_there() {
        return;
    }
    let secret = tempfile::Builder::new().prefix("host-secret").tempdir_in("/tmp").unwrap();
    fs::write(secret.path().join("file"), "the host's").unwrap();
    let mut server = Server::start(&[
        ("LOCAL_SPRITES_RUNTIME", "runsc"),
        ("LOCAL_SPRITES_FREEZE_AFTER_S", "20"),
    ])
    .await;
    let sprite = server.sprite("guest").await;
    assert_eq!(said(&sprite, "uname -r; id -u; pwd; exit 7").await, "4.4.0\n1001\n/home/sprite\n");
    assert_eq!(bash(&sprite, "exit 7").await.code, 7);
    assert_eq!(bash(&sprite, "kill -9 $$").await.code, 137);
    let missing = ExecRequest { argv: &["no-such-program"], ..ExecRequest::default() };
    assert_eq!(sprite.run(&missing, Duration::from_secs(30)).await.unwrap().code, 127);

    // Files, both ways, also in the directory that gVisor would keep in its memory.
    for path in ["/home/sprite/file", "/tmp/file"] {
        sprite.write(path, "by the API", 0o600).await.unwrap();
        assert_eq!(
            said(&sprite, &format!("cat {path}; echo by a program > {path}")).await,
            "by the API"
        );
        assert_eq!(sprite.read(path).await.unwrap(), b"by a program\n", "{path}");
    }

    // Nothing of the machine: files, descriptors, services.
    let look = format!(
        "cat {}/file 2>/dev/null; ls /proc/self/fd | tr '\\n' ' '",
        secret.path().display()
    );
    assert_eq!(said(&sprite, &look).await, "0 1 2 3 ");
    for host in ["127.0.0.1", "192.0.0.1", "10.0.0.1", "169.254.169.254"] {
        let get =
            format!("curl -s -m 3 http://{host}:{}/v1/sprites | grep authentication", server.port);
        assert_ne!(bash(&sprite, &get).await.code, 0, "{host}");
    }

    // What it does not offer, it refuses by name.
    assert!(said(&sprite, "sudo id").await.contains("runsc"));
    let (status, text) =
        call(&server, "POST", "guest/policy/privileges", &json!({ "profile": "standard" })).await;
    assert!(status == 400 && text.contains("runsc"), "{status} {text}");

    // A signal of the API ends the command in the sandbox, not only what started it.
    let sleep = ExecRequest { argv: &["sleep", "4242"], ..ExecRequest::default() };
    let sleeping = sprite.exec(&sleep).await.unwrap();
    testkit::eventually("it runs", async || {
        said(&sprite, "pgrep -fc 'sleep [4]242'").await == "1\n"
    })
    .await;
    let (_, running) = call(&server, "GET", "guest/exec", &json!({})).await;
    let running: Value = serde_json::from_str(&running).unwrap();
    let running = running["sessions"].as_array().unwrap();
    let id = running.iter().find(|one| one.to_string().contains("4242")).unwrap()["id"]
        .as_str()
        .unwrap();
    assert_eq!(call(&server, "POST", &format!("guest/exec/{id}/kill"), &json!({})).await.0, 200);
    assert_ne!(sleeping.finish().await.unwrap().code, 0);
    assert_eq!(said(&sprite, "pgrep -fc 'sleep [4]242'").await, "0\n");

    // A service survives the server, and hears that it is to stop.
    let script = "trap 'echo stopping; exit 0' TERM; echo up; while true; do sleep 0.1; done";
    let service = json!({ "cmd": "bash", "args": ["-c", script] });
    assert_eq!(call(&server, "PUT", "guest/services/web?duration=500ms", &service).await.0, 200);
    server.end(rustix::process::Signal::KILL).await;
    server.run().await;
    assert_eq!(said(&sprite, "pgrep -fc 'echo [u]p'").await, "1\n");
    let (status, told) =
        call(&server, "POST", "guest/services/web/stop?timeout=20s", &json!({})).await;
    assert!(status == 200 && told.contains("\"type\":\"stopped\""), "{told}");
    assert!(said(&sprite, "cat /.sprite/logs/services/web.log").await.contains("stopping"));

    let (_, told) = call(&server, "POST", "guest/checkpoint", &json!({})).await;
    assert!(told.contains("Checkpoint v0 created"), "{told}");
    bash(&sprite, "rm file; echo other > more").await;
    let (_, told) = call(&server, "POST", "guest/checkpoints/v0/restore", &json!({})).await;
    assert!(told.contains("Restored to v0"), "{told}");
    assert_eq!(said(&sprite, "cat file; ls more 2>/dev/null").await, "by a program\n");

    sprite.limit_network(&["example.com".to_owned()]).await.unwrap();
    let direct = format!("curl -sS -m 3 --noproxy '*' -f {}/v1/sprites", server.url());
    assert_ne!(bash(&sprite, &direct).await.code, 0);
    let refused = "curl -s -o /dev/null -w '%{http_code}' -m 5 http://example.org/; cat /.sprite/policy/refused";
    assert_eq!(said(&sprite, refused).await, "403example.org:80\n");

    bash(
        &sprite,
        "(setsid sh -c 'while true; do date > beat; sleep 0.05; done' >/dev/null 2>&1 &)",
    )
    .await;
    let status = async || call(&server, "GET", "guest", &json!({})).await.1.contains("\"warm\"");
    testkit::eventually("it is frozen", status).await;
    let beat =
        "x=$(stat -c %y beat); sleep 0.5; [ \"$(stat -c %y beat)\" != \"$x\" ] && echo beats";
    assert_eq!(said(&sprite, beat).await, "beats\n", "a call wakes it where it was");

    server.client().delete(sprite.name()).await.unwrap();
    let data = server.data.path().to_str().unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
    assert_eq!(lines.filter(|line| line.contains("runsc") && line.contains(data)).count(), 0);
}
