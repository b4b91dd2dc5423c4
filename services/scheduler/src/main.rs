use std::process::ExitCode;

fn main() -> ExitCode {
    service::main("scheduler", "the record of sessions, and what should run next", scheduler::Config::from_env, scheduler::run)
}
