//! `cargo xtask gen` writes what is generated: bus messages, the NATS configuration and the
//! document of the bus. `cargo xtask agent-host` builds the agent host as one static file, and
//! prints where it is.

use anyhow::{Result, bail};

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("gen") => {
            xtask::write_messages(&xtask::root().join(xtask::MESSAGES))?;
            for (path, text) in xtask::rendered_files()? {
                let path = xtask::root().join(path);
                if let Some(folder) = path.parent() {
                    std::fs::create_dir_all(folder)?;
                }
                std::fs::write(path, text)?;
            }
            Ok(())
        }
        Some("agent-host") => {
            println!("{}", xtask::build_agent_host()?.display());
            Ok(())
        }
        _ => bail!("usage: cargo xtask gen | agent-host"),
    }
}
