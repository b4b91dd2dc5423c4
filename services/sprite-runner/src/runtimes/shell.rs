//! The prompt as a bash script: for load tests, fault tests and first steps.

use types::McpServer;

use super::{Adapter, Launch, Skills, Stdin, SystemPrompt};
use crate::ModelEndpoints;

pub struct Shell;

impl Adapter for Shell {
    fn executable(&self) -> Option<&'static str> {
        None
    }

    fn begin(&self, launch: &Launch<'_>) -> Vec<String> {
        vec!["bash".to_owned(), launch.prompt_path.to_owned()]
    }

    /// There is no conversation to go on with.
    fn resume(&self, launch: &Launch<'_>) -> Vec<String> {
        self.begin(launch)
    }

    fn find_conversation(&self, _: &Launch<'_>) -> String {
        String::new()
    }

    fn stdin(&self) -> Stdin {
        Stdin::Empty
    }

    fn system_prompt(&self) -> SystemPrompt {
        SystemPrompt::BeforeThePrompt
    }

    fn is_shell(&self) -> bool {
        true
    }

    fn env(&self, _: &ModelEndpoints) -> Vec<(String, String)> {
        Vec::new()
    }

    fn config_files(&self, _: &[McpServer], _: &ModelEndpoints, _: &str) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    fn skills(&self) -> Option<Skills> {
        None
    }
}
