use std::process::ExitCode;

/// The first descriptor after the standard streams.
const FIRST_OTHER_DESCRIPTOR: std::ffi::c_int = 3;

fn main() -> ExitCode {
    // A descriptor inherited from whoever started the server must not reach a Sprite: a directory among them would be the
    // machine's file system.
    close_fds::set_fds_cloexec(FIRST_OTHER_DESCRIPTOR, &[]);
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
