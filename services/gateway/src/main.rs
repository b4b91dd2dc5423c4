use std::process::ExitCode;

fn main() -> ExitCode {
    service::main("gateway", "the REST and SSE API", gateway::Config::from_env, gateway::run)
}
