//! The newest part of one session's event log, kept without a gap. Pure: [`super::hub`] does what
//! it asks for.
//!
//! Entries come from a live subscription, which may lose some. [`Tail::offer`] compares what each
//! entry says of the one before it; what is missing is read from Postgres ([`Tail::need`],
//! [`Tail::add_persisted`]), and what arrives meanwhile is held. So the events from `floor` to
//! `end` are complete and in order, whatever was lost.

use std::{collections::VecDeque, sync::Arc};

use bus::live::Entry;
use contract::session::SessionEvent;
use prost::Message as _;

use crate::stream::event::{Event, Visible};

const EVENTS_MAX: usize = 4096;
const BYTES_MAX: usize = 4 * 1024 * 1024;
/// Entries that are held while what came before them is read; beyond this they are read as well.
const HELD_BYTES_MAX: usize = 1024 * 1024;

#[derive(Debug)]
pub struct Tail {
    /// Every event after `floor`, up to `end`, is in `events`.
    floor: u64,
    end: u64,
    events: VecDeque<Arc<Event>>,
    bytes: usize,
    source: Source,
    deleted: bool,
}

/// Where the events after `end` come from.
#[derive(Debug)]
enum Source {
    /// Where the log ends is not known yet.
    Unknown,
    /// The subscription: nothing was missed.
    Live,
    /// Postgres, since the connection was interrupted; whether anything was missed is not known.
    Interrupted,
    /// Postgres, until everything up to `through` is persisted. `held` follows after that, without
    /// a gap.
    Gap { through: u64, held: VecDeque<Entry>, held_bytes: usize },
}

/// What keeps the tail from being complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    Nothing,
    /// The stream's last entry of the session, see [`Tail::join`].
    Last,
    /// Events after this one from Postgres, see [`Tail::add_persisted`].
    Persisted {
        after: u64,
    },
}

/// What a reader at some position gets.
#[derive(Debug)]
pub enum Read {
    Events(Vec<Arc<Event>>),
    /// Nothing yet: more will come.
    Wait,
    /// The tail begins later: read the event log in Postgres, until everything up to `floor` is
    /// persisted.
    Behind {
        floor: u64,
    },
    /// Where the log ends is not known yet: read the event log in Postgres.
    Unknown,
    /// The session was deleted: nothing will come.
    Deleted,
}

impl Tail {
    pub fn new() -> Self {
        Self {
            floor: 0,
            end: 0,
            events: VecDeque::new(),
            bytes: 0,
            source: Source::Unknown,
            deleted: false,
        }
    }

    pub fn need(&self) -> Need {
        match self.source {
            Source::Live => Need::Nothing,
            Source::Unknown | Source::Interrupted => Need::Last,
            Source::Gap { .. } => Need::Persisted { after: self.end },
        }
    }

    pub fn is_unknown(&self) -> bool {
        matches!(self.source, Source::Unknown)
    }

    /// The id of the newest event.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Entries may have been lost from here on.
    pub fn interrupt(&mut self) {
        if !matches!(self.source, Source::Unknown) {
            self.source = Source::Interrupted;
        }
    }

    /// Takes an entry of the subscription. Returns whether it shows that others were missed.
    pub fn offer(&mut self, entry: Entry) -> bool {
        if matches!(self.source, Source::Unknown) {
            // All before it is in Postgres, or will be.
            (self.floor, self.end) = (before(&entry, 0), before(&entry, 0));
            self.source = Source::Live;
            self.push(entry);
            return false;
        }
        if entry.sequence <= self.end {
            return false;
        }
        match &mut self.source {
            Source::Live if entry.previous == self.end && (self.end > 0 || is_first(&entry)) => {
                self.push(entry)
            }
            Source::Interrupted if entry.previous == self.end && self.end > 0 => {
                self.source = Source::Live;
                self.push(entry);
            }
            Source::Gap { held, held_bytes, .. }
                if held.back().is_some_and(|last| last.sequence == entry.previous) =>
            {
                *held_bytes += entry.payload.len();
                held.push_back(entry);
                self.limit_held();
            }
            Source::Gap { held, .. }
                if held.back().is_some_and(|last| last.sequence >= entry.sequence) => {}
            _ => {
                let through = before(&entry, self.end);
                self.source = Source::Gap {
                    through,
                    held_bytes: entry.payload.len(),
                    held: VecDeque::from([entry]),
                };
                self.limit_held();
                return true;
            }
        }
        false
    }

