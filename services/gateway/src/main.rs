use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(
        "gateway",
        "serves the REST API and event streams",
        gateway::Config::from_env,
        gateway::run,
    )
}
