//! The Helm chart, rendered and checked without a cluster; and the compose file.

use std::{path::Path, process::Command};

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

#[test]
fn the_compose_file_uses_names_that_exist() {
    pytest("system-tests/deployment");
}
