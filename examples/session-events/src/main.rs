//! Follows what happens to sessions, on the bus: an example for services of your own.
//!
//! It connects as the user `events`, which can read the streams LIFECYCLE and EVENTS and do nothing
//! else.
//!
//! ```text
//! export NATS_URL=nats://127.0.0.1:4222 NATS_PASSWORD=…     # of the user `events`
//! session-events                  # a line for every change of a session's status, from now on
//! session-events SESSION_ID       # what one session's agent prints, from its beginning
//! ```
//!
//! `docs/asyncapi.json` describes all there is on the bus.

use std::{io::Write as _, time::Duration};

use anyhow::{Context as _, Result};
use async_nats::{
    ConnectOptions,
    jetstream::{
        self,
        consumer::{DeliverPolicy, pull},
    },
};
use clap::Parser;
use contract::{
    access,
    scheduler::SessionChanged,
    session::{SessionEvent, session_event::Kind},
    subject, topology,
};
use futures::StreamExt as _;
use prost::Message as _;
use types::{Partition, SessionId, Timestamp};

/// Follow what happens to sessions, on the bus.
#[derive(Parser)]
struct Args {
    /// Where NATS is
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222")]
    nats_url: String,
    /// The password of the user `events`; from the environment alone
    #[arg(env = "NATS_PASSWORD", hide_env_values = true, hide = true, long)]
    nats_password: String,
    /// Print what this session's agent prints, from its beginning; without it, every change of a
    /// session's status from now on
    session: Option<SessionId>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let args = Args::parse();
    let options = ConnectOptions::new()
        .user_and_password(access::EVENTS.user.to_owned(), args.nats_password)
        // Replies arrive where this user alone may listen.
        .custom_inbox_prefix(access::EVENTS.inbox())
        .connection_timeout(Duration::from_secs(5));
    let client = options.connect(args.nats_url).await.context("NATS cannot be reached")?;
    let jetstream = jetstream::new(client);
    match args.session {
        None => follow_lifecycle(&jetstream).await,
        Some(session) => follow_output(&jetstream, session).await,
    }
}

/// Facts about sessions. A service that must see each of them once, also across its own restarts,
/// makes a consumer with a durable name, acknowledges what it has dealt with, and expects that a
/// fact may come twice.
async fn follow_lifecycle(jetstream: &jetstream::Context) -> Result<()> {
    let config = pull::OrderedConfig {
        deliver_policy: DeliverPolicy::New,
        name: Some(unique_name()),
        ..Default::default()
    };
    let consumer = jetstream
        .get_stream_no_info(topology::LIFECYCLE.name)
        .await?
        .create_consumer(config)
        .await?;
    let mut facts = consumer.messages().await?;
    println!("following");
    while let Some(message) = facts.next().await {
        let message = message?;
        let fact = SessionChanged::decode(message.payload.clone())?;
        // What happened is the last but one word of the subject: a status, or `deleted`.
        let what = message.subject.rsplit('.').nth(1).unwrap_or_default();
        let code = fact.exit_code.map(|code| format!(" exit code {code}")).unwrap_or_default();
        println!(
            "{} session {} turn {} {what}{code}",
            Timestamp::from_unix_micros(fact.at_us),
            fact.session_id,
            fact.turn
        );
    }
    Ok(())
}

/// One session's record: a subject of its own, in the order of what happened. It is in one of the
/// partitions.
async fn follow_output(jetstream: &jetstream::Context, session: SessionId) -> Result<()> {
    let mut partitions = Vec::new();
    for partition in Partition::all() {
        // There are as many as the deployment has.
        let Ok(stream) = jetstream.get_stream(topology::events(partition).name).await else {
            continue;
        };
        let config = pull::OrderedConfig {
            deliver_policy: DeliverPolicy::All,
            filter_subject: subject::session_log(session, partition),
            name: Some(unique_name()),
            ..Default::default()
        };
        partitions.push(stream.create_consumer(config).await?.messages().await?);
    }
    let mut events = futures::stream::select_all(partitions);
    while let Some(message) = events.next().await {
        match SessionEvent::decode(message?.payload.clone())?.kind {
            Some(Kind::Output(output)) if output.stderr => {
                std::io::stderr().write_all(&output.data)?
            }
            Some(Kind::Output(output)) => std::io::stdout().write_all(&output.data)?,
            Some(Kind::TurnEnded(_) | Kind::Terminated(_)) => break,
            _ => {}
        }
    }
    std::io::stdout().flush()?;
    Ok(())
}

/// Consumers are named by those who make them: permissions go by the stream and the name.
fn unique_name() -> String {
    format!("session-events-{}", SessionId::new())
}
