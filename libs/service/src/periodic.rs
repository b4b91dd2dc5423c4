//! Work that is repeated at an interval.

use std::{fmt, future::Future, time::Duration};

use tokio::{
    sync::Notify,
    time::{Instant, Interval, MissedTickBehavior, interval_at, timeout},
};
use tokio_util::sync::CancellationToken;

/// The longest that one run may take. A run that hangs, on a connection that is half dead for
/// example, is dropped with what it holds.
const RUN_MAX: Duration = Duration::from_secs(60);

/// Ticks soon, and then after each `every`; a tick that is late moves the later ones. Each process
/// and task begins at a moment of its own within a second, so that they do not all want a
/// connection at the same moments for ever.
pub fn ticks(every: Duration) -> Interval {
    let first = every.min(Duration::from_secs(1)).mul_f64(types::random_fraction());
    let mut ticks = interval_at(Instant::now() + first, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Runs `work` soon and after each `every`, until the stop, which also interrupts a run. A run that
/// fails or takes more than a minute is logged, and counted in `aod_periodic_failures_total`; the
/// next one is on time.
///
/// `work` must be safe to interrupt and to run again.
pub async fn periodically<F, E>(
    name: &'static str,
    every: Duration,
    stop: CancellationToken,
    work: impl FnMut() -> F,
) where
    F: Future<Output = Result<(), E>>,
    E: fmt::Display,
{
    repeat(name, every, None, RUN_MAX, stop, work).await;
}

/// As [`periodically`], but only when `due` was notified: a run begins at once, or `pause` after the
/// last one began.
pub async fn whenever<F, E>(
    name: &'static str,
    due: &Notify,
    pause: Duration,
    stop: CancellationToken,
    work: impl FnMut() -> F,
) where
    F: Future<Output = Result<(), E>>,
    E: fmt::Display,
{
    repeat(name, pause, Some(due), RUN_MAX, stop, work).await;
}

async fn repeat<F, E>(
    name: &'static str,
    every: Duration,
    due: Option<&Notify>,
    run_max: Duration,
    stop: CancellationToken,
    mut work: impl FnMut() -> F,
) where
    F: Future<Output = Result<(), E>>,
    E: fmt::Display,
{
    metrics::describe_counter!(
        "aod_periodic_failures_total",
        "runs of periodic work that failed or took too long, by task"
    );
    let mut ticks = ticks(every);
    let mut next = async || {
        ticks.tick().await;
        if let Some(due) = due {
            due.notified().await;
            ticks.reset();
        }
    };
    while stop.run_until_cancelled(next()).await.is_some() {
        let error = match stop.run_until_cancelled(timeout(run_max, work())).await {
            None | Some(Ok(Ok(()))) => continue,
            Some(Ok(Err(error))) => format!("{error:#}"),
            Some(Err(_)) => format!("took more than {run_max:?}"),
        };
        metrics::counter!("aod_periodic_failures_total", "task" => name).increment(1);
        tracing::warn!(task = name, error, "periodic work failed; will retry");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn work_that_fails_or_hangs_runs_again() {
        let (runs, stop) = (AtomicUsize::new(0), CancellationToken::new());
        let work = || async {
            match runs.fetch_add(1, Ordering::Relaxed) {
                0 => return Err("failed"),
                1 => std::future::pending().await,
                2 => {}
                _ => stop.cancel(),
            }
            Ok(())
        };
        let (every, run_max) = (Duration::from_millis(1), Duration::from_millis(20));
        repeat("test", every, None, run_max, stop.clone(), work).await;
        assert_eq!(runs.load(Ordering::Relaxed), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn work_runs_at_once_when_it_is_due_and_not_more_often_than_it_may() {
        const PAUSE: Duration = Duration::from_secs(1);
        let (runs, stop, due) = (AtomicUsize::new(0), CancellationToken::new(), Notify::new());
        let work = || async {
            runs.fetch_add(1, Ordering::Relaxed);
            Ok::<_, &str>(())
        };
        let watched = async {
            tokio::time::sleep(PAUSE * 10).await;
            assert_eq!(runs.load(Ordering::Relaxed), 0, "nothing was due");
            due.notify_one();
            tokio::time::sleep(Duration::from_millis(5)).await;
            assert_eq!(runs.load(Ordering::Relaxed), 1);
            for _ in 0..40 {
                tokio::time::sleep(PAUSE / 4).await;
                due.notify_one();
            }
            assert_eq!(runs.load(Ordering::Relaxed), 1 + 40 / 4, "once in each pause");
            stop.cancel();
        };
        tokio::join!(whenever("test", &due, PAUSE, stop.clone(), work), watched);
    }
}
