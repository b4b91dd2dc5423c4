//! Pages of a session's events, in either order. They are read through [`Log`], which tests
//! implement.
//!
//! A page with a cursor is never empty: SDKs stop at the first empty page.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use contract::{
    host::{self, event},
    scheduler::{Cursor, FindTurnReply, Input},
    session::{Checkpoint, SessionEvent, session_event::Kind},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use types::{Runtime, SessionId};

use crate::{
    error::ApiError,
    v1::{
        query::{Query, bad},
        send,
        thread::{
            State, Thread, Within,
            entry::{Place, Shown},
            names::TYPES,
        },
    },
};

/// Pages of the log after which an answer ends that has something to show.
const LOG_PAGES: usize = 32;
/// In descending order so many entries more are read than are to be shown: one of them tells how
/// the thread is at its place.
const MARGIN: usize = if cfg!(test) { 6 } else { 64 };
/// Tool uses that are open at such a place, at most.
const OPEN_TOOLS: usize = 16;
/// Most turns begin within so many entries from where they are said to begin: set-up stages come
/// before.
const HEAD: usize = 64;
/// The entries that one answer in descending order shows hold about so many bytes.
const ANSWER_BYTES: usize = 8 * 1024 * 1024;
/// Entries of the log that are read at a time.
const ENTRIES_MAX: usize = 2000;
/// How long a page is searched for its first event.
const SEARCH_TIME: Duration = Duration::from_secs(20);
const LOG_END: Place = Place { entry: u64::MAX, part: u8::MAX };

/// An entry of a log, and how many bytes it holds.
pub type Entry = (u64, SessionEvent, usize);

/// What follows a place of a log.
pub enum Read {
    Entries(Vec<Entry>),
    /// Nothing but raw output up to this entry; of entries before one, from this entry on.
    Output {
        through: u64,
    },
    End,
}

/// A session's log and queue.
pub trait Log {
    /// The last turn that began before an entry; 0: the last turn.
    async fn find(&self, before: u64) -> Result<FindTurnReply, ApiError>;
    /// At most so many entries. They may come without their checkpoints.
    async fn read(&self, after: u64, limit: usize) -> Result<Read, ApiError>;
    /// The last entries before one, in the order of the log, at most so many.
    async fn read_before(&self, before: u64, limit: usize) -> Result<Read, ApiError>;
    /// What is sent and not in the log yet, oldest first.
    async fn queue(&self) -> Result<Vec<Input>, ApiError>;
}

/// Which events are wanted.
pub struct Filter {
    types: HashSet<String>,
    /// Microseconds; both included.
    times: RangeInclusive<i64>,
}

impl Filter {
    pub fn read(query: &Query) -> Result<Self, ApiError> {
        let types: HashSet<String> = query.all("types").map(str::to_owned).collect();
        if let Some(unknown) = types.iter().find(|name| !TYPES.contains(&name.as_str())) {
            return Err(bad(&format!("types: '{unknown}' is no type of an event")));
        }
        let time = |name: &str| query.time(&format!("created_at[{name}]"));
        let from = time("gte")?
            .into_iter()
            .chain(time("gt")?.map(|at| at.saturating_add(1)))
            .max()
            .unwrap_or(i64::MIN);
        let to = time("lte")?
            .into_iter()
            .chain(time("lt")?.map(|at| at.saturating_sub(1)))
            .min()
            .unwrap_or(i64::MAX);
        Ok(Self { types, times: from..=to })
    }

    fn takes(&self, event: &Shown) -> bool {
        self.takes_type(event.kind)
            && self.times.contains(&event.at_us)
            && event.kind != "session.deleted"
    }

    fn takes_type(&self, kind: &str) -> bool {
        self.types.is_empty() || self.types.contains(kind)
    }

    /// An event that is not processed has no time to compare.
    fn queued(&self, input: &Input) -> Option<Value> {
        let event = send::queued(input)?;
        let is_wanted = self.takes_type(event["type"].as_str().unwrap_or_default())
            && self.times == (i64::MIN..=i64::MAX);
        is_wanted.then_some(event)
    }
}

/// A place in the queue.
type QueueKey = (i64, String);

fn queue_key(input: &Input) -> QueueKey {
    (input.created_at_us, input.input_id.clone())
}

