//! Attacks that worked once, by name of what they are after. Each gets nothing.

use std::{fs, os::unix::fs::MetadataExt as _, time::Duration};

use serde_json::{Value, json};

use crate::server::{Server, TOKEN, as_root, bash, has_own_kernel, said};

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

/// The server of every test was started with descriptor 7 on the machine's root directory.
#[tokio::test]
async fn inherited_descriptors_do_not_reach_a_sprite() {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("inheritor").await;
    assert_eq!(
        said(&sprite, "ls /proc/self/fd | tr '\\n' ' '").await,
        "0 1 2 3 ",
        "3 is the directory that ls reads"
    );
    let of_all = "for p in $(ls /proc | grep '^[0-9]'); do sudo ls -l /proc/$p/fd 2>/dev/null; done | grep -c ' -> /$'";
    assert_eq!(said(&sprite, of_all).await, "0\n");
    let service = json!({ "cmd": "sh", "args": ["-c", "ls /proc/$$/fd | sort -n | tail -1 > /tmp/last; exec sleep 1000"] });
    let (status, _) =
        call(&server, "PUT", "inheritor/services/descriptors?duration=500ms", &service).await;
    assert_eq!(status, 200);
    let last: u32 = said(&sprite, "cat /tmp/last").await.trim().parse().unwrap();
    assert!(last < 7 || last == 10 || last == 255, "{last}");
}

/// Variables that a dynamic linker obeys are the command's, not those of what starts it: that is
/// root on the machine at first.
#[tokio::test]
async fn variables_of_a_command_do_not_reach_what_starts_it() {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("linker").await;
    let outside = tempfile::Builder::new().prefix("outside").tempdir_in("/tmp").unwrap();
    let file = outside.path().join("linked");
    let file = file.to_str().unwrap();
    let service = json!({ "cmd": "sh", "args": ["-c", "env > /home/sprite/seen; exec sleep 1000"], "env": { "LD_DEBUG": "libs", "LD_DEBUG_OUTPUT": file } });
    // By the agent itself, and by a client.
    sprite.write("/home/sprite/service", service.to_string(), 0o644).await.unwrap();
    bash(
        &sprite,
        "sprite-env curl -X PUT --data-binary @service '/v1/services/linked?duration=500ms'",
    )
    .await;
    let command = format!("linker/exec?cmd=env&env=LD_DEBUG%3Dlibs&env=LD_DEBUG_OUTPUT%3D{file}");
    let (_, seen) = call(&server, "POST", &command, &json!({})).await;
    for seen in [seen, said(&sprite, "cat seen").await] {
        assert!(
            seen.contains(&format!("LD_DEBUG_OUTPUT={file}\n")) && !seen.contains("sprite:"),
            "{seen}"
        );
    }
    assert_eq!(
        fs::read_dir(outside.path()).unwrap().count(),
        0,
        "files of the machine were written"
    );
}

#[tokio::test]
async fn the_management_socket_holds_little_of_the_server() {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("hoarder").await;
    // A body over the limit, a definition over its own, and one that never ends.
    let calls = "head -c 70000 /dev/zero > big; head -c 20000 /dev/zero | tr '\\0' a > args; \
                 sprite-env curl -o /dev/null -w '%{http_code} ' -X PUT --data-binary @big /v1/services/x; \
                 printf '{\"cmd\":\"true\",\"args\":[\"%s\"]}' \"$(cat args)\" > definition; \
                 sprite-env curl -o /dev/null -w '%{http_code} ' -X PUT --data-binary @definition /v1/services/x; \
                 sprite-env curl -o /dev/null -w '%{http_code}' /v1/services";
    assert_eq!(said(&sprite, calls).await, "413 413 200");
    let hold = "import socket, time\n\
                held = []\n\
                for number in range(200):\n    \
                    s = socket.socket(socket.AF_UNIX); s.setblocking(False)\n    \
                    try: s.connect('/.sprite/api.sock')\n    \
                    except OSError: break\n    \
                    held.append(s)\n\
                print(len(held), flush=True); time.sleep(60)\n";
    sprite.write("/home/sprite/hold.py", hold, 0o644).await.unwrap();
    bash(&sprite, "(setsid python3 hold.py >held 2>&1 &); for n in $(seq 50); do [ -s held ] && break; sleep 0.1; done").await;
    let before = said(&sprite, "cat held").await;
    assert!(before.trim().parse::<u32>().is_ok_and(|held| held > 32), "{before}");
    // The API itself serves on.
    let (status, text) = call(&server, "GET", "hoarder/services", &json!({})).await;
    assert_eq!(status, 200, "{text}");
    // Connections without a request are closed, and others get their turn.
    tokio::time::sleep(Duration::from_secs(11)).await;
    testkit::eventually("the socket answers", async || {
        said(&sprite, "sprite-env curl -m 2 -o /dev/null -w '%{http_code}' /v1/services")
            .await
            .contains("200")
    })
    .await;
}

