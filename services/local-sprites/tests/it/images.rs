//! Sprites that begin from kept disks.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use rustix::process::Signal;
use serde_json::Value;
use sprites::{Began, Error, Sprite};
use testkit::eventually;

use crate::server::{Server, bash, output, said};

const WITHOUT: [&str; 2] = ["/var/lib/aod-host", "/var/lib/aod"];
/// In no text of this test's but by its parts.
const SENTINELS: [(&str, &str); 3] =
    [("journal-", "7c1e0b9d"), ("deleted-", "e4a2f6c8"), ("temporary-", "51d3b7aa")];

fn has_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The images that a server keeps, without drafts.
fn images(server: &Server) -> Vec<PathBuf> {
    let below =
        |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut all: Vec<PathBuf> = below(server.data.path().join("images"))
        .flat_map(below)
        .filter(|image| image.join("image.json").exists())
        .collect();
    all.sort();
    all
}

fn names(server: &Server) -> Vec<String> {
    let name = |image: PathBuf| image.file_name().unwrap().to_str().unwrap().to_owned();
    images(server).into_iter().map(name).collect()
}

async fn keep(sprite: &Sprite, key: &str) {
    let draft = sprite.draft_image(key, &WITHOUT).await.unwrap();
    sprite.keep_image(draft).await.unwrap();
}

async fn keep_and_wait(server: &Server, sprite: &Sprite, key: &str) {
    keep(sprite, key).await;
    eventually("the image is there", async || names(server).contains(&key.to_owned())).await;
}

async fn began(server: &Server, name: &str, key: &str) -> Began {
    server.client().ensure_from(&name.parse().unwrap(), key).await.unwrap()
}

/// Whether the bytes of a file hold a text.
fn holds(file: &std::path::Path, text: &str) -> bool {
    let content = fs::read(file).unwrap();
    memchr::memmem::find(&content, text.as_bytes()).is_some()
}

#[tokio::test]
async fn a_sprite_begins_with_what_another_installed_and_without_its_secrets() {
    if !has_root() {
        return;
    }
    let mut server = Server::start(&[("LOCAL_SPRITES_DISK_MB", "256")]).await;
    let first = server.sprite("first").await;
    let [journal, deleted, temporary] = SENTINELS.map(|(one, two)| format!("{one}{two}"));
    let script = format!(
        "set -e; echo tool >tool; ln tool hard; ln -s tool soft
         sudo sh -ec 'echo program >/usr/local/bin/program; chmod 4755 /usr/local/bin/program; rm /etc/motd
                      mkdir -p /var/lib/aod-host/deep; echo {journal} >/var/lib/aod-host/deep/journal
                      mkdir -p /var/lib/aod; yes {temporary} | head -c 300000 >/var/lib/aod/spec'
         yes {deleted} | head -c 300000 >gone; sync; rm gone"
    );
    bash(&first, &script).await;
    // What is drafted is what counts, not what is there when the draft is kept.
    let draft = first.draft_image("one", &WITHOUT).await.unwrap();
    bash(&first, "echo later >later").await;
    first.keep_image(draft).await.unwrap();
    eventually("the image is there", async || names(&server) == ["one"]).await;
    let disk = images(&server)[0].join("disk.img");
    if disk.exists() {
        assert!(holds(
            &server.data.path().join("sprites").join(name_of(&server, "first")).join("disk.img"),
            &journal
        ));
        for sentinel in [&journal, &deleted, &temporary] {
            assert!(!holds(&disk, sentinel), "{sentinel}");
        }
        let image = fs::metadata(&disk).unwrap();
        assert!(std::os::unix::fs::MetadataExt::blocks(&image) * 512 < 100 << 20);
    }
    let second = server.client().sprite("second".parse().unwrap());
    assert!(
        matches!(began(&server, "second", "one").await, Began::FromImage(took) if took < Duration::from_secs(10))
    );
    let found = "cat tool soft; stat -c %h tool; stat -c %a /usr/local/bin/program; ls /etc/motd later /var/lib/aod-host /var/lib/aod 2>&1 | grep -c 'No such'; id -un; touch mine && stat -c %U mine";
    assert_eq!(said(&second, found).await, "tool\ntool\n2\n4755\n4\nsprite\nsprite\n");
    // A repetition says the same, also after a restart of the server.
    server.end(Signal::KILL).await;
    server.run().await;
    assert!(matches!(began(&server, "second", "one").await, Began::FromImage(_)));
    assert_eq!(began(&server, "third", "other").await, Began::Empty);
    // So does a request for a Sprite that another one is creating.
    let both = tokio::join!(began(&server, "raced", "one"), began(&server, "raced", "one"));
    assert!(matches!(both, (Began::FromImage(_), Began::FromImage(_))), "{both:?}");
    // The first one wins.
    let third = server.client().sprite("third".parse().unwrap());
    assert!(matches!(third.draft_image("one", &[]).await, Err(Error::Conflict { .. })));
    // What changes in a Sprite does not change the image.
    bash(&second, "rm tool").await;
    began(&server, "fourth", "one").await;
    assert_eq!(
        said(&server.client().sprite("fourth".parse().unwrap()), "cat tool").await,
        "tool\n"
    );
    // Not from inside.
    let inside = "curl -s -o /dev/null -w '%{http_code}' --unix-socket /.sprite/api.sock -X POST -d '{\"key\":\"x\"}' http://x/v1/image";
    assert_eq!(said(&second, inside).await, "404");
    // Another's draft is not kept.
    let drafted = third.draft_image("two", &[]).await.unwrap();
    assert!(matches!(second.keep_image(drafted).await, Err(Error::NotFound { .. })));
}

