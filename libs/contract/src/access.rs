//! Who may do what on the bus. NATS enforces it: `nats/permissions.conf` is rendered from this
//! table.
//!
//! What it says of the stream EVENTS goes for each of its partitions.

use types::Partition;

use crate::{rpc, topology};

/// A user of the bus: each service has its own, and may use only its own subjects.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// The NATS user, see [`password_variable`].
    pub user: &'static str,
    pub publish: &'static [&'static str],
    pub subscribe: &'static [&'static str],
}

impl Access {
    /// Where the user's replies arrive: no other user may listen there.
    #[must_use]
    pub fn inbox(&self) -> String {
        inbox(self.user)
    }

    /// The inboxes of the users whose requests this one serves. It may publish to no other reply
    /// subject: NATS does not check which one a request names.
    pub fn inboxes_to_answer(&self) -> impl Iterator<Item = String> {
        let serves = |subject: &str| self.subscribe.iter().any(|pattern| matches(pattern, subject));
        let served: Vec<_> =
            rpc::RPCS.iter().map(|rpc| rpc.subject).filter(|subject| serves(subject)).collect();
        ALL.iter()
            .filter(move |other| served.iter().any(|subject| other.may_publish(subject)))
            .map(Self::inbox)
    }

    /// Whether the user may publish to a subject.
    #[must_use]
    pub fn may_publish(&self, subject: &str) -> bool {
        self.publish.iter().any(|pattern| matches(pattern, subject))
    }

    /// What the user may publish to, for each partition.
    fn publish_everywhere(&self) -> impl Iterator<Item = String> {
        self.publish.iter().flat_map(|subject| match subject.split_once(".EVENTS") {
            None => vec![(*subject).to_owned()],
            Some((before, after)) => Partition::all()
                .map(|partition| format!("{before}.{}{after}", topology::events(partition).name))
                .collect(),
        })
    }
}

/// The users who may send a request.
pub fn callers(subject: &str) -> impl Iterator<Item = &'static str> {
    ALL.iter().filter(move |access| access.may_publish(subject)).map(|access| access.user)
}

/// The variable that the server reads a user's password from.
#[must_use]
pub fn password_variable(user: &str) -> String {
    format!("NATS_PASSWORD_{}", user.to_uppercase())
}

/// The inbox prefix of a user.
#[must_use]
pub fn inbox(user: &str) -> String {
    format!("_INBOX_{user}")
}

pub const GATEWAY: Access = Access {
    user: "gateway",
    publish: &[
        "aod.rpc.auth.v1.health.check",
        "aod.rpc.auth.v1.key.>",
        "aod.rpc.auth.v1.console.*",
        "aod.rpc.vault.v1.health.check",
        "aod.rpc.vault.v1.credential.>",
        "aod.rpc.vault.v1.sealing.key",
        "aod.rpc.vault.v1.secret.*",
        "aod.rpc.scheduler.v1.health.check",
        "aod.rpc.scheduler.v1.agent.>",
        "aod.rpc.scheduler.v1.environment.>",
        "aod.rpc.scheduler.v1.session.>",
        "aod.rpc.scheduler.v1.file.*",
        "aod.rpc.scheduler.v1.vault.*",
        "aod.rpc.scheduler.v1.vault_credential.*",
        "aod.rpc.scheduler.v1.budget.get",
        "aod.rpc.scheduler.v1.budget.set",
        "aod.rpc.scheduler.v1.usage.list",
        "$JS.API.STREAM.MSG.GET.EVENTS",
    ],
    subscribe: &["aod.live.session.v1.>", "aod.queued.session.v1.*"],
};

pub const AUTH: Access = Access { user: "auth", publish: &[], subscribe: &["aod.rpc.auth.>"] };

pub const VAULT: Access = Access { user: "vault", publish: &[], subscribe: &["aod.rpc.vault.>"] };

