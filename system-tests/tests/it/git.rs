//! A real git server, in GitHub's place: git itself is told that GitHub is here.

use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::{eventually, tls::Tls};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

/// Ended when dropped.
pub struct GitServer {
    _served: TempDir,
    _daemon: Child,
    pub port: u16,
}

impl GitServer {
    /// Serves one repository with one file.
    pub async fn start(repository: &str, path: &str, content: &str) -> Self {
        Self::serving(repository, &[(path, content)]).await
    }

    /// Serves one repository with these files.
    pub async fn serving(repository: &str, files: &[(&str, &str)]) -> Self {
        let served = tempfile::tempdir().unwrap();
        let origin = served.path().join(repository);
        let git = async |args: &[&str]| {
            let mut command = Command::new("git");
            command
                .arg("-C")
                .arg(&origin)
                .args(["-c", "user.name=t", "-c", "user.email=t@example.org"])
                .args(args);
            assert!(command.status().await.unwrap().success(), "git {args:?}");
        };
        for (path, content) in files {
            let file = origin.join(path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, content).unwrap();
        }
        git(&["init", "-q"]).await;
        git(&["add", "."]).await;
        git(&["commit", "-q", "-m", "first"]).await;
        // Some ask for it by this name.
        std::os::unix::fs::symlink(&origin, origin.with_extension("git")).unwrap();
        let port = testkit::free_port().unwrap();
        // Not by way of `git daemon`, which would leave it running when it is killed itself.
        let programs =
            std::process::Command::new("git").arg("--exec-path").output().unwrap().stdout;
        let mut daemon =
            Command::new(format!("{}/git-daemon", String::from_utf8(programs).unwrap().trim()));
        daemon.args([
            "--export-all",
            "--listen=127.0.0.1",
            &format!("--port={port}"),
            &format!("--base-path={}", served.path().display()),
        ]);
        let daemon = daemon.kill_on_drop(true).spawn().unwrap();
        eventually("git serves", || async {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
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

/// github.com with repositories that each want a token of their own: reached over HTTP, and by way
/// of a proxy over TLS, as git reaches the real one. Ended when dropped.
pub struct PrivateGitHub {
    served: TempDir,
    _tls: Tls,
    _server: Child,
    pub port: u16,
}

impl PrivateGitHub {
    /// Serves repositories, each `owner/name` with its token.
    pub async fn start(repositories: &[(&str, &str)]) -> Self {
        let served = tempfile::tempdir().unwrap();
        let tls = Tls::generate().unwrap();
        let mut server = Command::new("python3");
        server
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/git/private_github.py"))
            .arg(served.path())
            .arg(tls.certificate_file());
        server.arg(tls.key_file()).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut server = server.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).await.unwrap();
        let github =
            Self { served, _tls: tls, _server: server, port: line.trim().parse().unwrap() };
        for (name, token) in repositories {
            let path = github.served.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            github.git(name, &["init", "-q", "--bare", "-b", "main"]).await;
            github.git(name, &["config", "http.receivepack", "true"]).await;
            let tree = github.git(name, &["hash-object", "-t", "tree", "-w", "/dev/null"]).await;
            let commit = github.git(name, &["commit-tree", &tree, "-m", "first"]).await;
            github.git(name, &["update-ref", "refs/heads/main", &commit]).await;
            github.set_token(name, token);
        }
        github
    }

    /// Exchanges what a repository wants to see.
    pub fn set_token(&self, name: &str, token: &str) {
        std::fs::write(self.served.path().join(name).join("token"), token).unwrap();
    }

    /// What git says of a repository, asked on the server.
    pub async fn git(&self, repository: &str, args: &[&str]) -> String {
        let mut command = Command::new("git");
        command
            .arg("-C")
            .arg(self.served.path().join(repository))
            .args(["-c", "user.name=t", "-c", "user.email=t@example.org"])
            .args(args);
        let output = command.output().await.unwrap();
        assert!(
            output.status.success(),
            "git {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Where the model gateway finds it (`AOD_GITHUB_URL`).
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Variables by which git finds it under its real name. Its certificate has no authority that a
    /// Sprite knows.
    pub fn as_github(&self) -> Value {
        json!({
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": "http.https://github.com/.proxy",
            "GIT_CONFIG_VALUE_0": self.url(),
            "GIT_CONFIG_KEY_1": "http.https://github.com/.sslVerify",
            "GIT_CONFIG_VALUE_1": "false",
        })
    }
}
