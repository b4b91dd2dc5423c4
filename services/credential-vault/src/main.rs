use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(
        "credential-vault",
        "the only place where a secret is encrypted or decrypted",
        credential_vault::Config::from_env,
        credential_vault::run,
    )
}