pub const SCHEDULER: Access = Access {
    user: "scheduler",
    publish: &[
        "aod.log.>",
        "aod.cmd.>",
        "aod.evt.>",
        "aod.hint.>",
        "aod.queued.session.v1.*",
        "aod.dlq.>",
        "aod.rpc.vault.v1.account.find",
        "aod.rpc.vault.v1.lease.mint",
        "aod.rpc.vault.v1.lease.revoke",
        "aod.rpc.vault.v1.model_token.revoke",
        "aod.rpc.vault.v1.secret.delete",
        "$JS.API.STREAM.INFO.JOBS",
        "$JS.API.STREAM.INFO.EVENTS",
        "$JS.API.STREAM.INFO.LIFECYCLE",
        "$JS.API.STREAM.INFO.DLQ",
        "$JS.API.STREAM.PURGE.EVENTS",
        "$JS.API.STREAM.MSG.GET.EVENTS",
        "$JS.API.STREAM.MSG.DELETE.EVENTS",
        "$JS.API.CONSUMER.CREATE.JOBS.runner",
        "$JS.API.CONSUMER.CREATE.JOBS.runner.>",
        "$JS.API.CONSUMER.DURABLE.CREATE.JOBS.runner",
        "$JS.API.CONSUMER.CREATE.EVENTS.>",
        "$JS.API.CONSUMER.INFO.JOBS.runner",
        "$JS.API.CONSUMER.INFO.EVENTS.*",
        "$JS.API.CONSUMER.DELETE.EVENTS.>",
        "$JS.API.CONSUMER.MSG.NEXT.EVENTS.>",
    ],
    subscribe: &["aod.rpc.scheduler.>"],
};

pub const RUNNER: Access = Access {
    user: "runner",
    publish: &[
        "aod.log.session.v1.*",
        "aod.log.session.v1.*.*",
        "aod.queued.session.v1.*",
        "aod.dlq.runner.>",
        "aod.rpc.scheduler.v1.turn.*",
        "aod.rpc.scheduler.v1.sprite.>",
        "aod.rpc.vault.v1.lease.redeem",
        "$JS.API.STREAM.INFO.JOBS",
        "$JS.API.STREAM.INFO.EVENTS",
        "$JS.API.CONSUMER.INFO.JOBS.runner",
        "$JS.API.CONSUMER.MSG.NEXT.JOBS.runner",
        "$JS.API.STREAM.MSG.GET.EVENTS",
        "$JS.ACK.JOBS.runner.>",
    ],
    subscribe: &["aod.hint.runner.>"],
};

/// Between agents and model providers: it redeems the credentials of sessions that show it their
/// tokens.
pub const MODEL_GATEWAY: Access = Access {
    user: "model_gateway",
    publish: &[
        "aod.rpc.vault.v1.model_token.redeem",
        "aod.rpc.vault.v1.oauth.*",
        "aod.rpc.vault.v1.sealing.key",
        "aod.rpc.scheduler.v1.model_request.*",
        "aod.rpc.auth.v1.user.check",
    ],
    subscribe: &[],
};

/// `aod deploy streams`: creates and changes streams, which no other user may. A stream may store any
/// subject and republish it to any other, and no permission limits that.
pub const STREAMS: Access = Access {
    user: "streams",
    publish: &[
        "$JS.API.STREAM.CREATE.JOBS",
        "$JS.API.STREAM.CREATE.EVENTS",
        "$JS.API.STREAM.CREATE.LIFECYCLE",
        "$JS.API.STREAM.CREATE.DLQ",
        "$JS.API.STREAM.UPDATE.JOBS",
        "$JS.API.STREAM.UPDATE.EVENTS",
        "$JS.API.STREAM.UPDATE.LIFECYCLE",
        "$JS.API.STREAM.UPDATE.DLQ",
        "$JS.API.STREAM.INFO.JOBS",
        "$JS.API.STREAM.INFO.EVENTS",
        "$JS.API.STREAM.INFO.LIFECYCLE",
        "$JS.API.STREAM.INFO.DLQ",
    ],
    subscribe: &[],
};

