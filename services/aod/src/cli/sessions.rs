//! `aod sessions`.

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::{
    budget::LimitArgs,
    cli::call::{Call, change_budget, list},
    client::{Api, ApiFailure, Page},
    output::{Output, Table},
    prompt::PromptArgs,
};

#[derive(Debug, Subcommand)]
pub enum Sessions {
    /// List sessions, newest first
    List(Page),
    /// Print a session
    Get {
        /// Id of the session
        id: String,
    },
    /// Start a session without following it; `aod run` follows
    #[command(after_help = "Example:\n  aod sessions create --agent AGENT 'write a haiku'")]
    Create {
        /// Id of the agent
        #[arg(long, value_name = "ID")]
        agent: String,
        /// Seconds for each turn, 10 to 3600
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u32>,
        #[command(flatten)]
        budget: LimitArgs,
        #[command(flatten)]
        prompt: PromptArgs,
    },
    /// Print the budget of a session; limits change it first
    #[command(after_help = "Example:\n  aod sessions budget SESSION --usd 10")]
    Budget {
        /// Id of the session
        id: String,
        #[command(flatten)]
        limits: LimitArgs,
    },
    /// List the turns of a session, oldest first
    Turns {
        /// Id of the session
        id: String,
        #[command(flatten)]
        page: Page,
    },
    /// Start the next turn of a session without following it
    #[command(
        after_help = "Example:\n  aod sessions prompt SESSION --when-busy queue 'and then run the tests'"
    )]
    Prompt {
        /// Id of the session
        id: String,
        /// What to do while a turn runs
        #[arg(long, value_enum)]
        when_busy: Option<WhenBusy>,
        #[command(flatten)]
        prompt: PromptArgs,
    },
    /// Interrupt the running turn; the session continues
    Interrupt {
        /// Id of the session
        id: String,
    },
    /// List what was sent to a session while its turns ran, newest first
    Inputs {
        /// Id of the session
        id: String,
        #[command(flatten)]
        page: Page,
    },
    /// Change the text of a queued message
    Edit {
        /// Id of the session
        id: String,
        /// Id of the input
        input: String,
        #[command(flatten)]
        prompt: PromptArgs,
    },
    /// Withdraw a queued message
    Withdraw {
        /// Id of the session
        id: String,
        /// Id of the input
        input: String,
    },
    /// List the permission requests of a session, newest first
    Requests {
        /// Id of the session
        id: String,
        #[command(flatten)]
        page: Page,
    },
    /// Allow what the agent asks for
    #[command(after_help = "Example:\n  aod sessions approve SESSION")]
    Approve {
        /// Id of the session
        id: String,
        /// Id of the request; not needed while only one is open
        request: Option<u64>,
        /// Do not ask about this tool again in this session
        #[arg(long)]
        for_session: bool,
    },
    /// Deny what the agent asks for
    #[command(
        after_help = "Example:\n  aod sessions deny SESSION --message 'Use the staging database.'"
    )]
    Deny {
        /// Id of the session
        id: String,
        /// Id of the request; not needed while only one is open
        request: Option<u64>,
        /// Reason, which the model reads
        #[arg(long)]
        message: Option<String>,
    },
    /// Stop a session and delete its sandbox
    Terminate {
        /// Id of the session
        id: String,
    },
    /// Delete a session that is not active, with its output
    Delete {
        /// Id of the session
        id: String,
    },
}

/// What a prompt does while a turn runs.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum WhenBusy {
    /// Refuse the prompt
    Reject,
    /// Queue it: it begins the next turn
    Queue,
    /// Queue it, and interrupt the running turn
    Interrupt,
    /// Add it to the running turn
    Steer,
}

impl WhenBusy {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reject => "reject",
            Self::Queue => "queue",
            Self::Interrupt => "interrupt",
            Self::Steer => "steer",
        }
    }
}

