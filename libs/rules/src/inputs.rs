//! What becomes of inputs and permission requests. The rows are read and written by the scheduler's
//! `inputs`.
//!
//! An input travels to the agent host at least once and is applied there once; the event log says
//! what became of it. A message that waits for the turn's end never leaves the scheduler: the
//! transaction that settles the turn begins the next one from it.

use contract::{
    host::{decision_settled::How, input_settled::Outcome},
    session::{StopReason, TurnEnded},
};
use types::{InputKind, InputStatus, RequestStatus, SessionStatus};

/// The reason for refusing an input that arrived too late for its turn.
pub const TURN_ENDED: &str = "the turn had ended";
/// The reason for refusing a message whose turn failed before its agent began.
pub const NOT_BEGUN: &str = "its turn ended before it began";
/// The reason for refusing a decision whose request is no longer open.
pub const NOT_OPEN: &str = "the agent does not ask any more";

/// An input, as it is persisted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Input {
    pub kind: InputKind,
    /// A message that is to join the running turn.
    pub steers: bool,
    /// The turn that it belongs to: one that it was sent to, or that it began.
    pub turn: Option<u32>,
    pub status: InputStatus,
}

/// What an event changes about an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Keep,
    Applied,
    /// With the reason; `None`: the agent host's own.
    Refused(Option<&'static str>),
    /// A message did not join its turn: it waits for the turn's end instead.
    Queued,
}

impl Input {
    fn is_open_in(self, turn: u32) -> bool {
        self.status.is_open() && self.turn == Some(turn)
    }

    /// Whether the runner of a turn is to send it to the agent host.
    #[must_use]
    pub fn is_for(self, turn: u32) -> bool {
        self.is_open_in(turn) && (self.kind != InputKind::Message || self.steers)
    }

    /// Whether it waits for the end of whichever turn runs.
    #[must_use]
    pub fn is_queued(self) -> bool {
        self.kind == InputKind::Message && self.status == InputStatus::Queued && self.turn.is_none()
    }
}

/// The agent host said what became of an input.
#[must_use]
pub fn settled(input: Input, turn: u32, outcome: Outcome) -> Change {
    // A message that began a turn settles with it.
    if !input.is_for(turn) {
        return Change::Keep;
    }
    match (outcome, input.kind) {
        (Outcome::Applied, _) => Change::Applied,
        (Outcome::Unspecified, _) => Change::Keep,
        (Outcome::Refused | Outcome::Withdrawn, InputKind::Message) => Change::Queued,
        (Outcome::Refused | Outcome::Withdrawn, _) => Change::Refused(None),
    }
}

/// A turn's agent began.
#[must_use]
pub fn turn_started(input: Input, turn: u32) -> Change {
    if input.is_open_in(turn) && input.kind == InputKind::Message && !input.steers {
        Change::Applied
    } else {
        Change::Keep
    }
}

/// A turn ended.
#[must_use]
pub fn turn_ended(input: Input, turn: u32, ended: &TurnEnded) -> Change {
    if !input.is_open_in(turn) {
        return Change::Keep;
    }
    match input.kind {
        InputKind::Message if input.steers => Change::Queued,
        InputKind::Message => Change::Refused(Some(NOT_BEGUN)),
        InputKind::Interrupt if ended.stop_reason() == StopReason::Interrupted => Change::Applied,
        InputKind::Interrupt | InputKind::Decision | InputKind::ToolResult => {
            Change::Refused(Some(TURN_ENDED))
        }
    }
}

/// A place in a session's log: after an event, or within it, after what it shows first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub event_id: u64,
    pub is_within: bool,
}

/// The position from which a reader that has seen an input continues. The event that settled it
/// shows it first, if any event shows it. What the log does not tell of yet comes after all that is
/// in it, up to `newest`.
#[must_use]
pub fn place(
    status: InputStatus,
    settled_by: Option<u64>,
    sent_after: Option<u64>,
    newest: u64,
) -> Place {
    match settled_by {
        Some(event_id) => Place { event_id, is_within: true },
        None if status.is_open() => Place { event_id: newest, is_within: false },
        None => Place { event_id: sent_after.unwrap_or(newest), is_within: false },
    }
}