/// Where a page of ascending order begins.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Forward {
    /// The log is read after this entry, in this state.
    entry: u64,
    state: State,
    /// Events up to this place are shown.
    after: Place,
    /// So is what the queue had up to here.
    queued: Option<QueueKey>,
}

/// Where a page of descending order begins.
#[derive(Serialize, Deserialize)]
struct Backward {
    /// Exclusive.
    end: Place,
    /// The page begins in the queue, before this.
    queued: Option<QueueKey>,
}

fn unknown_cursor() -> ApiError {
    bad("page: unknown cursor")
}

fn cursor(start: &impl Serialize) -> Result<Option<Cursor>, ApiError> {
    let id = serde_json::to_string(start).map_err(|_| unknown_cursor())?;
    Ok(Some(Cursor { position: 0, id }))
}

fn start<T: DeserializeOwned>(cursor: &Cursor) -> Result<T, ApiError> {
    serde_json::from_str(&cursor.id).map_err(|_| unknown_cursor())
}

/// The last events before a place, as many as the page still takes.
#[derive(Default)]
struct Window {
    events: VecDeque<(Shown, usize)>,
    /// There are earlier ones that are wanted.
    has_more: bool,
    /// Everything earlier is too old for the filter.
    is_too_old: bool,
    /// Where it begins: what is earlier was not looked at. `None`: at the begin of the log.
    begin: Option<Place>,
}

/// Whether a thread is known at an entry of a turn that an agent's CLI reported: its checkpoint is
/// of exactly this place, and nothing is asked.
fn place_of(entry: &SessionEvent, turn: u32) -> Option<&Checkpoint> {
    let checkpoint =
        entry.checkpoint.as_ref().filter(|checkpoint| entry.turn == turn && checkpoint.started)?;
    let Some(Kind::Agent(agent)) = &entry.kind else { return None };
    // The checkpoint of a tool use does not know its own id.
    let is_use = matches!(agent.event.as_ref()?.kind, Some(event::Kind::ToolUse(_)));
    let is_open = !checkpoint.open_requests.is_empty() || checkpoint.open_tools.len() > OPEN_TOOLS;
    (!is_use && !is_open).then_some(checkpoint)
}

fn is_report(entry: &SessionEvent) -> bool {
    let Some(Kind::Agent(agent)) = &entry.kind else { return false };
    matches!(agent.event, Some(host::Event { kind: Some(event::Kind::ModelRequestEnded(_)), .. }))
}

/// Whether a CLI may report what each model request used. Where nothing is known of it, it may.
fn reports_requests(runtime: &str) -> bool {
    !matches!(runtime.parse(), Ok(Runtime::Claude | Runtime::Gemini | Runtime::Shell))
}

/// The tool use that an entry shows, if it does, and whether it is open until its result: a custom
/// tool is not.
fn is_tool_use(entry: &SessionEvent) -> Option<bool> {
    match &entry.kind {
        Some(Kind::Agent(agent)) => {
            matches!(agent.event.as_ref()?.kind, Some(event::Kind::ToolUse(_))).then_some(true)
        }
        Some(Kind::DecisionRequested(asked)) => Some(!asked.request.as_ref()?.is_custom_tool),
        _ => None,
    }
}

/// One page while it is made.
pub struct Listing<L> {
    log: L,
    session: SessionId,
    filter: Filter,
    limit: usize,
    /// JSON.
    data: Vec<String>,
    bytes: usize,
    until: Instant,
}

impl<L: Log> Listing<L> {
    pub fn new(log: L, session: SessionId, filter: Filter, limit: usize) -> Self {
        Self {
            log,
            session,
            filter,
            limit,
            data: Vec::new(),
            bytes: 0,
            until: Instant::now() + SEARCH_TIME,
        }
    }

    pub fn into_data(self) -> Vec<String> {
        self.data
    }

    fn is_full(&self) -> bool {
        self.data.len() == self.limit
    }

    /// How many entries of the log are read at a time. Most show as one event; one more than a page
    /// shows that there is another page.
    fn entries_wanted(&self) -> usize {
        let all = self.filter.types.is_empty() && *self.filter.times.start() == i64::MIN;
        if all { (self.limit - self.data.len() + 1).min(ENTRIES_MAX) } else { ENTRIES_MAX }
    }

