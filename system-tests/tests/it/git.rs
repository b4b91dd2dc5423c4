//! A real git server, in GitHub's place: git itself is told that GitHub is here.

use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::eventually;
use tokio::process::{Child, Command};

/// Ended when dropped.
pub struct GitServer {
    _served: TempDir,
    _daemon: Child,
    port: u16,
}

impl GitServer {
    /// Serves one repository with one file.
    pub async fn start(repository: &str, path: &str, content: &str) -> Self {
        let served = tempfile::tempdir().unwrap();
        let origin = served.path().join(repository);
        let git = async |args: &[&str]| {
            let mut command = Command::new("git");
            command.arg("-C").arg(&origin).args(["-c", "user.name=t", "-c", "user.email=t@example.org"]).args(args);
            assert!(command.status().await.unwrap().success(), "git {args:?}");
        };
        let file = origin.join(path);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, content).unwrap();
        git(&["init", "-q"]).await;
        git(&["add", "."]).await;
        git(&["commit", "-q", "-m", "first"]).await;
        // Some ask for it by this name.
        std::os::unix::fs::symlink(&origin, origin.with_extension("git")).unwrap();
        let port = testkit::free_port().unwrap();
        // Not by way of `git daemon`, which would leave it running when it is killed itself.
        let programs = std::process::Command::new("git").arg("--exec-path").output().unwrap().stdout;
        let mut daemon = Command::new(format!("{}/git-daemon", String::from_utf8(programs).unwrap().trim()));
        daemon.args(["--export-all", "--listen=127.0.0.1", &format!("--port={port}"), &format!("--base-path={}", served.path().display())]);
        let daemon = daemon.kill_on_drop(true).spawn().unwrap();
        eventually("git serves", || async { tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() }).await;
        Self { _served: served, _daemon: daemon, port }
    }

    /// Variables that lead git from GitHub to this server.
    pub fn as_github(&self) -> Value {
        json!({
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": format!("url.git://127.0.0.1:{}/.insteadOf", self.port),
            "GIT_CONFIG_VALUE_0": "https://github.com/",
        })
    }
}
