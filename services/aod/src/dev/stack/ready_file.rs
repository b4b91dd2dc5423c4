//! The file that says what was started, for programs.

use std::{net::SocketAddr, path::PathBuf};

use serde_json::{Map, Value, json};

use crate::dev::{
    DevError,
    data::{READY_FILE, write_privately},
    stack::{DATABASE, Stack},
    supervisor::Probe,
};

impl Stack {
    /// In the data directory, where `aod admin` finds it; and where it was asked for.
    pub(super) fn ready_files(&self) -> impl Iterator<Item = PathBuf> {
        [self.data.join(READY_FILE)].into_iter().chain(self.ready_file.clone())
    }

    /// What was started, for programs.
    pub(super) fn write_ready_file(&self) -> Result<(), DevError> {
        let mut services: Map<String, Value> = Map::new();
        for process in &self.processes {
            let list = services.entry(process.spec.service).or_insert_with(|| json!([]));
            if let (Some(list), Some(pid)) = (list.as_array_mut(), process.pid()) {
                let mut service = json!({ "pid": pid, "log": process.spec.log });
                if let (Some(service), Probe::Ready(admin)) =
                    (service.as_object_mut(), &process.spec.probe)
                {
                    service.insert("admin_url".to_owned(), format!("http://{admin}").into());
                }
                list.push(service);
            }
        }
        let secrets = &self.data.secrets;
        let nats = self.nats.first().map(|addrs| addrs.client.to_string()).unwrap_or_default();
        let urls = |addrs: &mut dyn Iterator<Item = SocketAddr>| {
            addrs.map(|addr| format!("http://{addr}")).collect::<Vec<_>>()
        };
        let ready = json!({
            "api_url": self.api_url(),
            "api_urls": urls(&mut self.apis()),
            "api_key": secrets.api_key,
            "sprites_url": format!("http://{}", self.sprites),
            "sprites_token": secrets.sprites_token,
            "nats_url": format!("nats://operator:{}@{nats}", secrets.nats_password("operator")),
            "events_url": format!("nats://events:{}@{nats}", secrets.nats_password("events")),
            "database_url": self.database_url("postgres", &secrets.postgres_password, DATABASE),
            "model_gateway_urls": urls(&mut self.model_gateways()),
            "model_url": self.model.map(|addr| format!("http://{addr}")),
            "services": services,
        });
        let ready = format!("{ready:#}\n");
        for path in self.ready_files() {
            write_privately(&path, ready.as_bytes()).map_err(|error| {
                DevError::Unfit(format!("ready file {} cannot be written: {error}", path.display()))
            })?;
        }
        Ok(())
    }
}
