//! Prompts: an argument, a file or standard input. An argument holds at most 128 KiB on Linux.

use std::{
    io::{IsTerminal as _, Read as _},
    path::PathBuf,
};

use clap::Args;

use crate::client::ApiFailure;

#[derive(Debug, Default, Args)]
pub struct PromptArgs {
    /// Prompt for the agent; `-` reads it from standard input
    #[arg(conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
}

impl PromptArgs {
    /// Returns the prompt. Without an argument it is read from standard input, unless that is a
    /// terminal.
    pub fn read(self) -> Result<String, ApiFailure> {
        let prompt = match (self.prompt, self.prompt_file) {
            (_, Some(path)) => crate::cli::files::read_file(&path)?,
            (Some(prompt), None) if prompt != "-" => prompt,
            (None, None) if std::io::stdin().is_terminal() => {
                return Err(ApiFailure::Local(
                    "no prompt: give it as an argument, with --prompt-file FILE, or on standard input".to_owned(),
                ));
            }
            _ => {
                let mut text = String::new();
                let read = std::io::stdin().lock().read_to_string(&mut text);
                read.map_err(|error| {
                    ApiFailure::Local(format!(
                        "cannot read the prompt from standard input: {error}"
                    ))
                })?;
                text
            }
        };
        if prompt.trim().is_empty() {
            return Err(ApiFailure::Local("the prompt is empty".to_owned()));
        }
        Ok(prompt)
    }
}
