//! Sessions and turns (docs/api.md §6).

use std::collections::BTreeMap;

use axum::{
    Json,
    extract::{FromRequestParts, State},
    http::{StatusCode, request::Parts},
    response::Response,
};
use contract::{
    common::Empty,
    rpc,
    scheduler::{
        self, CreateSessionRequest, Cursor, DeleteSessionRequest, GetSessionRequest, PromptRequest,
        TerminateRequest,
    },
};
use serde::{Deserialize, Serialize};
use types::{
    AgentId, EnvironmentId, Repository, SessionId, SessionStatus, WhenBusy,
    limits::{
        BODY_BYTES_MAX, RESOURCES_MAX, TIMEOUT_SECONDS_MAX, TIMEOUT_SECONDS_MIN, TOKEN_CHARS_MAX,
        URL_CHARS_MAX,
    },
    model::quoted,
    repository::{
        Author, Checkout, RepositoryTag, RepositoryUrl, check_mount_path, is_author_part,
        is_branch, is_commit, is_normal_path,
    },
};
use utoipa::{IntoParams, ToSchema};

use crate::{
    App,
    agents::{json, time},
    auth::Caller,
    body::{Body, Fields},
    environments::read_env_vars,
    error::{ApiError, Detail},
    etag::Known,
    idempotency::{Created, IdempotencyKey, IdempotencyParams},
    inputs::Input,
    openapi::{Conflict, QuotaUsedUp},
    page::{Listed, Page, PageParams, bad_query, check_status, listed, read_query},
    path::{Id, IdParams},
    secrets::{Kept, Kind},
};

/// A session.
#[derive(Serialize, ToSchema)]
pub struct Session {
    #[schema(format = Uuid)]
    id: String,
    #[schema(format = Uuid)]
    agent_id: Option<String>,
    #[schema(format = Uuid)]
    environment_id: Option<String>,
    runtime: String,
    provider: Option<String>,
    status: Status,
    exit_code: Option<i32>,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    updated_at: String,
    resources: Vec<Repository>,
    /// Null if the session did not name one.
    working_directory: Option<String>,
    turn_count: u32,
    current_turn: Option<u32>,
    metadata: BTreeMap<String, String>,
    failure: Option<Failure>,
    /// Which decision the running turn waits for. For a single session also what a pending turn
    /// waits for.
    waiting_on: Option<String>,
    /// How many queued messages wait for the turn to end; null in lists.
    queued_inputs: Option<u32>,
    /// The first 200 characters of the newest turn's prompt; only in lists.
    last_prompt: Option<String>,
    /// What the session's turns cost, as far as the agent reported it; only in lists.
    cost_usd: Option<f64>,
}

/// `pending`, `running`, `completed`, `failed` or `terminated`.
#[derive(Serialize, ToSchema)]
#[schema(pattern = "^(pending|running|completed|failed|terminated)$")]
pub struct Status(String);

/// Why a session failed, if not by the agent's exit code.
#[derive(Serialize, ToSchema)]
pub struct Failure {
    stage: String,
    message: String,
}

impl From<scheduler::Session> for Session {
    fn from(session: scheduler::Session) -> Self {
        Self {
            id: session.session_id,
            agent_id: session.agent_id,
            environment_id: session.environment_id,
            runtime: session.runtime,
            provider: session.provider,
            status: Status(session.status),
            exit_code: session.exit_code,
            created_at: time(session.created_at_us),
            updated_at: time(session.updated_at_us),
            resources: serde_json::from_str(&session.resources).unwrap_or_default(),
            working_directory: session.working_directory,
            turn_count: session.turn_count,
            current_turn: Some(session.turn_count),
            metadata: serde_json::from_str(&session.metadata).unwrap_or_default(),
            waiting_on: session.waiting_on,
            queued_inputs: session.queued_inputs,
            last_prompt: session.last_prompt,
            cost_usd: session.cost_micro_usd.map(|micro| micro as f64 / 1e6),
            failure: session
                .failure
                .map(|failure| Failure { stage: failure.stage, message: failure.message }),
        }
    }
}

