//! Services of a Sprite (docs/sprites-api.md §9): started when it boots, in the order of their
//! needs, and again when they end. They outlive this server, and the next one keeps them on.

mod output;

use std::{
    collections::BTreeMap,
    fs, io,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use service::Lifecycle;
use tokio::{
    io::AsyncWriteExt as _,
    process::Child,
    sync::{broadcast, watch},
};
use types::{Backoff, Timestamp};

use self::output::{Files, Output};
use crate::{
    atomic::write_atomically,
    isolation::{
        holder::Holder,
        launch::{Launch, exit_code},
        process::Process,
        sandbox::{self, HOME},
    },
    run::exec::Stream,
    sprites::sprite::{RegistryError, Sprite},
    sync::locked,
};

/// Delays before a service that ended is started again.
const RESTART: Backoff =
    Backoff { base: Duration::from_millis(500), max: Duration::from_secs(30), attempts: u32::MAX };
/// One that ran so long begins with the shortest delay again.
const STEADY: Duration = Duration::from_secs(60);
/// How long a service's last words are waited for.
const DRAIN: Duration = Duration::from_millis(50);
const DRAIN_MAX: Duration = Duration::from_secs(2);
const EVENTS_HELD: usize = 1024;
const SERVICES_MAX: usize = 100;

/// What a service is, as its user wrote it; and what is known of it when this server is restarted.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Definition {
    pub cmd: String,
    #[serde(default)]
    pub args: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub dir: Option<String>,
    #[serde(default)]
    pub needs: Vec<String>,
    #[serde(default)]
    pub http_port: Option<u16>,
    /// Its user stopped it: it is not started by itself.
    #[serde(default)]
    pub stopped: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    #[default]
    Stopped,
    Starting,
    Running,
    Stopping,
    Failed,
}

/// How a service is now.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub status: Status,
    pub process: Option<Process>,
    pub started_at: Option<Timestamp>,
    pub error: Option<String>,
    pub restart_count: u32,
    pub next_restart_at: Option<Timestamp>,
}

/// What happens to a service, for who watches.
#[derive(Clone, Debug)]
pub enum Event {
    Started,
    Output(Stream, String),
    Exit(Option<u8>),
    Error(String),
    Stopping,
    Stopped(Option<u8>),
}

/// A service that was ended by its user takes this long to end by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Running,
    Stopped(Duration),
    /// It is no longer kept running; its processes are ended elsewhere.
    Forgotten,
}

#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    #[error("service not found")]
    NotFound,
    #[error("service is not running")]
    NotRunning,
    #[error("another service already has an HTTP port configured")]
    PortTaken,
    #[error("at most {SERVICES_MAX} services")]
    TooMany,
    #[error(transparent)]
    Sprite(#[from] RegistryError),
}

#[derive(Debug, Default)]
pub struct Services(Mutex<BTreeMap<String, Arc<Unit>>>);

/// One service, and the task that keeps it running.
#[derive(Debug)]
pub struct Unit {
    name: String,
    state: Mutex<State>,
    events: broadcast::Sender<Event>,
    /// What the keeper is to do; it has a receiver while a keeper runs.
    wanted: watch::Sender<Wanted>,
}

/// Where a Sprite's log of a service is, for this server.
pub fn log_path(sprite: &Sprite, name: &str) -> PathBuf {
    sprite.inside_dir().join(format!("logs/services/{name}.log"))
}

/// A name of the API's paths, and of files.
pub fn is_name(name: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=63).contains(&name.len())
        && name.chars().all(fine)
        && !name.starts_with('.')
        && name != "signal"
}

impl Services {
    pub fn unit(&self, name: &str) -> Result<Arc<Unit>, ServiceError> {
        locked(&self.0).get(name).cloned().ok_or(ServiceError::NotFound)
    }

    /// A service that is defined, whether it was ever started or not.
    pub fn defined(&self, sprite: &Sprite, name: &str) -> Result<Arc<Unit>, ServiceError> {
        if sprite.record().services.contains_key(name) {
            Ok(self.known(name))
        } else {
            Err(ServiceError::NotFound)
        }
    }

