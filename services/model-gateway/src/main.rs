use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(
        "model-gateway",
        "forwards agents' requests to model providers, with the user's key",
        model_gateway::Config::from_env,
        model_gateway::run,
    )
}
