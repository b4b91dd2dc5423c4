use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(
        "credential-vault",
        "encrypts, stores and decrypts secrets",
        credential_vault::Config::from_env,
        credential_vault::run,
    )
}