    /// Makes a service, or replaces one that was ended before.
    pub fn put(
        &self,
        sprite: &Sprite,
        name: &str,
        definition: Definition,
    ) -> Result<Arc<Unit>, ServiceError> {
        let services = sprite.record().services;
        if services.len() >= SERVICES_MAX && !services.contains_key(name) {
            return Err(ServiceError::TooMany);
        }
        let taken =
            |(other, with): (&String, &Definition)| other != name && with.http_port.is_some();
        if definition.http_port.is_some() && services.iter().any(taken) {
            return Err(ServiceError::PortTaken);
        }
        sprite.change(|record| drop(record.services.insert(name.to_owned(), definition)))?;
        Ok(self.known(name))
    }

    fn known(&self, name: &str) -> Arc<Unit> {
        locked(&self.0).entry(name.to_owned()).or_insert_with(|| Arc::new(Unit::new(name))).clone()
    }

    pub fn remove(&self, sprite: &Sprite, name: &str) -> Result<(), ServiceError> {
        locked(&self.0).remove(name).ok_or(ServiceError::NotFound)?;
        files(sprite, name).remove();
        Ok(sprite.change(|record| drop(record.services.remove(name)))?)
    }

    /// Starts what is to run, what others need first; takes up what runs already.
    pub fn start_all(&self, sprite: &Arc<Sprite>, holder: Holder, lifecycle: &Lifecycle) {
        let definitions = sprite.record().services;
        let mut order = Vec::new();
        for name in definitions.keys() {
            add_with_needs(name, &definitions, &mut order);
        }
        for name in order {
            let unit = self.known(name);
            if !definitions[name].stopped {
                unit.start(sprite, holder, lifecycle);
            }
        }
    }

    /// Nothing is started any more.
    pub fn forget_all(&self) {
        for unit in locked(&self.0).values() {
            unit.wanted.send_replace(Wanted::Forgotten);
        }
    }
}

fn add_with_needs<'a>(
    name: &'a String,
    definitions: &'a BTreeMap<String, Definition>,
    order: &mut Vec<&'a String>,
) {
    if order.len() > definitions.len() || order.contains(&name) {
        return;
    }
    // Marked first: needs that go in a circle are started in some order.
    let place = order.len();
    order.push(name);
    for need in
        definitions.get(name).map(|definition| definition.needs.as_slice()).unwrap_or_default()
    {
        if let Some((need, _)) = definitions.get_key_value(need) {
            add_with_needs(need, definitions, order);
        }
    }
    let own = order.remove(place);
    order.push(own);
}