    fn check_time(&self) -> Result<(), ApiError> {
        if self.data.is_empty() && Instant::now() > self.until {
            return Err(bad(
                "the log is too long to search for these events: narrow created_at, or leave out types",
            ));
        }
        Ok(())
    }

    /// Fills the page. Returns where the next one begins.
    pub async fn ascending(&mut self, from: Option<&Cursor>) -> Result<Option<Cursor>, ApiError> {
        let resumed: Option<Forward> = from.map(start).transpose()?;
        let begin = resumed.as_ref().map_or(0, |at| at.entry);
        // Neither needs the other.
        let (found, first) =
            futures::try_join!(self.log.find(1), self.log.read(begin, self.entries_wanted()))?;
        let mut thread = Thread::at(self.session, &found);
        let mut at = resumed
            .unwrap_or_else(|| Forward { state: thread.state.clone(), ..Forward::default() });
        thread.state = at.state.clone();
        let (mut processed, mut queue, mut pages, mut first) =
            (HashSet::new(), None, 0, Some(first));
        loop {
            let read = match first.take() {
                Some(first) => first,
                None => self.log.read(at.entry, self.entries_wanted()).await?,
            };
            match (read, queue.take()) {
                // Then the log is read on: what left the queue before has an entry.
                (Read::End, None) => queue = Some(self.log.queue().await?),
                (Read::End, Some(queue)) => {
                    at.state = thread.state;
                    return self.queued_last(&queue, &processed, at);
                }
                (Read::Output { through }, open) => (at.entry, queue) = (through, open),
                (Read::Entries(entries), open) => {
                    queue = open;
                    for (id, entry, _) in entries {
                        // Without what one entry may show as, the page may end within it.
                        let before = (self.data.len() + usize::from(u8::MAX) > self.limit)
                            .then(|| thread.state.clone());
                        let mut shown = Vec::new();
                        thread.apply(id, &entry, &mut shown);
                        for event in shown {
                            if event.at_us > *self.filter.times.end() {
                                return Ok(None);
                            }
                            if event.place <= at.after {
                                continue;
                            }
                            if event.kind.starts_with("user.") {
                                processed.insert(event.id.clone());
                            }
                            if !self.filter.takes(&event) {
                                continue;
                            }
                            if self.is_full() {
                                return cursor(&Forward {
                                    state: before.unwrap_or_default(),
                                    ..at
                                });
                            }
                            at.after = event.place;
                            self.data.push(event.body);
                        }
                        at.entry = id;
                    }
                }
            }
            pages += 1;
            if pages >= LOG_PAGES && !self.data.is_empty() {
                return cursor(&Forward { state: thread.state, ..at });
            }
            self.check_time()?;
        }
    }

    fn queued_last(
        &mut self,
        queue: &[Input],
        processed: &HashSet<String>,
        mut at: Forward,
    ) -> Result<Option<Cursor>, ApiError> {
        for input in queue {
            let key = queue_key(input);
            if at.queued.as_ref().is_some_and(|shown| key <= *shown) {
                continue;
            }
            let Some(event) = self.filter.queued(input) else { continue };
            if event["id"].as_str().is_some_and(|id| processed.contains(id)) {
                continue;
            }
            if self.is_full() {
                return cursor(&at);
            }
            self.data.push(event.to_string());
            at.queued = Some(key);
        }
        Ok(None)
    }

    /// As [`Self::ascending`], newest first.
    pub async fn descending(&mut self, from: Option<&Cursor>) -> Result<Option<Cursor>, ApiError> {
        let from: Option<Backward> = from.map(start).transpose()?;
        let mut end = from.as_ref().map_or(LOG_END, |from| from.end);
        if from.as_ref().is_none_or(|from| from.queued.is_some()) {
            let mut before = from.and_then(|from| from.queued);
            // What leaves the queue from here on is shown twice rather than not at all.
            for input in self.log.queue().await?.iter().rev() {
                let key = queue_key(input);
                if before.as_ref().is_some_and(|before| key >= *before) {
                    continue;
                }
                let Some(event) = self.filter.queued(input) else { continue };
                if self.is_full() {
                    return cursor(&Backward { end, queued: before });
                }
                self.data.push(event.to_string());
                before = Some(key);
            }
        }
        for windows in 1.. {
            let window = self.window(end).await?;
            for (event, bytes) in window.events.into_iter().rev() {
                end = event.place;
                self.bytes += bytes;
                self.data.push(event.body);
            }
            if window.has_more {
                return cursor(&Backward { end, queued: None });
            }
            end = match window.begin {
                Some(begin) if !window.is_too_old => begin,
                _ => break,
            };
            if windows >= LOG_PAGES && !self.data.is_empty() {
                return cursor(&Backward { end, queued: None });
            }
            self.check_time()?;
        }
        Ok(None)
    }