/// A turn.
#[derive(Serialize, ToSchema)]
pub struct Turn {
    turn_number: u32,
    prompt: String,
    #[schema(pattern = "^(pending|running|completed|failed)$")]
    status: String,
    exit_code: Option<i32>,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    started_at: Option<String>,
    #[schema(format = DateTime)]
    ended_at: Option<String>,
    /// As the agent reported it; null if it did not.
    usage: Option<Usage>,
}

/// What a turn used. Values that the agent did not report are null.
#[derive(Serialize, ToSchema)]
pub struct Usage {
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    cost_usd: Option<f64>,
    model: Option<String>,
}

impl From<contract::session::Usage> for Usage {
    fn from(usage: contract::session::Usage) -> Self {
        Self {
            input_tokens: usage.input_tokens,
            output_tokens: usage.output_tokens,
            cost_usd: usage.cost_micro_usd.map(|cost| cost as f64 / 1e6),
            model: usage.model,
        }
    }
}

impl From<scheduler::Turn> for Turn {
    fn from(turn: scheduler::Turn) -> Self {
        Self {
            turn_number: turn.turn_number,
            prompt: turn.prompt,
            status: turn.status,
            exit_code: turn.exit_code,
            created_at: time(turn.created_at_us),
            started_at: turn.started_at_us.map(time),
            ended_at: turn.ended_at_us.map(time),
            usage: turn.usage.map(Usage::from),
        }
    }
}

/// A session that was accepted.
#[derive(Serialize, ToSchema)]
pub struct Accepted {
    #[schema(format = Uuid)]
    id: String,
    status: Status,
    stream_url: String,
    #[schema(format = Uuid)]
    environment_id: Option<String>,
    resources: Vec<Repository>,
    current_turn: u32,
}

/// A turn that was accepted.
#[derive(Serialize, ToSchema)]
pub struct AcceptedTurn {
    #[schema(format = Uuid)]
    id: String,
    status: Status,
    stream_url: String,
    current_turn: u32,
    /// The message that waits for the running turn, or joins it; absent if no turn was running.
    #[serde(skip_serializing_if = "Option::is_none")]
    input: Option<Input>,
}

/// A session that was terminated.
#[derive(Serialize, ToSchema)]
pub struct Terminated {
    #[schema(format = Uuid)]
    id: String,
    status: Status,
}

fn stream_url(id: &str) -> String {
    format!("/sessions/{id}/stream")
}

/// A new session.
#[derive(ToSchema)]
pub struct CreateSession {
    agent_id: String,
    #[schema(min_length = 1, pattern = r"\S")]
    prompt: String,
    /// Seconds for each turn; the deployment's default is 600
    #[schema(minimum = 10, maximum = 3600)]
    timeout: Option<u32>,
    /// Replaces the agent's own environment
    environment_id: Option<String>,
    #[schema(max_items = 10)]
    resources: Option<Vec<Resource>>,
    /// Absolute path of the agent's working directory. Default: the mount path of the only
    /// repository, otherwise `/workspace`
    #[schema(max_length = 500)]
    working_directory: Option<String>,
    /// Stored encrypted and never returned; they override all other variables
    secret_env_vars: Option<BTreeMap<String, String>>,
    metadata: Option<BTreeMap<String, String>>,
    /// What the session may use; see docs/budgets.md
    #[schema(value_type = Option<crate::budgets::NewBudget>)]
    budget: Option<scheduler::BudgetChange>,
}

/// A repository that is cloned before the first turn.
#[derive(ToSchema)]
pub struct Resource {
    r#type: RepositoryTag,
    /// `https://github.com/<owner>/<repo>`
    #[schema(max_length = 500, example = "https://github.com/octocat/Hello-World")]
    url: String,
    /// Absolute; default `/workspace/<repo>`
    #[schema(max_length = 500)]
    pub mount_path: Option<String>,
    /// What is checked out; by default the default branch
    checkout: Option<Checkout>,
    /// Whether to fetch the contents of files in Git LFS. The sandbox needs `git-lfs`: `packages:
    /// {"apt": ["git-lfs"]}`
    lfs: Option<bool>,
    /// The author of commits in this repository
    author: Option<Author>,
    /// Stored encrypted and never returned
    authorization_token: Option<String>,
}

