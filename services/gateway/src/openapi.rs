//! The OpenAPI document, committed as `docs/openapi.json`. Operations are described beside their
//! handlers; this module adds what they share.

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
    v1::error::{Envelope, is_under_v1},
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Agent on Demand",
        description = "Runs AI coding agents in sandboxes and streams their output. Define an agent, start a session, follow it live, send the next prompt."
    ),
    security(("key" = [])),
    components(schemas(ErrorBody, Envelope, StreamEvent, TypedEvent)),
    tags(
        (name = "agents", description = "Templates that sessions run"),
        (name = "environments", description = "How sandboxes are set up"),
        (name = "sessions", description = "An agent that runs in one sandbox, turn by turn"),
        (name = "usage", description = "What model requests used"),
        (name = "credentials", description = "Keys with which agents call models and sandboxes"),
        (name = "api-keys", description = "Keys with which users call this API"),
        (name = "managed-agents", description = "The same resources in the shapes of the Managed Agents API"),
        (name = "health", description = "Health checks"),
    )
)]
pub struct Base;

/// A failure, with an example of its body.
fn failure(description: &str, detail: &str) -> RefOr<Response> {
    let mut content = Content::new(Some(Ref::from_schema_name("ErrorBody")));
    content.example =
        Some(json!({ "detail": detail, "request_id": "4bf92f3577b34da6a3ce929d0e0e4736" }));
    ResponseBuilder::new()
        .description(description)
        .content("application/json", content)
        .build()
        .into()
}

fn field_errors() -> RefOr<Response> {
    let mut content = Content::new(Some(Ref::from_schema_name("ErrorBody")));
    content.example = Some(json!({
        "detail": [{ "type": "missing", "loc": ["name"], "msg": "Field required", "input": {} }],
        "request_id": "4bf92f3577b34da6a3ce929d0e0e4736"
    }));
    ResponseBuilder::new()
        .description("Invalid or missing fields")
        .content("application/json", content)
        .build()
        .into()
}

/// The state of the resource refuses the request.
pub struct Conflict;

impl IntoResponses for Conflict {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        BTreeMap::from([(
            "409".to_owned(),
            failure(
                "The current state of the resource does not allow the request",
                "Version mismatch: expected 3, got 2",
            ),
        )])
    }
}

/// The user has reached the limit of active sessions.
pub struct QuotaUsedUp;

impl IntoResponses for QuotaUsedUp {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let mut content = Content::new(Some(Ref::from_schema_name("ErrorBody")));
        content.example = Some(json!({
            "detail": "Concurrent session limit reached (100/100). Terminate an active session before starting a new one.",
            "limit": 100, "active": 100, "request_id": "4bf92f3577b34da6a3ce929d0e0e4736"
        }));
        let response = ResponseBuilder::new()
            .description("The user has reached the limit of active sessions")
            .content("application/json", content);
        BTreeMap::from([("429".to_owned(), response.build().into())])
    }
}

/// Adds the security scheme, unique operation names and the failures that operations have in
/// common.
pub fn complete(mut document: Document) -> Document {
    let scheme = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .bearer_format("aod_…")
        .description(Some("An API key"))
        .build();
    document
        .components
        .get_or_insert_default()
        .add_security_scheme("key", SecurityScheme::Http(scheme));
    for (path, item) in &mut document.paths.paths {
        let operations =
            [&mut item.get, &mut item.put, &mut item.post, &mut item.patch, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            name(operation);
            if is_under_v1(path) {
                add_v1_failures(operation, path.contains('{'));
            } else {
                add_failures(operation, path.contains('{'));
            }
        }
    }
    document
}

/// `agents_list`: handlers of different resources have the same names.
fn name(operation: &mut Operation) {
    let tag =
        operation.tags.iter().flatten().next().map(|tag| tag.replace('-', "_")).unwrap_or_default();
    let name = operation.operation_id.take().unwrap_or_default();
    operation.operation_id = Some(format!("{tag}_{name}"));
}

fn add_failures(operation: &mut Operation, names_a_resource: bool) {
    // Operations without authentication describe their failures themselves.
    if operation.security.is_some() {
        return;
    }
    let mut failures = vec![
        ("400", failure("Malformed request", "Invalid JSON")),
        ("401", failure("The API key is missing, unknown or inactive", "Invalid API key")),
        (
            "503",
            failure(
                "A dependency is unavailable; retry after the time in `Retry-After`",
                "scheduler is not available",
            ),
        ),
    ];
    if names_a_resource {
        failures.push((
            "404",
            failure("The resource does not exist or belongs to another user", "Session not found"),
        ));
    }
    if operation.request_body.is_some() {
        failures.push((
            "408",
            failure("The request body did not arrive in time", "Request body took too long"),
        ));
        failures.push((
            "413",
            failure("The request body is larger than 2,621,440 bytes", "Request body too large"),
        ));
        failures.push(("422", field_errors()));
    }
    for (status, response) in failures {
        operation.responses.responses.entry(status.to_owned()).or_insert(response);
    }
}

fn v1_failure(description: &str, kind: &str, message: &str) -> RefOr<Response> {
    let mut content = Content::new(Some(Ref::from_schema_name("Envelope")));
    let (error, request_id) =
        (json!({ "type": kind, "message": message }), "req_4bf92f3577b34da6a3ce929d0e0e4736");
    content.example = Some(json!({ "type": "error", "error": error, "request_id": request_id }));
    ResponseBuilder::new()
        .description(description)
        .content("application/json", content)
        .build()
        .into()
}

fn add_v1_failures(operation: &mut Operation, names_a_resource: bool) {
    let mut failures = vec![
        (
            "400",
            v1_failure(
                "The request is refused; the message names the field",
                "invalid_request_error",
                "limit: must be an integer",
            ),
        ),
        (
            "401",
            v1_failure(
                "The API key is missing, unknown or inactive",
                "authentication_error",
                "Invalid API key",
            ),
        ),
        (
            "503",
            v1_failure("A dependency is unavailable", "api_error", "scheduler is not available"),
        ),
    ];
    if names_a_resource {
        let description = "The resource does not exist or belongs to another user";
        failures.push(("404", v1_failure(description, "not_found_error", "Session not found")));
    }
    if operation.request_body.is_some() {
        failures.push((
            "413",
            v1_failure(
                "The request body is too large",
                "request_too_large",
                "Request body too large",
            ),
        ));
    }
    for (status, response) in failures {
        operation.responses.responses.entry(status.to_owned()).or_insert(response);
    }
}

#[cfg(test)]
mod tests {
    const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");

    /// `INSTA_UPDATE=always` writes the file, as it does snapshots.
    #[expect(clippy::disallowed_methods, reason = "a setting of the test")]
    #[test]
    fn the_committed_document_is_up_to_date() {
        let (_, document) = crate::router::routes();
        let document = format!("{}\n", document.to_pretty_json().unwrap());
        if std::env::var("INSTA_UPDATE").as_deref() == Ok("always") {
            std::fs::write(COMMITTED, &document).unwrap();
        }
        let committed = std::fs::read_to_string(COMMITTED).unwrap_or_default();
        assert!(
            committed == document,
            "docs/openapi.json differs: run `INSTA_UPDATE=always cargo test -p gateway`"
        );
    }
}
