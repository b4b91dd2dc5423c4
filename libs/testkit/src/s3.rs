//! A real S3 server on this machine: s3s-fs, which keeps buckets as directories.

use std::{
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use crate::{free_port, spawn_tied};

pub const ACCESS_KEY_ID: &str = "test-access-key";
pub const SECRET_ACCESS_KEY: &str = "test-secret-access-key";

/// A server with buckets of its own. It ends when this is dropped.
#[derive(Debug)]
pub struct S3 {
    program: PathBuf,
    port: u16,
    buckets: tempfile::TempDir,
    running: Option<Child>,
}

impl S3 {
    /// Starts a server that has one bucket.
    ///
    /// # Errors
    /// When s3s-fs is not installed or does not start.
    pub fn start(bucket: &str) -> anyhow::Result<Self> {
        let program = crate::programs("s3s-fs").into_iter().find(|program| program.is_file());
        let mut s3 = Self {
            program: program.context("s3s-fs is not installed: run `SETUP_TESTS=1 make setup`")?,
            port: free_port()?,
            buckets: tempfile::Builder::new().prefix("aod-s3-").tempdir()?,
            running: None,
        };
        std::fs::create_dir(s3.buckets.path().join(bucket))?;
        s3.run()?;
        Ok(s3)
    }

    /// Kills the server and starts it again, with the same port and buckets.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.kill();
        self.run()
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.running.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Every file below the server's directory: objects, parts of uploads, and what describes them.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn stored(&self) -> anyhow::Result<Vec<PathBuf>> {
        let (mut folders, mut files) = (vec![self.buckets.path().to_owned()], Vec::new());
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder)? {
                let path = entry?.path();
                if path.is_dir() { folders.push(path) } else { files.push(path) }
            }
        }
        Ok(files)
    }

    fn run(&mut self) -> anyhow::Result<()> {
        let mut command = Command::new(&self.program);
        command
            .args(["--host", "127.0.0.1", "--port", &self.port.to_string()])
            .args(["--access-key", ACCESS_KEY_ID, "--secret-key", SECRET_ACCESS_KEY])
            .arg(self.buckets.path());
        self.running = Some(spawn_tied(&command)?);
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("s3s-fs does not take connections")
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.kill();
    }
}
