//! What the tests of the scheduler share.

use std::{num::NonZeroU8, time::Duration};

use contract::{access, scheduler::CreateAgentRequest};
use rules::spares::Limits;
use scheduler::{Config, FileSettings, ModelDefaults, Retention};
use testkit::{Database, Nats};
use types::UserId;

/// A scheduler of one partition that keeps everything.
pub fn config(nats: &Nats, database: &Database) -> Config {
    Config {
        bus: nats.config(&access::SCHEDULER),
        store: database.config("scheduler"),
        sprite_name_prefix: "aod".to_owned(),
        deployment_id: "deployment-of-tests".into(),
        event_partitions: NonZeroU8::MIN,
        orphan_sweep: Duration::from_secs(900),
        retention: Retention { event_days: None, session_days: None },
        files: FileSettings { store: None, user_bytes_max: u64::MAX, days: None },
        model_defaults: ModelDefaults::default(),
        prepared_sessions_max: 10,
        spares: Limits::default(),
    }
}

/// The agent of a user that runs prompts as scripts.
pub fn shell_agent(user: UserId) -> CreateAgentRequest {
    CreateAgentRequest {
        user_id: user.to_string(),
        name: "a".to_owned(),
        model: "none".to_owned(),
        runtime: "shell".to_owned(),
        metadata: "{}".to_owned(),
        skills: "[]".to_owned(),
        mcp_servers: "[]".to_owned(),
        ..CreateAgentRequest::default()
    }
}