/// `aod admin` and `aod dev`: sets users, keys and credentials; reads no secret.
pub const OPERATOR: Access = Access {
    user: "operator",
    publish: &[
        "aod.rpc.auth.>",
        "aod.rpc.vault.v1.health.check",
        "aod.rpc.vault.v1.credential.>",
        "aod.rpc.vault.v1.sealing.key",
        "aod.rpc.vault.v1.key.*",
        "aod.rpc.vault.v1.audit.*",
        "aod.rpc.scheduler.v1.health.check",
        "aod.rpc.scheduler.v1.budget.*",
        "aod.rpc.scheduler.v1.usage.list",
        "$JS.API.STREAM.INFO.DLQ",
        "$JS.API.STREAM.MSG.GET.DLQ",
    ],
    subscribe: &[],
};

/// Services that follow sessions: they read what happens, and can do nothing about it.
pub const EVENTS: Access = Access {
    user: "events",
    publish: &[
        "$JS.API.INFO",
        "$JS.API.STREAM.INFO.LIFECYCLE",
        "$JS.API.STREAM.INFO.EVENTS",
        "$JS.API.CONSUMER.CREATE.LIFECYCLE.>",
        "$JS.API.CONSUMER.CREATE.EVENTS.>",
        "$JS.API.CONSUMER.INFO.LIFECYCLE.*",
        "$JS.API.CONSUMER.INFO.EVENTS.*",
        "$JS.API.CONSUMER.MSG.NEXT.LIFECYCLE.*",
        "$JS.API.CONSUMER.MSG.NEXT.EVENTS.*",
        "$JS.ACK.LIFECYCLE.>",
    ],
    subscribe: &["aod.live.session.v1.>"],
};

/// Users that several processes of different trust share: each could read the replies to the
/// others, so they are sealed to a key of the process that asked.
pub const SEALED_REPLIES: &[&str] = &[RUNNER.user];

pub const ALL: [Access; 9] =
    [GATEWAY, AUTH, VAULT, SCHEDULER, RUNNER, MODEL_GATEWAY, STREAMS, OPERATOR, EVENTS];

/// The account of all of these: what is said in it, other accounts of the same servers do not hear.
pub const ACCOUNT: &str = "AOD";

/// The user of the servers' own account: it reports on servers and removes one from a cluster, and
/// hears nothing of [`ACCOUNT`].
pub const SYSTEM: &str = "system";

/// Every user that the servers know.
pub fn users() -> impl Iterator<Item = &'static str> {
    ALL.iter().map(|access| access.user).chain([SYSTEM])
}

/// Whether a subject is one of those that a pattern of NATS means.
#[must_use]
pub fn matches(pattern: &str, subject: &str) -> bool {
    matches_by(pattern, subject, |word, wanted| word == wanted)
}

/// Like [`matches`]; `same` compares a word of the pattern that is not a wildcard with a word of
/// the subject.
#[must_use]
pub fn matches_by(pattern: &str, subject: &str, same: impl Fn(&str, &str) -> bool) -> bool {
    let (mut pattern, mut subject) = (pattern.split('.'), subject.split('.'));
    loop {
        match (pattern.next(), subject.next()) {
            (Some(">"), Some(_)) | (None, None) => return true,
            (Some("*"), Some(_)) => {}
            (Some(p), Some(s)) if same(p, s) => {}
            _ => return false,
        }
    }
}

/// The servers' accounts, with their users.
#[must_use]
pub fn render_permissions() -> String {
    let users: String = ALL.iter().map(render_user).collect();
    let system_password = password_variable(SYSTEM);
    format!(
        "# Rendered from libs/contract/src/access.rs by `cargo xtask gen`. Passwords come from the server's environment.
accounts {{
  {ACCOUNT} {{
    jetstream: enabled
    users: [
{users}    ]
  }}
  SYS {{
    users: [{{ user: {SYSTEM}, password: ${system_password} }}]
  }}
}}
system_account: SYS
"
    )
}