#[tokio::test]
async fn checkpoints_are_few_and_count_as_disk() {
    let server = Server::start(&[("LOCAL_SPRITES_DISK_MB", "200")]).await;
    let sprite = server.sprite("keeper").await;
    for number in 0..5 {
        let (_, told) = call(&server, "POST", "keeper/checkpoint", &json!({})).await;
        assert!(told.contains(&format!("Checkpoint v{number} created")), "{told}");
    }
    let (_, told) = call(&server, "POST", "keeper/checkpoint", &json!({})).await;
    assert!(told.contains("at most 5 checkpoints"), "{told}");
    for number in 0..5 {
        assert_eq!(
            call(&server, "DELETE", &format!("keeper/checkpoints/v{number}"), &json!({})).await.0,
            204
        );
    }
    assert_eq!(bash(&sprite, "head -c 80M /dev/urandom > data && sync").await.code, 0);
    let (_, told) = call(&server, "POST", "keeper/checkpoint", &json!({})).await;
    assert!(told.contains("Checkpoint v5 created"), "{told}");
    let (_, told) = call(&server, "POST", "keeper/checkpoint", &json!({})).await;
    assert!(told.contains("more than the Sprite's disk limit"), "{told}");
}

/// Where disks are directories, a checkpoint reads what the agent changes meanwhile.
#[tokio::test]
async fn a_checkpoint_copies_nothing_of_the_machine() {
    let server = Server::start(&[("LOCAL_SPRITES_DISK_MB", "0")]).await;
    let sprite = server.sprite("copier").await;
    let outside = tempfile::Builder::new().prefix("outside").tempdir_in("/tmp").unwrap();
    fs::write(outside.path().join("marker"), "the machine's").unwrap();
    let swap = format!(
        "mkdir -p t/d; for n in $(seq 200); do head -c 1M /dev/urandom > t/d/$n; done; echo mine > t/d/marker; \
         (setsid sh -c 'while true; do mv -T t/d t/old; ln -sn {} t/d; sleep 0.003; rm t/d; mv -T t/old t/d; done' >/dev/null 2>&1 &)",
        outside.path().display()
    );
    bash(&sprite, &swap).await;
    for number in 0..4 {
        let (_, told) = call(&server, "POST", "copier/checkpoint", &json!({})).await;
        assert!(told.contains(&format!("Checkpoint v{number} created")), "{told}");
    }
    let data = server.data.path().display().to_string();
    let found = tokio::process::Command::new("grep")
        .args(["-rl", "the machine's", &data])
        .output()
        .await
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    bash(&sprite, "pkill -f 'ln -s[n]'; true").await;
    let (_, told) = call(&server, "POST", "copier/checkpoints/v0/restore", &json!({})).await;
    assert!(told.contains("Restored to v0"), "{told}");
    assert!(!said(&sprite, "cat t/d/marker t/old/marker").await.contains("the machine's"));
    let uid = if has_own_kernel() { "1001" } else { "0" };
    let wrote = said(&sprite, &as_root("sudo id -u; touch t/new && echo writes")).await;
    assert_eq!(wrote, format!("{uid}\nwrites\n"));
}