fn name_of(server: &Server, sprite: &str) -> String {
    let entries = fs::read_dir(server.data.path().join("sprites")).unwrap().flatten();
    let mut names = entries.map(|entry| entry.file_name().into_string().unwrap());
    names.find(|name| name.starts_with(&format!("{sprite}."))).unwrap()
}

#[tokio::test]
async fn images_stay_within_their_bytes_and_the_least_recently_used_goes_first() {
    if !has_root() {
        return;
    }
    let server = Server::start(&[("LOCAL_SPRITES_IMAGES_MB", "100")]).await;
    let sprite = server.sprite("filler").await;
    bash(&sprite, "head -c 40M /dev/urandom >big").await;
    keep_and_wait(&server, &sprite, "one").await;
    keep_and_wait(&server, &sprite, "two").await;
    began(&server, "user", "one").await;
    keep_and_wait(&server, &sprite, "three").await;
    assert_eq!(names(&server), ["one", "three"]);
    // One that is larger than all may be is not kept, and no other goes for it.
    bash(&sprite, "head -c 90M /dev/urandom >bigger").await;
    keep(&sprite, "four").await;
    eventually("the draft is gone", async || drafts(&server) == 0).await;
    assert_eq!(names(&server), ["one", "three"]);
}

fn drafts(server: &Server) -> usize {
    let all = fs::read_dir(server.data.path().join("images")).unwrap().flatten();
    let below = all.flat_map(|entry| fs::read_dir(entry.path()).unwrap().flatten());
    below.filter(|entry| entry.file_name().to_str().unwrap().starts_with("draft.")).count()
}

