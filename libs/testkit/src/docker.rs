//! Where only Docker is there: the same servers from images. Used when a program is not found and `docker` answers.

use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, ensure};

/// A container that is removed when dropped, and when this process ends without that.
#[derive(Debug)]
pub struct Container {
    /// Waits for the end of its standard input, which is this process's end at the latest.
    remover: Child,
}

impl Container {
    /// Whether a Docker engine answers.
    #[must_use]
    pub fn available() -> bool {
        let version = Command::new("docker").args(["version", "--format", "{{.Server.Version}}"]).stderr(Stdio::null()).output();
        version.is_ok_and(|output| output.status.success())
    }

    /// Runs an image with some of its ports on loopback.
    ///
    /// # Errors
    /// When Docker refuses.
    pub fn run(options: &[&str], image: &str, args: &[&str]) -> anyhow::Result<Self> {
        let output =
            Command::new("docker").args(["run", "--rm", "--detach"]).args(options).arg(image).args(args).output().context("docker")?;
        ensure!(output.status.success(), "docker run {image}: {}", String::from_utf8_lossy(&output.stderr));
        let id = String::from_utf8(output.stdout)?.trim().to_owned();
        let mut remover = Command::new("sh");
        remover.args(["-c", "read -r _; exec docker rm --force \"$0\"", &id]);
        let remover = remover.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        Ok(Self { remover })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        drop(self.remover.stdin.take());
        let _ = self.remover.wait();
    }
}