    fn limit_held(&mut self) {
        if let Source::Gap { through, held, held_bytes } = &mut self.source
            && *held_bytes > HELD_BYTES_MAX
            && let Some(last) = held.back()
        {
            *through = last.sequence;
            (*held, *held_bytes) = (VecDeque::new(), 0);
        }
    }

    /// Takes the stream's last entry of the session, asked for after the subscription was there:
    /// what follows it arrives. `None` where the stream holds none: everything is persisted.
    /// `newest` is the newest persisted event, needed where the end is unknown.
    pub fn join(&mut self, last: Option<Last>, newest: Option<u64>) {
        match (&self.source, last, newest) {
            (Source::Unknown, Some(Last { entry, follows }), _) => {
                (self.floor, self.end) = match follows {
                    Some(follows) => (follows, follows),
                    None => (entry.sequence, entry.sequence),
                };
                self.source = Source::Live;
                if follows.is_some() {
                    self.push(entry);
                }
            }
            (Source::Unknown, None, Some(newest)) => {
                (self.floor, self.end) = (newest, newest);
                self.source = Source::Live;
            }
            (Source::Interrupted, Some(Last { entry, .. }), _) if entry.sequence <= self.end => {
                self.source = Source::Live
            }
            (Source::Interrupted, Some(Last { entry, follows }), _)
                if follows == Some(self.end) && self.end > 0 =>
            {
                self.source = Source::Live;
                self.push(entry);
            }
            (Source::Interrupted, last, _) => {
                let through = last.map_or(0, |last| last.entry.sequence);
                self.source = Source::Gap { through, held: VecDeque::new(), held_bytes: 0 };
            }
            // An entry came first, and said more.
            _ => {}
        }
    }

    /// Starts after the newest persisted event while the stream does not answer.
    pub fn start_without_stream(&mut self, newest: u64) {
        if matches!(self.source, Source::Unknown) {
            (self.floor, self.end) = (newest, newest);
            self.source = Source::Interrupted;
        }
    }

    /// Takes the persisted events after some event up to `end`. An empty page is complete up to
    /// `projected`.
    pub fn add_persisted(&mut self, events: impl Iterator<Item = Event>, projected: u64) {
        let mut is_empty = true;
        if matches!(self.source, Source::Unknown) {
            return;
        }
        for event in events {
            is_empty = false;
            if event.id > self.end {
                self.add(event);
            }
        }
        let Source::Gap { through, held, .. } = &mut self.source else { return };
        let joins = held
            .front()
            .is_some_and(|first| first.previous == self.end || first.sequence <= self.end);
        if joins || is_empty && projected >= *through {
            let held = std::mem::take(held);
            self.source = Source::Live;
            for entry in held {
                self.push(entry);
            }
        }
    }

    /// The session is gone: what is held is all there is.
    pub fn delete(&mut self) {
        if let Source::Gap { held, .. } = &mut self.source {
            for entry in std::mem::take(held) {
                self.push(entry);
            }
        }
        self.deleted = true;
    }

    fn push(&mut self, entry: Entry) {
        if entry.sequence > self.end {
            self.add(Event::decode(entry.sequence, entry.payload));
        }
    }

    fn add(&mut self, event: Event) {
        self.end = event.id;
        self.bytes += event.size();
        self.events.push_back(Arc::new(event));
        while self.events.len() > EVENTS_MAX || self.bytes > BYTES_MAX {
            let Some(oldest) = self.events.pop_front() else { break };
            self.bytes -= oldest.size();
            self.floor = oldest.id;
        }
    }

    /// The event after `cursor` that may end the session's stream.
    pub fn end_after(&self, cursor: u64) -> Option<Arc<Event>> {
        let ends = |event: &&Arc<Event>| {
            event.id > cursor && matches!(event.kind, Visible::TurnEnd(_) | Visible::Terminated(_))
        };
        self.events.iter().rev().find(ends).cloned()
    }

    /// Events after `cursor`, at most `limit`.
    pub fn read(&self, cursor: u64, limit: usize) -> Read {
        if matches!(self.source, Source::Unknown) && !self.deleted {
            return Read::Unknown;
        }
        if cursor < self.floor && !self.deleted {
            return Read::Behind { floor: self.floor };
        }
        let from = self.events.partition_point(|event| event.id <= cursor);
        let events: Vec<_> = self.events.iter().skip(from).take(limit).cloned().collect();
        match (events.is_empty(), self.deleted) {
            (false, _) => Read::Events(events),
            (true, true) => Read::Deleted,
            (true, false) => Read::Wait,
        }
    }
}

/// The last entry of a session's log that the stream holds.
#[derive(Clone, Debug)]
pub struct Last {
    pub entry: Entry,
    /// The event that its writer continued, where it said so.
    pub follows: Option<u64>,
}

