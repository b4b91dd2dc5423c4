use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == local_sprites::launch::COMMAND) {
        return local_sprites::launch::main(arguments);
    }
    service::main(
        "local-sprites",
        "a Sprites-compatible server that keeps each Sprite in a sandbox on this machine",
        local_sprites::Config::from_env,
        local_sprites::run,
    )
}
