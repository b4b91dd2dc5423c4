//! Ways out of a Sprite, tried.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    time::Duration,
};

use sprites::{Error, ExecRequest};

use crate::server::{Server, as_root, bash, has_own_kernel, said};

#[tokio::test]
async fn a_sprite_sees_nothing_of_the_machine() {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("inmate").await;
    let secret = tempfile::Builder::new().prefix("host-secret").tempdir_in("/tmp").unwrap();
    fs::write(secret.path().join("file"), "the host's").unwrap();
    // Wherever on the machine: as root's own, in directories that programs have their settings in.
    let of_root = ["/etc", "/usr/share", "/var/lib"].map(|dir| {
        let file = tempfile::Builder::new().prefix("aod-test-").tempfile_in(dir).unwrap();
        fs::write(file.path(), "the host's").unwrap();
        file
    });
    let script = format!(
        "for file in {0}/file {2}; do cat $file; sudo cat $file; sudo ls -d $file; done 2>&1 | grep -v 'No such file'; ls /home; \
         ls -A /mnt /media /sys 2>/dev/null; ls /proc | grep -c '^[0-9]'; ls {1}",
        secret.path().display(),
        server.data.path().display(),
        of_root.each_ref().map(|file| file.path().display().to_string()).join(" ")
    );
    let seen = said(&sprite, &as_root(&script)).await;
    assert!(!seen.contains("the host's"), "{seen}");
    assert!(seen.starts_with("sprite\n"), "{seen}");
    // Its own processes alone: the holder's two, the shell, what it runs.
    let processes: u32 = seen.lines().find_map(|line| line.parse().ok()).unwrap();
    assert!(processes < 10, "{seen}");
    // A root in name: not over devices, the kernel, other namespaces.
    let attempts = [
        "sudo mount -t tmpfs x /mnt",
        "sudo mknod /tmp/disk b 7 0 && sudo head -c 1 /tmp/disk",
        // Writable by root of the machine, of which a Sprite's root is one to the kernel.
        "sudo sysctl -w kernel.core_pattern='|/tmp/x %p'",
        "echo x | sudo tee /proc/sys/kernel/core_pattern",
        "sudo unshare -rmpf sh -c 'mount -t proc proc /mnt && echo x > /mnt/sys/kernel/core_pattern'",
        "sudo mount -o remount,rw /proc/sys",
        "sudo unshare -rm mount -o remount,rw /proc/sys",
        "sudo unshare -rm mount -o remount,rw /.sprite",
        "sudo head -c 1 /proc/kcore",
        "echo 1 | sudo tee /proc/sysrq-trigger",
        "sudo dmesg",
        "sudo nsenter -t 1 -m ls",
        "sudo kill -9 1 && sleep 0.2 && kill -0 1 && false",
        "unshare -r sh -c 'mount --bind / /mnt && umount /etc && cat /etc/shadow'",
        "sudo rm /.sprite/version.txt",
        "echo x | sudo tee /sys/fs/cgroup/memory/memory.limit_in_bytes",
        "sudo swapoff -a && sudo reboot -f",
        "python3 -c 'import ctypes,sys; sys.exit(0 if ctypes.CDLL(None).syscall(321,0,0,0)>=0 else 1)'",
    ];
    // What it may do to its own kernel has a test of its own, and the messages of that are no
    // secret.
    let is_of_the_machine = |attempt: &&&str| {
        !has_own_kernel() || !attempt.contains("unshare") && !attempt.contains("dmesg")
    };
    for attempt in attempts.iter().filter(is_of_the_machine) {
        let finished = bash(&sprite, &as_root(attempt)).await;
        assert_ne!(finished.code, 0, "{attempt}: {}", String::from_utf8_lossy(&finished.stdout));
    }
    assert_eq!(said(&sprite, "echo still here").await, "still here\n");
}

