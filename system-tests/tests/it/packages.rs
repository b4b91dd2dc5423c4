//! What an environment's packages are for: the agent finds them.

use std::process::Stdio;

use serde_json::json;
use system_tests::{Options, Stack};
use testkit::eventually;
use tokio::process::{Child, Command};

/// Go's module proxy, as files: `example.org/greet`, a program that says hello.
async fn module_proxy() -> (tempfile::TempDir, Child, u16) {
    let dir = tempfile::tempdir().unwrap();
    let module = "example.org/greet@v1.0.0";
    let (source, served) = (dir.path().join("source"), dir.path().join("served/example.org/greet/@v"));
    std::fs::create_dir_all(source.join(module)).unwrap();
    std::fs::create_dir_all(&served).unwrap();
    for (path, text) in [
        (source.join(module).join("go.mod"), "module example.org/greet\n\ngo 1.19\n"),
        (source.join(module).join("main.go"), "package main\n\nfunc main() { println(\"hello from go\") }\n"),
        (served.join("list"), "v1.0.0\n"),
        (served.join("v1.0.0.info"), "{\"Version\":\"v1.0.0\",\"Time\":\"2026-01-01T00:00:00Z\"}"),
        (served.join("v1.0.0.mod"), "module example.org/greet\n\ngo 1.19\n"),
    ] {
        std::fs::write(path, text).unwrap();
    }
    let files = ["go.mod", "main.go"].map(|name| format!("{module}/{name}"));
    let zip = "import sys, zipfile\nwith zipfile.ZipFile(sys.argv[1], 'w') as zip:\n    for name in sys.argv[2:]: zip.write(name)";
    let mut zipped = Command::new("python3");
    zipped.current_dir(&source).args(["-c", zip]).arg(served.join("v1.0.0.zip")).args(files);
    assert!(zipped.status().await.unwrap().success());
    let port = testkit::free_port().unwrap();
    let mut server = Command::new("python3");
    server.args(["-m", "http.server", "--bind", "127.0.0.1", "--directory"]).arg(dir.path().join("served")).arg(port.to_string());
    let server = server.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    eventually("modules are served", || async { tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() }).await;
    (dir, server, port)
}

/// By the real managers; all but Go's from their own registries. Compilers come by apt, which is first.
#[tokio::test]
async fn packages_are_installed_for_the_agent() {
    let stack = Stack::start(Options::default()).await.unwrap();
    let (_modules, _server, port) = module_proxy().await;
    let environment = json!({
        "name": "packages",
        "packages": {
            "apt": ["hello", "cargo-web", "golang-go"],
            "cargo": ["ungrammar2json@1.0.0"],
            "go": ["example.org/greet@v1.0.0"],
            "npm": ["is-odd@3.0.1"],
            "pip": ["six==1.17.0"],
        },
        "env_vars": { "GOPROXY": format!("http://127.0.0.1:{port}"), "GOSUMDB": "off" },
    });
    let environment = stack.post("/environments", environment).await.unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let prompt = r#"hello; echo "Name = 'a'" | ungrammar2json; greet 2>&1
        NODE_PATH=$(npm root -g) node -p 'require("is-odd")(3)'; python3 -c 'import six; print(six.__version__)'"#;
    let body = json!({ "agent_id": agent, "environment_id": environment.text("id"), "prompt": prompt });
    let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    let expected = "Hello, world!\n{\"Name\":{\"token\":\"a\"}}\nhello from go\ntrue\n1.17.0\n";
    assert_eq!(output, expected, "{:?}", events.last());
}