/// What happens to queued messages after a turn's end, by the session's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The oldest queued message begins a turn.
    Begin,
    /// Nothing runs any more: queued messages are refused, for this reason.
    Refuse(&'static str),
    Nothing,
}

#[must_use]
pub fn next(session: SessionStatus, has_sandbox: bool) -> Next {
    match session {
        SessionStatus::Completed if has_sandbox => Next::Begin,
        SessionStatus::Completed => Next::Refuse("the session's sandbox is gone"),
        SessionStatus::Failed => Next::Refuse("the session failed"),
        SessionStatus::Terminated => Next::Refuse("the session was terminated"),
        SessionStatus::Pending | SessionStatus::Running => Next::Nothing,
    }
}

/// What the agent host says of a request.
#[must_use]
pub const fn request_settled(how: How) -> Option<RequestStatus> {
    match how {
        How::Unspecified => None,
        How::Allowed => Some(RequestStatus::Allowed),
        How::Denied => Some(RequestStatus::Denied),
        How::Withdrawn => Some(RequestStatus::Withdrawn),
        How::Void => Some(RequestStatus::Void),
    }
}

/// A turn's deadline, which stands still while a decision is awaited. In microseconds since the
/// epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    pub deadline: i64,
    pub waiting_since: Option<i64>,
}

impl Clock {
    /// A request was made at this time.
    #[must_use]
    pub fn asked(self, at: i64) -> Self {
        Self { waiting_since: self.waiting_since.or(Some(at)), ..self }
    }

    /// A request was settled at this time; so many are open still.
    #[must_use]
    pub fn answered(self, at: i64, open: usize) -> Self {
        match self.waiting_since {
            Some(since) if open == 0 => Self {
                deadline: self.deadline.saturating_add(at.saturating_sub(since).max(0)),
                waiting_since: None,
            },
            _ => self,
        }
    }

    #[must_use]
    pub fn is_overdue(self, now: i64) -> bool {
        self.waiting_since.is_none() && self.deadline < now
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_reader_continues_after_an_input_whatever_became_of_it() {
        let settled = |by, sent| place(InputStatus::Refused, by, sent, 90);
        assert_eq!(settled(Some(40), Some(7)), Place { event_id: 40, is_within: true });
        // An interrupt of an idle session, or a message that was withdrawn.
        assert_eq!(settled(None, Some(7)), Place { event_id: 7, is_within: false });
        assert_eq!(
            place(InputStatus::Queued, None, Some(7), 90),
            Place { event_id: 90, is_within: false }
        );
        assert_eq!(settled(None, None), Place { event_id: 90, is_within: false });
    }

    /// A user, the scheduler's rows, deliveries to the host, the host, and the log back: everything
    /// that may come twice, late or never does. Deliveries of a turn end with its connection.
    #[derive(Debug, Default)]
    struct World {
        rows: BTreeMap<u32, Input>,
        /// The newest turn, and whether its agent began; `None`: none runs.
        turn: u32,
        running: Option<bool>,
        /// Deliveries to the host: input, and the kind as it was sent.
        network: Vec<(u32, InputKind)>,
        accepted: BTreeSet<u32>,
        host_runs: bool,
        log: Vec<(u32, Event)>,
        /// What the agent read, by its input.
        read: Vec<u32>,
        interrupted: BTreeMap<u32, u32>,
    }

    #[derive(Clone, Debug)]
    enum Event {
        Started,
        Settled(u32, Outcome),
        Ended(Box<TurnEnded>),
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Send(InputKind, bool),
        Withdraw(usize),
        Fetch,
        Deliver(usize),
        Lose(usize),
        HostStarts,
        HostEnds,
        Project,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            2 => any::<bool>().prop_map(|steers| Step::Send(InputKind::Message, steers)),
            1 => Just(Step::Send(InputKind::Interrupt, false)),
            1 => any::<usize>().prop_map(Step::Withdraw),
            3 => Just(Step::Fetch),
            4 => any::<usize>().prop_map(Step::Deliver),
            2 => any::<usize>().prop_map(Step::Lose),
            3 => Just(Step::HostStarts),
            1 => Just(Step::HostEnds),
            4 => Just(Step::Project),
        ];
        proptest::collection::vec(step, 1..120)
    }