/// What a Sprite's root is to the machine: an unknown user.
#[tokio::test]
async fn nothing_of_the_machines_own_is_changed_by_a_sprites_root() {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("root").await;
    let changed = |path: &str| {
        fs::metadata(path)
            .map(|metadata| {
                // `runsc` itself changes the time of the machine's /dev/null.
                let changed_at =
                    (!has_own_kernel()).then(|| (metadata.ctime(), metadata.ctime_nsec()));
                (changed_at, metadata.mode(), metadata.uid(), metadata.gid())
            })
            .unwrap()
    };
    let before = ["/dev/full", "/dev/null", "/proc/meminfo"].map(changed);
    for attempt in [
        "sudo chmod 666 /dev/full",
        "sudo chown root /dev/null",
        "sudo chmod 400 /proc/execdomains",
        "sudo chmod 400 /proc/meminfo",
        "sudo mknod /tmp/disk b 7 0 && sudo head -c 1 /tmp/disk",
        "sudo sh -c 'echo x >> /.sprite/version.txt'",
        "sudo head -c 1 /proc/kpageflags | grep .",
        "sudo head -c 1 /proc/kallsyms | grep .",
        "echo x | sudo tee /proc/sys/kernel/hostname",
        "echo 1 | sudo tee /proc/sys/user/max_user_namespaces",
    ] {
        let finished = bash(&sprite, &as_root(attempt)).await;
        assert_ne!(finished.code, 0, "{attempt}: {}", String::from_utf8_lossy(&finished.stdout));
    }
    assert_eq!(["/dev/full", "/dev/null", "/proc/meminfo"].map(changed), before);
    // Its users are none of the machine's.
    let sleep = as_root("(setsid sudo sleep 54321 >/dev/null 2>&1 &); sleep 0.2");
    bash(&sprite, &sleep).await;
    let sleeps = fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
        fs::read_to_string(entry.path().join("cmdline"))
            .is_ok_and(|line| line.starts_with("sleep\0") && line.contains("54321"))
    });
    let owners: Vec<u32> =
        sleeps.filter_map(|entry| Some(fs::metadata(entry.path()).ok()?.uid())).collect();
    assert_eq!(owners.is_empty(), has_own_kernel(), "{owners:?}");
    assert!(owners.iter().all(|owner| *owner > 1 << 30), "{owners:?}");
    // Its first program is its own image's, which it changes for itself alone.
    let shells = format!("{}/bin/sleep", testkit::rootfs().display());
    let image = changed(&shells);
    bash(&sprite, &as_root("sudo chmod 000 /proc/1/exe; sudo chown 0 /bin/sleep")).await;
    assert_eq!(changed(&shells), image);
}

#[tokio::test]
async fn no_namespaces_are_made_within_and_no_rights_gained() {
    if has_own_kernel() {
        // Those that it makes are gVisor's: see `root_of_its_own_kernel_gets_nothing_of_the_machine`.
        return;
    }
    let server = Server::start(&[]).await;
    let sprite = server.sprite("nested").await;
    for attempt in [
        "unshare -U true",
        "unshare -Urmn true",
        "sudo unshare -m true",
        "sudo unshare -n true",
        "sudo unshare -p -f true",
        "sudo unshare -rmC true",
        "sudo mount -t tmpfs x /mnt",
        "sudo mount -t cgroup -o memory x /mnt",
        "sudo mount -o remount,rw /.sprite",
        "sudo umount /proc/sys",
        "sudo nsenter -t 1 -m true",
        "sudo ip route del unreachable 10.0.0.0/8",
        "sudo ip link set lo down",
    ] {
        assert_ne!(bash(&sprite, attempt).await.code, 0, "{attempt}");
    }
    let calls = r#"
import ctypes, errno, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    return errno.errorcode.get(ctypes.get_errno(), 'done') if result < 0 else 'done'
def family(number):
    try: socket.socket(number, socket.SOCK_STREAM).close()
    except OSError as error: return errno.errorcode[error.errno]
    return 'done'
print('io_uring', call(425, 1, 0), 'bpf', call(321, 0, 0, 0), 'keyctl', call(250, 0, 0), 'userfaultfd', call(323, 0))
print('clone3', call(435, 0, 0), 'unshare', call(272, 0x10000000), 'setns', call(308, 0, 0), 'fsopen', call(430, 0, 0))
print('x32', call(0x40000000 | 39), 'kexec', call(246, 0, 0, 0, 0), 'handle', call(304, 0, 0, 0), 'perf', call(298, 0, 0, 0, 0, 0))
print('vsock', family(40), 'alg', family(38), 'inet', family(2))
"#;
    sprite.write("/home/sprite/calls.py", calls, 0o644).await.unwrap();
    let expected = "io_uring EPERM bpf EPERM keyctl EPERM userfaultfd EPERM\nclone3 ENOSYS unshare EPERM setns EPERM fsopen EPERM\n\
                    x32 EPERM kexec EPERM handle EPERM perf EPERM\nvsock EPERM alg EPERM inet done\n";
    #[cfg(target_arch = "x86_64")]
    for run in ["python3 calls.py", "sudo python3 /home/sprite/calls.py"] {
        assert_eq!(said(&sprite, run).await, expected, "{run}");
    }
    // The process that holds the sandbox is under the same filter, should a Sprite's root take it
    // over.
    assert_eq!(said(&sprite, "sudo grep -c '^Seccomp:.2' /proc/1/status").await, "1\n");
}

