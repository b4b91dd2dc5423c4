//! The published clients, unmodified: all that they can do.

use std::path::{Path, PathBuf};

use crate::server::{Server, output};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

async fn passes(command: std::process::Command) {
    let output = output(command).await;
    let text = format!(
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}");
}

#[tokio::test]
async fn sprites_py() {
    let server = Server::start(&[]).await;
    // `make setup` makes what is started here.
    let mut command = server.with_client(&repository().join(".venv/bin/python"));
    command.args(["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]);
    command.arg(repository().join("services/local-sprites/tests/clients/test_sprites_py.py"));
    passes(command).await;
}

#[tokio::test]
async fn fly_sprites() {
    let server = Server::start(&[]).await;
    // Modules are found beside the program: it is put where they are.
    let modules = repository().join(".venv/node");
    let program = modules.join(format!("sprites-{}.test.mjs", std::process::id()));
    std::fs::copy(
        repository().join("services/local-sprites/tests/clients/sprites_js.test.mjs"),
        &program,
    )
    .unwrap();
    let mut command = server.with_client(&modules.join("node"));
    command.args(["--test", "--test-timeout=90000"]).arg(&program);
    passes(command).await;
    std::fs::remove_file(program).unwrap();
}
