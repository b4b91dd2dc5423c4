//! Sandboxes with a kernel of their own: gVisor, where `runsc` is installed.

use std::{fs, os::unix::fs::MetadataExt as _, time::Duration};

use serde_json::{Value, json};
use sprites::ExecRequest;

use crate::server::{Server, TOKEN, bash, said};

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
    if !testkit::has_gvisor() {
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

/// Namespaces inside are of gVisor's kernel: root in them is root of nothing else.
#[tokio::test]
async fn root_of_its_own_kernel_gets_nothing_of_the_machine() {
    if !testkit::has_gvisor() {
        return;
    }
    let secret = tempfile::Builder::new().prefix("host-secret").tempdir_in("/tmp").unwrap();
    fs::write(secret.path().join("file"), "the host's").unwrap();
    let server = Server::start(&[("LOCAL_SPRITES_RUNTIME", "runsc")]).await;
    let (sprite, other) = (server.sprite("root").await, server.sprite("other").await);
    bash(&other, "echo another > marker; (setsid python3 -m http.server 8000 >/dev/null 2>&1 &)")
        .await;
    let of = |path: &str| {
        let metadata = fs::metadata(path).unwrap();
        (metadata.mode(), metadata.uid(), metadata.gid(), metadata.len())
    };
    let shell = format!("{}/bin/sh", testkit::rootfs().display());
    let paths = ["/dev/null", "/dev/full", "/proc/meminfo", &shell];
    let before = paths.map(of);
    let nested = async |script: &str| {
        let script = format!("unshare -Urmnp --fork sh -c '{script}'");
        bash(&sprite, &script).await
    };
    assert_eq!(nested("id -u").await.stdout, b"0\n", "the check checks nothing");
    for attempt in [
        "mknod disk b 7 0 && head -c 1 disk",
        "mknod disk b 254 0 && head -c 1 disk",
        "mknod memory c 1 1 && head -c 1 memory",
        "head -c 1 /proc/kcore | grep .",
        "chmod 666 /dev/full && chmod 666 /bin/sh",
        "echo x >> /bin/sh",
        "echo x >> /.sprite/version.txt",
        "mount -o remount,rw /.sprite && echo x >> /.sprite/version.txt",
        "echo x > /proc/sys/kernel/core_pattern",
        "echo x > /proc/sys/kernel/hostname && hostname | grep -v x",
        "reboot -f && sleep 5",
    ] {
        let finished = nested(attempt).await;
        assert_ne!(finished.code, 0, "{attempt}: {}", String::from_utf8_lossy(&finished.stdout));
    }
    // Whatever it mounts, the files are those of its own disk.
    let find = format!(
        "mount -t proc proc /mnt; mount -t tmpfs x /media; mount -t overlay x -o lowerdir=/ /srv; \
         grep -rsl the.host {0} /mnt/1/root{0} /proc/*/root{0} /srv{0}; ls -d /proc/*/root/{1}",
        secret.path().display(),
        server.data.path().display(),
    );
    assert_eq!(String::from_utf8_lossy(&nested(&find).await.stdout), "");
    let look = "cat /proc/*/root/home/sprite/marker /home/sprite/marker";
    assert_eq!(nested(look).await.stdout, b"");
    // A network of its own leads nowhere, and the Sprite's own not to the machine.
    for enter in ["unshare -Urm", "unshare -Urmn"] {
        for host in ["127.0.0.1", "192.0.0.1", "10.0.0.1", "169.254.169.254"] {
            let call = format!(
                "{enter} sh -c 'ip route del unreachable 10.0.0.0/8; ip route del unreachable 127.0.0.0/8; \
                 curl -s -m 2 http://{host}:{}/v1/sprites' | grep authentication",
                server.port
            );
            assert_ne!(bash(&sprite, &call).await.code, 0, "{enter} {host}");
        }
    }
    assert_eq!(paths.map(of), before);
    assert_eq!(said(&sprite, "echo still here").await, "still here\n");
    assert_eq!(said(&other, "cat marker").await, "another\n");
}