impl Call for Sessions {
    async fn call(self, api: &Api, output: Output) -> Result<(), ApiFailure> {
        const SESSIONS: Table =
            Table(&["id", "status", "runtime", "exit_code", "turn_count", "created_at"]);
        const INPUTS: Table = Table(&["id", "kind", "status", "turn", "created_at", "text"]);
        const REQUESTS: Table = Table(&["id", "turn", "tool", "status", "created_at", "input"]);
        const TURNS: Table =
            Table(&["turn_number", "status", "exit_code", "started_at", "ended_at", "prompt"]);
        match self {
            Self::List(page) => list(api, "/sessions", &page, output, SESSIONS).await?,
            Self::Get { id } => output.one(&api.get(&format!("/sessions/{id}")).await?),
            Self::Create { agent, timeout, budget, prompt } => {
                let body = json!({ "agent_id": agent, "prompt": prompt.read()?, "timeout": timeout, "budget": budget.body() });
                output.one(&api.post("/sessions", &body).await?);
            }
            Self::Budget { id, limits } => {
                output.one(&change_budget(api, &format!("/sessions/{id}/budget"), &limits).await?)
            }
            Self::Turns { id, page } => {
                list(api, &format!("/sessions/{id}/turns"), &page, output, TURNS).await?
            }
            Self::Prompt { id, when_busy, prompt } => {
                let body =
                    json!({ "prompt": prompt.read()?, "when_busy": when_busy.map(WhenBusy::name) });
                output.one(&api.post(&format!("/sessions/{id}/prompt"), &body).await?);
            }
            Self::Interrupt { id } => {
                output.one(&api.post(&format!("/sessions/{id}/interrupt"), &Value::Null).await?)
            }
            Self::Inputs { id, page } => {
                list(api, &format!("/sessions/{id}/inputs"), &page, output, INPUTS).await?
            }
            Self::Edit { id, input, prompt } => {
                output.one(
                    &api.patch(
                        &format!("/sessions/{id}/inputs/{input}"),
                        &json!({ "text": prompt.read()? }),
                    )
                    .await?,
                );
            }
            Self::Withdraw { id, input } => {
                output.one(&api.delete(&format!("/sessions/{id}/inputs/{input}")).await?)
            }
            Self::Requests { id, page } => {
                list(api, &format!("/sessions/{id}/requests"), &page, output, REQUESTS).await?
            }
            Self::Approve { id, request, for_session } => {
                let decision = if for_session { "allow_for_session" } else { "allow" };
                output.one(&decide(api, &id, request, decision, None).await?);
            }
            Self::Deny { id, request, message } => {
                output.one(&decide(api, &id, request, "deny", message.as_deref()).await?)
            }
            Self::Terminate { id } => {
                output.one(&api.post(&format!("/sessions/{id}/terminate"), &Value::Null).await?)
            }
            Self::Delete { id } => {
                output.one(&api.delete(&format!("/sessions/{id}/delete")).await?)
            }
        }
        Ok(())
    }
}

/// Answers a permission request: the one that is named, or the only one that is open.
pub async fn decide(
    api: &Api,
    session: &str,
    request: Option<u64>,
    decision: &str,
    message: Option<&str>,
) -> Result<Value, ApiFailure> {
    let request = match request {
        Some(request) => request,
        None => only_request(api, session).await?,
    };
    let body = json!({ "decision": decision, "message": message });
    api.post(&format!("/sessions/{session}/requests/{request}"), &body).await
}

async fn only_request(api: &Api, session: &str) -> Result<u64, ApiFailure> {
    let answer = api.get(&format!("/sessions/{session}/requests?status=open")).await?;
    let requests =
        answer.get("data").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    // Those that were answered are still open until the agent has read it.
    let open: Vec<&Value> = requests
        .iter()
        .filter(|request| request.get("answer").is_none_or(Value::is_null))
        .collect();
    match open.as_slice() {
        [] => Err(ApiFailure::Local("no permission request is open".to_owned())),
        [request] => Ok(request.get("id").and_then(Value::as_u64).unwrap_or_default()),
        several => {
            let ids: Vec<String> = several
                .iter()
                .map(|request| format!("{} ({})", request["id"], request["tool"]))
                .collect();
            Err(ApiFailure::Local(format!(
                "several permission requests are open, name one: {}",
                ids.join(", ")
            )))
        }
    }
}