impl Unit {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            state: Mutex::default(),
            events: broadcast::Sender::new(EVENTS_HELD),
            wanted: watch::Sender::new(Wanted::Running),
        }
    }

    pub fn state(&self) -> State {
        locked(&self.state).clone()
    }

    /// Whether it runs, or is about to.
    pub fn is_kept(&self) -> bool {
        !matches!(locked(&self.state).status, Status::Stopped | Status::Failed)
    }

    pub fn watch(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    fn tell(&self, event: Event) {
        // No watcher may be left.
        let _ = self.events.send(event);
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut locked(&self.state));
    }

    /// Starts the service where it is not running.
    pub fn start(self: &Arc<Self>, sprite: &Arc<Sprite>, holder: Holder, lifecycle: &Lifecycle) {
        // One keeper at a time: it listens as long as it lives.
        let mut state = locked(&self.state);
        if state.status != Status::Stopped && state.status != Status::Failed {
            return;
        }
        let before = state.process.take();
        *state = State { status: Status::Starting, process: before, ..State::default() };
        drop(state);
        self.wanted.send_replace(Wanted::Running);
        let (unit, sprite, stop) = (self.clone(), sprite.clone(), lifecycle.stop_token());
        let wanted = self.wanted.subscribe();
        // At a stop of this server the service runs on.
        lifecycle.tracker().spawn(async move {
            stop.run_until_cancelled(unit.keep(sprite, holder, wanted)).await
        });
    }

    /// Ends the service, by force after a while; and waits for that.
    pub async fn stop(&self, grace: Duration) -> Result<(), ServiceError> {
        if !self.is_kept() {
            return Err(ServiceError::NotRunning);
        }
        self.wanted.send_replace(Wanted::Stopped(grace));
        // The keeper lets go of its end when it is done.
        let gone = self.wanted.closed();
        let _ = tokio::time::timeout(grace + Duration::from_secs(5), gone).await;
        Ok(())
    }

    pub fn signal(&self, signal: Signal) -> Result<(), ServiceError> {
        let state = locked(&self.state);
        let process =
            state.process.filter(|process| process.is_alive()).ok_or(ServiceError::NotRunning)?;
        process.signal_command(signal);
        Ok(())
    }

    /// Runs the service, again and again, until it is to stop.
    async fn keep(
        self: Arc<Self>,
        sprite: Arc<Sprite>,
        mut holder: Holder,
        mut wanted: watch::Receiver<Wanted>,
    ) {
        let mut failures = 0;
        loop {
            let begun = std::time::Instant::now();
            let ended = match self.run(&sprite, holder, &mut wanted).await {
                Ok(ended) => ended,
                Err(error) => {
                    self.tell(Event::Error(error.to_string()));
                    self.set(|state| state.error = Some(error.to_string()));
                    None
                }
            };
            // Where its output could not be logged, on a full disk say, it may run on, and is
            // followed again.
            if !self.state().process.is_some_and(Process::is_alive) {
                let _ = fs::remove_file(pid_file(&sprite, &self.name));
            }
            self.set(|state| state.process = None);
            let now = *wanted.borrow();
            match now {
                Wanted::Stopped(_) => {
                    self.set(|state| {
                        *state = State { restart_count: state.restart_count, ..State::default() }
                    });
                    self.tell(Event::Stopped(ended));
                    return;
                }
                Wanted::Forgotten => return,
                Wanted::Running => {}
            }
            self.tell(Event::Exit(ended));
            if !holder.is_alive() {
                // The Sprite was restarted, or will be, and starts its services then. Decided while
                // the state is locked: it is this keeper that continues, or the next one.
                let mut state = locked(&self.state);
                match sprite.holder() {
                    Some(next) => holder = next,
                    None => {
                        state.status = Status::Stopped;
                        return;
                    }
                }
            }
            failures = if begun.elapsed() > STEADY { 1 } else { failures + 1 };
            let delay = RESTART.jittered(failures.min(16));
            let at = Timestamp::from_unix_micros(
                Timestamp::now().unix_micros() + i64::try_from(delay.as_micros()).unwrap_or(0),
            );
            self.set(|state| {
                state.status = Status::Starting;
                state.restart_count += 1;
                state.next_restart_at = Some(at);
            });
            if tokio::time::timeout(delay, changed(&mut wanted)).await.is_ok() {
                self.set(|state| state.status = Status::Stopped);
                self.tell(Event::Stopped(None));
                return;
            }
        }
    }

    /// Runs the service once, or follows a run that began before; gives its exit status where that
    /// can be known.
    async fn run(
        &self,
        sprite: &Arc<Sprite>,
        holder: Holder,
        wanted: &mut watch::Receiver<Wanted>,
    ) -> io::Result<Option<u8>> {
        let mut output = Output::open(&files(sprite, &self.name))?;
        let before = fs::read(pid_file(sprite, &self.name))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Process>(&bytes).ok());
        let (process, mut child) = match before.filter(|process| process.is_alive()) {
            Some(process) => (process, None),
            None => {
                let child = self.spawn(sprite, holder)?;
                let process = child.id().and_then(|id| Process::find(i32::try_from(id).ok()?));
                (process.ok_or_else(|| io::Error::other("it ended before it began"))?, Some(child))
            }
        };
        write_atomically(&pid_file(sprite, &self.name), &serde_json::to_vec(&process)?)?;
        if let Some(mut go) = child.as_mut().and_then(|child| child.stdin.take()) {
            go.write_all(b"\n").await?;
        }
        self.set(|state| {
            state.status = Status::Running;
            state.process = Some(process);
            state.started_at = Some(Timestamp::now());
            state.error = None;
            state.next_restart_at = None;
        });
        self.tell(Event::Started);
        let mut ended = std::pin::pin!(ended(&mut child, process));
        let code = loop {
            // In any order: a service that prints without end is ended too.
            tokio::select! {
                lines = output.next() => self.tell_lines(lines?),
                code = &mut ended => break code,
                change = changed(wanted) => match change {
                    Wanted::Stopped(grace) => break self.end(process, &mut output, ended.as_mut(), grace).await,
                    _ => return Ok(None),
                },
            }
        };
        // Processes that it left running may keep writing.
        let drained = async {
            while let Ok(lines) = tokio::time::timeout(DRAIN, output.next()).await {
                self.tell_lines(lines?);
            }
            io::Result::Ok(())
        };
        tokio::time::timeout(DRAIN_MAX, drained).await.unwrap_or(Ok(()))?;
        self.tell_lines(output.rest()?);
        Ok(code)
    }

    async fn end(
        &self,
        process: Process,
        output: &mut Output,
        mut ended: std::pin::Pin<&mut impl Future<Output = Option<u8>>>,
        grace: Duration,
    ) -> Option<u8> {
        self.set(|state| state.status = Status::Stopping);
        self.tell(Event::Stopping);
        process.signal_command(Signal::TERM);
        let mut out_of_patience = std::pin::pin!(tokio::time::sleep(grace));
        let (mut killed, mut logged) = (false, true);
        loop {
            tokio::select! {
                lines = output.next(), if logged => match lines {
                    Ok(lines) => self.tell_lines(lines),
                    // It ends all the same; what it says meanwhile waits in its pipes.
                    Err(error) => {
                        logged = false;
                        self.tell(Event::Error(error.to_string()));
                    }
                },
                code = &mut ended => return code,
                () = &mut out_of_patience, if !killed => {
                    killed = true;
                    process.signal_command(Signal::KILL);
                }
            }
        }
    }

    /// Starts it suspended, until its process is noted on disk.
    fn spawn(&self, sprite: &Arc<Sprite>, holder: Holder) -> io::Result<Child> {
        let definition = sprite
            .record()
            .services
            .remove(&self.name)
            .ok_or_else(|| io::Error::other("it is defined no more"))?;
        let dir = definition.dir.filter(|dir| !dir.is_empty()).unwrap_or_else(|| HOME.to_owned());
        let argv: Vec<_> = std::iter::once(definition.cmd).chain(definition.args).collect();
        let variables = sandbox::environment(holder)
            .into_iter()
            .chain(sprite.environment())
            .chain(definition.env);
        let launch = Launch { held: true, ..sprite.launch(holder, dir.into(), false) };
        let mut command = launch.command(&argv, variables)?;
        let [stdout, stderr] = files(sprite, &self.name).writers()?;
        command.stdin(Stdio::piped()).stdout(stdout).stderr(stderr).spawn()
    }

    fn tell_lines(&self, lines: Vec<(Stream, String)>) {
        for (stream, line) in lines {
            self.tell(Event::Output(stream, line));
        }
    }
}