    /// The events before a place that the page still takes, or some of them. It costs what it
    /// shows: a thread is known at many places within a turn. Where it is not, the turn is read
    /// from its begin.
    async fn window(&self, end: Place) -> Result<Window, ApiError> {
        let (mut entries, mut bytes): (Vec<Entry>, usize) = (Vec::new(), 0);
        let mut before = if end.part == 0 { end.entry } else { end.entry.saturating_add(1) };
        let is_start = loop {
            match self.log.read_before(before, self.entries_wanted() + MARGIN).await? {
                Read::End => break true,
                Read::Output { through } => before = through,
                Read::Entries(mut earlier) => {
                    before = earlier.first().map_or(0, |(id, ..)| *id);
                    bytes += earlier.iter().map(|(.., size)| size).sum::<usize>();
                    earlier.append(&mut entries);
                    entries = earlier;
                    if entries.len() > MARGIN || bytes > ANSWER_BYTES {
                        break false;
                    }
                }
            }
            self.check_time()?;
        };
        let Some((oldest, ..)) = entries.first() else { return Ok(Window::default()) };
        let found = self.log.find(*oldest).await?;
        let known = match is_start {
            true => Some((Thread::at(self.session, &found), 0)),
            false => self.known_within(&found, &entries).await?,
        };
        let Some((mut thread, first)) = known else { return self.turn_before(&found, end).await };
        let begin =
            entries.get(first).filter(|_| !is_start).map(|(id, ..)| Place { entry: *id, part: 0 });
        let (mut window, mut bytes) = (Window { begin, ..Window::default() }, self.bytes);
        for (id, entry, size) in entries.drain(first..) {
            self.apply((id, &entry, size), end, &mut thread, &mut window, &mut bytes);
        }
        Ok(window)
    }

    /// How the thread is before some entry of a window, and which entry that is: as early as it is
    /// known.
    async fn known_within(
        &self,
        found: &FindTurnReply,
        entries: &[Entry],
    ) -> Result<Option<(Thread, usize)>, ApiError> {
        let begin = entries
            .iter()
            .position(|(_, entry, _)| matches!(entry.kind, Some(Kind::TurnStarted(_))));
        let mut head = None;
        for (index, (_, entry, _)) in
            entries.iter().enumerate().take(begin.unwrap_or(entries.len() - 1))
        {
            let Some(checkpoint) = place_of(entry, found.turn) else { continue };
            let (started, is_metered) = match head {
                Some(head) => head,
                None => match self.head(found).await? {
                    Some(read) => *head.insert(read),
                    None => break,
                },
            };
            let reports_requests = !is_metered && reports_requests(&found.runtime);
            if reports_requests && !is_report(entry) {
                continue;
            }
            let Some(tools) = self.open_tools(checkpoint, started, entries).await? else {
                continue;
            };
            let thread = Thread::within(
                self.session,
                found,
                Within { started, is_metered, reports_requests, tools },
            );
            let rest = entries.get(index + 1..).unwrap_or_default();
            if !ends_as_known(&thread, rest, found.turn, reports_requests) {
                break;
            }
            return Ok(Some((thread, index + 1)));
        }
        let Some((begin, (id, entry, _))) =
            begin.and_then(|begin| Some((begin, entries.get(begin)?)))
        else {
            return Ok(None);
        };
        let found =
            if entry.turn == found.turn { found.clone() } else { self.log.find(*id).await? };
        // Of a turn of an earlier release it is not known what was used before it.
        Ok((found.turn == entry.turn).then(|| (Thread::at(self.session, &found), begin)))
    }