/// The inotify instances of the machine's kernel that gVisor's processes have.
fn inotify_instances_of(server: &Server) -> usize {
    let data = server.data.path().to_str().unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let of_gvisor = processes.filter(|path| {
        fs::read_to_string(path.join("cmdline"))
            .is_ok_and(|line| line.contains("runsc") && line.contains(data))
    });
    let files = of_gvisor.flat_map(|path| fs::read_dir(path.join("fd")).into_iter().flatten());
    let links = files.flatten().filter_map(|file| fs::read_link(file.path()).ok());
    links.filter(|link| link.to_string_lossy().contains("inotify")).count()
}

/// Whatever all Sprites and the machine share is had in part.
#[tokio::test]
async fn one_sprite_does_not_exhaust_what_all_share() {
    let server = Server::start(&[]).await;
    let (greedy, other) = (server.sprite("greedy").await, server.sprite("other").await);
    let instances = "import ctypes\nn = 0\nwhile n < 1000 and ctypes.CDLL(None).inotify_init() >= 0: n += 1\nprint(n, flush=True)\n\
                     import time, sys\nif len(sys.argv) > 1: time.sleep(60)\n";
    for sprite in [&greedy, &other] {
        sprite.write("/home/sprite/instances.py", instances, 0o644).await.unwrap();
    }
    bash(&greedy, "(setsid python3 instances.py hold >held 2>&1 &); for n in $(seq 50); do [ -s held ] && break; sleep 0.1; done").await;
    // The instances of gVisor's kernel are none of the machine's.
    let count = if has_own_kernel() { "1000\n" } else { "64\n" };
    assert_eq!(said(&greedy, "cat held").await, count);
    assert_eq!(said(&other, "python3 instances.py").await, count);
    if has_own_kernel() {
        assert_eq!(inotify_instances_of(&server), 0);
    }
}

/// A Sprite reaches nothing of the machine and of other Sprites, but what the deployment names; and
/// its loopback is its own.
#[tokio::test]
async fn only_named_addresses_of_the_machine_are_reachable() {
    let served = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let other = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let (port, unnamed) = (served.local_addr().unwrap().port(), other.local_addr().unwrap().port());
    let answer = async |listener: tokio::net::TcpListener| loop {
        let Ok((mut client, _)) = listener.accept().await else { return };
        // Read first: what is not read when the connection ends takes the answer with it.
        let _ = tokio::io::AsyncReadExt::read(&mut client, &mut [0; 1024]).await;
        let _ = tokio::io::AsyncWriteExt::write_all(
            &mut client,
            b"HTTP/1.0 200 OK\r\n\r\nthe machine's",
        )
        .await;
    };
    let mut answering = tokio::task::JoinSet::new();
    answering.spawn(answer(served));
    answering.spawn(answer(other));
    let probe = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    probe.connect("192.0.2.77:9").unwrap();
    let machine = probe.local_addr().unwrap().ip();
    let named = format!("127.0.0.1:{port},{machine}:{port}");
    let mut server = Server::start(&[("LOCAL_SPRITES_PRIVATE_HOSTS", &named)]).await;
    let (sprite, neighbour) = (server.sprite("one").await, server.sprite("two").await);
    let api = server.port;
    bash(&neighbour, "(setsid python3 -m http.server 8123 >/dev/null 2>&1 &); sleep 0.5").await;
    for (host, refused) in [
        ("127.0.0.1", api),
        ("127.0.0.1", unnamed),
        ("[::1]", api),
        ("localhost", api),
        ("192.0.0.1", api),
        ("192.0.0.1", 22),
    ]
    .map(|(host, port)| (host.to_owned(), port))
    .into_iter()
    .chain([(machine.to_string(), api), (machine.to_string(), unnamed), (machine.to_string(), 22)])
    .chain(
        ["10.0.0.1", "172.17.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.0.2"]
            .map(|host| (host.to_owned(), 8123)),
    ) {
        let get = format!("curl -sS -m 3 http://{host}:{refused}/");
        let got = bash(&sprite, &get).await;
        let text = String::from_utf8_lossy(&got.stdout);
        let ours = ["authentication", "machine's", "Directory listing", "SSH"]
            .iter()
            .any(|mark| text.contains(mark));
        // The Sprite's own way out is an address that some networks have something at.
        assert!(!ours && (got.code != 0 || host == "192.0.0.1"), "{get}: {text}");
    }
    let reaches = |host: &str| format!("curl -sS -m 5 http://{host}:{port}/");
    for host in ["127.0.0.1".to_owned(), machine.to_string()] {
        assert_eq!(said(&sprite, &reaches(&host)).await, "the machine's", "{host}");
    }
    // The port of the server itself, on the Sprite's own loopback: no process of the machine
    // connects to it, whenever the server restarts.
    let thief = format!(
        "import socket\ns = socket.create_server(('127.0.0.1', {api}))\nprint('bound', flush=True)\nc = s.accept()[0]\nprint(c.recv(9999), flush=True)\n"
    );
    sprite.write("/home/sprite/thief.py", thief, 0o644).await.unwrap();
    bash(&sprite, "(setsid python3 thief.py >stolen 2>&1 &); sleep 0.5").await;
    server.end(rustix::process::Signal::KILL).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.run().await;
    assert_eq!(said(&sprite, "cat stolen").await, "bound\n");
    // What carries its traffic outlives the server.
    assert_eq!(said(&sprite, &reaches("127.0.0.1")).await, "the machine's");
    assert_eq!(said(&sprite, &reaches(&machine.to_string())).await, "the machine's");
}