fn render_user(access: &Access) -> String {
    let inbox = format!("{}.>", access.inbox());
    let allow = |subjects: &mut dyn Iterator<Item = String>| {
        let quoted: Vec<_> =
            subjects.chain([inbox.clone()]).map(|subject| format!("{subject:?}")).collect();
        quoted.join(", ")
    };
    // A message to its own inbox tells a user that the server has processed what it sent before.
    let answers = access.inboxes_to_answer().map(|inbox| format!("{inbox}.>"));
    format!(
        "      {{
        user: {}
        password: ${}
        permissions: {{
          publish: {{ allow: [{}] }}
          subscribe: {{ allow: [{}] }}
        }}
      }}
",
        access.user,
        password_variable(access.user),
        allow(&mut access.publish_everywhere().chain(answers)),
        allow(&mut access.subscribe.iter().map(ToString::to_string)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_is_served_by_one_service_and_has_a_caller() {
        for subject in rpc::RPCS.iter().map(|rpc| rpc.subject) {
            let servers: Vec<_> = ALL
                .iter()
                .filter(|a| a.subscribe.iter().any(|p| matches(p, subject)))
                .map(|a| a.user)
                .collect();
            assert_eq!(servers.len(), 1, "{subject} is served by {servers:?}");
            assert!(
                ALL.iter().any(|a| a.publish.iter().any(|p| matches(p, subject))),
                "no user may call {subject}"
            );
        }
    }

    #[test]
    fn leases_are_minted_by_the_scheduler_and_redeemed_by_runners_alone() {
        let callers = |subject| callers(subject).collect::<Vec<_>>();
        assert_eq!(callers("aod.rpc.vault.v1.lease.mint"), ["scheduler"]);
        assert_eq!(callers("aod.rpc.vault.v1.lease.redeem"), ["runner"]);
        assert_eq!(callers("aod.rpc.scheduler.v1.turn.claim"), ["runner"]);
        assert_eq!(callers("aod.rpc.vault.v1.model_token.redeem"), ["model_gateway"]);
    }

    /// A user who may set the subjects of a stream can read messages of all others.
    #[test]
    fn streams_are_created_and_changed_by_their_own_user_alone() {
        for partition in Partition::all() {
            for stream in topology::streams([partition]) {
                for what in ["CREATE", "UPDATE", "RESTORE", "DELETE"] {
                    let subject = format!("$JS.API.STREAM.{what}.{}", stream.name);
                    let may = |access: &&Access| {
                        access.publish_everywhere().any(|pattern| matches(&pattern, &subject))
                    };
                    let users: Vec<_> = ALL.iter().filter(may).map(|access| access.user).collect();
                    let expected: &[&str] =
                        if matches!(what, "CREATE" | "UPDATE") { &["streams"] } else { &[] };
                    assert_eq!(users, expected, "{subject}");
                }
            }
        }
    }

    #[test]
    fn only_the_inboxes_of_callers_are_answered_and_nothing_else_is_open_to_reply_subjects() {
        let answered = |access: &Access| access.inboxes_to_answer().collect::<Vec<_>>();
        assert_eq!(answered(&AUTH), ["_INBOX_gateway", "_INBOX_model_gateway", "_INBOX_operator"]);
        assert_eq!(
            answered(&VAULT),
            [
                "_INBOX_gateway",
                "_INBOX_scheduler",
                "_INBOX_runner",
                "_INBOX_model_gateway",
                "_INBOX_operator"
            ]
        );
        assert_eq!(
            answered(&SCHEDULER),
            ["_INBOX_gateway", "_INBOX_runner", "_INBOX_model_gateway", "_INBOX_operator"]
        );
        for access in [GATEWAY, RUNNER, MODEL_GATEWAY, STREAMS, OPERATOR, EVENTS] {
            assert!(answered(&access).is_empty(), "{}", access.user);
        }
        assert!(!render_permissions().contains("allow_responses"));
    }
}
