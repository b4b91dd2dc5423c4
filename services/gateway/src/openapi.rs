//! The OpenAPI document. Operations describe themselves beside their handlers; here is what they share.

use std::collections::BTreeMap;

use serde_json::json;
use utoipa::{
    IntoResponses, OpenApi,
    openapi::{
        Content, OpenApi as Document, Ref, RefOr, Response, ResponseBuilder,
        path::Operation,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use crate::{
    error::ErrorBody,
    stream::{event::StreamEvent, typed::TypedEvent},
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Agent on Demand",
        description = "Runs AI coding agents in sandboxes and streams what they do: define an agent, post a session, follow it live, prompt it again."
    ),
    security(("key" = [])),
    components(schemas(ErrorBody, StreamEvent, TypedEvent)),
    tags(
        (name = "agents", description = "Templates that sessions run"),
        (name = "environments", description = "How sandboxes are set up"),
        (name = "sessions", description = "An agent running, turn after turn, in one sandbox"),
        (name = "credentials", description = "What agents call models with"),
        (name = "api-keys", description = "What users call this API with"),
        (name = "health", description = "For whoever watches over the service"),
    )
)]
pub struct Base;

/// A failure, with an example of its body.
fn failure(description: &str, detail: &str) -> RefOr<Response> {
    let mut content = Content::new(Some(Ref::from_schema_name("ErrorBody")));
    content.example = Some(json!({ "detail": detail, "request_id": "4bf92f3577b34da6a3ce929d0e0e4736" }));
    ResponseBuilder::new().description(description).content("application/json", content).build().into()
}

fn field_errors() -> RefOr<Response> {
    let mut content = Content::new(Some(Ref::from_schema_name("ErrorBody")));
    content.example = Some(json!({
        "detail": [{ "type": "missing", "loc": ["name"], "msg": "Field required", "input": {} }],
        "request_id": "4bf92f3577b34da6a3ce929d0e0e4736"
    }));
    ResponseBuilder::new().description("Fields that are missing or wrong").content("application/json", content).build().into()
}

/// The state of the resource refuses the request.
pub struct Conflict;

impl IntoResponses for Conflict {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        BTreeMap::from([("409".to_owned(), failure("The state of the resource refuses it", "Version mismatch: expected 3, got 2"))])
    }
}

/// The user has as many active sessions as are allowed.
pub struct QuotaUsedUp;

impl IntoResponses for QuotaUsedUp {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let mut content = Content::new(Some(Ref::from_schema_name("ErrorBody")));
        content.example = Some(json!({
            "detail": "Concurrent session limit reached (100/100). Terminate an active session before starting a new one.",
            "limit": 100, "active": 100, "request_id": "4bf92f3577b34da6a3ce929d0e0e4736"
        }));
        let response =
            ResponseBuilder::new().description("As many sessions are active as are allowed").content("application/json", content);
        BTreeMap::from([("429".to_owned(), response.build().into())])
    }
}

/// Adds what is the same for every operation of its sort.
pub fn complete(mut document: Document) -> Document {
    let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("aod_…").description(Some("An API key")).build();
    document.components.get_or_insert_default().add_security_scheme("key", SecurityScheme::Http(scheme));
    for (path, item) in &mut document.paths.paths {
        let operations = [&mut item.get, &mut item.put, &mut item.post, &mut item.patch, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            name(operation);
            add_failures(operation, path.contains('{'));
        }
    }
    document
}

/// `agents_list`: handlers of different resources have the same names.
fn name(operation: &mut Operation) {
    let tag = operation.tags.iter().flatten().next().map(|tag| tag.replace('-', "_")).unwrap_or_default();
    let name = operation.operation_id.take().unwrap_or_default();
    operation.operation_id = Some(format!("{tag}_{name}"));
}

fn add_failures(operation: &mut Operation, names_a_resource: bool) {
    // Open to everybody: nothing but itself can fail.
    if operation.security.is_some() {
        return;
    }
    let mut failures = vec![
        ("400", failure("Something about the request is malformed", "Invalid JSON")),
        ("401", failure("Nobody is known by that key", "Invalid API key")),
        ("503", failure("A part of the service does not answer; try again", "scheduler is not available")),
    ];
    if names_a_resource {
        failures.push(("404", failure("There is no such resource, or it is somebody else's", "Session not found")));
    }
    if operation.request_body.is_some() {
        failures.push(("408", failure("The body took too long to arrive", "Request body took too long")));
        failures.push(("413", failure("The body is larger than 2,621,440 bytes", "Request body too large")));
        failures.push(("422", field_errors()));
    }
    for (status, response) in failures {
        operation.responses.responses.entry(status.to_owned()).or_insert(response);
    }
}
