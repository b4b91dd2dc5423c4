//! Which prepared sandboxes are kept for sessions that are not created yet (ADR 0250).

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use types::limits::PROVISIONING_MAX;
use uuid::Uuid;

/// Creations within this time are recent.
pub const RECENT: Duration = Duration::from_secs(300);

/// What the preparation of a session depends on. A spare goes to a session of the same template
/// alone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Template {
    pub user: Uuid,
    pub agent: Uuid,
    pub agent_version: i32,
    /// With its version.
    pub environment: Option<(Uuid, i32)>,
    pub working_directory: Option<String>,
    pub collects_outputs: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No runner has claimed it.
    Offered,
    Preparing,
    Ready,
    /// Kept without its sandbox, so that a set-up that fails is not repeated at once.
    Failed,
}

impl State {
    /// How long a spare may be in this state.
    #[must_use]
    pub const fn life(self) -> Duration {
        match self {
            Self::Offered => Duration::from_secs(30),
            Self::Preparing => PROVISIONING_MAX,
            // Less than a CLI waits for a message.
            Self::Ready | Self::Failed => Duration::from_secs(240),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Spare {
    /// Of the session that gets it.
    pub id: Uuid,
    pub template: Template,
    /// Whether a session that is created now could still have this template.
    pub is_current: bool,
    pub state: State,
    /// How long it has been in this state.
    pub age: Duration,
}

/// How many spares there may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub all: u32,
    pub of_user: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub ended: BTreeSet<Uuid>,
    pub ordered: Vec<Template>,
}

/// Decides which spares are ended and of which templates others are made. `recent` says how many
/// sessions of each template were created recently.
///
/// One creation may be the last one: it takes two for a first spare. A spare that is there is kept
/// while any creation is recent, as making it is what costs most.
#[must_use]
pub fn plan(spares: &[Spare], recent: &BTreeMap<Template, u32>, limits: Limits) -> Plan {
    let mut plan = Plan::default();
    let mut kept = Kept { limits, ..Kept::default() };
    for spare in spares {
        let is_useful = spare.is_current
            && spare.age < spare.state.life()
            && recent.get(&spare.template).is_some_and(|creations| *creations > 0);
        if !(is_useful && kept.add(&spare.template)) {
            plan.ended.insert(spare.id);
        }
    }
    let mut demanded: Vec<(&Template, u32)> =
        recent.iter().map(|(template, creations)| (template, *creations)).collect();
    demanded.sort_by_key(|(_, creations)| Reverse(*creations));
    // No one's second before everyone's first.
    for number in 1..=limits.of_user {
        for (template, creations) in &demanded {
            let lacks = kept.of_template(template) < number && number < *creations;
            if lacks && kept.add(template) {
                plan.ordered.push((*template).clone());
            }
        }
    }
    plan
}

/// Counts spares up to the limits.
#[derive(Default)]
struct Kept {
    limits: Limits,
    all: u32,
    of_users: BTreeMap<Uuid, u32>,
    of_templates: BTreeMap<Template, u32>,
}

impl Kept {
    fn of_template(&self, template: &Template) -> u32 {
        self.of_templates.get(template).copied().unwrap_or_default()
    }

    /// Adds one, if there is room.
    fn add(&mut self, template: &Template) -> bool {
        let of_user = self.of_users.entry(template.user).or_default();
        if self.all >= self.limits.all || *of_user >= self.limits.of_user {
            return false;
        }
        self.all += 1;
        *of_user += 1;
        *self.of_templates.entry(template.clone()).or_default() += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn template(user: u8, agent_version: u8) -> Template {
        Template {
            user: Uuid::from_u128(user.into()),
            agent: Uuid::from_u128(user.into()),
            agent_version: agent_version.into(),
            environment: None,
            working_directory: None,
            collects_outputs: false,
        }
    }

    fn any_template() -> impl Strategy<Value = Template> {
        (0_u8..3, 0_u8..3).prop_map(|(user, version)| template(user, version))
    }

    fn any_spares() -> impl Strategy<Value = Vec<Spare>> {
        let states = [State::Offered, State::Preparing, State::Ready, State::Failed];
        let state = proptest::sample::select(states.to_vec());
        let spare = (any_template(), any::<bool>(), state, 0_u64..1000);
        proptest::collection::vec(spare, 0..12).prop_map(|spares| {
            let spare = |(id, (template, is_current, state, age))| Spare {
                id: Uuid::from_u128(id),
                template,
                is_current,
                state,
                age: Duration::from_secs(age),
            };
            (0..).zip(spares).map(spare).collect()
        })
    }

    proptest! {
        #[test]
        fn a_plan_keeps_the_limits_and_what_is_useful_and_is_followed_by_none(
            spares in any_spares(), recent in proptest::collection::btree_map(any_template(), 0_u32..5, 0..6),
            all in 0_u32..8, of_user in 0_u32..4,
        ) {
            let limits = Limits { all, of_user };
            let plan = super::plan(&spares, &recent, limits);
            let mut then: Vec<Spare> = spares.into_iter().filter(|spare| !plan.ended.contains(&spare.id)).collect();
            for spare in &then {
                prop_assert!(spare.is_current && spare.age < spare.state.life() && recent[&spare.template] > 0);
            }
            for (number, template) in (100..).zip(&plan.ordered) {
                then.push(Spare {
                    id: Uuid::from_u128(number),
                    template: template.clone(),
                    is_current: true,
                    state: State::Offered,
                    age: Duration::ZERO,
                });
                let of_it = then.iter().filter(|spare| spare.template == *template).count();
                prop_assert!(of_it < recent[template] as usize, "more than there were creations before the last one");
            }
            prop_assert!(then.len() <= all as usize);
            for user in 0..3 {
                let of_it = then.iter().filter(|spare| spare.template.user == Uuid::from_u128(user)).count();
                prop_assert!(of_it <= of_user as usize);
            }
            prop_assert_eq!(super::plan(&then, &recent, limits), Plan::default());
        }
    }

    #[test]
    fn the_second_creation_orders_a_spare_and_each_user_gets_one_first() {
        let ordered = |recent: &[(Template, u32)], all| {
            super::plan(&[], &recent.iter().cloned().collect(), Limits { all, of_user: 2 }).ordered
        };
        let (mine, others) = (template(1, 1), template(2, 1));
        assert_eq!(ordered(&[(mine.clone(), 1)], 9), []);
        assert_eq!(ordered(&[(mine.clone(), 2)], 9), std::slice::from_ref(&mine));
        assert_eq!(ordered(&[(mine.clone(), 9)], 9), [mine.clone(), mine.clone()]);
        let both = [(mine.clone(), 9), (others.clone(), 2)];
        assert_eq!(ordered(&both, 2), [mine, others]);
    }
}
