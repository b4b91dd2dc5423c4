//! `docs/asyncapi.json`: the bus for readers, rendered from the contract's own tables.

use std::time::Duration;

use contract::{
    access,
    rpc::{RPCS, RpcInfo},
    subject::{PUBLICATIONS, Publication},
    topology::{Retention, StreamSpec, streams},
};
use serde_json::{Map, Value, json};
use types::Partition;

use crate::{FILES, PROTO, root};

/// The document. Its messages are protobuf; their definitions are part of it.
///
/// # Errors
/// When a `.proto` file cannot be read.
pub fn render() -> std::io::Result<String> {
    let mut schemas = Map::new();
    for file in FILES {
        let text = std::fs::read_to_string(root().join(PROTO).join(file))?;
        let package = text
            .lines()
            .find_map(|line| line.strip_prefix("package ")?.strip_suffix(';'))
            .unwrap_or_default()
            .to_owned();
        schemas.insert(
            package,
            json!({ "schemaFormat": "application/vnd.google.protobuf;version=3", "schema": text }),
        );
    }
    let (mut channels, mut operations, mut messages) = (Map::new(), Map::new(), Map::new());
    for rpc in RPCS {
        add_request(rpc, &mut channels, &mut operations, &mut messages);
    }
    for publication in PUBLICATIONS {
        add_publication(publication, &mut channels, &mut operations, &mut messages);
    }
    let document = json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Agent on Demand: the bus",
            "version": "1",
            "description": "How the services of Agent on Demand communicate over NATS, and which subjects other services may read. \
                            `rpc` subjects are request and reply; `cmd`, `log`, `evt` and `dlq` are stored in JetStream streams; `hint` messages may be lost.",
            "license": { "name": "MIT OR Apache-2.0" }
        },
        "defaultContentType": CONTENT_TYPE,
        "servers": {
            "nats": {
                "host": "localhost:4222",
                "protocol": "nats",
                "description": format!("NATS 2.12 or later. Other services connect as the user `{}`, which may read only LIFECYCLE and EVENTS. EVENTS_1 to EVENTS_7 exist as far as EVENT_PARTITIONS says.", access::EVENTS.user),
                "security": [{ "$ref": "#/components/securitySchemes/user" }]
            }
        },
        "channels": channels,
        "operations": operations,
        "components": {
            "messages": messages,
            "schemas": schemas,
            "securitySchemes": { "user": { "type": "userPassword", "description": "A NATS user, restricted to its own subjects" } }
        },
        "x-nats-streams": streams(Partition::all()).map(describe_stream).collect::<Vec<_>>()
    });
    Ok(format!("{document:#}\n"))
}

const CONTENT_TYPE: &str = "application/x-protobuf";

/// `scheduler::Agent` as its `.proto` file calls it, with the package.
fn proto_name(rust: &str) -> (String, String) {
    let (module, name) = rust.split_once("::").unwrap_or(("common", rust));
    let package = format!("aod.{}.v1", module.trim());
    (package.clone(), format!("{package}.{}", name.trim()))
}

fn add_message(rust: &str, messages: &mut Map<String, Value>) -> String {
    let (package, name) = proto_name(rust);
    let message = json!({ "name": name, "contentType": CONTENT_TYPE, "payload": { "$ref": format!("#/components/schemas/{package}") } });
    messages.insert(name.clone(), message);
    name
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/messages/{name}") })
}

fn add_request(
    rpc: &RpcInfo,
    channels: &mut Map<String, Value>,
    operations: &mut Map<String, Value>,
    messages: &mut Map<String, Value>,
) {
    let (request, reply) = (add_message(rpc.request, messages), add_message(rpc.reply, messages));
    let retry_safe = if rpc.retry_safe {
        "Safe to retry."
    } else {
        "Not safe to retry without knowing whether it took effect."
    };
    channels.insert(
        rpc.name.to_owned(),
        json!({
            "address": rpc.subject,
            "description": format!("{} {retry_safe}", rpc.meaning).trim(),
            "messages": { "request": reference(&request) },
            "bindings": { "nats": { "queue": "q" } }
        }),
    );
    let answers = format!("{}Reply", rpc.name);
    channels.insert(
        answers.clone(),
        json!({ "address": null, "messages": { "reply": reference(&reply) } }),
    );
    operations.insert(
        rpc.name.to_owned(),
        json!({
            "action": "receive",
            "channel": { "$ref": format!("#/channels/{}", rpc.name) },
            "messages": [{ "$ref": format!("#/channels/{}/messages/request", rpc.name) }],
            "reply": {
                "address": { "location": "$message.header#/reply", "description": "The reply subject of the request" },
                "channel": { "$ref": format!("#/channels/{answers}") },
                "messages": [{ "$ref": format!("#/channels/{answers}/messages/reply") }]
            }
        }),
    );
}

fn add_publication(
    publication: &Publication,
    channels: &mut Map<String, Value>,
    operations: &mut Map<String, Value>,
    messages: &mut Map<String, Value>,
) {
    let message = publication.message.map(|message| add_message(message, messages));
    let parameters: Map<String, Value> = publication
        .parameters
        .iter()
        .map(|(name, meaning)| ((*name).to_owned(), json!({ "description": meaning })))
        .collect();
    channels.insert(
        publication.name.to_owned(),
        json!({
            "address": publication.address,
            "description": publication.meaning,
            "parameters": parameters,
            "messages": message.iter().map(|name| ("message".to_owned(), reference(name))).collect::<Map<_, _>>()
        }),
    );
    operations.insert(
        publication.name.to_owned(),
        json!({ "action": "send", "channel": { "$ref": format!("#/channels/{}", publication.name) } }),
    );
}

fn describe_stream(stream: StreamSpec) -> Value {
    let seconds = |duration: Duration| duration.as_secs();
    json!({
        "name": stream.name,
        "subjects": stream.subjects,
        "retention": match stream.retention { Retention::Limits => "limits", Retention::WorkQueue => "workqueue" },
        "max_age_seconds": seconds(stream.max_age),
        "max_bytes": stream.max_bytes,
        "when_full": if stream.refuse_when_full { "refuses new messages" } else { "drops the oldest" },
        "duplicate_window_seconds": seconds(stream.duplicate_window)
    })
}
