//! The stack's NATS servers.

use std::{fs, num::NonZeroU8};

use bus::Bus;
use contract::access;
use rustix::process::Signal;
use serde_json::json;

use crate::{
    deploy::streams::Plan,
    dev::{
        DevError,
        stack::{START_MAX, Stack},
        supervisor::{Probe, Process, Spec},
    },
    random,
};

const NATS_CONF: &str = include_str!("../../../../../nats/nats-server.conf");
const NATS_CLUSTER_CONF: &str = include_str!("../../../../../nats/cluster.conf");
const NATS_PERMISSIONS: &str = include_str!("../../../../../nats/permissions.conf");

impl Stack {
    pub(super) async fn start_nats(&mut self) -> Result<(), DevError> {
        let dir = self.data.join("nats");
        let confs = [
            ("nats-server.conf", NATS_CONF),
            ("cluster.conf", NATS_CLUSTER_CONF),
            ("permissions.conf", NATS_PERMISSIONS),
        ];
        for (name, text) in confs {
            fs::write(dir.join(name), text).map_err(DevError::broken)?;
        }
        // Known to these servers alone, for as long as they run.
        let cluster_password = random::secret().map_err(DevError::broken)?;
        let routes: Vec<String> = self
            .nats
            .iter()
            .map(|addrs| format!("nats://cluster:{cluster_password}@{}", addrs.peer))
            .collect();
        let first = self.processes.len();
        for (number, addrs) in (1..).zip(&self.nats) {
            let (name, alone) = (
                if number == 1 { "nats".to_owned() } else { format!("nats-{number}") },
                self.nats.len() == 1,
            );
            let conf = dir.join(if alone { "nats-server.conf" } else { "cluster.conf" });
            let store =
                dir.join(if number == 1 { "store".to_owned() } else { format!("store-{number}") });
            let mut args = vec![
                "-c".to_owned(),
                conf.display().to_string(),
                "-a".to_owned(),
                "127.0.0.1".to_owned(),
            ];
            args.extend([
                "-p".to_owned(),
                addrs.client.port().to_string(),
                "-sd".to_owned(),
                store.display().to_string(),
            ]);
            if !alone {
                args.extend(["--cluster".to_owned(), format!("nats://{}", addrs.peer)]);
            }
            let password = |user| {
                (access::password_variable(user), self.data.secrets.nats_password(user).to_owned())
            };
            let peer = [
                ("NATS_SERVER_NAME".to_owned(), name.clone()),
                ("NATS_CLUSTER_PASSWORD".to_owned(), cluster_password.clone()),
                ("NATS_ROUTES".to_owned(), json!(routes).to_string()),
            ];
            let spec = Spec {
                log: self.data.join(&format!("logs/{name}.log")),
                name,
                service: "nats",
                program: self.tools.nats_server.clone(),
                args,
                env: access::users().map(password).chain(peer).collect(),
                user: None,
                stop_signal: Signal::TERM,
                probe: Probe::Connect(addrs.client),
            };
            self.processes.push(Process::start(spec, &self.tools)?);
        }
        for process in &mut self.processes[first..] {
            process.ready(START_MAX).await?;
        }
        Ok(())
    }

    /// Creates the streams, and again those that the servers lose.
    pub(super) async fn start_streams(&mut self) -> Result<(), DevError> {
        let mut env = service::Env::from_process("aod dev", "");
        let plan = Plan::from_env(&mut env);
        if let settings::Verdict::Refused(problems) = env.finish() {
            return Err(DevError::Unfit(problems));
        }
        let born = NonZeroU8::new(self.partitions().await?).unwrap_or(NonZeroU8::MIN);
        let partitions = plan.partitions.max(born);
        let plan = Plan { partitions, replicas: self.nats.len().min(3), ..plan };
        let bus = Bus::connect(&self.nats_config(access::STREAMS.user))
            .await
            .map_err(DevError::broken)?;
        let streams = plan.apply(&bus).await.map_err(DevError::broken)?;
        let keep = async move { plan.keep(&bus, &streams).await };
        self.streams.spawn(keep);
        Ok(())
    }

    pub(super) fn nats_url(&self) -> String {
        self.nats
            .iter()
            .map(|addrs| format!("nats://{}", addrs.client))
            .collect::<Vec<_>>()
            .join(",")
    }

    pub(super) fn nats_config(&self, user: &'static str) -> bus::Config {
        bus::Config {
            url: self.nats_url(),
            user,
            password: self.data.secrets.nats_password(user).to_owned().into(),
            ca_file: None,
            name: format!("aod-dev/{user}"),
        }
    }
}
