use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(
        "scheduler",
        "stores sessions and their event logs, and decides what runs next",
        scheduler::Config::from_env,
        scheduler::run,
    )
}
