//! Which users of the machine Sprites' users are: each Sprite's are others.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use serde_json::json;
use sprites::Sprite;

use crate::server::{Server, TOKEN, bash, has_own_kernel, output, said};

const USERS: u32 = 65_536;
/// The Sprite's user, as it numbers itself.
const USER: u32 = 1001;

/// Root and a runtime that gives Sprites user ids of their own.
fn is_possible() -> bool {
    rustix::process::geteuid().is_root() && !has_own_kernel()
}

/// The owner of the root file system.
fn images_root() -> u32 {
    fs::metadata(testkit::rootfs()).unwrap().uid()
}

/// Starts `sleep` with a number that no other process has, and returns its number and its user, as
/// the machine names them.
async fn sleeper(sprite: &Sprite, sudo: &str) -> (i32, u32) {
    let seconds = fastrand::u32(1_000_000..).to_string();
    bash(sprite, &format!("(setsid {sudo} sleep {seconds} >/dev/null 2>&1 &); sleep 0.3")).await;
    let is_it = |path: &Path| {
        fs::read(path.join("cmdline"))
            .is_ok_and(|line| line == format!("sleep\0{seconds}\0").into_bytes())
    };
    let path = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let path = path.into_iter().find(|path| is_it(path)).unwrap();
    let pid = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
    (pid, fs::metadata(path).unwrap().uid())
}

async fn user(sprite: &Sprite) -> u32 {
    sleeper(sprite, "").await.1
}

/// Whether a user of the machine may send a process signals.
async fn may_signal(user: u32, pid: i32) -> bool {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &user.to_string(), "--regid", &user.to_string(), "--clear-groups"]);
    command.args(["sh", "-c", &format!("kill -0 {pid}")]);
    output(command).await.status.success()
}

async fn call(server: &Server, method: &str, path: &str, body: String) {
    let url = format!("{}/v1/sprites/{path}", server.url());
    let client = sprites::http_client().unwrap();
    let request = client.request(method.parse().unwrap(), url).bearer_auth(TOKEN).body(body);
    let response = request.send().await.unwrap();
    // A checkpoint is made, or restored, once all of the answer is there.
    let (status, text) = (response.status(), response.text().await.unwrap());
    assert!(status.is_success() && !text.contains("error"), "{path}: {text}");
}

/// Owners of the image's files, of those that a program in the Sprite writes, and of those that the
/// file API writes, as the Sprite sees them.
async fn check_owners(server: &Server, sprite: &Sprite) {
    let name = sprite.name();
    bash(sprite, "sudo rm -rf own roots api given; touch own; sudo touch roots").await;
    sprite.write("/home/sprite/api", "new", 0o644).await.unwrap();
    sprite.write("/home/sprite/own", "again", 0o644).await.unwrap();
    let file = format!("{name}/fs/write?path=/home/sprite/given&asRoot=true");
    call(server, "PUT", &file, "new".to_owned()).await;
    let owners = "stat -c '%n %u:%g' / /usr/bin/env /etc/passwd /etc/hosts /home/sprite /workspace own roots api given";
    let expected = "/ 0:0\n/usr/bin/env 0:0\n/etc/passwd 0:0\n/etc/hosts 0:0\n/home/sprite 1001:1001\n/workspace 1001:1001\n\
                    own 1001:1001\nroots 0:0\napi 1001:1001\ngiven 0:0\n";
    assert_eq!(said(sprite, owners).await, expected);
    let change = json!({ "path": "/home/sprite/given", "uid": 5, "gid": "sprite" });
    call(server, "POST", &format!("{name}/fs/chown"), change.to_string()).await;
    assert_eq!(said(sprite, "stat -c %u:%g given; cat own").await, "5:1001\nagain");
}

