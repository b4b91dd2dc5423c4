//! Pages of a session's events, in either order. They are read through [`Log`], which tests implement.
//!
//! A page with a cursor is never empty: SDKs stop at the first empty page.

use std::{
    collections::{HashSet, VecDeque},
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use contract::{
    scheduler::{Cursor, FindTurnReply, Input},
    session::SessionEvent,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use types::SessionId;

use crate::{
    error::ApiError,
    v1::{
        query::{Query, bad},
        send,
        thread::{
            State, Thread,
            entry::{Place, Shown},
            names::TYPES,
        },
    },
};

/// Pages of the log, and turns, after which an answer ends that has something to show.
const LOG_PAGES: usize = 32;
const TURNS: usize = 64;
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
    /// Nothing but raw output up to this entry.
    Output {
        through: u64,
    },
    End,
}

/// A session's log and queue.
pub trait Log {
    /// The last turn that began before an entry; 0: the last turn.
    async fn find(&self, before: u64) -> Result<FindTurnReply, ApiError>;
    /// At most so many entries.
    async fn read(&self, after: u64, limit: usize) -> Result<Read, ApiError>;
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
        let from = time("gte")?.into_iter().chain(time("gt")?.map(|at| at.saturating_add(1))).max().unwrap_or(i64::MIN);
        let to = time("lte")?.into_iter().chain(time("lt")?.map(|at| at.saturating_sub(1))).min().unwrap_or(i64::MAX);
        Ok(Self { types, times: from..=to })
    }

    fn takes(&self, event: &Shown) -> bool {
        self.takes_type(event.kind) && self.times.contains(&event.at_us) && event.kind != "session.deleted"
    }

    fn takes_type(&self, kind: &str) -> bool {
        self.types.is_empty() || self.types.contains(kind)
    }

    /// An event that is not processed has no time to compare.
    fn queued(&self, input: &Input) -> Option<Value> {
        let event = send::queued(input)?;
        let is_wanted = self.takes_type(event["type"].as_str().unwrap_or_default()) && self.times == (i64::MIN..=i64::MAX);
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

/// The end of a turn, or of a part of it.
#[derive(Default)]
struct TurnEvents {
    events: VecDeque<(Shown, usize)>,
    /// There are earlier ones.
    has_more: bool,
    /// Everything earlier is too old for the filter.
    is_too_old: bool,
}

/// One page while it is made.
pub struct Listing<L> {
    log: L,
    session: SessionId,
    filter: Filter,
    limit: usize,
    data: Vec<Value>,
    bytes: usize,
    until: Instant,
}

impl<L: Log> Listing<L> {
    pub fn new(log: L, session: SessionId, filter: Filter, limit: usize) -> Self {
        Self { log, session, filter, limit, data: Vec::new(), bytes: 0, until: Instant::now() + SEARCH_TIME }
    }

    pub fn into_data(self) -> Vec<Value> {
        self.data
    }

    fn is_full(&self) -> bool {
        self.data.len() == self.limit
    }

    /// How many entries of the log are read at a time. Most show as one event; one more than a page shows that there is another page.
    fn entries_wanted(&self) -> usize {
        let all = self.filter.types.is_empty() && *self.filter.times.start() == i64::MIN;
        if all { (self.limit - self.data.len() + 1).min(ENTRIES_MAX) } else { ENTRIES_MAX }
    }

    fn check_time(&self) -> Result<(), ApiError> {
        if self.data.is_empty() && Instant::now() > self.until {
            return Err(bad("the log is too long to search for these events: narrow created_at, or leave out types"));
        }
        Ok(())
    }

    /// Fills the page. Returns where the next one begins.
    pub async fn ascending(&mut self, from: Option<&Cursor>) -> Result<Option<Cursor>, ApiError> {
        let resumed: Option<Forward> = from.map(start).transpose()?;
        let begin = resumed.as_ref().map_or(0, |at| at.entry);
        // Neither needs the other.
        let (found, first) = futures::try_join!(self.log.find(1), self.log.read(begin, self.entries_wanted()))?;
        let mut thread = Thread::at(self.session, &found);
        let mut at = resumed.unwrap_or_else(|| Forward { state: thread.state.clone(), ..Forward::default() });
        thread.state = at.state.clone();
        let (mut processed, mut queue, mut pages, mut first) = (HashSet::new(), None, 0, Some(first));
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
                        let before = (self.data.len() + usize::from(u8::MAX) > self.limit).then(|| thread.state.clone());
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
                                return cursor(&Forward { state: before.unwrap_or_default(), ..at });
                            }
                            at.after = event.place;
                            self.data.push(event.into_json());
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

    fn queued_last(&mut self, queue: &[Input], processed: &HashSet<String>, mut at: Forward) -> Result<Option<Cursor>, ApiError> {
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
            self.data.push(event);
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
                self.data.push(event);
                before = Some(key);
            }
        }
        let mut found = self.log.find(if end == LOG_END { 0 } else { end.entry }).await?;
        for turns in 1.. {
            let turn = self.turn_before(&found, end).await?;
            for (event, bytes) in turn.events.into_iter().rev() {
                end = event.place;
                self.bytes += bytes;
                self.data.push(event.into_json());
            }
            if turn.has_more {
                return cursor(&Backward { end, queued: None });
            }
            if turn.is_too_old || found.begun_after == 0 {
                break;
            }
            end = Place { entry: found.begun_after.saturating_add(1), part: 0 };
            if turns >= TURNS && !self.data.is_empty() {
                return cursor(&Backward { end, queued: None });
            }
            found = self.log.find(found.begun_after).await?;
        }
        Ok(None)
    }

    /// The last events of a turn before a place, as many as the page still takes.
    async fn turn_before(&self, found: &FindTurnReply, end: Place) -> Result<TurnEvents, ApiError> {
        let (mut thread, mut after, mut turn) = (Thread::at(self.session, found), found.begun_after, TurnEvents::default());
        let mut bytes = self.bytes;
        loop {
            match self.log.read(after, ENTRIES_MAX).await? {
                Read::End => return Ok(turn),
                Read::Output { through } => after = through,
                Read::Entries(entries) => {
                    for (id, entry, size) in entries {
                        if id > end.entry {
                            return Ok(turn);
                        }
                        let mut shown = Vec::new();
                        thread.apply(id, &entry, &mut shown);
                        for event in shown.into_iter().filter(|event| event.place < end) {
                            turn.is_too_old |= event.at_us < *self.filter.times.start();
                            if self.filter.takes(&event) {
                                bytes += size;
                                turn.events.push_back((event, size));
                            }
                        }
                        while self.data.len() + turn.events.len() > self.limit
                            || (bytes > ANSWER_BYTES && self.data.len() + turn.events.len() > 1)
                        {
                            let Some((_, size)) = turn.events.pop_front() else { break };
                            bytes -= size;
                            turn.has_more = true;
                        }
                        after = id;
                    }
                }
            }
            if turn.events.is_empty() {
                self.check_time()?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use contract::{
        host::{AgentMessage, Event, event},
        session::{AgentEvent, Output, StopReason, TurnEnded, TurnStarted, session_event::Kind},
    };
    use futures::FutureExt as _;
    use proptest::prelude::*;
    use types::InputId;

    use super::*;

    /// A session whose queue drains while it is read.
    #[derive(Default)]
    struct Session {
        log: Vec<(u64, SessionEvent)>,
        /// After which entry each turn begins.
        turns: Vec<u64>,
        queue: Vec<Input>,
        page: usize,
        /// Requests until the next message leaves the queue, again and again; 0: none does.
        drain_every: usize,
        requests: usize,
    }

    impl Session {
        fn append(&mut self, kind: Kind) {
            let (id, at_us) = self.log.last().map_or((7, 1_000_000), |(id, event)| (id + 3, event.at_us + 1000));
            let turn = self.turns.len() as u32;
            self.log.push((id, SessionEvent { turn, at_us, kind: Some(kind), ..SessionEvent::default() }));
        }

        fn turn(&mut self, input_id: String, outputs: usize, messages: usize) {
            self.turns.push(self.log.last().map_or(0, |(id, _)| *id));
            self.append(Kind::TurnStarted(TurnStarted { prompt: "hi".to_owned(), input_id, ..TurnStarted::default() }));
            for _ in 0..messages {
                (0..outputs).for_each(|_| self.append(Kind::Output(Output::default())));
                let said = event::Kind::Message(AgentMessage { text: "ok".to_owned(), ..AgentMessage::default() });
                let event = Some(Event { id: 1, parent: 0, kind: Some(said) });
                self.append(Kind::Agent(AgentEvent { event, ..AgentEvent::default() }));
            }
            (0..outputs).for_each(|_| self.append(Kind::Output(Output::default())));
            let (exit_code, stop_reason) = (Some(0), StopReason::EndTurn.into());
            self.append(Kind::TurnEnded(TurnEnded { exit_code, stop_reason, ..TurnEnded::default() }));
        }

        fn requested(&mut self) {
            self.requests += 1;
            if self.drain_every > 0 && self.requests.is_multiple_of(self.drain_every) && !self.queue.is_empty() {
                let input = self.queue.remove(0);
                self.turn(input.input_id, 1, 1);
            }
        }
    }

    impl Log for &RefCell<Session> {
        async fn find(&self, before: u64) -> Result<FindTurnReply, ApiError> {
            self.borrow_mut().requested();
            let session = self.borrow();
            let found = session.turns.iter().enumerate().rev().find(|(_, begun_after)| before == 0 || **begun_after < before);
            let (turn, begun_after) = found.map_or((0, 0), |(index, begun_after)| (index as u32 + 1, *begun_after));
            Ok(FindTurnReply { turn, begun_after, ..FindTurnReply::default() })
        }

        async fn read(&self, after: u64, limit: usize) -> Result<Read, ApiError> {
            self.borrow_mut().requested();
            let session = self.borrow();
            // Rows of an earlier release: a page may hold nothing but output.
            let limit = session.page.min(limit);
            let page: Vec<_> = session.log.iter().filter(|(id, _)| *id > after).take(limit).cloned().collect();
            let Some((through, _)) = page.last().cloned() else { return Ok(Read::End) };
            let shown = page.into_iter().filter(|(_, event)| !matches!(event.kind, Some(Kind::Output(_))));
            let entries: Vec<Entry> = shown.map(|(id, event)| (id, event, 100)).collect();
            Ok(if entries.is_empty() { Read::Output { through } } else { Read::Entries(entries) })
        }

        async fn queue(&self) -> Result<Vec<Input>, ApiError> {
            let queue = self.borrow().queue.clone();
            self.borrow_mut().requested();
            Ok(queue)
        }
    }

    fn input(created_at_us: i64) -> Input {
        Input { input_id: InputId::new().to_string(), kind: "message".to_owned(), created_at_us, ..Input::default() }
    }

    fn every(types: &[&str]) -> Filter {
        Filter { types: types.iter().map(|name| (*name).to_owned()).collect(), times: i64::MIN..=i64::MAX }
    }

    /// Follows the cursors as an SDK does: to the first page that is empty or the last.
    fn pages(session: &RefCell<Session>, limit: usize, types: &[&str], is_ascending: bool) -> Vec<Value> {
        let (mut all, mut from) = (Vec::new(), None);
        for _ in 0..10_000 {
            let mut listing = Listing::new(session, SessionId::from_uuid(uuid::Uuid::nil()), every(types), limit);
            let next = match is_ascending {
                true => listing.ascending(from.as_ref()).now_or_never(),
                false => listing.descending(from.as_ref()).now_or_never(),
            };
            let next = next.unwrap().ok().unwrap();
            let data = listing.into_data();
            assert!(data.len() <= limit && (next.is_none() || !data.is_empty()), "an empty page with a cursor");
            all.extend(data);
            from = next;
            if from.is_none() {
                return all;
            }
        }
        panic!("the pages do not end");
    }

    fn ids(events: &[Value]) -> Vec<String> {
        events.iter().map(|event| event["id"].as_str().unwrap().to_owned()).collect()
    }

    proptest! {
        /// Whatever the size of pages, and however much output lies between events: all pages together are one long page, in both orders.
        #[test]
        fn pages_together_hold_every_event_once(
            turns in proptest::collection::vec((0_usize..12, 0_usize..3), 0..4),
            (queued, limit, page) in (0_i64..4, 1_usize..12, 1_usize..6),
        ) {
            let session = RefCell::new(Session { page, queue: (0..queued).map(input).collect(), ..Session::default() });
            for (outputs, messages) in turns {
                session.borrow_mut().turn(String::new(), outputs, messages);
            }
            for types in [&[][..], &["session.status_idle"], &["user.message", "session.error"]] {
                let whole = pages(&session, 100_000, types, true);
                prop_assert_eq!(&pages(&session, limit, types, true), &whole);
                let mut backwards = pages(&session, limit, types, false);
                backwards.reverse();
                prop_assert_eq!(&backwards, &whole);
            }
        }

        /// Messages leave the queue between pages, and while a page is made: each event is in some page.
        #[test]
        fn what_leaves_the_queue_is_in_some_page(
            (turns, queued, limit, page, drain_every) in (0_usize..3, 1_i64..6, 1_usize..8, 1_usize..8, 1_usize..9),
            is_ascending: bool,
        ) {
            let session = RefCell::new(Session { page, queue: (0..queued).map(input).collect(), ..Session::default() });
            for _ in 0..turns {
                session.borrow_mut().turn(String::new(), 2, 1);
            }
            let before = ids(&pages(&session, 100_000, &[], true));
            session.borrow_mut().drain_every = drain_every;
            let seen: HashSet<_> = ids(&pages(&session, limit, &[], is_ascending)).into_iter().collect();
            prop_assert!(before.iter().all(|id| seen.contains(id)));
            if is_ascending {
                // What is queued last needs no second look; everything that was processed before it was read does.
                session.borrow_mut().drain_every = 0;
                let left: HashSet<_> = session.borrow().queue.iter().map(|input| send::queued(input).unwrap()["id"].to_string()).collect();
                let missing = pages(&session, 100_000, &["user.message"], true).into_iter();
                prop_assert!(missing.filter(|event| !left.contains(&event["id"].to_string())).all(|event| seen.contains(event["id"].as_str().unwrap())));
            }
        }
    }
}
