//! Whether budgets let a model request be sent, and what it counts as.
//!
//! A request reserves an estimate and is settled with what it used. It is sent while what is used
//! and reserved is below each budget. Near a budget, where only reservations are in the way, a
//! session may send one request more, and the next ones wait.

use contract::session::BudgetNotice;

/// What may be spent; absent: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Millionths of a US dollar.
    pub cost: Option<u64>,
    pub tokens: Option<u64>,
    pub requests: Option<u64>,
    pub seconds: Option<u64>,
}

impl Limits {
    #[must_use]
    pub const fn is_none(&self) -> bool {
        self.cost.is_none()
            && self.tokens.is_none()
            && self.requests.is_none()
            && self.seconds.is_none()
    }

    /// Fills missing limits with the defaults of the scope.
    #[must_use]
    pub fn or(self, defaults: Self) -> Self {
        Self {
            cost: self.cost.or(defaults.cost),
            tokens: self.tokens.or(defaults.tokens),
            requests: self.requests.or(defaults.requests),
            seconds: self.seconds.or(defaults.seconds),
        }
    }
}

/// A budget and what became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    pub limits: Limits,
    pub used_cost: u64,
    pub used_tokens: u64,
    pub used_requests: u64,
    pub used_us: u64,
    pub held_cost: u64,
    pub held_tokens: u64,
    pub has_warned: bool,
}

/// What a request may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Absent: the model has no price.
    pub cost: Option<u64>,
    pub tokens: u64,
}

/// A limit of a budget, how much is used of it, and whose it is: an index into the accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice {
    pub account: usize,
    pub limit: &'static str,
    pub used: u64,
    pub max: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// `overdraws`: only by the one request that a session may send beyond reservations.
    Admitted {
        warnings: Vec<Notice>,
        overdraws: bool,
    },
    Reached(Notice),
    /// A budget of money cannot be kept without a price.
    Unpriced,
    Waits,
}

/// Percentage of a budget at which a warning is due.
pub const WARNS_AT: u64 = 80;