#[tokio::test]
async fn no_two_sprites_are_one_user_of_the_machine_and_files_keep_their_owners() {
    if !is_possible() {
        return;
    }
    // Disks that are file systems of their own, and disks that are directories.
    for disk_mb in ["200", "0"] {
        let mut server = Server::start(&[("LOCAL_SPRITES_DISK_MB", disk_mb)]).await;
        let (one, other) = (server.sprite("one").await, server.sprite("other").await);
        let ((own, user), (others, others_user)) =
            (sleeper(&one, "").await, sleeper(&other, "").await);
        let (roots, root) = sleeper(&one, "sudo").await;
        assert_eq!(user, root + USER);
        for users in [root, others_user - USER].windows(2).chain([[root, images_root()].as_slice()])
        {
            assert!(users[0].abs_diff(users[1]) >= USERS, "{users:?}");
        }
        assert!(may_signal(user, own).await && may_signal(root, roots).await);
        for pid in [others, roots] {
            assert!(!may_signal(user, pid).await, "{pid}");
        }
        assert!(!may_signal(root, others).await && !may_signal(others_user, own).await);
        check_owners(&server, &one).await;

        call(&server, "POST", "one/checkpoint", json!({}).to_string()).await;
        bash(&one, "sudo rm -rf own roots; sudo chown 7 api").await;
        call(&server, "POST", "one/checkpoints/v0/restore", json!({}).to_string()).await;
        let owners = "stat -c %u:%g own roots api given";
        assert_eq!(said(&one, owners).await, "1001:1001\n0:0\n1001:1001\n5:1001\n");
        check_owners(&server, &one).await;

        let before = sleeper(&one, "").await;
        server.end(Signal::KILL).await;
        server.run().await;
        assert_eq!(fs::metadata(format!("/proc/{}", before.0)).unwrap().uid(), before.1);
        check_owners(&server, &one).await;
        let third = server.sprite("third").await;
        let users = [before.1, self::user(&one).await, others_user, self::user(&third).await];
        assert_eq!(users[0], users[1]);
        assert!(users[3] != users[0] && users[3] != users[2], "{users:?}");
        if disk_mb == "0" {
            // As releases before had them, and other Sprites, from images and checkpoints.
            let mut sprites = fs::read_dir(server.data.path().join("sprites")).unwrap().flatten();
            let layer = sprites.find_map(|sprite| {
                let layer = sprite.path().join("disk/upper/home/sprite");
                layer.join("own").exists().then_some(layer)
            });
            let on_disk =
                |file: &str| fs::metadata(layer.as_ref().unwrap().join(file)).unwrap().uid();
            let image = images_root();
            assert_eq!(["own", "roots", "api"].map(on_disk), [image + USER, image, image + USER]);
        }
    }
}

/// Pipes' memory is limited by user: beyond it a new pipe holds little.
#[tokio::test]
async fn one_sprites_pipes_take_nothing_from_anothers() {
    if !is_possible() {
        return;
    }
    let server = Server::start(&[]).await;
    let (greedy, other) = (server.sprite("pipes").await, server.sprite("plumber").await);
    let pipes = "import fcntl, os, resource, sys, time\n\
                 most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n\
                 resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))\n\
                 for _ in range(int(sys.argv[1])): last = os.pipe()\n\
                 print(fcntl.fcntl(last[0], 1032), flush=True)\n\
                 if len(sys.argv) > 2: time.sleep(60)\n";
    for sprite in [&greedy, &other] {
        sprite.write("/home/sprite/pipes.py", pipes, 0o644).await.unwrap();
    }
    bash(&greedy, "(setsid python3 pipes.py 1500 hold >held 2>&1 &); for n in $(seq 100); do [ -s held ] && break; sleep 0.1; done").await;
    assert_eq!(said(&greedy, "cat held").await, "8192\n", "its own are used up");
    assert_eq!(said(&other, "python3 pipes.py 1").await, "65536\n");
}

/// An overlay over the root file system: the owners of its files cannot be mapped.
struct Unmappable(tempfile::TempDir);

impl Unmappable {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("lowerdir={}:{}", testkit::rootfs().display(), dir.path().display());
        let mut mount = Command::new("mount");
        mount.args(["-t", "overlay", "overlay", "-o", &options]).arg(dir.path());
        assert!(mount.status().unwrap().success());
        Self(dir)
    }
}

impl Drop for Unmappable {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_sprite_with_the_ids_that_all_had_runs_on_and_gets_ids_of_its_own() {
    if !is_possible() {
        return;
    }
    let image = Unmappable::new();
    let path = image.0.path().to_str().unwrap();
    let mut server = Server::start(&[("LOCAL_SPRITES_ROOTFS", path)]).await;
    let (one, other) = (server.sprite("elder").await, server.sprite("cold").await);
    for sprite in [&one, &other] {
        assert_eq!(user(sprite).await, images_root() + USER);
        check_owners(&server, sprite).await;
    }
    call(&server, "POST", "elder/checkpoint", json!({}).to_string()).await;
    let before = sleeper(&one, "").await;

