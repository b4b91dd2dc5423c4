//! The Helm chart, rendered and checked without a cluster; and the compose file.

use std::{path::Path, process::Command, time::Duration};

use contract::{access, topology};
use testkit::Nats;
use types::Partition;

fn pytest(path: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut command = Command::new(root.join(".venv/bin/python"));
    command
        .args(["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"])
        .arg(root.join(path));
    command
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("AOD", testkit::services::binary("aod").unwrap());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn the_chart_is_valid_for_every_kind_of_deployment() {
    pytest("helm/test_chart.py");
}

#[tokio::test]
async fn the_streams_of_a_deployment_are_created_and_kept() {
    let nats = Nats::start().unwrap();
    let streams = |partitions: &str| {
        let mut command = Command::new(testkit::services::binary("aod").unwrap());
        command
            .args(["deploy", "streams"])
            .env("NATS_URL", nats.url())
            .env("NATS_PASSWORD", nats.password(access::STREAMS.user))
            .env("EVENT_PARTITIONS", partitions)
            .env("AOD_EVENTS_MAX_BYTES", "4194304");
        command
    };
    assert!(streams("2").status().unwrap().success());
    let bus = nats.connect(&access::STREAMS).await.unwrap();
    for stream in topology::streams(Partition::all().take(2)) {
        assert!(bus.find_stream(&stream).await.unwrap().is_some(), "{}", stream.name);
    }
    // A partition that exists has sessions; all of them share the room.
    let output = streams("1").output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("stream EVENTS_1: ready"), "{said}");
    let info = bus.stream_info(&topology::EVENTS).await.unwrap();
    assert_eq!(info.bytes_max, 2 << 20);

    let mut watching = streams("1").arg("--watch").spawn().unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(watching.try_wait().unwrap().is_none());
    system_tests::Stack::signal(&[watching.id()], rustix::process::Signal::TERM);
    assert!(watching.wait().unwrap().success());
}

#[test]
fn the_compose_file_uses_names_that_exist() {
    pytest("system-tests/deployment");
}
