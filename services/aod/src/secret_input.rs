//! Secrets from people. Never an argument: those show in process lists and in shell histories.

use std::io::{IsTerminal as _, Read as _};

use secrecy::SecretString;

/// Asks on a terminal, without an echo; else reads standard input to its end.
pub fn read() -> Result<SecretString, String> {
    let stdin = std::io::stdin();
    let text = if stdin.is_terminal() {
        rpassword::prompt_password("Value (not shown): ")
            .map_err(|error| format!("the terminal cannot be read: {error}"))?
    } else {
        let mut text = String::new();
        stdin
            .lock()
            .read_to_string(&mut text)
            .map_err(|error| format!("standard input cannot be read: {error}"))?;
        text
    };
    let text = text.trim_end_matches(['\r', '\n']);
    if text.is_empty() { Err("no value was given".to_owned()) } else { Ok(text.into()) }
}