    impl World {
        fn change(&mut self, decide: impl Fn(u32, Input) -> Change) {
            for (id, row) in &mut self.rows {
                match decide(*id, *row) {
                    Change::Keep => {}
                    Change::Applied => row.status = InputStatus::Applied,
                    Change::Refused(_) => row.status = InputStatus::Refused,
                    Change::Queued => {
                        *row =
                            Input { steers: false, turn: None, status: InputStatus::Queued, ..*row }
                    }
                }
            }
        }

        fn begin(&mut self, message: Option<u32>) {
            self.turn += 1;
            self.running = Some(false);
            self.host_runs = false;
            self.network.clear();
            if let Some(row) = message.and_then(|id| self.rows.get_mut(&id)) {
                *row = Input { turn: Some(self.turn), status: InputStatus::Delivered, ..*row };
            }
        }

        fn host_ends(&mut self, stop_reason: StopReason) {
            self.host_runs = false;
            let ended = TurnEnded {
                exit_code: Some(0),
                stop_reason: stop_reason.into(),
                ..TurnEnded::default()
            };
            self.log.push((self.turn, Event::Ended(Box::new(ended))));
        }

        fn deliver(&mut self, id: u32, kind: InputKind) {
            if !self.accepted.insert(id) {
                return;
            }
            match kind {
                InputKind::Message if self.host_runs => {
                    self.read.push(id);
                    self.log.push((self.turn, Event::Settled(id, Outcome::Applied)));
                }
                InputKind::Message => {
                    self.log.push((self.turn, Event::Settled(id, Outcome::Refused)))
                }
                _ => {
                    self.log.push((self.turn, Event::Settled(id, Outcome::Applied)));
                    if self.host_runs {
                        self.interrupted.insert(id, self.turn);
                        self.host_ends(StopReason::Interrupted);
                    }
                }
            }
        }

        fn project(&mut self) {
            if self.log.is_empty() {
                return;
            }
            let (turn, event) = self.log.remove(0);
            match event {
                Event::Started => {
                    self.running = Some(true);
                    self.change(|_, row| turn_started(row, turn));
                }
                Event::Settled(id, outcome) => {
                    self.change(|other, row| {
                        if other == id { settled(row, turn, outcome) } else { Change::Keep }
                    });
                }
                Event::Ended(ended) => {
                    self.running = None;
                    self.change(|_, row| turn_ended(row, turn, &ended));
                    let queued =
                        self.rows.iter().find(|(_, row)| row.is_queued()).map(|(id, _)| *id);
                    if let (Next::Begin, Some(id)) = (next(SessionStatus::Completed, true), queued)
                    {
                        self.begin(Some(id));
                    }
                }
            }
        }

        fn step(&mut self, step: Step) {
            match step {
                Step::Send(kind, steers) => {
                    if self.running.is_none() {
                        if kind == InputKind::Message {
                            let id = self.rows.len() as u32;
                            self.rows.insert(
                                id,
                                Input {
                                    kind,
                                    steers: false,
                                    turn: None,
                                    status: InputStatus::Queued,
                                },
                            );
                            self.begin(Some(id));
                        }
                        return;
                    }
                    let turn = (steers || kind != InputKind::Message).then_some(self.turn);
                    self.rows.insert(
                        self.rows.len() as u32,
                        Input { kind, steers, turn, status: InputStatus::Queued },
                    );
                }
                Step::Withdraw(which) => {
                    let open: Vec<u32> = self
                        .rows
                        .iter()
                        .filter(|(_, row)| {
                            row.kind == InputKind::Message && row.status == InputStatus::Queued
                        })
                        .map(|(id, _)| *id)
                        .collect();
                    if let Some(id) = which.checked_rem(open.len()).map(|index| open[index]) {
                        self.rows.get_mut(&id).unwrap().status = InputStatus::Withdrawn;
                    }
                }
                Step::Fetch if self.running == Some(true) => {
                    let turn = self.turn;
                    for (id, row) in self.rows.iter_mut().filter(|(_, row)| row.is_for(turn)) {
                        row.status = InputStatus::Delivered;
                        self.network.push((*id, row.kind));
                    }
                }
                Step::Fetch => {}
                // Delivered, and perhaps once more later.
                Step::Deliver(which) => {
                    if let Some(index) = which.checked_rem(self.network.len()) {
                        let (id, kind) = self.network[index];
                        self.deliver(id, kind);
                    }
                }
                Step::Lose(which) => {
                    if let Some(index) = which.checked_rem(self.network.len()) {
                        self.network.remove(index);
                    }
                }
                Step::HostStarts => {
                    let begun = self.log.iter().any(|(turn, _)| *turn == self.turn);
                    if self.running == Some(false) && !self.host_runs && !begun {
                        self.host_runs = true;
                        let began = self.rows.iter().find(|(_, row)| {
                            row.turn == Some(self.turn)
                                && row.kind == InputKind::Message
                                && !row.steers
                        });
                        self.read.extend(began.map(|(id, _)| *id));
                        self.log.push((self.turn, Event::Started));
                    }
                }
                Step::HostEnds => {
                    if self.host_runs {
                        self.host_ends(StopReason::EndTurn);
                    }
                }
                Step::Project => self.project(),
            }
        }
    }

