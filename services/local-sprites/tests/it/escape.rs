//! Attacks that worked once, by name of what they are after. Each gets nothing.

use std::{fs, time::Duration};

use serde_json::{Value, json};

use crate::server::{Server, TOKEN, bash, said};

async fn call(server: &Server, method: &str, path: &str, body: &Value) -> (u16, String) {
    let url = format!("{}/v1/sprites/{path}", server.url());
    let request = sprites::http_client().unwrap().request(method.parse().unwrap(), url).bearer_auth(TOKEN).json(body);
    let response = request.send().await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

/// The server of every test was started with descriptor 7 on the machine's root directory.
#[tokio::test]
async fn descriptors_of_whoever_started_the_server_do_not_reach_a_sprite() {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("inheritor").await;
    assert_eq!(said(&sprite, "ls /proc/self/fd | tr '\\n' ' '").await, "0 1 2 3 ", "3 is the directory that ls reads");
    let of_all = "for p in $(ls /proc | grep '^[0-9]'); do sudo ls -l /proc/$p/fd 2>/dev/null; done | grep -c ' -> /$'";
    assert_eq!(said(&sprite, of_all).await, "0\n");
    let service = json!({ "cmd": "sh", "args": ["-c", "ls /proc/$$/fd | sort -n | tail -1 > /tmp/last; exec sleep 1000"] });
    let (status, _) = call(&server, "PUT", "inheritor/services/descriptors?duration=500ms", &service).await;
    assert_eq!(status, 200);
    let last: u32 = said(&sprite, "cat /tmp/last").await.trim().parse().unwrap();
    assert!(last < 7 || last == 10 || last == 255, "{last}");
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
        said(&sprite, "sprite-env curl -m 2 -o /dev/null -w '%{http_code}' /v1/services").await.contains("200")
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
        assert_eq!(call(&server, "DELETE", &format!("keeper/checkpoints/v{number}"), &json!({})).await.0, 204);
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
    let found = tokio::process::Command::new("grep").args(["-rl", "the machine's", &data]).output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    bash(&sprite, "pkill -f 'ln -s[n]'; true").await;
    let (_, told) = call(&server, "POST", "copier/checkpoints/v0/restore", &json!({})).await;
    assert!(told.contains("Restored to v0"), "{told}");
    assert!(!said(&sprite, "cat t/d/marker t/old/marker").await.contains("the machine's"));
    assert_eq!(said(&sprite, "sudo id -u; touch t/new && echo writes").await, "0\nwrites\n");
}