/// The newest event that may be missing before an entry, when everything up to `end` is known. A
/// stream that does not hold the entry before it any more, or holds an older one than is known,
/// says nothing.
fn before(entry: &Entry, end: u64) -> u64 {
    if entry.previous > end && entry.previous < entry.sequence {
        entry.previous
    } else {
        entry.sequence.saturating_sub(1)
    }
}

/// Whether an entry begins its session's log: that the stream holds none before it may also mean
/// that it was trimmed.
fn is_first(entry: &Entry) -> bool {
    SessionEvent::decode(entry.payload.clone()).is_ok_and(|event| event.follows.unwrap_or(0) == 0)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn entry(sequence: u64, previous: u64) -> Entry {
        Entry { sequence, previous, payload: Bytes::new() }
    }

    fn entry_of(sequence: u64, previous: u64, follows: u64) -> Entry {
        let event = SessionEvent { follows: Some(follows), ..SessionEvent::default() };
        Entry { sequence, previous, payload: event.encode_to_vec().into() }
    }

    fn last(sequence: u64, follows: Option<u64>) -> Option<Last> {
        Some(Last { entry: entry(sequence, 0), follows })
    }

    fn events(ids: &[u64]) -> impl Iterator<Item = Event> {
        ids.iter().map(|id| Event::decode(*id, Bytes::new()))
    }

    fn ids(tail: &Tail, cursor: u64) -> Vec<u64> {
        match tail.read(cursor, usize::MAX) {
            Read::Events(events) => events.iter().map(|event| event.id).collect(),
            _ => Vec::new(),
        }
    }

    #[test]
    fn entries_that_follow_each_other_need_no_postgres() {
        let mut tail = Tail::new();
        assert!(matches!(tail.read(0, 9), Read::Unknown));
        tail.join(last(10, Some(7)), None);
        assert_eq!((tail.need(), ids(&tail, 7)), (Need::Nothing, vec![10]));
        assert!(
            !tail.offer(entry(12, 10)) && !tail.offer(entry(12, 10)) && !tail.offer(entry(11, 10))
        );
        assert_eq!(ids(&tail, 7), [10, 12]);
        assert!(matches!(tail.read(3, 9), Read::Behind { floor: 7 }));
        assert!(matches!(tail.read(u64::MAX, 9), Read::Wait));
    }

    #[test]
    fn a_gap_is_filled_from_postgres_before_later_events() {
        let mut tail = Tail::new();
        tail.join(None, Some(5));
        assert!(tail.offer(entry(9, 8)));
        assert!(!tail.offer(entry(10, 9)));
        assert_eq!((tail.need(), ids(&tail, 5)), (Need::Persisted { after: 5 }, vec![]));
        // Not all of it is persisted yet.
        tail.add_persisted(events(&[7]), 0);
        tail.add_persisted(events(&[]), 7);
        assert_eq!(tail.need(), Need::Persisted { after: 7 });
        tail.add_persisted(events(&[8]), 0);
        assert_eq!((tail.need(), ids(&tail, 5)), (Need::Nothing, vec![7, 8, 9, 10]));
    }

    #[test]
    fn an_entry_whose_predecessor_was_trimmed_waits_until_all_before_it_is_persisted() {
        let mut tail = Tail::new();
        tail.join(last(5, None), None);
        assert!(tail.offer(entry(20, 0)));
        tail.add_persisted(events(&[]), 18);
        assert!(ids(&tail, 5).is_empty());
        tail.add_persisted(events(&[]), 19);
        assert_eq!((tail.need(), ids(&tail, 5)), (Need::Nothing, vec![20]));
    }

    #[test]
    fn after_an_interruption_the_last_entry_shows_what_was_missed() {
        let mut tail = Tail::new();
        tail.join(last(5, None), None);
        tail.interrupt();
        assert_eq!(tail.need(), Need::Last);
        tail.join(last(5, Some(1)), None);
        assert_eq!(tail.need(), Need::Nothing);
        tail.interrupt();
        tail.join(last(9, Some(5)), None);
        assert_eq!((tail.need(), ids(&tail, 5)), (Need::Nothing, vec![9]));
        tail.interrupt();
        tail.join(None, None);
        assert_eq!(tail.need(), Need::Persisted { after: 9 });
        tail.add_persisted(events(&[11]), 0);
        tail.add_persisted(events(&[]), 11);
        assert_eq!((tail.need(), ids(&tail, 5)), (Need::Nothing, vec![9, 11]));
    }

    #[test]
    fn a_deleted_session_ends_its_stream_with_the_known_events() {
        let mut tail = Tail::new();
        tail.join(last(5, None), None);
        tail.offer(entry(9, 8));
        tail.delete();
        assert_eq!(ids(&tail, 5), [9]);
        assert!(matches!(tail.read(9, 9), Read::Deleted));
        let mut unknown = Tail::new();
        unknown.delete();
        assert!(matches!(unknown.read(0, 9), Read::Deleted));
    }

    /// What happens to a session's log and to who follows it.
    #[derive(Clone, Debug)]
    enum Happening {
        Append {
            is_lost: bool,
        },
        Project,
        /// The stream forgets what is persisted.
        Trim,
        Interrupt,
        Join,
        ReadPage,
    }

    fn happening() -> impl Strategy<Value = Happening> {
        prop_oneof![
            4 => any::<bool>().prop_map(|is_lost| Happening::Append { is_lost }),
            2 => Just(Happening::Project),
            1 => Just(Happening::Trim),
            1 => Just(Happening::Interrupt),
            2 => Just(Happening::Join),
            3 => Just(Happening::ReadPage),
        ]
    }

    #[derive(Default)]
    struct World {
        log: Vec<u64>,
        clock: u64,
        persisted: usize,
        trimmed: usize,
        projected: u64,
        is_subscribed: bool,
    }

    impl World {
        fn last_in_stream(&self) -> Option<Last> {
            let at = self.log.len().checked_sub(1).filter(|at| *at >= self.trimmed)?;
            let follows = at.checked_sub(1).map_or(0, |before| self.log[before]);
            last(self.log[at], Some(follows))
        }

        fn step(&mut self, tail: &mut Tail, happening: &Happening) {
            match happening {
                Happening::Append { is_lost } => {
                    let previous = self.last_in_stream().map_or(0, |last| last.entry.sequence);
                    let follows = self.log.last().copied().unwrap_or_default();
                    self.clock += 3;
                    self.log.push(self.clock);
                    if self.is_subscribed && !is_lost {
                        tail.offer(entry_of(self.clock, previous, follows));
                    }
                }
                Happening::Project => {
                    self.persisted = self.log.len();
                    self.projected = self.clock + 2;
                }
                Happening::Trim => self.trimmed = self.persisted,
                Happening::Interrupt => tail.interrupt(),
                Happening::Join => {
                    self.is_subscribed = true;
                    if tail.need() == Need::Last {
                        let newest = self.log[..self.persisted].last().copied().unwrap_or_default();
                        tail.join(self.last_in_stream(), Some(newest));
                    }
                }
                Happening::ReadPage => {
                    let page: Vec<u64> = self.log[..self.persisted]
                        .iter()
                        .copied()
                        .filter(|id| *id > tail.end())
                        .take(2)
                        .collect();
                    tail.add_persisted(
                        events(&page),
                        if page.is_empty() { self.projected } else { 0 },
                    );
                }
            }
        }
    }

    proptest! {
        /// A reader takes from the tail what it has, and from Postgres what it has not.
        #[test]
        fn a_reader_sees_every_event_once_whatever_is_lost(happenings in prop::collection::vec(happening(), 0..60)) {
            let (mut world, mut tail, mut seen) = (World::default(), Tail::new(), Vec::<u64>::new());
            let mut cursor = 0;
            let read = |world: &World, tail: &Tail, seen: &mut Vec<u64>, cursor: &mut u64| {
                match tail.read(*cursor, 3) {
                    Read::Events(events) => seen.extend(events.iter().map(|event| event.id)),
                    Read::Behind { floor } => {
                        let page = world.log[..world.persisted].iter().copied().filter(|id| *id > *cursor);
                        let before = seen.len();
                        seen.extend(page);
                        if seen.len() == before && world.projected >= floor {
                            *cursor = floor;
                        }
                    }
                    Read::Wait | Read::Unknown | Read::Deleted => {}
                }
                *cursor = seen.last().copied().unwrap_or_default().max(*cursor);
            };
            for happening in &happenings {
                world.step(&mut tail, happening);
                read(&world, &tail, &mut seen, &mut cursor);
                prop_assert_eq!(&seen[..], &world.log[..seen.len()]);
            }
            // Whatever happened, once it calms down nothing is missing.
            tail.interrupt();
            for _ in 0..200 {
                for happening in [Happening::Project, Happening::Join, Happening::ReadPage] {
                    world.step(&mut tail, &happening);
                }
                read(&world, &tail, &mut seen, &mut cursor);
            }
            prop_assert_eq!(tail.need(), Need::Nothing);
            prop_assert_eq!(seen, world.log);
        }
    }
}