impl CreateSession {
    pub(crate) fn read(fields: &mut Fields) -> Self {
        Self {
            agent_id: fields.string("agent_id", BODY_BYTES_MAX),
            prompt: read_prompt(fields),
            timeout: read_timeout(fields),
            environment_id: fields.optional_string("environment_id", BODY_BYTES_MAX),
            resources: read_resources(fields),
            working_directory: read_working_directory(fields),
            secret_env_vars: read_env_vars(fields, "secret_env_vars"),
            metadata: fields.string_metadata("metadata"),
            budget: crate::budgets::read(fields),
        }
    }
}

/// Reads a prompt. One of white space only is refused, since no CLI accepts it.
fn read_prompt(fields: &mut Fields) -> String {
    let prompt = fields.string("prompt", BODY_BYTES_MAX);
    fields.refuse_blank("prompt");
    prompt
}

fn read_timeout(fields: &mut Fields) -> Option<u32> {
    let seconds =
        fields.integer("timeout", i64::from(TIMEOUT_SECONDS_MIN), i64::from(TIMEOUT_SECONDS_MAX));
    seconds.and_then(|seconds| u32::try_from(seconds).ok())
}

fn read_working_directory(fields: &mut Fields) -> Option<String> {
    let path = fields.optional_string("working_directory", URL_CHARS_MAX)?;
    if !is_normal_path(&path) {
        fields.refuse("working_directory", "working_directory must be absolute and normal: without '.', '..', '//' or a slash at its end");
    }
    Some(path)
}

pub fn read_resources(fields: &mut Fields) -> Option<Vec<Resource>> {
    let resources = fields.objects("resources", RESOURCES_MAX, read_resource)?;
    let mut paths: Vec<&str> =
        resources.iter().filter_map(|resource| resource.mount_path.as_deref()).collect();
    paths.sort_unstable();
    if let Some([path, _]) = paths.array_windows().find(|[one, other]| one == other) {
        fields.refuse("resources", &format!("duplicate mount_path: {path}"));
    }
    Some(resources)
}

/// Reads a resource: its URL in the form that responses show, and the default mount path if it has
/// none.
pub fn read_resource(item: &mut Fields) -> Resource {
    item.literal("type", "github_repository");
    let url = item.string("url", URL_CHARS_MAX);
    let repository = RepositoryUrl::parse(&url);
    if repository.is_none() && !url.is_empty() {
        item.refuse("url", "url must be https://github.com/<owner>/<repo>");
    }
    let mount_path = item.optional_string("mount_path", URL_CHARS_MAX);
    if let Some(error) = mount_path.as_deref().and_then(|path| check_mount_path(path).err()) {
        item.refuse("mount_path", &error.to_string());
    }
    let authorization_token = read_token(item);
    Resource {
        r#type: RepositoryTag::GithubRepository,
        mount_path: mount_path
            .or_else(|| repository.as_ref().map(RepositoryUrl::default_mount_path)),
        url: repository.map(|repository| repository.to_string()).unwrap_or_default(),
        checkout: item.nested("checkout", read_checkout).flatten(),
        lfs: item.optional_bool("lfs"),
        author: item.nested("author", read_author),
        authorization_token,
    }
}

pub fn read_token(item: &mut Fields) -> Option<String> {
    let token = item.optional_string("authorization_token", TOKEN_CHARS_MAX)?;
    if token.is_empty() || token.chars().any(|c| c.is_control() || c.is_whitespace()) {
        item.refuse("authorization_token", "a token is one word");
    }
    Some(token)
}

fn read_checkout(checkout: &mut Fields) -> Option<Checkout> {
    match checkout.named_string("type", BODY_BYTES_MAX)?.as_str() {
        "branch" => {
            let name = checkout.named_string("name", BODY_BYTES_MAX)?;
            if !is_branch(&name) {
                checkout.refuse("name", "name must be the name of a branch");
            }
            Some(Checkout::Branch { name })
        }
        "commit" => {
            let sha = checkout.named_string("sha", BODY_BYTES_MAX)?;
            if !is_commit(&sha) {
                checkout.refuse("sha", "sha must be a whole commit id, in lower case");
            }
            Some(Checkout::Commit { sha })
        }
        _ => {
            checkout.refuse("type", "type must be 'branch' or 'commit'");
            None
        }
    }
}

