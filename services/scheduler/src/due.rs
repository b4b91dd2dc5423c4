//! Looks for work that is due, on behalf of this replica's loops, in one statement: most of the time
//! there is none for any of them.
//!
//! A loop whose work is due is woken, and again at each look until the work is done. A look that
//! fails wakes all, so that a table that cannot be read holds up no work but its own. What this
//! replica itself commits wakes the relay and the reconciler without waiting for a look.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use sqlx::{AssertSqlSafe, PgPool};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    Scheduler,
    catalog::files::FileSettings,
    cleanup::{self, deletion},
    dispatch::{ending, relay},
    log::projector,
    models,
    sessions::managed,
};

const LOOPS: usize = 7;
const EVERY: Duration = Duration::from_millis(500);
/// The longest that a look may take. Less than Postgres waits for a lock.
const LOOK_MAX: Duration = Duration::from_secs(2);

/// Wakes the loops of this replica, each when there is work for it.
#[derive(Clone, Default)]
pub struct Due {
    /// Also woken after a commit of this replica.
    pub outbox: Arc<Notify>,
    pub projections: Arc<Notify>,
    pub endings: Arc<Notify>,
    pub session_updates: Arc<Notify>,
    pub deletions: Arc<Notify>,
    pub files: Arc<Notify>,
    pub model_requests: Arc<Notify>,
}

impl Due {
    /// Each loop with the condition on which there is work for it: null is false.
    ///
    /// A condition on ages compares the oldest, which is the first of its index. Postgres looks for
    /// any row that is too old in the whole table while its statistics say that there are many.
    fn loops(&self, files: &FileSettings) -> [(String, &Notify); LOOPS] {
        [
            (relay::due(), &self.outbox),
            (projector::DUE.to_owned(), &self.projections),
            (ending::DUE.to_owned(), &self.endings),
            (managed::DUE.to_owned(), &self.session_updates),
            (deletion::DUE.to_owned(), &self.deletions),
            (cleanup::files::due(files), &self.files),
            (models::due(), &self.model_requests),
        ]
    }
}

fn statement(loops: &[(String, &Notify)]) -> String {
    let conditions: Vec<_> =
        loops.iter().map(|(condition, _)| format!("coalesce({condition}, false)")).collect();
    format!("select array[{}]", conditions.join(", "))
}

pub async fn run(scheduler: Scheduler, stop: CancellationToken) {
    let loops = scheduler.due.loops(&scheduler.files);
    let statement = statement(&loops);
    service::periodically("due work", EVERY, stop, || async {
        let found = look(&scheduler.pool, &statement).await;
        let are_due = found.as_deref().unwrap_or(&[true; LOOPS]);
        for ((_, due), _) in loops.iter().zip(are_due).filter(|(_, is_due)| **is_due) {
            due.notify_one();
        }
        found.map(drop)
    })
    .await;
}

async fn look(pool: &PgPool, statement: &str) -> anyhow::Result<Vec<bool>> {
    let look = sqlx::query_scalar(AssertSqlSafe(statement.to_owned())).fetch_one(pool);
    Ok(tokio::time::timeout(LOOK_MAX, look).await.context("no answer in time")??)
}

#[cfg(test)]
mod tests {
    use testkit::Database;

    use super::*;

    #[tokio::test]
    async fn a_look_reads_no_table_whole_however_much_waits_or_is_kept() {
        let database = Database::create().await.unwrap();
        let pool =
            store::open(&database.config("scheduler"), "test", crate::MIGRATIONS).await.unwrap();
        let many = "
            insert into session (session_id, user_id, agent_version, runtime, sprite, conversation_id, metadata, status, turn_count)
            select gen_random_uuid(), gen_random_uuid(), 1, 'shell', 'done-' || number, gen_random_uuid(), '{}', 'completed', 1
            from generate_series(1, 5000) as number;
            insert into turn (session_id, turn_number, prompt, timeout_seconds, status, deadline_at, offer_after)
            select session_id, 1, 'x', 60, 'completed', now(), now() from session;
            insert into deleted_session (session_id, user_id, sprite, purge_after)
            select gen_random_uuid(), gen_random_uuid(), 'gone-' || number, now() + interval '1 day'
            from generate_series(1, 5000) as number;
            insert into outbox (outbox_id, subject, payload, not_before)
            select gen_random_uuid(), 'aod.cmd.x', '', now() + interval '1 hour' from generate_series(1, 5000);
            insert into answered_once (user_id, route, key, body_hash, reply)
            select gen_random_uuid(), 'x', 'x', '', '' from generate_series(1, 5000);
            insert into file (file_id, user_id, kind, state, object_id, filename, mime_type)
            select gen_random_uuid(), gen_random_uuid(), 'upload', 'ready', gen_random_uuid(), 'x', 'x'
            from generate_series(1, 5000);
            insert into model_request (request_id, session_id, user_id, turn_number, gateway_id, provider, model, key, status,
                                       ended_at, is_summed)
            select gen_random_uuid(), session_id, user_id, 1, gen_random_uuid(), 'x', 'x', 'x', 'settled', now(), true from session;
            insert into model_entry (session_id, number, payload) select session_id, 1, '' from session";
        sqlx::raw_sql(many).execute(&pool).await.unwrap();
        // What Postgres knows of ages is as old as its statistics: it takes many rows to be too old
        // that have been deleted.
        let aged = "
            update answered_once set created_at = now() - interval '26 hours' * random();
            update file set created_at = now() - interval '33 days' * random(),
                expires_at = now() + interval '1 hour' - interval '10 hours' * random();
            update model_request set ended_at = now() - interval '8 days' * random();
            update model_entry set recorded_at = now() - interval '8 days' * random()";
        let analyze = "vacuum analyze session, turn, deleted_session, outbox, answered_once, file, model_request, model_entry";
        let gone = "
            delete from answered_once where created_at < now() - interval '24 hours';
            delete from file where created_at < now() - interval '30 days' or expires_at < now();
            delete from model_request where ended_at < now() - interval '7 days';
            delete from model_entry where recorded_at < now() - interval '7 days'";
        for statements in [aged, analyze, gone] {
            sqlx::raw_sql(statements).execute(&pool).await.unwrap();
        }
        let files = FileSettings { store: None, user_bytes_max: 0, days: Some(30) };
        let statement = statement(&Due::default().loops(&files));
        let explain = AssertSqlSafe(format!("explain {statement}"));
        let plan: Vec<String> = sqlx::query_scalar(explain).fetch_all(&pool).await.unwrap();
        let plan = plan.join("\n");
        for table in ["session", "turn", "deleted_session", "outbox", "answered_once", "file"]
            .into_iter()
            .chain(["model_request", "model_entry"])
        {
            assert!(!plan.contains(&format!("Seq Scan on {table} ")), "{table}: {plan}");
        }
        let found: Vec<bool> =
            sqlx::query_scalar(AssertSqlSafe(statement)).fetch_one(&pool).await.unwrap();
        assert_eq!(found, [false; LOOPS], "nothing is due");
    }
}
