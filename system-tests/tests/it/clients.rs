//! Programs that others publish, unmodified, against the running stack.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;
use system_tests::{Options, Stack};

/// A program of the Python environment that the set-up makes, pointed at a stack.
fn python(stack: &Stack, program: &str) -> Command {
    let mut command = Command::new(root().join("../.venv/bin").join(program));
    command
        .env("AOD_READY", stack.data_dir().join("running.json"))
        .env("AOD_BIN", testkit::services::binary("aod").unwrap())
        .env("SPRITES_URL", stack.ready_text("/sprites_url"))
        .env("SPRITES_TOKEN", stack.ready_text("/sprites_token"))
        .env("AOD_API_URL", stack.ready_text("/api_url"))
        .env("AOD_API_TOKEN", stack.ready_text("/api_key"));
    command
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

/// `make setup` makes what is started here.
async fn succeeds(mut command: Command) -> String {
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = format!(
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}");
    text
}

#[tokio::test]
async fn the_published_clients_run_claude_and_drive_sprites() {
    let stack = Stack::start(Options { scripted_model: true, ..Options::default() }).await.unwrap();
    let mut command = python(&stack, "python");
    command.arg(root().join("clients/sdk_first_steps.py"));
    succeeds(command).await;
}

#[tokio::test]
async fn every_method_error_and_stream_of_aod_sdk() {
    let stack = Stack::start(Options { scripted_model: true, ..Options::default() }).await.unwrap();
    let mut command = python(&stack, "python");
    command
        .args(["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"])
        .arg(root().join("clients/test_aod_sdk.py"));
    succeeds(command).await;
}

/// Requests that are made from the document, right ones and wrong ones: no 5xx, no answer that is
/// not described.
#[tokio::test]
async fn schemathesis_finds_nothing() {
    let stack = Stack::start(Options { scripted_model: true, ..Options::default() }).await.unwrap();
    // What there is to be found: else most answers are 404.
    let agent = stack.agent("shell").await.unwrap();
    let environment =
        stack.post("/environments", json!({ "name": "e" })).await.unwrap().text("id").to_owned();
    let session = stack.session("shell", "echo hi").await.unwrap();
    stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("schemathesis.toml");
    let ids = [("agents", &agent), ("environments", &environment), ("sessions", &session)];
    let mut text = String::from("[warnings]\nenabled = false\n");
    for (resource, id) in ids {
        text += &format!(
            "[[operations]]\ninclude-path-regex = \"^/{resource}/\"\nparameters = {{ \"path.id\" = \"{id}\" }}\n"
        );
    }
    std::fs::write(&config, text).unwrap();
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method,\
                  allow_header_conformance,negative_data_rejection,ignored_auth";
    let mut command = python(&stack, "schemathesis");
    command
        .current_dir(dir.path())
        .arg("--config-file")
        .arg(&config)
        .arg("run")
        .arg(format!("{}/openapi.json", stack.ready_text("/api_url")));
    command.args([
        "-H",
        &format!("Authorization: Bearer {}", stack.ready_text("/api_key")),
        "-c",
        checks,
        "--seed",
        "7",
        "--no-color",
    ]);
    // What /v1 refuses and how is Anthropic's to say: its SDKs judge that (`make conformance`).
    command.args(["--exclude-path-regex", "^/v1/"]);
    command.args(["--max-examples", "15", "--request-timeout", "20", "--continue-on-failure"]);
    let report = succeeds(command).await;
    assert!(report.contains("Operations:       42 selected / "), "{report}");
}

/// The example of a service that follows sessions on the bus, as the user that can only read.
#[tokio::test]
async fn a_service_follows_sessions_on_the_bus_and_can_do_no_more() {
    use tokio::io::{AsyncBufReadExt as _, BufReader};
    let stack = Stack::start(Options::default()).await.unwrap();
    let url: url::Url = stack.ready_text("/events_url").parse().unwrap();
    let address = format!("nats://{}:{}", url.host_str().unwrap(), url.port().unwrap());
    let example = |args: &[&str]| {
        let mut command =
            tokio::process::Command::new(testkit::services::binary("session-events").unwrap());
        command
            .args(args)
            .env("NATS_URL", &address)
            .env("NATS_PASSWORD", url.password().unwrap())
            .kill_on_drop(true);
        command
    };
    let mut following = example(&[]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(following.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("following"));
    let session = stack.session("shell", "echo heard; exit 4").await.unwrap();
    stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let mut heard = Vec::new();
    while !heard.last().is_some_and(|line: &String| line.contains("failed")) {
        heard.push(lines.next_line().await.unwrap().unwrap());
    }
    assert!(
        heard.last().unwrap().ends_with(&format!("session {session} turn 1 failed exit code 4")),
        "{heard:?}"
    );
    let output = example(&[&session]).output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "heard\n");

    // The same user can neither write nor read anything else.
    let client = async_nats::ConnectOptions::new()
        .user_and_password("events".to_owned(), url.password().unwrap().to_owned());
    let client = client
        .custom_inbox_prefix("_INBOX_events")
        .request_timeout(Some(std::time::Duration::from_millis(300)));
    let client = client.connect(&address).await.unwrap();
    let jetstream = async_nats::jetstream::new(client.clone());
    assert!(
        jetstream
            .publish(format!("aod.log.session.v1.{session}"), "x".into())
            .await
            .unwrap()
            .await
            .is_err()
    );
    for subject in [
        "aod.rpc.auth.v1.user.list",
        "aod.rpc.vault.v1.lease.redeem",
        "$JS.API.STREAM.INFO.JOBS",
        "$JS.API.STREAM.PURGE.EVENTS",
        "$JS.API.STREAM.DELETE.EVENTS",
        "$JS.API.CONSUMER.CREATE.JOBS.x",
    ] {
        assert!(client.request(subject, "".into()).await.is_err(), "{subject}");
    }
    let mut others = client.subscribe("aod.>").await.unwrap();
    let session = stack.session("shell", "true").await.unwrap();
    stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    assert!(
        tokio::time::timeout(
            std::time::Duration::from_millis(300),
            futures::StreamExt::next(&mut others)
        )
        .await
        .is_err()
    );
    assert_eq!(
        stack.stream(&session, 0).await.unwrap().all().await.unwrap().last().unwrap()["type"],
        "exit"
    );
}