fn read_author(author: &mut Fields) -> Author {
    let mut part = |name: &str| {
        let text = author.named_string(name, BODY_BYTES_MAX).unwrap_or_default();
        if !text.is_empty() && !is_author_part(&text) {
            author.refuse(
                name,
                &format!(
                    "{name} must be as git writes it: at most 200 bytes, without <, > and line ends"
                ),
            );
        }
        text
    };
    Author { name: part("name"), email: part("email") }
}

/// A session's own secrets, as they are stored in the vault.
#[derive(Serialize)]
pub struct SessionSecrets {
    pub env: BTreeMap<String, String>,
    /// By the mount path of their repository.
    pub tokens: BTreeMap<String, String>,
}

/// Start a session
#[utoipa::path(post, path = "/sessions", tag = "sessions", params(IdempotencyParams), request_body = CreateSession,
    responses((status = 202, description = "The session was accepted", body = Accepted), (status = 404, description = "No such agent or environment", body = crate::error::ErrorBody), Conflict, QuotaUsedUp))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    key: IdempotencyKey,
    body: Body,
) -> Result<Created<Accepted>, ApiError> {
    let mut fields = body.fields()?;
    let session = CreateSession::read(&mut fields);
    fields.finish()?;
    let credential_kinds = app.credential_kinds.of(&app.bus, &caller.user_id).await?;
    let (resources, tokens) = split_tokens(session.resources.unwrap_or_default());
    let secrets = SessionSecrets { env: session.secret_env_vars.unwrap_or_default(), tokens };
    let kept = keep(&app, &caller, &secrets).await?;
    let request = CreateSessionRequest {
        user_id: caller.user_id,
        agent_id: session.agent_id,
        prompt: session.prompt,
        timeout_seconds: session.timeout.unwrap_or(app.config.default_timeout_seconds),
        environment_id: session.environment_id,
        credential_kinds,
        session_limit: caller.session_limit.unwrap_or(app.config.default_session_limit),
        metadata: json(&session.metadata.unwrap_or_default()),
        resources: json(&resources),
        working_directory: session.working_directory,
        secret_id: kept.as_ref().map(|kept| kept.id.clone()),
        secret_env_var_names: secrets.env.into_keys().collect(),
        once: key.once(&body),
        session_id: SessionId::new().to_string(),
        budget: session.budget,
        ..CreateSessionRequest::default()
    };
    let reply = app.bus.call::<rpc::CreateSession>(&request, crate::RPC_DEADLINE).await;
    app.forget_unless_used(kept, &reply, |reply| !reply.replayed).await;
    let reply = reply?;
    let session = reply.session.unwrap_or_default();
    let accepted = Accepted {
        stream_url: stream_url(&session.session_id),
        resources: serde_json::from_str(&session.resources).unwrap_or_default(),
        id: session.session_id,
        status: Status(session.status),
        environment_id: session.environment_id,
        current_turn: session.turn_count,
    };
    Ok(Created { status: StatusCode::ACCEPTED, body: accepted, replayed: reply.replayed })
}

pub async fn keep(
    app: &App,
    caller: &Caller,
    secrets: &SessionSecrets,
) -> Result<Option<Kept>, ApiError> {
    if secrets.env.is_empty() && secrets.tokens.is_empty() {
        return Ok(None);
    }
    app.keep(&caller.user_id, Kind::Session, secrets, None).await.map(Some)
}