impl Account {
    fn measures(&self) -> [(&'static str, Option<u64>, u64, u64); 4] {
        [
            ("cost", self.limits.cost, self.used_cost, self.held_cost),
            ("tokens", self.limits.tokens, self.used_tokens, self.held_tokens),
            ("requests", self.limits.requests, self.used_requests, 0),
            ("seconds", self.limits.seconds, self.used_us / 1_000_000, 0),
        ]
    }

    /// The first limit of which at least so many percent are used.
    #[must_use]
    pub fn used_up(&self, account: usize, percent: u64) -> Option<Notice> {
        self.measures().into_iter().find_map(|(limit, max, used, _)| {
            let max = max?;
            let is_used = u128::from(used) * 100 >= u128::from(max) * u128::from(percent);
            is_used.then_some(Notice { account, limit, used, max })
        })
    }

    fn is_reserved(&self) -> bool {
        self.measures()
            .into_iter()
            .any(|(_, max, used, held)| max.is_some_and(|max| used.saturating_add(held) >= max))
    }
}

/// `has_overdrawn`: the session has sent its one request beyond reservations.
#[must_use]
pub fn admit(accounts: &[Account], estimate: Estimate, has_overdrawn: bool) -> Verdict {
    if let Some(notice) =
        accounts.iter().enumerate().find_map(|(index, account)| account.used_up(index, 100))
    {
        return Verdict::Reached(notice);
    }
    if estimate.cost.is_none() && accounts.iter().any(|account| account.limits.cost.is_some()) {
        return Verdict::Unpriced;
    }
    let overdraws = accounts.iter().any(Account::is_reserved);
    if overdraws && has_overdrawn {
        return Verdict::Waits;
    }
    let soft = accounts.iter().enumerate().filter(|(_, account)| !account.has_warned);
    let warnings = soft.filter_map(|(index, account)| account.used_up(index, WARNS_AT)).collect();
    Verdict::Admitted { warnings, overdraws }
}

/// What a request is counted as when it is settled. One that was cut off, or of which nothing is
/// known, counts as at least its estimate: a budget holds also where a provider's count is lost.
#[must_use]
pub fn charge(held: u64, used: Option<u64>, is_whole: bool) -> u64 {
    match used {
        Some(used) if is_whole => used,
        used => held.max(used.unwrap_or_default()),
    }
}

/// The message for the agent and its user.
#[must_use]
pub fn message(notice: &BudgetNotice) -> String {
    let usd = |micros: u64| format!("{}.{:02}", micros / 1_000_000, micros % 1_000_000 / 10_000);
    let (used, max) = match notice.limit.as_str() {
        "cost" => (format!("{} US dollars", usd(notice.used)), usd(notice.max)),
        limit => (format!("{} {limit}", notice.used), notice.max.to_string()),
    };
    format!(
        "Budget reached: {used} of {max} are used (budget of the {}). Raise it to continue.",
        notice.scope
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    const SESSIONS: usize = 4;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// A request of a session that will use so much, beside an estimate that is at least as
        /// much.
        Begin(usize, u64, u64),
        /// The oldest request of a session ends; its end may be lost.
        End(usize, bool),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let begin = (0..SESSIONS, 0_u64..30, 0_u64..30)
            .prop_map(|(session, used, more)| Step::Begin(session, used, used + more));
        vec(
            prop_oneof![
                begin,
                (0..SESSIONS, any::<bool>()).prop_map(|(session, known)| Step::End(session, known))
            ],
            0..200,
        )
    }

    proptest! {
        /// Of all sessions under one budget, each sends at most one request once the budget is used
        /// up by what was sent before.
        #[test]
        fn no_session_passes_a_budget_by_more_than_one_request(max in 1_u64..200, steps in steps()) {
            let mut account = Account { limits: Limits { tokens: Some(max), ..Limits::default() }, ..Account::default() };
            let (mut open, mut overdrawn): (BTreeMap<usize, Vec<(u64, u64)>>, _) = (BTreeMap::new(), [false; SESSIONS]);
            let (mut sent, mut beyond) = (0, [0; SESSIONS]);
            for step in steps {
                match step {
                    Step::Begin(session, uses, estimate) => {
                        let estimate = Estimate { cost: None, tokens: estimate };
                        if let Verdict::Admitted { overdraws, .. } = admit(&[account], estimate, overdrawn[session]) {
                            overdrawn[session] = overdraws;
                            account.held_tokens += estimate.tokens;
                            beyond[session] += u32::from(sent >= max);
                            sent += uses;
                            open.entry(session).or_default().push((uses, estimate.tokens));
                        }
                    }
                    Step::End(session, is_known) => {
                        let Some(requests) = open.get_mut(&session).filter(|requests| !requests.is_empty()) else { continue };
                        let (uses, held) = requests.remove(0);
                        account.held_tokens -= held;
                        account.used_tokens += charge(held, is_known.then_some(uses), is_known);
                    }
                }
                prop_assert!(beyond.iter().all(|count| *count <= 1), "{:?}", beyond);
                let all_ended = open.values().all(Vec::is_empty);
                prop_assert!(!all_ended || account.held_tokens == 0);
                prop_assert!(!all_ended || account.used_tokens >= sent);
            }
        }
    }

    #[test]
    fn each_limit_holds_and_the_soft_limit_warns_once() {
        let with = |limits: Limits| Account {
            limits,
            used_cost: 80,
            used_tokens: 80,
            used_requests: 80,
            used_us: 80_000_000,
            ..Account::default()
        };
        let estimate = Estimate { cost: Some(1), tokens: 1 };
        for (limits, name) in [
            (Limits { cost: Some(80), ..Limits::default() }, "cost"),
            (Limits { tokens: Some(80), ..Limits::default() }, "tokens"),
            (Limits { requests: Some(80), ..Limits::default() }, "requests"),
            (Limits { seconds: Some(80), ..Limits::default() }, "seconds"),
        ] {
            let reached = admit(&[Account::default(), with(limits)], estimate, false);
            assert_eq!(
                reached,
                Verdict::Reached(Notice { account: 1, limit: name, used: 80, max: 80 })
            );
        }
        let nearly = with(Limits { requests: Some(100), ..Limits::default() });
        let Verdict::Admitted { warnings, .. } = admit(&[nearly], estimate, false) else {
            panic!("not admitted")
        };
        assert_eq!(warnings, [Notice { account: 0, limit: "requests", used: 80, max: 100 }]);
        let told = Account { has_warned: true, ..nearly };
        assert_eq!(
            admit(&[told], estimate, false),
            Verdict::Admitted { warnings: Vec::new(), overdraws: false }
        );
        let unpriced = Estimate { cost: None, tokens: 1 };
        assert_eq!(
            admit(&[with(Limits { cost: Some(100), ..Limits::default() })], unpriced, false),
            Verdict::Unpriced
        );
    }
}