    /// The entry that a turn begins with, and whether the model gateway meters it.
    async fn head(&self, found: &FindTurnReply) -> Result<Option<(u64, bool)>, ApiError> {
        // What set-up steps printed may stand before it.
        for limit in [HEAD, ENTRIES_MAX] {
            let Read::Entries(entries) = self.log.read(found.begun_after, limit).await? else {
                return Ok(None);
            };
            let head = entries.iter().find_map(|(id, entry, _)| match &entry.kind {
                Some(Kind::TurnStarted(started)) if entry.turn == found.turn => {
                    Some((*id, started.is_metered))
                }
                _ => None,
            });
            if head.is_some() {
                return Ok(head);
            }
        }
        Ok(None)
    }

    /// The tool uses that wait for their results where a checkpoint was taken. `None`: it does not
    /// say.
    async fn open_tools(
        &self,
        checkpoint: &Checkpoint,
        started: u64,
        entries: &[Entry],
    ) -> Result<Option<BTreeMap<u64, bool>>, ApiError> {
        let mut tools = BTreeMap::new();
        for tool in checkpoint.open_tools.iter().filter(|tool| tool.event_id > started) {
            let is_open = match entries.binary_search_by_key(&tool.event_id, |(id, ..)| *id) {
                Ok(at) => entries.get(at).and_then(|(_, entry, _)| is_tool_use(entry)),
                Err(_) => match self.log.read(tool.event_id.saturating_sub(1), 1).await? {
                    Read::Entries(read) => read
                        .first()
                        .filter(|(id, ..)| *id == tool.event_id)
                        .and_then(|(_, entry, _)| is_tool_use(entry)),
                    _ => None,
                },
            };
            match is_open {
                Some(true) => _ = tools.insert(tool.event_id, tool.is_mcp),
                Some(false) => {}
                None => return Ok(None),
            }
        }
        Ok(Some(tools))
    }

    /// The last events of a turn before a place, read from the turn's begin.
    async fn turn_before(&self, found: &FindTurnReply, end: Place) -> Result<Window, ApiError> {
        let begin = (found.begun_after > 0)
            .then(|| Place { entry: found.begun_after.saturating_add(1), part: 0 });
        let mut window = Window { begin, ..Window::default() };
        let (mut thread, mut after, mut bytes) =
            (Thread::at(self.session, found), found.begun_after, self.bytes);
        loop {
            match self.log.read(after, ENTRIES_MAX).await? {
                Read::End => return Ok(window),
                Read::Output { through } => after = through,
                Read::Entries(entries) => {
                    for (id, entry, size) in entries {
                        if id > end.entry {
                            return Ok(window);
                        }
                        self.apply((id, &entry, size), end, &mut thread, &mut window, &mut bytes);
                        after = id;
                    }
                }
            }
            if window.events.is_empty() {
                self.check_time()?;
            }
        }
    }

    /// Adds what an entry shows as to a window, and takes from its begin what the page has no room
    /// for.
    fn apply(
        &self,
        (id, entry, size): (u64, &SessionEvent, usize),
        end: Place,
        thread: &mut Thread,
        window: &mut Window,
        bytes: &mut usize,
    ) {
        let mut shown = Vec::new();
        thread.apply(id, entry, &mut shown);
        for event in shown.into_iter().filter(|event| event.place < end) {
            window.is_too_old |= event.at_us < *self.filter.times.start();
            if self.filter.takes(&event) {
                *bytes += size;
                window.events.push_back((event, size));
            }
        }
        while self.data.len() + window.events.len() > self.limit
            || (*bytes > ANSWER_BYTES && self.data.len() + window.events.len() > 1)
        {
            let Some((_, size)) = window.events.pop_front() else { break };
            *bytes -= size;
            window.has_more = true;
        }
    }
}

/// Whether the end of the turn, if it is among these entries, shows as it should though the thread
/// was built within the turn.
fn ends_as_known(thread: &Thread, entries: &[Entry], turn: u32, reports_requests: bool) -> bool {
    let end = entries.iter().position(|(_, entry, _)| {
        entry.turn == turn && matches!(entry.kind, Some(Kind::TurnEnded(_)))
    });
    let Some((before, (_, entry, _))) =
        end.and_then(|end| Some((entries.get(..end)?, entries.get(end)?)))
    else {
        return true;
    };
    let Some(Kind::TurnEnded(ended)) = &entry.kind else { return true };
    let (mut thread, mut shown) = (thread.clone(), Vec::new());
    for (id, entry, _) in before {
        thread.apply(*id, entry, &mut shown);
    }
    thread.knows_end(ended, reports_requests)
}
