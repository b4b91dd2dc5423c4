//! The tasks of a process, and their shutdown.
//!
//! Every task has a name and this owner. A task that ends before the process is told to stop has
//! crashed: then the whole process stops, with an exit code at which its supervisor restarts it.

use std::{
    fmt,
    future::Future,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

type Check = (&'static str, Box<dyn Fn() -> bool + Send + Sync>);

/// The lifecycle of a process. Cheap to clone.
#[derive(Clone)]
pub struct Lifecycle {
    stop: CancellationToken,
    tasks: TaskTracker,
    shared: Arc<Shared>,
}

struct Shared {
    ready: AtomicBool,
    crashed: AtomicBool,
    interrupted: AtomicBool,
    checks: Mutex<Vec<Check>>,
}

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lifecycle")
            .field("stopping", &self.stop.is_cancelled())
            .finish_non_exhaustive()
    }
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self::new()
    }
}

impl Lifecycle {
    #[must_use]
    pub fn new() -> Self {
        let shared = Shared {
            ready: AtomicBool::new(false),
            crashed: AtomicBool::new(false),
            interrupted: AtomicBool::new(false),
            checks: Mutex::default(),
        };
        Self { stop: CancellationToken::new(), tasks: TaskTracker::new(), shared: Arc::new(shared) }
    }

    /// Cancelled when the process is to stop.
    #[must_use]
    pub fn stop_token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// For tasks that may end at any time, such as requests.
    #[must_use]
    pub fn tracker(&self) -> TaskTracker {
        self.tasks.clone()
    }

    /// Spawns a task that lives until the stop.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let (stop, shared, crash_guard) =
            (self.stop.clone(), self.shared.clone(), self.stop.clone().drop_guard());
        self.tasks.spawn(async move {
            // A panic drops the guard too, which stops the process.
            let crash_guard = crash_guard;
            task.await;
            if stop.is_cancelled() {
                crash_guard.disarm();
            } else {
                tracing::error!(task = name, "task ended by itself; stopping");
                shared.crashed.store(true, Ordering::Relaxed);
            }
        });
    }

    /// Adds a condition of readiness.
    pub fn add_check(&self, name: &'static str, check: impl Fn() -> bool + Send + Sync + 'static) {
        self.shared
            .checks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((name, Box::new(check)));
    }

    pub fn set_ready(&self) {
        self.shared.ready.store(true, Ordering::Relaxed);
    }

    /// Whether the stop was requested by SIGINT (Ctrl-C), so that no restart is expected.
    #[must_use]
    pub fn was_interrupted(&self) -> bool {
        self.shared.interrupted.load(Ordering::Relaxed)
    }

    /// Why the process should receive no traffic now; empty if it is ready.
    #[must_use]
    pub fn unready(&self) -> Vec<&'static str> {
        if self.stop.is_cancelled() {
            return vec!["stopping"];
        }
        if !self.shared.ready.load(Ordering::Relaxed) {
            return vec!["starting"];
        }
        let checks = self.shared.checks.lock().unwrap_or_else(PoisonError::into_inner);
        checks.iter().filter(|(_, check)| !check()).map(|(name, _)| *name).collect()
    }

    /// Waits for a signal or a crash, then for the tasks, at most `grace`. A second signal ends it
    /// at once.
    pub async fn wait(self, grace: Duration) -> ExitCode {
        let (Ok(mut terminate), Ok(mut interrupt)) =
            (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
        else {
            tracing::error!("signals cannot be received");
            return ExitCode::FAILURE;
        };
        let requested = tokio::select! {
            _ = terminate.recv() => true,
            _ = interrupt.recv() => {
                self.shared.interrupted.store(true, Ordering::Relaxed);
                true
            }
            () = self.stop.cancelled() => false,
        };
        tracing::info!(requested, "stopping");
        self.stop.cancel();
        self.tasks.close();
        tokio::select! {
            () = self.tasks.wait() => {}
            () = tokio::time::sleep(grace) => tracing::warn!("tasks did not end in time"),
            _ = terminate.recv() => tracing::warn!("second signal: not waiting for tasks"),
            _ = interrupt.recv() => tracing::warn!("second signal: not waiting for tasks"),
        }
        let crashed = !requested || self.shared.crashed.load(Ordering::Relaxed);
        if crashed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }
}