/// Waits until the service is not to run any more.
async fn changed(wanted: &mut watch::Receiver<Wanted>) -> Wanted {
    wanted
        .wait_for(|wanted| *wanted != Wanted::Running)
        .await
        .map_or(Wanted::Forgotten, |wanted| *wanted)
}

/// Waits for a process to end; the status of one that an earlier server started is not to be had.
async fn ended(child: &mut Option<Child>, process: Process) -> Option<u8> {
    match child {
        Some(child) => child.wait().await.ok().map(exit_code),
        None => {
            while process.is_alive() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            None
        }
    }
}

fn pid_file(sprite: &Sprite, name: &str) -> PathBuf {
    sprite.dir().join(format!("services/{name}.process"))
}

fn files(sprite: &Sprite, name: &str) -> Files {
    Files::new(&sprite.dir().join("services"), name, log_path(sprite, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_start_after_their_needs_and_cycles_terminate() {
        let needing = |needs: &[&str]| Definition {
            needs: needs.iter().map(|need| (*need).to_owned()).collect(),
            ..Definition::default()
        };
        let order = |definitions: &[(&str, &[&str])]| {
            let definitions: BTreeMap<_, _> = definitions
                .iter()
                .map(|(name, needs)| ((*name).to_owned(), needing(needs)))
                .collect();
            let mut order = Vec::new();
            for name in definitions.keys() {
                add_with_needs(name, &definitions, &mut order);
            }
            order.into_iter().cloned().collect::<Vec<_>>()
        };
        assert_eq!(order(&[("a", &["c", "gone"]), ("b", &[]), ("c", &["b"])]), ["b", "c", "a"]);
        let circle = order(&[("a", &["b"]), ("b", &["c"]), ("c", &["a"]), ("d", &["d", "a"])]);
        assert_eq!(circle.len(), 4);
        assert_eq!(circle.last().unwrap(), "d");
    }

    #[test]
    fn names_are_no_paths() {
        assert!(is_name("web-1_a.b"));
        for bad in ["", "signal", "../x", "a/b", ".hidden", &"x".repeat(64)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
