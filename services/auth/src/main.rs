use std::process::ExitCode;

fn main() -> ExitCode {
    service::main("auth", "stores users, API keys and quotas", auth::Config::from_env, auth::run)
}