    server.end(Signal::KILL).await;
    server.set("LOCAL_SPRITES_ROOTFS", testkit::rootfs().to_str().unwrap());
    server.run().await;
    assert_eq!(fs::metadata(format!("/proc/{}", before.0)).unwrap().uid(), before.1);
    assert_eq!(user(&one).await, before.1, "it runs on as it was");
    check_owners(&server, &one).await;
    call(&server, "POST", "elder/checkpoints/v0/restore", json!({}).to_string()).await;
    // Ends what runs in both.
    server.end(Signal::INT).await;
    server.run().await;
    let users = [user(&one).await, user(&other).await, images_root() + USER];
    assert!(users[0] != users[1] && !users[..2].contains(&users[2]), "{users:?}");
    for sprite in [&one, &other] {
        assert_eq!(said(sprite, "stat -c %u:%g own given").await, "1001:1001\n5:1001\n");
        check_owners(&server, sprite).await;
    }
}

/// The directory of a Sprite.
fn directory(server: &Server, sprite: &str) -> PathBuf {
    let mut sprites = fs::read_dir(server.data.path().join("sprites")).unwrap().flatten();
    let is_it = |name: &str| name.rsplit_once('.').is_some_and(|(name, _)| name == sprite);
    sprites.find(|entry| is_it(entry.file_name().to_str().unwrap())).unwrap().path()
}

/// Runs a command that succeeds.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a server that was killed while it started a sandbox left mounted.
struct LeftMounted(PathBuf);

impl LeftMounted {
    fn new(place: PathBuf, source: &Path) -> Self {
        let left = Self(place);
        for mount in ["root", "root", "exposed/image"] {
            let target = left.0.join(mount);
            fs::create_dir_all(&target).unwrap();
            run("mount", &["--bind", source.to_str().unwrap(), target.to_str().unwrap()]);
        }
        left
    }
}

impl Drop for LeftMounted {
    fn drop(&mut self) {
        for mount in ["root", "root", "exposed/image"] {
            let mut unmount = Command::new("umount");
            unmount.args(["--quiet", "--lazy"]).arg(self.0.join(mount));
            let _ = unmount.stderr(Stdio::null()).status();
        }
    }
}

#[tokio::test]
async fn a_server_removes_mounts_that_one_before_left_and_deletes_no_file_that_they_show() {
    if !is_possible() {
        return;
    }
    let mut server = Server::start(&[]).await;
    server.sprite("left").await;
    let id = directory(&server, "left").extension().unwrap().to_str().unwrap().to_owned();
    let places = fs::read_dir("/run").unwrap().flatten().map(|entry| entry.path().join(&id));
    let place = places.into_iter().find(|place| place.exists()).unwrap();
    // Ends the Sprite as well.
    server.end(Signal::INT).await;
    let image = tempfile::tempdir().unwrap();
    fs::write(image.path().join("kept"), "").unwrap();
    let forgotten = place.with_file_name("0123456789abcdef0123456789abcdef");
    let left = [place, forgotten].map(|place| LeftMounted::new(place, image.path()));
    server.run().await;
    assert!(image.path().join("kept").exists());
    for LeftMounted(place) in &left {
        assert!(!place.exists(), "{}", place.display());
    }
}

/// A Sprite's disk that takes no writes: who writes to it cannot be killed.
struct Frozen(tempfile::TempDir);

impl Frozen {
    fn new(image: &Path) -> Self {
        let device =
            run("losetup", &["--noheadings", "--output", "NAME", "-j", image.to_str().unwrap()]);
        let frozen = Self(tempfile::tempdir().unwrap());
        run("mount", &[device.trim(), frozen.0.path().to_str().unwrap()]);
        run("fsfreeze", &["--freeze", frozen.0.path().to_str().unwrap()]);
        frozen
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(self.0.path()).status();
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn no_sprite_gets_the_user_ids_of_processes_that_cannot_be_killed_yet() {
    if !is_possible() {
        return;
    }
    let server = Server::start(&[("LOCAL_SPRITES_DISK_MB", "200")]).await;
    let stuck = server.sprite("stuck").await;
    bash(&stuck, "(setsid sh -c 'sleep 3; echo > written' >/dev/null 2>&1 &)").await;
    let before = user(&stuck).await;
    let frozen = Frozen::new(&directory(&server, "stuck").join("disk.img"));
    tokio::time::sleep(Duration::from_secs(4)).await;
    call(&server, "DELETE", "stuck", String::new()).await;
    let next = server.sprite("next").await;
    let next_user = user(&next).await;
    drop(frozen);
    assert_ne!(next_user, before);
}
