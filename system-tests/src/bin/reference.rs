//! Writes the reference of all settings. Run by `make reference`.

fn main() -> anyhow::Result<()> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::fs::write(root.join(system_tests::reference::PATH), system_tests::reference::render()?)?;
    Ok(())
}