#[tokio::test]
async fn old_images_those_of_another_root_and_half_made_ones_are_deleted() {
    if !has_root() {
        return;
    }
    let mut server = Server::start(&[("LOCAL_SPRITES_IMAGE_HOURS", "2")]).await;
    let sprite = server.sprite("maker").await;
    for key in ["old", "young"] {
        keep_and_wait(&server, &sprite, key).await;
    }
    let record = images(&server)[0].join("image.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    json["created_at_us"] = (json["created_at_us"].as_i64().unwrap() - 7_300_000_000).into();
    fs::write(&record, json.to_string()).unwrap();
    assert_eq!(began(&server, "late", "old").await, Began::Empty);
    assert!(matches!(began(&server, "early", "young").await, Began::FromImage(_)));
    // A server that is killed leaves drafts, mounted perhaps, and what it was about to rename.
    let draft = sprite.draft_image("half", &WITHOUT).await.unwrap();
    assert_eq!(drafts(&server), 1);
    server.end(Signal::KILL).await;
    fs::create_dir(images(&server)[0].with_file_name("whole-but-for-its-record")).unwrap();
    server.run().await;
    assert_eq!((names(&server), drafts(&server)), (vec!["young".to_owned()], 0));
    assert!(matches!(sprite.keep_image(draft).await, Err(Error::NotFound { .. })));
    assert_eq!(began(&server, "other", "whole-but-for-its-record").await, Began::Empty);
    keep_and_wait(&server, &sprite, "whole-but-for-its-record").await;
    // Another root file system, or another size of disks.
    server.end(Signal::TERM).await;
    server.set("LOCAL_SPRITES_DISK_MB", "1000");
    server.run().await;
    assert!(names(&server).is_empty());
    keep_and_wait(&server, &sprite, "young").await;
    // None at all.
    server.end(Signal::TERM).await;
    server.set("LOCAL_SPRITES_IMAGES_MB", "0");
    server.run().await;
    assert!(names(&server).is_empty());
    assert_eq!(began(&server, "without", "young").await, Began::Empty);
    assert!(matches!(sprite.draft_image("young", &[]).await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn a_link_in_place_of_a_directory_leads_to_nothing_outside_of_an_image() {
    if !has_root() {
        return;
    }
    let server = Server::start(&[]).await;
    let sprite = server.sprite("linker").await;
    let outside = tempfile::tempdir().unwrap();
    fs::create_dir(outside.path().join("aod-host")).unwrap();
    let to = outside.path().to_str().unwrap();
    bash(
        &sprite,
        &format!("sudo sh -ec 'rm -rf /var/lib/aod-host; ln -s {to}/aod-host /var/lib/aod-host'"),
    )
    .await;
    keep(&sprite, "one").await;
    eventually("the draft is gone", async || drafts(&server) == 0).await;
    assert!(names(&server).is_empty() && outside.path().join("aod-host").exists());
}

#[tokio::test]
async fn an_image_that_no_sprite_starts_with_is_replaced() {
    if !has_root() {
        return;
    }
    let server = Server::start(&[]).await;
    let sprite = server.sprite("maker").await;
    keep_and_wait(&server, &sprite, "one").await;
    let disk = images(&server)[0].join("disk.img");
    if !disk.exists() {
        return;
    }
    fs::write(&disk, "no file system").unwrap();
    assert_eq!(began(&server, "plain", "one").await, Began::Empty);
    assert_eq!(
        said(&server.client().sprite("plain".parse().unwrap()), "echo works").await,
        "works\n"
    );
    assert!(names(&server).is_empty());
    keep_and_wait(&server, &sprite, "one").await;
}

/// On a disk of the test's own. A quarter of it is to stay free.
#[tokio::test]
async fn no_copy_of_an_image_takes_the_machines_reserve() {
    if !has_root() {
        return;
    }
    let mount = tempfile::tempdir().unwrap();
    let mut tmpfs = Command::new("mount");
    tmpfs.args(["-t", "tmpfs", "-o", "size=1200M", "tmpfs"]).arg(mount.path());
    assert!(output(tmpfs).await.status.success());
    let data = mount.path().join("data");
    let server = Server::start(&[("LOCAL_SPRITES_DATA_DIR", data.to_str().unwrap())]).await;
    let sprite = server.sprite("maker").await;
    bash(&sprite, "head -c 200M /dev/urandom >big; sync").await;
    keep(&sprite, "one").await;
    eventually("a Sprite begins from it", async || {
        let first = began(&server, "first", "one").await;
        if first == Began::Empty {
            server.client().delete(&"first".parse().unwrap()).await.unwrap();
        }
        first != Began::Empty
    })
    .await;
    let names = ["second", "third"];
    let all = futures::future::join_all(names.map(|name| began(&server, name, "one"))).await;
    assert!(all.contains(&Began::Empty), "{all:?}");
    let free = rustix::fs::statvfs(&data).unwrap();
    assert!(free.f_bavail * free.f_frsize > 300 << 20, "{} blocks", free.f_bavail);
    drop(server);
    let mut unmount = Command::new("umount");
    unmount.arg("--lazy").arg(mount.path());
    assert!(output(unmount).await.status.success());
}

/// As a package's script may leave them. With a call for each level the server's stack overflows.
#[tokio::test]
async fn deep_directories_end_no_server() {
    if !has_root() {
        return;
    }
    let nest = "python3 -c 'import os; os.chdir(\"/tmp\"); [(os.mkdir(\"a\"), os.chdir(\"a\")) for _ in range(20000)]'";
    for disk_mb in ["512", "0"] {
        let server = Server::start(&[("LOCAL_SPRITES_DISK_MB", disk_mb)]).await;
        let sprite = server.sprite("deep").await;
        assert_eq!(bash(&sprite, nest).await.code, 0);
        match sprite.draft_image("one", &["/tmp"]).await {
            Ok(draft) => {
                sprite.keep_image(draft).await.unwrap();
                eventually("the image is there", async || names(&server) == ["one"]).await;
            }
            // Disks that are directories are copied only so deep.
            Err(error) => assert!(error.to_string().contains("deep"), "{error}"),
        }
        server.client().delete(&"deep".parse().unwrap()).await.unwrap();
        assert_eq!(said(&server.sprite("next").await, "echo fine").await, "fine\n");
        // On a busy machine a client may give up before the last of them is deleted.
        let sprites = server.data.path().join("sprites");
        let is_alone = async || fs::read_dir(&sprites).unwrap().count() == 1;
        eventually("the directories are deleted", is_alone).await;
    }
}
