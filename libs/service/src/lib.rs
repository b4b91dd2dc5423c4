//! What every service needs: telemetry, start and shutdown, health.

pub mod admin;
pub mod connection;
pub mod lifecycle;
pub mod periodic;
pub mod telemetry;

use std::{fmt, future::Future, process::ExitCode};

pub use lifecycle::Lifecycle;
pub use periodic::{periodically, ticks, whenever};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
pub use settings::Env;

/// A service refused its settings.
const EXIT_SETTINGS: u8 = 2;

/// Runs a service process: settings, telemetry, health endpoints, `run`, shutdown.
///
/// `run` builds the service and spawns its tasks on the [`Lifecycle`]; it returns when everything
/// listens. The process then runs until a signal or a crashed task, and exits with 0 only after a
/// requested stop.
pub fn main<C, R, F, E>(
    name: &'static str,
    about: &'static str,
    config: impl FnOnce(&mut Env) -> C,
    run: R,
) -> ExitCode
where
    R: FnOnce(C, Lifecycle) -> F,
    F: Future<Output = Result<(), E>>,
    E: fmt::Display,
{
    let mut env = Env::from_process(name, about);
    let chassis = Chassis::from_env(&mut env);
    let config = config(&mut env);
    match env.finish() {
        settings::Verdict::Ready => {}
        settings::Verdict::Help(text) => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        settings::Verdict::Refused(problems) => {
            eprintln!("{name}: {problems}");
            return ExitCode::from(EXIT_SETTINGS);
        }
    }
    if settings::has_argument("--check-ready") {
        return admin::check_ready(chassis.admin_addr);
    }
    let _telemetry = match telemetry::init(name, &chassis.telemetry) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("{name}: OTEL_EXPORTER_OTLP_ENDPOINT cannot be used: {error}");
            return ExitCode::from(EXIT_SETTINGS);
        }
    };
    raise_file_limit();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{name}: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(async {
        let lifecycle = Lifecycle::new();
        if let Err(error) = admin::serve(chassis.admin_addr, &lifecycle).await {
            eprintln!("{name}: cannot listen on AOD_ADMIN_ADDR {}: {error}", chassis.admin_addr);
            return ExitCode::from(EXIT_SETTINGS);
        }
        if let Err(error) = run(config, lifecycle.clone()).await {
            tracing::error!("{error:#}");
            eprintln!("{name}: {error:#}");
            return ExitCode::FAILURE;
        }
        lifecycle.set_ready();
        tracing::info!(service = name, "ready");
        lifecycle.wait(chassis.stop_grace).await
    })
}

/// As many open files as the system allows: each connection is one, and shells often give a process
/// 1024.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).is_err() {
        tracing::warn!(limit = ?limit.current, "failed to raise the limit of open files");
    }
}

/// Settings that every service has.
struct Chassis {
    admin_addr: std::net::SocketAddr,
    telemetry: telemetry::Settings,
    stop_grace: std::time::Duration,
}

impl Chassis {
    fn from_env(env: &mut Env) -> Self {
        Self {
            admin_addr: env.parsed(
                "AOD_ADMIN_ADDR",
                "listen address of /livez, /readyz and /metrics",
                ([127, 0, 0, 1], 9464).into(),
            ),
            telemetry: telemetry::Settings::from_env(env),
            stop_grace: env.seconds(
                "AOD_STOP_GRACE_SECONDS",
                "how long work in flight may continue after SIGTERM",
                25,
            ),
        }
    }
}
