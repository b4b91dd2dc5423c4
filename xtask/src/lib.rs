//! What the workspace generates from its own sources. Tests compare it with what is committed.

pub mod asyncapi;
pub mod bus;
pub mod metrics;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// Where the generated bus messages are committed.
pub const MESSAGES: &str = "libs/contract/src/gen";
const PROTO: &str = "libs/contract/proto";
const FILES: [&str; 6] = [
    "aod/common/v1/common.proto",
    "aod/session/v1/event.proto",
    "aod/runner/v1/jobs.proto",
    "aod/auth/v1/auth.proto",
    "aod/vault/v1/vault.proto",
    "aod/scheduler/v1/scheduler.proto",
];
/// The agent host's journal and inputs: files and streams of bytes, not messages on the bus.
const HOST_FILE: &str = "aod/host/v1/host.proto";

/// The repository's root.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// Compiles the messages into `out`, without a system `protoc`.
///
/// # Errors
/// When a `.proto` file does not compile, or `out` cannot be written.
pub fn write_messages(out: &Path) -> Result<()> {
    let proto = root().join(PROTO);
    let descriptors =
        protox::compile(FILES.iter().chain([&HOST_FILE]).map(|file| proto.join(file)), [&proto])
            .context("compiling .proto files")?;
    std::fs::create_dir_all(out)?;
    prost_build::Config::new()
        .out_dir(out)
        .bytes([
            ".aod.session.v1.Output.data",
            ".aod.host.v1.Output.data",
            ".aod.scheduler.v1.RecordedEvent.payload",
        ])
        .skip_debug([
            ".aod.vault.v1.PutCredentialRequest",
            ".aod.vault.v1.PutSecretRequest",
            ".aod.vault.v1.BundledSecret",
            ".aod.vault.v1.Bundle",
            ".aod.vault.v1.RouteHeader",
            ".aod.host.v1.Variable",
        ])
        .compile_fds(descriptors)
        .context("writing messages")
}

/// The largest static agent host: it is uploaded into sandboxes.
const AGENT_HOST_BYTES_MAX: u64 = 4 << 20;

/// Builds the agent host as one static file for this machine's architecture.
///
/// # Errors
/// When it does not build, or is too large.
pub fn build_agent_host() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = std::process::Command::new(cargo);
    command.current_dir(root()).args([
        "rustc",
        "--quiet",
        "-p",
        "agent-host",
        "--bin",
        "agent-host",
        "--profile",
        "agent-host",
    ]);
    // No libc of the sandbox is needed. Only the last step of the build differs: dependencies stay
    // as they are.
    let status =
        command.args(["--", "-C", "target-feature=+crt-static"]).status().context("cargo rustc")?;
    ensure!(status.success(), "the agent host does not build");
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let file = target.join("agent-host/agent-host");
    let bytes = std::fs::metadata(&file).with_context(|| file.display().to_string())?.len();
    ensure!(
        bytes <= AGENT_HOST_BYTES_MAX,
        "the agent host has {bytes} bytes, more than {AGENT_HOST_BYTES_MAX}"
    );
    Ok(file)
}

/// The rendered files, by path from the root.
///
/// # Errors
/// When what they are rendered from cannot be read.
pub fn rendered_files() -> Result<Vec<(&'static str, String)>> {
    let copy =
        |path: &str| std::fs::read_to_string(root().join(path)).with_context(|| path.to_owned());
    Ok(vec![
        ("nats/permissions.conf", contract::access::render_permissions()),
        // A chart holds all that it installs.
        ("helm/agent-on-demand/files/permissions.conf", contract::access::render_permissions()),
        ("helm/agent-on-demand/files/nats-server.conf", copy("nats/nats-server.conf")?),
        ("helm/agent-on-demand/files/alerts.yaml", copy("observability/alerts.yaml")?),
        ("helm/agent-on-demand/files/dashboard.json", copy("observability/dashboard.json")?),
        ("docs/asyncapi.json", asyncapi::render().context("docs/asyncapi.json")?),
        ("docs/bus.md", bus::render().context("docs/bus.md")?),
        ("docs/metrics.md", metrics::render().context("docs/metrics.md")?),
    ])
}
