//! The prompt as a bash script: for load tests, fault tests and first steps.

use types::McpServer;

use super::{Adapter, Skills};
use crate::ModelEndpoints;

pub struct Shell;

impl Adapter for Shell {
    fn executable(&self) -> Option<&'static str> {
        None
    }

    fn config_files(&self, _: &[McpServer], _: &ModelEndpoints) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    fn skills(&self) -> Option<Skills> {
        None
    }
}
