//! Embeds the files of the web console: a table of what `console/dist` holds. It is empty where the
//! console was not built.

use std::{
    env, fs,
    io::{Result, Write as _},
    path::{Path, PathBuf},
};

fn main() -> Result<()> {
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../console/dist").canonicalize();
    let mut files = Vec::new();
    match &dist {
        Ok(dist) => {
            println!("cargo:rerun-if-changed={}", dist.display());
            collect(dist, &mut files)?;
            files.sort_by_key(|file| file.display().to_string());
        }
        // Until the console is built for the first time.
        Err(_) => println!("cargo:rerun-if-changed={}/../../console", env!("CARGO_MANIFEST_DIR")),
    }
    println!("cargo:rerun-if-changed=build.rs");
    let mut table = fs::File::create(
        PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("console_files.rs"),
    )?;
    writeln!(table, "&[")?;
    for file in &files {
        let name = file.strip_prefix(dist.as_deref().unwrap_or(Path::new(""))).unwrap_or(file);
        writeln!(
            table,
            "    ({:?}, include_bytes!({:?}) as &[u8]),",
            name.display().to_string(),
            file.display().to_string()
        )?;
    }
    writeln!(table, "]")
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.file_name().is_some_and(|name| !name.to_string_lossy().starts_with('.')) {
            files.push(path);
        }
    }
    Ok(())
}