/// Repositories as everybody may see them, and their tokens by path.
pub fn split_tokens(resources: Vec<Resource>) -> (Vec<Repository>, BTreeMap<String, String>) {
    let mut tokens = BTreeMap::new();
    let mut repositories = Vec::with_capacity(resources.len());
    for Resource { r#type: kind, url, mount_path, checkout, lfs, author, authorization_token } in
        resources
    {
        let mount_path = mount_path.unwrap_or_default();
        if let Some(token) = authorization_token {
            tokens.insert(mount_path.clone(), token);
        }
        repositories.push(Repository {
            kind,
            url,
            mount_path,
            checkout,
            lfs: lfs.unwrap_or_default(),
            author,
        });
    }
    (repositories, tokens)
}

async fn find(app: &App, caller: &Caller, id: &str) -> Result<scheduler::Session, ApiError> {
    let request = GetSessionRequest {
        user_id: caller.user_id.clone(),
        session_id: id.to_owned(),
        recorded_through: 0,
        v1: false,
    };
    app.call::<rpc::GetSession>(&request).await
}

/// Get a session
#[utoipa::path(get, path = "/sessions/{id}", tag = "sessions", params(IdParams),
    responses((status = 200, description = "The session", body = Session)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Session>, ApiError> {
    Ok(Json(find(&app, &caller, &id).await?.into()))
}

/// Which sessions a list holds.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Filter {
    /// `pending`, `running`, `completed`, `failed` or `terminated`
    status: Option<String>,
    #[param(format = Uuid)]
    agent_id: Option<String>,
    #[param(format = Uuid)]
    environment_id: Option<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for Filter {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let filter: Self = read_query(parts, state).await?;
        check_status(
            filter.status.as_deref(),
            SessionStatus::ALL.iter().map(|status| status.as_str()),
        )?;
        if filter.agent_id.as_deref().is_some_and(|id| id.parse::<AgentId>().is_err()) {
            return Err(bad_query("agent_id must be a lowercase UUID"));
        }
        if filter.environment_id.as_deref().is_some_and(|id| id.parse::<EnvironmentId>().is_err()) {
            return Err(bad_query("environment_id must be a lowercase UUID"));
        }
        Ok(filter)
    }
}

/// List sessions, newest first
///
/// A client that polls sends the response's `ETag` as `If-None-Match` and receives 304 without a
/// body until something changes.
#[utoipa::path(get, path = "/sessions", tag = "sessions",
    params(PageParams, Filter, ("If-None-Match" = Option<String>, Header, description = "The `ETag` of the page that the client has")),
    responses(
        (status = 200, description = "A page of sessions", body = Listed<Session>, headers(("ETag" = String, description = "Changes with the page"))),
        (status = 304, description = "The client has this page")))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    page: Page,
    filter: Filter,
    known: Known,
) -> Result<Response, ApiError> {
    let Filter { status, agent_id, environment_id } = filter;
    let request =
        scheduler::ListRequest { status, agent_id, environment_id, ..page.request(caller) };
    let reply = app.call::<rpc::ListSessions>(&request).await?;
    let cursor = |row: &scheduler::Session| Cursor {
        position: row.created_at_us,
        id: row.session_id.clone(),
    };
    let Json(page) = listed(reply.sessions, reply.has_more, cursor, Session::from);
    known.answer(&page)
}

/// List the turns of a session, oldest first
#[utoipa::path(get, path = "/sessions/{id}/turns", tag = "sessions", params(IdParams, PageParams),
    responses((status = 200, description = "A page of turns", body = Listed<Turn>)))]
pub async fn turns(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    page: Page,
) -> Result<Json<Listed<Turn>>, ApiError> {
    let reply = app.call::<rpc::ListTurns>(&page.request_parts(caller, id)).await?;
    let cursor =
        |row: &scheduler::Turn| Cursor { position: row.turn_number.into(), id: String::new() };
    Ok(listed(reply.turns, reply.has_more, cursor, Turn::from))
}

/// A new turn.
#[derive(ToSchema)]
pub struct Prompt {
    #[schema(min_length = 1, pattern = r"\S")]
    prompt: String,
    /// Seconds for this turn; the deployment's default is 600
    #[schema(minimum = 10, maximum = 3600)]
    timeout: Option<u32>,
    /// What to do while a turn runs: `reject` (the default), `queue` (begin the next turn),
    /// `interrupt` (the same, and interrupt the running one) or `steer` (join the running turn)
    #[schema(pattern = "^(reject|queue|interrupt|steer)$")]
    when_busy: Option<String>,
}

