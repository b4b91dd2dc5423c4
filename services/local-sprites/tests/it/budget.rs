//! What all Sprites together may take of the machine.

use std::{process::Command, time::Duration};

use sprites::{ExecRequest, Sprite};

use crate::server::{Server, TOKEN, bash, output, said};

async fn status(server: &Server, name: &str) -> String {
    let request = sprites::http_client()
        .unwrap()
        .get(format!("{}/v1/sprites/{name}", server.url()))
        .bearer_auth(TOKEN);
    let body: serde_json::Value = request.send().await.unwrap().json().await.unwrap();
    body["status"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn all_sprites_together_have_a_limit_of_memory() {
    let server = Server::start(&[("LOCAL_SPRITES_TOTAL_MEMORY_MB", "300")]).await;
    let sprites =
        [server.sprite("one").await, server.sprite("two").await, server.sprite("three").await];
    let hold = |sprite: Sprite| async move {
        bash(&sprite, "python3 -c 'import time; x = bytearray(200 << 20); time.sleep(3)'")
            .await
            .code
    };
    assert_eq!(hold(sprites[0].clone()).await, 0, "one alone has room for it");
    let mut codes = futures::future::join_all(sprites.map(hold)).await;
    codes.sort_unstable();
    assert_eq!(codes, [0, 137, 137]);
    assert_eq!(said(&server.sprite("one").await, "echo fine").await, "fine\n");
}

#[tokio::test]
async fn an_unused_sprite_is_frozen_then_stopped_and_wakes() {
    let server = Server::start(&[
        ("LOCAL_SPRITES_FREEZE_AFTER_S", "1"),
        ("LOCAL_SPRITES_STOP_AFTER_S", "4"),
    ])
    .await;
    let (unused, used) = (server.sprite("unused").await, server.sprite("used").await);
    // A daemon that outlives the command that started it, and a quiet command that a client waits
    // for.
    bash(&unused, "echo disk > kept; (setsid sh -c 'while true; do date > beat; sleep 0.05; done' >/dev/null 2>&1 &)").await;
    let request =
        ExecRequest { argv: &["sh", "-c", "sleep 8; echo done"], ..ExecRequest::default() };
    let quiet = used.exec(&request).await.unwrap();
    testkit::eventually("it is frozen", async || status(&server, "unused").await == "warm").await;
    let beat =
        "x=$(stat -c %y beat); sleep 0.3; [ \"$(stat -c %y beat)\" != \"$x\" ] && echo beats";
    assert_eq!(said(&unused, beat).await, "beats\n", "a call wakes it where it was");
    testkit::eventually("it is stopped", async || status(&server, "unused").await == "cold").await;
    assert_eq!(status(&server, "used").await, "running");
    assert_eq!(quiet.finish().await.unwrap().stdout, b"done\n");
    assert_eq!(
        said(&unused, "cat kept; pgrep -f 'date [>]' >/dev/null || echo alone").await,
        "disk\nalone\n"
    );
}

/// On a disk of the test's own, so that nothing else fills it. A quarter of it is to stay free.
#[tokio::test]
async fn the_sprite_that_fills_the_disk_is_stopped_and_others_run_on() {
    let mount = tempfile::tempdir().unwrap();
    let mut tmpfs = Command::new("mount");
    tmpfs.args(["-t", "tmpfs", "-o", "size=1200M", "tmpfs"]).arg(mount.path());
    assert!(output(tmpfs).await.status.success());
    let data = mount.path().join("data");
    let server = Server::start(&[
        ("LOCAL_SPRITES_DATA_DIR", data.to_str().unwrap()),
        ("LOCAL_SPRITES_MEMORY_MB", "400"),
    ])
    .await;
    let (hog, other) = (server.sprite("hog").await, server.sprite("other").await);
    // Images go first, and do not keep it running meanwhile.
    bash(&other, "head -c 6M /dev/urandom >some; sync").await;
    for number in 0..8 {
        let draft = other.draft_image(&format!("image-{number}"), &[]).await.unwrap();
        other.keep_image(draft).await.unwrap();
    }
    let images = || {
        let roots = std::fs::read_dir(data.join("images")).unwrap().flatten();
        let below = |root: std::fs::DirEntry| std::fs::read_dir(root.path()).unwrap().flatten();
        roots.flat_map(below).filter(|image| image.path().join("image.json").exists()).count()
    };
    testkit::eventually("the images are there", async || images() == 8).await;
    let write = "for n in $(seq 100); do head -c 20M /dev/urandom > /home/sprite/$n || exit 3; sync; sleep 0.1; done";
    let request = ExecRequest { argv: &["bash", "-c", write], ..ExecRequest::default() };
    let ended =
        tokio::time::timeout(Duration::from_secs(100), hog.exec(&request).await.unwrap().finish())
            .await
            .unwrap();
    assert!(ended.as_ref().map_or(true, |finished| finished.code == 137), "{ended:?}");
    assert_eq!(images(), 0);
    assert_eq!(said(&other, "echo x > file && sync && cat file").await, "x\n");
    let woken = sprites::http_client()
        .unwrap()
        .get(format!("{}/v1/sprites/hog/fs/read?path=/home/sprite/1", server.url()));
    let refused = woken.bearer_auth(TOKEN).send().await.unwrap();
    assert_eq!(refused.status(), 507, "{}", refused.text().await.unwrap());
    server.sprite("new").await;
    server.client().delete(&"hog".parse().unwrap()).await.unwrap();
    assert_eq!(said(&server.sprite("next").await, "echo fine").await, "fine\n");
    drop(server);
    let mut unmount = Command::new("umount");
    unmount.arg("--lazy").arg(mount.path());
    assert!(output(unmount).await.status.success());
}
