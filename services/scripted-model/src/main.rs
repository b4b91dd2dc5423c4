use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(
        "scripted-model",
        "a model that answers from a script, for agents without a provider key",
        scripted_model::Config::from_env,
        scripted_model::run,
    )
}
