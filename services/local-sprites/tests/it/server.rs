//! A server of a test's own.

use std::{
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal};
use sprites::{Client, ExecRequest, Finished, Sprite};

pub const TOKEN: &str = "a/token";

pub struct Server {
    pub data: tempfile::TempDir,
    pub port: u16,
    settings: Vec<(String, String)>,
    child: Option<Child>,
}

impl Server {
    pub async fn start(settings: &[(&str, &str)]) -> Self {
        let settings = settings
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let port = testkit::free_port().unwrap();
        let mut server = Self { data: tempfile::tempdir().unwrap(), port, settings, child: None };
        server.run().await;
        server
    }

    /// Starts a server over the same data.
    pub async fn run(&mut self) {
        // As when the starting process has a directory open: 7 is the machine's root.
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "exec 7</; exec \"$0\"", env!("CARGO_BIN_EXE_local-sprites")])
            .env("LOCAL_SPRITES_ADDR", format!("127.0.0.1:{}", self.port))
            .env("LOCAL_SPRITES_TOKEN", TOKEN)
            .env("LOCAL_SPRITES_DATA_DIR", self.data.path())
            .env("LOCAL_SPRITES_ROOTFS", testkit::rootfs())
            .env("AOD_ADMIN_ADDR", "127.0.0.1:0")
            .envs(self.settings.iter().cloned())
            .stdout(Stdio::null());
        self.child = Some(testkit::spawn_tied(&command).unwrap());
        testkit::eventually("the server answers", async || self.status("/v1/sprites").await == 200)
            .await;
    }

    /// Changes a setting of the next run.
    pub fn set(&mut self, name: &str, value: &str) {
        self.settings.push((name.to_owned(), value.to_owned()));
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub async fn status(&self, path: &str) -> u16 {
        let request =
            sprites::http_client().unwrap().get(format!("{}{path}", self.url())).bearer_auth(TOKEN);
        request.send().await.map_or(0, |response| response.status().as_u16())
    }

    pub fn client(&self) -> Client {
        Client::new(sprites::http_client().unwrap(), &self.url(), TOKEN.to_owned().into())
    }

    pub async fn sprite(&self, name: &str) -> Sprite {
        self.client().ensure(&name.parse().unwrap()).await.unwrap();
        self.client().sprite(name.parse().unwrap())
    }

    /// Ends the server with a signal, and waits for that.
    pub async fn end(&mut self, signal: Signal) {
        let Some(mut child) = self.child.take() else { return };
        rustix::process::kill_process(Pid::from_child(&child), signal).unwrap();
        tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap();
    }

    /// A program with what the published clients' tests need.
    pub fn with_client(&self, program: &std::path::Path) -> Command {
        let mut command = Command::new(program);
        command.env("SPRITES_URL", self.url()).env("SPRITES_TOKEN", TOKEN);
        command
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It ends what runs in its Sprites first.
        if let Some(child) = &mut self.child {
            let _ = rustix::process::kill_process(Pid::from_child(child), Signal::INT);
            let _ = child.wait();
        }
    }
}

/// Whether the servers use gVisor: each Sprite has a kernel of its own, whose namespaces, devices and
/// limits are no one else's.
pub fn has_own_kernel() -> bool {
    std::env::var_os("LOCAL_SPRITES_RUNTIME").is_some_and(|runtime| runtime == "runsc")
}

/// A script that is as close to root as a Sprite's programs get: with gVisor there is no `sudo`.
pub fn as_root(script: &str) -> String {
    if has_own_kernel() { script.replace("sudo ", "") } else { script.to_owned() }
}

/// Runs a shell script in a Sprite.
pub async fn bash(sprite: &Sprite, script: &str) -> Finished {
    let request = ExecRequest { argv: &["bash", "-c", script], ..ExecRequest::default() };
    sprite.run(&request, Duration::from_secs(60)).await.unwrap()
}

/// What a script writes.
pub async fn said(sprite: &Sprite, script: &str) -> String {
    let finished = bash(sprite, script).await;
    String::from_utf8_lossy(&[finished.stdout, finished.stderr].concat()).into_owned()
}

pub async fn output(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
}
