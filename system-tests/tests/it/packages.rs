//! What an environment's packages are for: the agent finds them.

use std::{process::Stdio, time::Duration};

use serde_json::json;
use sprites::{Client, ExecRequest};
use system_tests::{Options, Stack};
use testkit::eventually;
use tokio::process::{Child, Command};

/// Go's module proxy, as files: `example.org/greet`, a program that says hello.
async fn module_proxy() -> (tempfile::TempDir, Child, u16) {
    let dir = tempfile::tempdir().unwrap();
    let module = "example.org/greet@v1.0.0";
    let (source, served) =
        (dir.path().join("source"), dir.path().join("served/example.org/greet/@v"));
    std::fs::create_dir_all(source.join(module)).unwrap();
    std::fs::create_dir_all(&served).unwrap();
    for (path, text) in [
        (source.join(module).join("go.mod"), "module example.org/greet\n\ngo 1.19\n"),
        (
            source.join(module).join("main.go"),
            "package main\n\nfunc main() { println(\"hello from go\") }\n",
        ),
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
    let server = serve(&dir.path().join("served"), port).await;
    (dir, server, port)
}

/// A gem, `greet`, and the index of a server that has it: what RubyGems itself makes of them, in a
/// Sprite.
const GEM_SERVER: &str = r#"
    set -e
    export DEBIAN_FRONTEND=noninteractive
    sudo -E apt-get -qq update
    sudo -E apt-get -qq install -y --no-install-recommends ruby
    mkdir -p greet/bin served/gems
    cd greet
    printf '#!/usr/bin/ruby\nputs "hello from ruby"\n' >bin/greet-by-gem
    chmod +x bin/greet-by-gem
    echo 'Gem::Specification.new("greet", "1.0.0") { |gem| gem.summary, gem.authors = "says hello", ["us"]
        gem.files, gem.executables = ["bin/greet-by-gem"], ["greet-by-gem"] }' >greet.gemspec
    gem build --quiet --output ../served/gems/greet-1.0.0.gem greet.gemspec
    cd ../served
    gem generate_index --quiet --directory .
    tar -c -f ../served.tar ."#;

async fn gem_server(client: &Client, port: u16) -> (tempfile::TempDir, Child) {
    let name = "gems".parse().unwrap();
    client.ensure(&name).await.unwrap();
    let request = ExecRequest { argv: &["bash", "-c", GEM_SERVER], ..ExecRequest::default() };
    let sprite = client.sprite(name);
    let made = sprite.run(&request, Duration::from_secs(300)).await.unwrap();
    assert_eq!(made.code, 0, "{made:?}");
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("served.tar"),
        sprite.read("/home/sprite/served.tar").await.unwrap(),
    )
    .unwrap();
    let unpacked = Command::new("tar")
        .arg("-x")
        .arg("-f")
        .arg(dir.path().join("served.tar"))
        .arg("-C")
        .arg(dir.path())
        .status();
    assert!(unpacked.await.unwrap().success());
    let server = serve(dir.path(), port).await;
    (dir, server)
}

/// A directory, over HTTP.
async fn serve(dir: &std::path::Path, port: u16) -> Child {
    let mut server = Command::new("python3");
    server
        .args(["-m", "http.server", "--bind", "127.0.0.1", "--directory"])
        .arg(dir)
        .arg(port.to_string());
    let server =
        server.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    eventually("files are served", || async {
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
    })
    .await;
    server
}

/// Has the session's Sprite take its gems from there, as a company's own image would: before
/// packages are installed, of which apt's are first.
async fn use_gem_server(client: &Client, port: u16) {
    let names = async || client.list("aod-").await.unwrap();
    eventually("the session has a Sprite", async || !names().await.is_empty()).await;
    let sprite = client.sprite(names().await[0].parse().unwrap());
    sprite
        .write("/home/sprite/.gemrc", format!(":sources: ['http://127.0.0.1:{port}/']\n"), 0o644)
        .await
        .unwrap();
}

/// By the real managers, all six; Go's and Ruby's from servers of the test's, the others from their
/// own registries. Compilers come by apt, which is first.
#[tokio::test]
async fn packages_are_installed_for_the_agent() {
    let (_modules, _server, port) = module_proxy().await;
    let gems = testkit::free_port().unwrap();
    let stack = Stack::start(Options::default().reaching(&[port, gems])).await.unwrap();
    let client = Client::new(
        sprites::http_client().unwrap(),
        &stack.ready_text("/sprites_url"),
        stack.ready_text("/sprites_token").into(),
    );
    let (_gems, _gem_server) = gem_server(&client, gems).await;
    let environment = json!({
        "name": "packages",
        "packages": {
            "apt": ["hello", "cargo-web", "golang-go", "ruby"],
            "cargo": ["ungrammar2json@1.0.0"],
            "gem": ["greet@~>1.0"],
            "go": ["example.org/greet@v1.0.0"],
            "npm": ["is-odd@3.0.1"],
            "pip": ["six==1.17.0"],
        },
        "env_vars": { "GOPROXY": format!("http://127.0.0.1:{port}"), "GOSUMDB": "off" },
    });
    let environment = stack.post("/environments", environment).await.unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let prompt = r#"hello; echo "Name = 'a'" | ungrammar2json; greet 2>&1; greet-by-gem
        NODE_PATH=$(npm root -g) node -p 'require("is-odd")(3)'; python3 -c 'import six; print(six.__version__)'"#;
    let body =
        json!({ "agent_id": agent, "environment_id": environment.text("id"), "prompt": prompt });
    let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
    use_gem_server(&client, gems).await;
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    let expected = "Hello, world!\n{\"Name\":{\"token\":\"a\"}}\nhello from go\nhello from ruby\ntrue\n1.17.0\n";
    assert_eq!(output, expected, "{:?}", events.last());
}
