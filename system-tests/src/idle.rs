//! Many sessions that wait and print nothing, each followed over a connection of its own: rows that
//! no runner is offered.

use anyhow::{Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};

use crate::{Stack, faults::sql, stream::Events};

/// Connections that are opened at a time.
const AT_A_TIME: usize = 32;

/// Makes so many sessions of an agent and follows each, for as long as what is returned is kept:
/// their ids and their events.
///
/// # Errors
/// When one of them cannot be followed.
pub async fn follow(stack: &Stack, agent: &str, number: usize) -> Result<Vec<(String, Events)>> {
    let open = async |session: String| {
        let mut events = stack.stream(&session, 0).await?;
        let first = events.next().await?.unwrap_or_default();
        ensure!(first["type"] == "start", "session {session} begins with {first}");
        Ok((session, events))
    };
    stream::iter(make(stack, agent, number)?)
        .map(open)
        .buffer_unordered(AT_A_TIME)
        .try_collect()
        .await
}

/// Makes pending sessions that are not offered for an hour, as copies of one that is made by the
/// API's rules.
fn make(stack: &Stack, agent: &str, number: usize) -> Result<Vec<String>> {
    if number == 0 {
        return Ok(Vec::new());
    }
    ensure!(agent.parse::<types::AgentId>().is_ok(), "{agent} is no id");
    let made = sql(
        stack,
        &format!(
            "with made as (
                 insert into scheduler.session (session_id, user_id, agent_id, agent_version, runtime, sprite, conversation_id, metadata, status,
                                                turn_count)
                 select gen_random_uuid(), user_id, agent_id, version, 'shell', 'idle-' || n, gen_random_uuid(), '{{}}', 'pending', 1
                 from scheduler.agent, generate_series(1, {number}) n
                 where agent_id = '{agent}'
                 returning session_id
             ), turns as (
                 insert into scheduler.turn (session_id, turn_number, prompt, timeout_seconds, status, deadline_at, offers, offer_after)
                 select session_id, 1, 'true', 600, 'pending', now() + interval '2 hours', 1, now() + interval '1 hour' from made
             )
             select session_id from made"
        ),
    )?;
    let made: Vec<String> = made
        .lines()
        .filter(|line| line.parse::<types::SessionId>().is_ok())
        .map(str::to_owned)
        .collect();
    ensure!(made.len() == number, "{} of {number} sessions were made", made.len());
    Ok(made)
}