/// An address of this machine that counts as public, until dropped.
struct PublicAddress(&'static str);

impl PublicAddress {
    fn add(address: &'static str) -> Self {
        assert!(ip_address("add", address));
        Self(address)
    }
}

impl Drop for PublicAddress {
    fn drop(&mut self) {
        ip_address("del", self.0);
    }
}

fn ip_address(change: &str, address: &str) -> bool {
    let mut ip = std::process::Command::new("ip");
    let bits = if address.contains(':') { 128 } else { 32 };
    ip.args(["address", change, &format!("{address}/{bits}"), "dev", "lo"]);
    ip.status().unwrap().success()
}

/// Services of a machine may listen at its public addresses as well, and proxies connect from the
/// machine's own network.
#[tokio::test]
async fn no_proxy_leads_to_a_public_address_of_the_machine() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    // Of ranges for documentation: no one has them.
    let addresses = ["203.0.113.77", "3fff::77"].map(PublicAddress::add);
    let server = Server::start(&[]).await;
    let (free, limited) = (server.sprite("free").await, server.sprite("limited").await);
    let hosts = addresses.iter().map(|address| address.0.to_owned());
    limited.limit_network(&hosts.collect::<Vec<_>>()).await.unwrap();
    let secret = sprites::OutsideSecret {
        placeholder: "aod_placeholder_of_a_test".to_owned(),
        value: "value".into(),
        hosts: vec!["a.example".to_owned()],
    };
    free.set_secrets(&[secret]).await.unwrap();
    for address in &addresses {
        let ip: std::net::IpAddr = address.0.parse().unwrap();
        let service = tokio::net::TcpListener::bind((ip, 0)).await.unwrap();
        let target = service.local_addr().unwrap();
        for sprite in [&free, &limited] {
            let tunnel = format!("curl -sS -m 3 -p -x http://127.0.0.1:3128 http://{target}/");
            let said = said(sprite, &tunnel).await;
            assert!(said.contains("403"), "{target}: {said}");
        }
    }
}

/// With rules: its own servers are reached as programs reach them, by the proxy that their
/// environment names.
#[tokio::test]
async fn a_limited_sprite_reaches_its_own_loopback() {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("own").await;
    sprite.limit_network(&["example.com".to_owned()]).await.unwrap();
    let script = "echo mine > page; (setsid python3 -m http.server 8000 --bind 127.0.0.1 >/dev/null 2>&1 &); sleep 1; \
                  for host in localhost 127.0.0.1; do curl -sS -m 5 http://$host:8000/page; done; \
                  python3 -c \"import urllib.request as u; print(u.urlopen('http://localhost:8000/page', timeout=5).read().decode(), end='')\"; \
                  cat /.sprite/policy/refused";
    assert_eq!(said(&sprite, script).await, "mine\nmine\nmine\n");
}
