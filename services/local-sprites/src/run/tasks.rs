//! Tasks, which keep a quiet Sprite awake. Its own programs register them for a limited time
//! (docs/sprites-api.md §11.1).

use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use types::Timestamp;

use crate::sync::locked;

pub const EXPIRE_MAX: Duration = Duration::from_secs(3600);
const TASKS_MAX: usize = 1000;

#[derive(Clone, Copy, Debug)]
pub struct Task {
    pub started_at: Timestamp,
    pub expires_at: Timestamp,
    ends: Instant,
}

#[derive(Debug, Default)]
pub struct Tasks(Mutex<BTreeMap<String, Task>>);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TaskError {
    #[error("task already exists")]
    Exists,
    #[error("a task expires after one second to one hour")]
    Expire,
    #[error("at most {TASKS_MAX} tasks")]
    TooMany,
}

impl Tasks {
    fn alive(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Task>> {
        let mut tasks = locked(&self.0);
        tasks.retain(|_, task| task.ends > Instant::now());
        tasks
    }

    pub fn any(&self) -> bool {
        !self.alive().is_empty()
    }

    pub fn list(&self) -> Vec<(String, Task)> {
        self.alive().iter().map(|(name, task)| (name.clone(), *task)).collect()
    }

    pub fn get(&self, name: &str) -> Option<Task> {
        self.alive().get(name).copied()
    }

    /// Makes a task, or with `replace` makes one that is there last longer.
    pub fn set(&self, name: &str, expire: Duration, replace: bool) -> Result<Task, TaskError> {
        if expire < Duration::from_secs(1) || expire > EXPIRE_MAX {
            return Err(TaskError::Expire);
        }
        let mut tasks = self.alive();
        let before = tasks.get(name).copied();
        if before.is_some() && !replace {
            return Err(TaskError::Exists);
        }
        if before.is_none() && tasks.len() >= TASKS_MAX {
            return Err(TaskError::TooMany);
        }
        let now = Timestamp::now();
        let expires_at = Timestamp::from_unix_micros(
            now.unix_micros() + i64::try_from(expire.as_micros()).unwrap_or(i64::MAX),
        );
        let task = Task {
            started_at: before.map_or(now, |task| task.started_at),
            expires_at,
            ends: Instant::now() + expire,
        };
        tasks.insert(name.to_owned(), task);
        Ok(task)
    }

    pub fn remove(&self, name: &str) -> bool {
        self.alive().remove(name).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_made_once_lasts_longer_and_ends() {
        let tasks = Tasks::default();
        let minute = Duration::from_secs(60);
        let first = tasks.set("build", minute, false).unwrap();
        assert_eq!(tasks.set("build", minute, false).unwrap_err(), TaskError::Exists);
        let longer = tasks.set("build", minute * 5, true).unwrap();
        assert!(longer.started_at == first.started_at && longer.expires_at > first.expires_at);
        assert_eq!(
            tasks.set("other", Duration::from_secs(3601), true).unwrap_err(),
            TaskError::Expire
        );
        assert!(tasks.any() && tasks.remove("build") && !tasks.remove("build") && !tasks.any());
    }
}