    proptest! {
        #[test]
        fn every_message_is_read_once_unless_it_was_withdrawn(steps in steps()) {
            let mut world = World::default();
            world.step(Step::Send(InputKind::Message, false));
            for step in steps {
                world.step(step);
            }
            // Without faults everything settles.
            let rest = [Step::HostStarts, Step::Project, Step::Fetch, Step::Deliver(0), Step::Lose(0), Step::HostEnds, Step::Project];
            for step in rest.into_iter().cycle().take(7 * 4 * (world.rows.len() + 4)) {
                world.step(step);
            }
            for (id, row) in &world.rows {
                prop_assert!(!row.status.is_open(), "{id}: {world:?}");
                let read = world.read.iter().filter(|read| *read == id).count();
                let expected = usize::from(row.kind == InputKind::Message && row.status != InputStatus::Withdrawn);
                prop_assert_eq!(read, expected, "{}: {:?}", id, world);
                if let (InputKind::Interrupt, Some(turn)) = (row.kind, world.interrupted.get(id)) {
                    prop_assert_eq!(row.turn, Some(*turn), "it ended another turn");
                    prop_assert_eq!(row.status, InputStatus::Applied);
                }
            }
            prop_assert_eq!(world.running, None);
        }

        /// However requests overlap, the deadline moves by the time in which at least one was open,
        /// and none passes meanwhile.
        #[test]
        fn the_timeout_of_a_turn_is_paused_while_a_request_is_open(steps in proptest::collection::vec((any::<bool>(), 0_i64..100), 0..40)) {
            let mut clock = Clock { deadline: 1000, waiting_since: None };
            let (mut now, mut open, mut waited) = (0_i64, 0_usize, 0_i64);
            for (asks, passed) in steps {
                now += passed;
                waited += if open > 0 { passed } else { 0 };
                if asks {
                    open += 1;
                    clock = clock.asked(now);
                } else if open > 0 {
                    open -= 1;
                    clock = clock.answered(now, open);
                }
                prop_assert_eq!(clock.waiting_since.is_some(), open > 0);
                prop_assert!(open == 0 || !clock.is_overdue(i64::MAX));
                if open == 0 {
                    prop_assert_eq!(clock.deadline, 1000 + waited);
                }
            }
        }
    }

    #[test]
    fn an_interrupt_that_comes_too_late_is_refused() {
        let interrupt = Input {
            kind: InputKind::Interrupt,
            steers: false,
            turn: Some(1),
            status: InputStatus::Delivered,
        };
        let ended = |stop_reason: StopReason| TurnEnded {
            stop_reason: stop_reason.into(),
            ..TurnEnded::default()
        };
        assert_eq!(turn_ended(interrupt, 1, &ended(StopReason::Interrupted)), Change::Applied);
        assert_eq!(
            turn_ended(interrupt, 1, &ended(StopReason::EndTurn)),
            Change::Refused(Some(TURN_ENDED))
        );
        assert_eq!(turn_ended(interrupt, 2, &ended(StopReason::EndTurn)), Change::Keep);
        assert_eq!(settled(interrupt, 2, Outcome::Applied), Change::Keep, "another turn's");
    }
}
