//! What users send to a session while its turn runs: queued messages, interrupts, and answers to
//! permission requests (docs/api.md §6).

use axum::{
    Json,
    extract::{FromRequestParts, State},
    http::{StatusCode, request::Parts},
};
use contract::{
    rpc,
    scheduler::{
        self, ChangeInputRequest, Cursor, DecideRequest, InterruptRequest,
        ListPermissionRequestsRequest, WithdrawInputRequest,
    },
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use types::{
    RequestStatus, Verdict, WhenBusy,
    limits::{BODY_BYTES_MAX, DENY_MESSAGE_CHARS_MAX},
};
use utoipa::{IntoParams, ToSchema};

use crate::{
    App,
    agents::{filled, time},
    auth::Caller,
    body::{Body, Fields},
    error::ApiError,
    openapi::Conflict,
    page::{Listed, Page, PageParams, check_status, listed, read_query},
    path::{Id, IdParams, Part},
};

/// Something that a user sent to a session while its turn ran.
#[derive(Serialize, ToSchema)]
pub struct Input {
    #[schema(format = Uuid)]
    id: String,
    #[schema(pattern = "^(message|interrupt|decision)$")]
    kind: String,
    #[schema(pattern = "^(queued|delivered|applied|refused|withdrawn)$")]
    status: String,
    /// Of a message.
    text: Option<String>,
    /// For a message: `steer` if it is to join the running turn, otherwise `queue`.
    #[schema(pattern = "^(queue|steer)$")]
    when_busy: Option<&'static str>,
    /// The turn that it was sent to, or that it began; a queued message has none yet.
    turn: Option<u32>,
    /// For a decision: the permission request that it answers.
    request_id: Option<u64>,
    /// For a decision: `allow`, `allow_for_session` or `deny`.
    decision: Option<String>,
    /// For a denial: what the model reads.
    deny_message: Option<String>,
    /// Why it was refused.
    reason: Option<String>,
    /// The API key that answered; null if the request timed out.
    #[schema(format = Uuid)]
    key_id: Option<String>,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    delivered_at: Option<String>,
    #[schema(format = DateTime)]
    settled_at: Option<String>,
}

impl From<scheduler::Input> for Input {
    fn from(input: scheduler::Input) -> Self {
        let is_message = input.kind == types::InputKind::Message.as_str();
        let when_busy = if input.steers { WhenBusy::Steer } else { WhenBusy::Queue };
        Self {
            id: input.input_id,
            text: is_message.then_some(input.text),
            when_busy: is_message.then_some(when_busy.as_str()),
            kind: input.kind,
            status: input.status,
            turn: input.turn,
            request_id: input.request_id,
            decision: filled(input.verdict),
            deny_message: filled(input.deny_message),
            reason: filled(input.message),
            key_id: filled(input.key_id),
            created_at: time(input.created_at_us),
            delivered_at: input.delivered_at_us.map(time),
            settled_at: input.settled_at_us.map(time),
        }
    }
}

/// List the inputs of a session, newest first
///
/// Messages that were queued or joined a turn, interrupts, and answers to permission requests.
#[utoipa::path(get, path = "/sessions/{id}/inputs", tag = "sessions", params(IdParams, PageParams),
    responses((status = 200, description = "A page of inputs", body = Listed<Input>)))]
pub async fn list_inputs(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    page: Page,
) -> Result<Json<Listed<Input>>, ApiError> {
    let reply = app.call::<rpc::ListInputs>(&page.request_parts(caller, id)).await?;
    let cursor = |input: &scheduler::Input| Cursor {
        position: input.created_at_us,
        id: input.input_id.clone(),
    };
    Ok(listed(reply.inputs, reply.has_more, cursor, Input::from))
}

#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes a path")]
pub struct InputParams {
    /// The session's id
    #[param(format = Uuid)]
    id: String,
    /// The input's id
    #[param(format = Uuid)]
    input: String,
}

/// A change of a queued message.
#[derive(ToSchema)]
pub struct ChangeInput {
    #[schema(min_length = 1, pattern = r"\S")]
    text: String,
}

impl ChangeInput {
    pub(crate) fn read(fields: &mut Fields) -> Self {
        let text = fields.string("text", BODY_BYTES_MAX);
        fields.refuse_blank("text");
        Self { text }
    }
}

/// Change the text of a queued message
#[utoipa::path(patch, path = "/sessions/{id}/inputs/{input}", tag = "sessions", params(InputParams), request_body = ChangeInput,
    responses((status = 200, description = "The message, changed", body = Input), Conflict))]
pub async fn change_input(
    State(app): State<App>,
    caller: Caller,
    Part(id, input): Part,
    body: Body,
) -> Result<Json<Input>, ApiError> {
    let mut fields = body.fields()?;
    let ChangeInput { text } = ChangeInput::read(&mut fields);
    fields.finish()?;
    let request =
        ChangeInputRequest { user_id: caller.user_id, session_id: id, input_id: input, text };
    Ok(Json(app.call::<rpc::ChangeInput>(&request).await?.into()))
}

/// Withdraw a queued message
#[utoipa::path(delete, path = "/sessions/{id}/inputs/{input}", tag = "sessions", params(InputParams),
    responses((status = 200, description = "The message, withdrawn", body = Input), Conflict))]
pub async fn withdraw_input(
    State(app): State<App>,
    caller: Caller,
    Part(id, input): Part,
) -> Result<Json<Input>, ApiError> {
    let request = WithdrawInputRequest { user_id: caller.user_id, session_id: id, input_id: input };
    Ok(Json(app.call::<rpc::WithdrawInput>(&request).await?.into()))
}

