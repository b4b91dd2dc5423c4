//! `docs/bus.md`: streams, subjects and users of the bus for people, rendered from the tables in
//! `libs/contract`.

use std::{fmt::Write as _, time::Duration};

use contract::{
    access::{self, Access},
    rpc::RPCS,
    subject::PUBLICATIONS,
    topology::{CONSUMERS, EVENTS, OTHERS, Retention, StreamSpec},
};

const HEAD: &str = "\
# The bus

<!-- Rendered from libs/contract by `cargo xtask gen`. -->

The services talk to each other over NATS with JetStream. This page lists the streams, the messages, the requests and the users, as the code defines them. \
The messages are protobuf; their fields are in [libs/contract/proto](../libs/contract/proto) and in [asyncapi.json](asyncapi.json). \
A subject begins with `aod.`, then its kind, its owner and a version:

| kind | delivery |
| --- | --- |
| `rpc` | request and reply, served by one queue group; not stored |
| `cmd` | work queue, at least once, until a worker acknowledges it |
| `log` | event log with one writer for each session; every append names the event that it follows |
| `live` | events of the log, published again by the NATS server, at most once |
| `evt` | lifecycle events for other services, at least once |
| `hint` | wakes a service earlier, at most once; nothing depends on it |
| `dlq` | dead letters |
";

/// The page.
///
/// # Errors
/// When it cannot be formatted.
pub fn render() -> Result<String, std::fmt::Error> {
    let mut page = HEAD.to_owned();
    page.push_str("\n## Streams\n\n| stream | subjects | kept | at most | when full |\n| --- | --- | --- | --- | --- |\n");
    for stream in OTHERS.iter().chain([&EVENTS]) {
        writeln!(page, "{}", stream_row(stream))?;
    }
    page.push_str(
        "\n`EVENTS` has up to seven more partitions, `EVENTS_1` to `EVENTS_7`, as the setting `EVENT_PARTITIONS` says; \
         the subjects of partition 3 end in `.3`. What this page says of `EVENTS` holds for each of them.\n",
    );
    if let Some(republish) = EVENTS.republish {
        writeln!(
            page,
            "\nThe NATS server republishes what `EVENTS` stores under `{}` as `{}`.",
            republish.from, republish.to
        )?;
    }
    page.push_str("\n## Consumers\n\n| consumer | stream | filters | ack deadline |\n| --- | --- | --- | --- |\n");
    for consumer in CONSUMERS {
        let filters = code(consumer.filters.iter().copied());
        writeln!(
            page,
            "| `{}` | `{}` | {filters} | {} |",
            consumer.name,
            consumer.stream,
            time(consumer.ack_wait)
        )?;
    }
    page.push_str("\n## Messages\n\n| subject | message | published by | read by | meaning |\n| --- | --- | --- | --- | --- |\n");
    for publication in PUBLICATIONS {
        let message = publication.message.map(|message| format!("`{message}`")).unwrap_or_default();
        let publishers = users_who(|user| user.publish, publication.address);
        let publishers =
            if publishers.is_empty() { "the NATS server".to_owned() } else { publishers };
        let readers = readers(publication.address);
        writeln!(
            page,
            "| `{}` | {message} | {publishers} | {readers} | {} |",
            publication.address,
            cell(publication.meaning)
        )?;
    }
    page.push_str(
        "\n## Requests\n\nA request that is retry-safe is sent once more when no reply arrives in time.\n\n\
         | request | subject | served by | called by | retry-safe | meaning |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    for rpc in RPCS {
        let (served, called) = (
            users_who(|user| user.subscribe, rpc.subject),
            users_who(|user| user.publish, rpc.subject),
        );
        let safe = if rpc.retry_safe { "yes" } else { "no" };
        writeln!(
            page,
            "| `{}` | `{}` | {served} | {called} | {safe} | {} |",
            rpc.name,
            rpc.subject,
            cell(rpc.meaning)
        )?;
    }
    page.push_str(
        "\n## Users\n\nEach service has its own NATS user, whose password it reads from `NATS_PASSWORD`. \
         NATS refuses everything that is not listed here. A user may also publish and subscribe below its own inbox, and may answer requests that it received.\n\n\
         | user | may publish | may subscribe |\n| --- | --- | --- |\n",
    );
    for user in access::ALL {
        writeln!(
            page,
            "| `{}` | {} | {} |",
            user.user,
            code(user.publish.iter().copied()),
            code(user.subscribe.iter().copied())
        )?;
    }
    writeln!(
        page,
        "\nAll of them belong to the account `{}`. The user `{}` belongs to the servers' own account: it reports on servers and sees no messages.",
        access::ACCOUNT,
        access::SYSTEM
    )?;
    Ok(page)
}

fn stream_row(stream: &StreamSpec) -> String {
    let kept = match stream.retention {
        Retention::Limits => time(stream.max_age),
        Retention::WorkQueue => format!("until acknowledged, {} at most", time(stream.max_age)),
    };
    let full = if stream.refuse_when_full { "refuses new messages" } else { "drops the oldest" };
    format!(
        "| `{}` | {} | {kept} | {} GiB | {full} |",
        stream.name,
        code(stream.subjects.iter().copied()),
        stream.max_bytes >> 30
    )
}

fn time(duration: Duration) -> String {
    match duration.as_secs() {
        seconds if seconds > 0 && seconds % 86_400 == 0 => format!("{} d", seconds / 86_400),
        seconds => format!("{seconds} s"),
    }
}

/// Subjects as code, one after the other.
fn code<'a>(subjects: impl Iterator<Item = &'a str>) -> String {
    subjects.map(|subject| format!("`{subject}`")).collect::<Vec<_>>().join(" ")
}

/// Returns whether a pattern of NATS covers an address, whose parameters are `{in_braces}` and
/// stand for one word each.
#[must_use]
pub fn covers(pattern: &str, address: &str) -> bool {
    access::matches_by(pattern, address, |word, of_address| {
        word == of_address || of_address.starts_with('{')
    })
}

/// The users with a pattern for an address.
fn users_who(patterns: impl Fn(&Access) -> &'static [&'static str], address: &str) -> String {
    let allowed = access::ALL
        .iter()
        .filter(|user| patterns(user).iter().any(|pattern| covers(pattern, address)));
    allowed.map(|user| user.user).collect::<Vec<_>>().join(", ")
}

/// The users who subscribe to an address, or may pull it from its stream.
fn readers(address: &str) -> String {
    let stores = |stream: &&StreamSpec| {
        stream
            .subjects
            .iter()
            .copied()
            .chain(stream.republish.map(|republish| republish.from))
            .any(|pattern| covers(pattern, address))
    };
    let streams: Vec<&str> =
        OTHERS.iter().chain([&EVENTS]).filter(stores).map(|stream| stream.name).collect();
    let reads = |user: &&Access| {
        user.subscribe.iter().any(|pattern| covers(pattern, address))
            || user.publish.iter().any(|publish| {
                let words: Vec<&str> = publish.split('.').collect();
                let verb = matches!(
                    words.get(2..5),
                    Some(["CONSUMER", "MSG", "NEXT"] | ["STREAM", "MSG", "GET"])
                );
                verb && words.get(5).is_some_and(|stream| streams.contains(stream))
            })
    };
    access::ALL.iter().filter(reads).map(|user| user.user).collect::<Vec<_>>().join(", ")
}

fn cell(text: &str) -> String {
    text.trim().replace('|', "\\|").replace('\n', " ")
}