/// The same file is in all Sprites: none of them changes it.
#[tokio::test]
async fn the_agent_host_is_there_to_run_and_not_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent-host");
    fs::write(&file, "#!/bin/sh\necho the agent host\n").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    let mut server = Server::start(&[("LOCAL_SPRITES_AGENT_HOST", file.to_str().unwrap())]).await;
    let sprite = server.sprite("hosted").await;
    let host = "/opt/aod/agent-host";
    assert_eq!(said(&sprite, host).await, "the agent host\n");
    for attempt in ["echo x >", "rm", "chmod 777", "chown sprite", "touch", "mv /bin/true"] {
        let finished = bash(&sprite, &format!("sudo sh -c '{attempt} {host}'")).await;
        assert_ne!(finished.code, 0, "{attempt}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "#!/bin/sh\necho the agent host\n");
    // Also after a restart, over the disk that is there.
    server.end(rustix::process::Signal::INT).await;
    server.run().await;
    assert_eq!(said(&sprite, host).await, "the agent host\n");
}

#[tokio::test]
async fn sprites_do_not_reach_each_other() {
    let server = Server::start(&[]).await;
    let (one, other) = (server.sprite("one").await, server.sprite("other").await);
    bash(
        &one,
        "echo mine > /home/sprite/file; echo mine > /tmp/file; sudo touch /etc/own /usr/bin/own; (setsid sleep 777 >/dev/null 2>&1 &)",
    )
    .await;
    let seen = said(&other, "cat /home/sprite/file /tmp/file; ls /etc/own /usr/bin/own; pgrep -fc 'sleep [7]77'; hostname").await;
    assert!(
        !seen.contains("mine")
            && seen.lines().filter(|line| line.contains("No such file")).count() == 4,
        "{seen}"
    );
    assert!(seen.starts_with("0\nother\n"), "{seen}");
    assert!(
        !std::path::Path::new("/etc/own").exists()
            && !std::path::Path::new("/usr/bin/own").exists()
    );
    // By the socket of the server either.
    let calls = "for path in /v1/sprites /v1/sprites/one /v1/sprites/one/exec /v1/services/../../one /v1/policy/network; do \
                 sprite-env curl --path-as-is -o /dev/null -w '%{http_code} ' $path; done; sprite-env curl -X POST -d '{}' -o /dev/null -w '%{http_code}' /v1/policy/network";
    assert_eq!(said(&other, calls).await, "404 404 404 404 200 404");
}

#[tokio::test]
async fn limits_hold() {
    let settings = [
        ("LOCAL_SPRITES_MEMORY_MB", "200"),
        ("LOCAL_SPRITES_PROCESSES", "100"),
        ("LOCAL_SPRITES_DISK_MB", "64"),
        ("LOCAL_SPRITES_CPUS", "0.25"),
    ];
    let server = Server::start(&settings).await;
    let (sprite, neighbour) = (server.sprite("greedy").await, server.sprite("neighbour").await);
    // Nor by a view of its own limits, where it may be root over them.
    let raise = "sudo unshare -rmC sh -c 'mount -t cgroup -o memory x /mnt && echo 4G > /mnt/memory.limit_in_bytes; echo 4G > /mnt/memory.memsw.limit_in_bytes; \
                 umount /mnt; mount -t cgroup2 x /mnt && echo max > /mnt/memory.max'";
    bash(&sprite, raise).await;
    let hungry = bash(&sprite, "python3 -c 'x = bytearray(500 << 20)'").await;
    assert_eq!(hungry.code, 137);
    // Memory by way of files too, and what is full of them can be emptied.
    assert_ne!(bash(&sprite, "head -c 500M /dev/zero > /dev/shm/x").await.code, 0);
    let fill = as_root("sudo head -c 500M /dev/zero | sudo tee /run/x >/dev/null");
    bash(&sprite, &fill).await;
    let remove = as_root("rm -f /dev/shm/x && { [ ! -e /run/x ] || sudo rm -f /run/x; }");
    assert_eq!(bash(&sprite, &remove).await.code, 0);
    let forked = said(&sprite, "for n in $(seq 300); do sleep 5 & done 2>&1 | grep -c 'Resource temporarily unavailable'; true").await;
    let finished =
        bash(&neighbour, "for n in $(seq 50); do sleep 0.1 & done; wait; echo fine").await;
    assert_eq!(finished.stdout, b"fine\n", "{forked}");
    testkit::eventually("the Sprite works again", async || {
        let request = ExecRequest { argv: &["true"], ..ExecRequest::default() };
        sprite.run(&request, Duration::from_secs(20)).await.is_ok_and(|finished| finished.code == 0)
    })
    .await;
    // The disk, through a command, through the system directories, and through the file API.
    let full =
        said(&sprite, "head -c 200M /dev/zero > big; ls -s --block-size=1M big | cut -d' ' -f1")
            .await;
    assert!(full.contains("No space left on device"), "{full}");
    assert!(matches!(
        sprite.write("/home/sprite/more", vec![1; 1 << 20], 0o644).await,
        Err(Error::Failed { .. })
    ));
    assert_ne!(
        bash(
            &sprite,
            &as_root(
                "set -o pipefail; sudo head -c 1M /dev/urandom | sudo tee /usr/more >/dev/null"
            )
        )
        .await
        .code,
        0
    );
    assert_eq!(bash(&neighbour, "head -c 30M /dev/zero > fits").await.code, 0);
    bash(&sprite, "rm big").await;
    sprite.write("/home/sprite/more", vec![1; 1 << 20], 0o644).await.unwrap();
    // A quarter of a CPU.
    let used = said(&sprite, "s=$(date +%s%N); timeout 2 sh -c 'while :; do :; done'; awk '{print $16+$17}' /proc/$$/stat").await;
    let ticks: u64 = used.trim().parse().unwrap();
    assert!(ticks < 110, "{ticks} of 200 ticks");
}

#[tokio::test]
async fn the_file_api_stays_inside() {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("climber").await;
    let outside = tempfile::Builder::new().prefix("outside").tempdir_in("/tmp").unwrap();
    fs::write(outside.path().join("secret"), "the host's").unwrap();
    let out = outside.path().display();
    bash(
        &sprite,
        &format!("ln -s {out} abs; ln -s ../../../../../../../..{out} rel; ln -s /proc/1/root/{out} magic; ln -s /proc/self/root{out} own"),
    )
    .await;
    for link in ["abs", "rel", "magic", "own"] {
        let path = format!("/home/sprite/{link}/secret");
        assert!(sprite.read(&path).await.is_err(), "{link}");
        let _ = sprite.write(&path, "overwritten", 0o644).await;
        let _ = sprite.write(&format!("/home/sprite/{link}/new"), "new", 0o644).await;
    }
    assert!(matches!(
        sprite.read(&format!("/../../../../{out}/secret")).await,
        Err(Error::NotFound { .. })
    ));
    assert_eq!(fs::read_to_string(outside.path().join("secret")).unwrap(), "the host's");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    // A directory that becomes a link while it is written through.
    bash(
        &sprite,
        &format!(
            "(setsid sh -c 'while true; do mkdir -p race; mv -T race old; ln -sfn {out} race; rm race; rm -rf old; done' >/dev/null 2>&1 &)"
        ),
    )
    .await;
    for _ in 0..300 {
        let _ = sprite.write("/home/sprite/race/new", "new", 0o644).await;
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "nothing is written outside");
    // Its devices are the machine's own, to which the server is root.
    let of_null = || {
        fs::metadata("/dev/null")
            .map(|metadata| (metadata.mode(), metadata.uid(), metadata.gid()))
            .unwrap()
    };
    let null = of_null();
    // With gVisor they are in its kernel, and the file API has a directory of the Sprite's disk.
    let wrote = sprite.write("/dev/null", "x", 0o600).await;
    assert_eq!(wrote.is_ok(), has_own_kernel());
    for (change, body) in [
        ("chown", r#"{"path":"/dev/null","uid":0,"gid":0}"#),
        ("chmod", r#"{"path":"/dev/null","mode":"0600"}"#),
    ] {
        let request = sprites::http_client()
            .unwrap()
            .post(format!("{}/v1/sprites/climber/fs/{change}", server.url()));
        let answer = request.bearer_auth(crate::server::TOKEN).body(body).send().await.unwrap();
        assert_eq!(answer.status().is_success(), has_own_kernel(), "{change}");
    }
    assert_eq!(of_null(), null);
    // What is no file is not waited for.
    bash(&sprite, "mkfifo pipe").await;
    assert!(sprite.read("/home/sprite/pipe").await.is_err());
    match sprite.write("/home/sprite/pipe", "x", 0o644).await {
        Err(Error::Rejected { .. } | Error::Failed { .. }) => {}
        // gVisor has both ends open.
        Ok(()) if has_own_kernel() => {}
        written => panic!("{written:?}"),
    }
}

#[tokio::test]
async fn a_limited_sprite_does_not_reach_the_machines_loopback() {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("limited").await;
    sprite
        .limit_network(&["localhost".to_owned(), "127.0.0.1".to_owned(), "example.com".to_owned()])
        .await
        .unwrap();
    let url = server.url();
    for probe in [
        format!("curl -sS -m 5 {url}/v1/sprites -f"),
        format!("curl -sS -m 5 -f --proxytunnel {url}/v1/sprites"),
        format!("curl -sS -m 5 -f --noproxy '*' {url}/v1/sprites"),
        format!(
            "sudo curl -sS -m 5 -f --noproxy '*' {}/v1/sprites",
            url.replace("127.0.0.1", "[::1]")
        ),
        "timeout 3 bash -c 'echo > /dev/udp/1.1.1.1/53' && sleep 0 && false".to_owned(),
    ] {
        assert_ne!(bash(&sprite, &probe).await.code, 0, "{probe}");
    }
    assert_eq!(said(&sprite, "ls /sys/class/net 2>/dev/null; cat /proc/net/dev | tail -n +3 | cut -d: -f1 | tr -d ' '").await, "lo\n");
}

#[tokio::test]
async fn bad_requests_are_answered() {
    let server = Server::start(&[]).await;
    server.sprite("asked").await;
    let http = sprites::http_client().unwrap();
    let call = async |method: &str, path: &str, body: &str| {
        let request = http
            .request(method.parse().unwrap(), format!("{}{path}", server.url()))
            .bearer_auth(crate::server::TOKEN);
        let response = request.body(body.to_owned()).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    for (method, path, body, status) in [
        ("POST", "/v1/sprites", "{", 400),
        ("POST", "/v1/sprites", "{}", 400),
        ("POST", "/v1/sprites", r#"{"name":"x","runtime":"nonsense"}"#, 400),
        ("POST", "/v1/sprites", r#"{"name":"x","labels":7}"#, 400),
        ("GET", "/v1/sprites/nothing", "", 404),
        ("GET", "/v1/sprites/asked/exec/1", "", 404),
        ("POST", "/v1/sprites/asked/exec/1/kill", "", 404),
        ("POST", "/v1/sprites/asked/exec?cmd=a%00b", "", 400),
        ("PUT", "/v1/sprites/asked/fs/write?path=x&mode=9", "", 400),
        ("GET", "/v1/sprites/asked/fs/read?path=/etc", "", 400),
        ("POST", "/v1/sprites/asked/fs/rename", "[]", 400),
        ("POST", "/v1/sprites/asked/fs/chown", r#"{"path":"/tmp","uid":"no-such-user"}"#, 400),
        ("PUT", "/v1/sprites/asked/services/signal", r#"{"cmd":"x"}"#, 405),
        ("PUT", "/v1/sprites/asked/services/a%2F..%2Fb", r#"{"cmd":"x"}"#, 400),
        ("PUT", "/v1/sprites/asked/services/x", "{}", 400),
        ("POST", "/v1/sprites/asked/services/x/stop", "", 404),
        ("POST", "/v1/sprites/asked/checkpoints/..%2F..%2Fx/restore", "", 404),
        ("POST", "/v1/sprites/asked/policy/privileges", r#"{"profile":"god"}"#, 400),
        ("POST", "/v1/sprites/asked/policy/resources", r#"{"memory":{"limit_mb":1}}"#, 400),
        ("GET", "/v1/sprites/asked/control", "", 404),
        ("PATCH", "/v1/sprites/asked", "", 405),
    ] {
        let (answered, text) = call(method, path, body).await;
        assert_eq!(answered, status, "{method} {path}: {text}");
        assert!(status == 405 || text.contains("error"), "{method} {path}: {text}");
    }
}
