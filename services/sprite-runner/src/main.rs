use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(
        "sprite-runner",
        "claims turns and runs agents in Sprites",
        sprite_runner::Config::from_env,
        sprite_runner::run,
    )
}