/// Interrupt the running turn
///
/// The agent stops what it does, the turn ends with exit code 0, and the session continues. Asking
/// again while an interrupt is under way changes nothing.
#[utoipa::path(post, path = "/sessions/{id}/interrupt", tag = "sessions", params(IdParams),
    responses((status = 202, description = "The turn will be interrupted", body = Input), Conflict))]
pub async fn interrupt(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<(StatusCode, Json<Input>), ApiError> {
    let request =
        InterruptRequest { user_id: caller.user_id, session_id: id, key_id: caller.key_id };
    Ok((StatusCode::ACCEPTED, Json(app.call::<rpc::Interrupt>(&request).await?.into())))
}

/// An agent asks whether it may use a tool.
#[derive(Serialize, ToSchema)]
pub struct PermissionRequest {
    /// The event that shows the tool use.
    id: u64,
    turn: u32,
    #[schema(example = "Bash")]
    tool: String,
    /// The tool's arguments.
    input: Value,
    /// A unified diff, where the agent's CLI supplies one.
    diff: Option<String>,
    /// Why the agent asks, where its CLI says so.
    reason: Option<String>,
    #[schema(pattern = "^(open|allowed|denied|withdrawn|void)$")]
    status: String,
    /// Once there is one; until the request's status says so, it is on its way to the agent.
    answer: Option<Input>,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    settled_at: Option<String>,
}

impl From<scheduler::PermissionRequest> for PermissionRequest {
    fn from(request: scheduler::PermissionRequest) -> Self {
        Self {
            id: request.request_id,
            turn: request.turn,
            tool: request.tool,
            // CLIs' own JSON; what is not is shown as text.
            input: serde_json::from_str(&request.input_json)
                .unwrap_or(Value::String(request.input_json)),
            diff: filled(request.diff),
            reason: filled(request.reason),
            status: request.status,
            answer: request.answer.map(Input::from),
            created_at: time(request.created_at_us),
            settled_at: request.settled_at_us.map(time),
        }
    }
}

/// Which permission requests a list holds.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct RequestFilter {
    /// `open`, `allowed`, `denied`, `withdrawn` or `void`
    status: Option<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for RequestFilter {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let filter: Self = read_query(parts, state).await?;
        check_status(
            filter.status.as_deref(),
            RequestStatus::ALL.iter().map(|status| status.as_str()),
        )?;
        Ok(filter)
    }
}

/// List the permission requests of a session, newest first
#[utoipa::path(get, path = "/sessions/{id}/requests", tag = "sessions", params(IdParams, PageParams, RequestFilter),
    responses((status = 200, description = "A page of permission requests", body = Listed<PermissionRequest>)))]
pub async fn list_requests(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    page: Page,
    filter: RequestFilter,
) -> Result<Json<Listed<PermissionRequest>>, ApiError> {
    let Page { limit, after } = page;
    let request = ListPermissionRequestsRequest {
        user_id: caller.user_id,
        session_id: id,
        status: filter.status,
        limit,
        after,
    };
    let reply = app.call::<rpc::ListPermissionRequests>(&request).await?;
    let cursor = |row: &scheduler::PermissionRequest| Cursor {
        position: row.request_id.cast_signed(),
        id: String::new(),
    };
    Ok(listed(reply.requests, reply.has_more, cursor, PermissionRequest::from))
}

#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes a path")]
pub struct RequestParams {
    /// The session's id
    #[param(format = Uuid)]
    id: String,
    /// The request's id
    request: u64,
}

/// The answer to a permission request.
#[derive(ToSchema)]
pub struct Decision {
    /// `allow`, `allow_for_session` (do not ask about this tool again) or `deny`
    #[schema(pattern = "^(allow|allow_for_session|deny)$")]
    decision: String,
    /// With `deny`: what the model reads
    #[schema(max_length = 4096)]
    message: Option<String>,
}

impl Decision {
    pub(crate) fn read(fields: &mut Fields) -> Self {
        let decision = fields.string("decision", BODY_BYTES_MAX);
        if !decision.is_empty() && decision.parse::<Verdict>().is_err() {
            fields.refuse("decision", "decision must be 'allow', 'allow_for_session' or 'deny'");
        }
        let message = fields.optional_string("message", DENY_MESSAGE_CHARS_MAX);
        if message.is_some() && decision != Verdict::Deny.as_str() {
            fields.refuse("message", "message is for the decision 'deny'");
        }
        Self { decision, message }
    }
}

/// Answer a permission request
///
/// The first answer counts.
#[utoipa::path(post, path = "/sessions/{id}/requests/{request}", tag = "sessions", params(RequestParams), request_body = Decision,
    responses((status = 200, description = "The request with its answer", body = PermissionRequest), Conflict))]
pub async fn decide(
    State(app): State<App>,
    caller: Caller,
    Part(id, request): Part,
    body: Body,
) -> Result<Json<PermissionRequest>, ApiError> {
    let mut fields = body.fields()?;
    let decision = Decision::read(&mut fields);
    fields.finish()?;
    let request = DecideRequest {
        user_id: caller.user_id,
        session_id: id,
        request_id: request.parse().map_err(|_| ApiError::not_found("Request"))?,
        verdict: decision.decision,
        message: decision.message.unwrap_or_default(),
        key_id: caller.key_id,
    };
    Ok(Json(app.call::<rpc::Decide>(&request).await?.into()))
}
