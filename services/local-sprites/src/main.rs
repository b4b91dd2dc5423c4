use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(
        "local-sprites",
        "a Sprites-compatible server that keeps each Sprite in a sandbox on this machine",
        local_sprites::Config::from_env,
        local_sprites::run,
    )
}