impl Prompt {
    fn read(body: &Body) -> Result<Self, ApiError> {
        let mut fields = body.fields()?;
        let prompt = Self {
            prompt: read_prompt(&mut fields),
            timeout: read_timeout(&mut fields),
            when_busy: read_when_busy(&mut fields),
        };
        fields.finish()?;
        Ok(prompt)
    }
}

fn read_when_busy(fields: &mut Fields) -> Option<String> {
    let when_busy = fields.optional_string("when_busy", BODY_BYTES_MAX);
    if when_busy.as_deref().is_some_and(|text| text.parse::<WhenBusy>().is_err()) {
        fields.refuse(
            "when_busy",
            &format!(
                "when_busy must be one of: {}",
                quoted(WhenBusy::ALL.iter().map(|when| when.as_str()))
            ),
        );
    }
    when_busy
}

/// Prompt a session again
///
/// While a turn runs, `when_busy` says what becomes of the prompt.
#[utoipa::path(post, path = "/sessions/{id}/prompt", tag = "sessions", params(IdParams, IdempotencyParams), request_body = Prompt,
    responses((status = 202, description = "The turn, or the queued message, was accepted", body = AcceptedTurn), Conflict))]
pub async fn prompt(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    key: IdempotencyKey,
    body: Body,
) -> Result<Created<AcceptedTurn>, ApiError> {
    let prompt = match Prompt::read(&body) {
        Ok(prompt) => prompt,
        Err(error)
            if body.fields().is_ok_and(|fields| fields.names().any(|name| name == "when_busy")) =>
        {
            return Err(error);
        }
        // The state is checked before the body.
        Err(error) => {
            let status = find(&app, &caller, &id).await?.status.parse::<SessionStatus>().ok();
            let refusal = status.and_then(SessionStatus::prompt_refusal);
            return Err(
                refusal.map_or(error, |refusal| ApiError::new(StatusCode::CONFLICT, refusal))
            );
        }
    };
    let once = key.once_or_own(&body);
    let replays = !once.is_of_one_request;
    let request = PromptRequest {
        user_id: caller.user_id,
        session_id: id,
        prompt: prompt.prompt,
        timeout_seconds: prompt.timeout.unwrap_or(app.config.default_timeout_seconds),
        once: Some(once),
        when_busy: prompt.when_busy.unwrap_or_default(),
        key_id: caller.key_id,
    };
    let reply = app.call::<rpc::Prompt>(&request).await?;
    let session = reply.session.unwrap_or_default();
    let accepted = AcceptedTurn {
        stream_url: stream_url(&session.session_id),
        id: session.session_id,
        status: Status(session.status),
        current_turn: session.turn_count,
        input: session.input.map(Input::from),
    };
    Ok(Created {
        status: StatusCode::ACCEPTED,
        body: accepted,
        replayed: reply.replayed && replays,
    })
}

/// Terminate a session
///
/// Kills the agent and deletes the sandbox, also while it is being provisioned.
#[utoipa::path(post, path = "/sessions/{id}/terminate", tag = "sessions", params(IdParams),
    responses((status = 200, description = "The session was terminated", body = Terminated), Conflict))]
pub async fn terminate(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Terminated>, ApiError> {
    let session = app
        .call::<rpc::Terminate>(&TerminateRequest { user_id: caller.user_id, session_id: id })
        .await?;
    Ok(Json(Terminated { id: session.session_id, status: Status(session.status) }))
}

/// Delete a session that is not active
///
/// Also deletes its turns, events, secrets and sandbox.
#[utoipa::path(delete, path = "/sessions/{id}/delete", tag = "sessions", params(IdParams),
    responses((status = 200, description = "The session was deleted", body = Detail), Conflict))]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Detail>, ApiError> {
    let Empty {} = app
        .call::<rpc::DeleteSession>(&DeleteSessionRequest {
            user_id: caller.user_id,
            session_id: id,
        })
        .await?;
    Ok(Detail::new("Session deleted"))
}
