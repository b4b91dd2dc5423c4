//! Random secrets.

/// 32 random bytes in hex: safe in URLs, files and configurations.
///
/// # Errors
/// When the operating system gives no randomness.
pub fn secret() -> Result<String, getrandom::Error> {
    let mut bytes = [0_u8; 32];
    getrandom::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
