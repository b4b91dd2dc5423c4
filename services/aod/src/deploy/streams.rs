//! `aod deploy streams`: creates the streams, as the only user of the bus that may.

use std::{
    num::NonZeroU8,
    time::{Duration, Instant},
};

use bus::{Bus, topology::TopologyError};
use contract::{
    access,
    topology::{self, EVENTS_BYTES_MIN, StreamSpec},
};
use service::Env;
use tokio::signal::unix::{SignalKind, signal};
use types::{Backoff, Partition};

/// How long the servers may take to come up, and a cluster to elect its leaders.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// How often [`keep`] looks for streams that are gone.
const EVERY: Duration = Duration::from_secs(1);
const RETRY: Backoff =
    Backoff { base: Duration::from_millis(100), max: Duration::from_secs(2), attempts: u32::MAX };

/// Which streams there are to be.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub partitions: NonZeroU8,
    pub events_max_bytes: i64,
    pub replicas: usize,
}

impl Plan {
    pub fn from_env(env: &mut Env) -> Self {
        let plan = Self {
            partitions: env.parsed(
                "EVENT_PARTITIONS",
                "number of EVENTS streams: as many as the schedulers have, or ever had",
                NonZeroU8::MIN,
            ),
            events_max_bytes: env.parsed(
                "AOD_EVENTS_MAX_BYTES",
                "total size of the EVENTS streams, which hold output while Postgres is away",
                topology::EVENTS.max_bytes,
            ),
            replicas: env.parsed(
                "AOD_STREAM_REPLICAS",
                "replicas of each stream in a NATS cluster",
                1,
            ),
        };
        if plan.events_max_bytes < EVENTS_BYTES_MIN {
            env.refuse(format!("AOD_EVENTS_MAX_BYTES has to be {EVENTS_BYTES_MIN} or more"));
        }
        if plan.partitions.get() > Partition::COUNT_MAX {
            env.refuse(format!("EVENT_PARTITIONS has to be {} or less", Partition::COUNT_MAX));
        }
        plan
    }

    /// Creates the streams that are missing, and changes those that differ. Returns all of them.
    ///
    /// # Errors
    /// When the servers refuse, or do not answer for a minute.
    pub async fn apply(&self, bus: &Bus) -> Result<Vec<StreamSpec>, TopologyError> {
        let (begun, mut attempt) = (Instant::now(), 0);
        loop {
            match self.apply_once(bus).await {
                Err(error) if begun.elapsed() > READY_WITHIN => return Err(error),
                Err(_) => attempt += 1,
                applied => return applied,
            }
            tokio::time::sleep(RETRY.jittered(attempt)).await;
        }
    }

    async fn apply_once(&self, bus: &Bus) -> Result<Vec<StreamSpec>, TopologyError> {
        let mut partitions = Vec::new();
        for partition in Partition::all() {
            // One that exists has sessions, whatever the setting says by now.
            let is_wanted = partition.number() < self.partitions.get();
            if is_wanted || bus.find_stream(topology::events(partition)).await?.is_some() {
                partitions.push(partition);
            }
        }
        let streams = topology::sized_streams(&partitions, self.events_max_bytes);
        let mut missing = Vec::new();
        // First those that exist: they may have to give room to others.
        for stream in &streams {
            match bus.find_stream(stream).await? {
                Some(_) => bus.ensure_stream(stream, self.replicas).await?,
                None => missing.push(stream),
            }
        }
        for stream in missing {
            bus.ensure_stream(stream, self.replicas).await?;
        }
        Ok(streams)
    }

    /// Creates streams again that the servers have lost. The schedulers then raise their sequences.
    pub async fn keep(&self, bus: &Bus, streams: &[StreamSpec]) {
        loop {
            tokio::time::sleep(EVERY).await;
            for stream in streams {
                // Servers that do not answer have lost nothing, for all that is known.
                let Ok(None) = bus.find_stream(stream).await else { continue };
                match bus.ensure_stream(stream, self.replicas).await {
                    Ok(()) => note!("stream {}: lost; created again", stream.name),
                    Err(error) => note!("{error}; will retry"),
                }
            }
        }
    }
}

/// The settings of the command, as its help lists them.
pub fn settings_table() -> String {
    let mut env = Env::from_variables("", "", std::collections::HashMap::default());
    let _ = (bus::Config::from_env(&mut env, &access::STREAMS), Plan::from_env(&mut env));
    env.table()
}

/// Runs the command. Returns once the streams are there; with `watch`, when it is terminated.
///
/// # Errors
/// As the command prints it.
pub async fn run(watch: bool) -> Result<(), String> {
    // Without a handler the first process of a container ignores the signal.
    let mut stop = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    tokio::select! {
        ended = deploy(watch) => ended,
        _ = stop.recv() => if watch { Ok(()) } else { Err("terminated".to_owned()) },
    }
}

async fn deploy(watch: bool) -> Result<(), String> {
    let mut env = Env::from_process("aod deploy streams", "");
    let config = bus::Config::from_env(&mut env, &access::STREAMS);
    let plan = Plan::from_env(&mut env);
    if let settings::Verdict::Refused(problems) = env.finish() {
        return Err(problems);
    }
    let bus = connect(&config).await?;
    let streams = plan.apply(&bus).await.map_err(|error| with_source(&error))?;
    for stream in &streams {
        note!("stream {}: ready", stream.name);
    }
    if watch {
        plan.keep(&bus, &streams).await;
    }
    Ok(())
}

async fn connect(config: &bus::Config) -> Result<Bus, String> {
    let (begun, mut attempt) = (Instant::now(), 0);
    loop {
        match Bus::connect(config).await {
            Ok(bus) => return Ok(bus),
            Err(error) if begun.elapsed() > READY_WITHIN => return Err(error.to_string()),
            Err(_) => attempt += 1,
        }
        tokio::time::sleep(RETRY.jittered(attempt)).await;
    }
}

fn with_source(error: &TopologyError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
