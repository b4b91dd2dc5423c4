//! `cargo xtask gen` writes what is generated: bus messages and the NATS configuration.

use anyhow::{Result, bail};

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("gen") => {
            xtask::write_messages(&xtask::root().join(xtask::MESSAGES))?;
            for (path, text) in xtask::nats_files() {
                std::fs::write(xtask::root().join(path), text)?;
            }
            Ok(())
        }
        _ => bail!("usage: cargo xtask gen"),
    }
}
