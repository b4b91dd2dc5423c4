//! Where only Docker is there: the same servers from images. Used when a program is not found and `docker` answers.

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

/// A container that is removed when dropped.
#[derive(Debug)]
pub struct Container {
    id: String,
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
        Ok(Self { id: String::from_utf8(output.stdout)?.trim().to_owned() })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = Command::new("docker").args(["rm", "--force", &self.id]).output();
    }
}
