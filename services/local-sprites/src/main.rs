use std::process::ExitCode;

/// The first descriptor after the standard streams.
const FIRST_OTHER_DESCRIPTOR: std::ffi::c_int = 3;

fn main() -> ExitCode {
    // A descriptor inherited from the process that started the server must not reach a Sprite: a
    // directory among them would be the machine's file system.
    close_fds::set_fds_cloexec(FIRST_OTHER_DESCRIPTOR, &[]);
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next().as_ref().and_then(|first| first.to_str()) {
        Some(local_sprites::isolation::launch::COMMAND) => {
            return local_sprites::isolation::launch::main(arguments);
        }
        Some(local_sprites::isolation::runsc::RELAY_COMMAND) => {
            return local_sprites::isolation::runsc::relay_main(arguments);
        }
        Some(local_sprites::isolation::launch::LIMIT_COMMAND) => {
            return local_sprites::isolation::launch::limit_main(arguments);
        }
        _ => {}
    }
    service::main(
        "local-sprites",
        "serves the Sprites API with sandboxes on this machine",
        local_sprites::Config::from_env,
        local_sprites::run,
    )
}
