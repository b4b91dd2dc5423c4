//! What an agent may do without asking, as it is sent.

use types::{
    Evaluation, Permissions,
    limits::{DECISION_SECONDS_MAX, NAME_CHARS_MAX, PERMISSION_RULES_MAX},
    permissions::{PermissionRule, TimeoutDecision},
};

use crate::body::Fields;

pub fn read(fields: &mut Fields) -> Option<Permissions> {
    fields.nested("permissions", |permissions| Permissions {
        default: read_evaluation(permissions, "default").unwrap_or_default(),
        rules: permissions.objects("rules", PERMISSION_RULES_MAX, read_rule).unwrap_or_default(),
        timeout_seconds: permissions
            .integer("timeout_seconds", 1, i64::from(DECISION_SECONDS_MAX))
            .and_then(|seconds| u32::try_from(seconds).ok()),
        on_timeout: read_on_timeout(permissions),
    })
}

fn read_rule(rule: &mut Fields) -> PermissionRule {
    let tool = rule.named_string("tool", NAME_CHARS_MAX);
    if tool.as_deref().is_some_and(|tool| tool.is_empty() || tool.trim_end_matches('*').contains('*') || tool.ends_with("**")) {
        rule.refuse("tool", "tool must be a tool's name, or the beginning of some followed by *");
    }
    let evaluation = rule.named_string("evaluation", NAME_CHARS_MAX);
    let evaluation = evaluation.and_then(|text| parsed(rule, "evaluation", &text));
    PermissionRule { tool: tool.unwrap_or_default(), evaluation: evaluation.unwrap_or_default() }
}

fn read_evaluation(fields: &mut Fields, name: &str) -> Option<Evaluation> {
    let text = fields.optional_string(name, NAME_CHARS_MAX)?;
    parsed(fields, name, &text)
}

fn parsed(fields: &mut Fields, name: &str, text: &str) -> Option<Evaluation> {
    let evaluation = text.parse().ok();
    if evaluation.is_none() {
        fields.refuse(name, &format!("{name} must be 'allow', 'ask' or 'deny'"));
    }
    evaluation
}

fn read_on_timeout(fields: &mut Fields) -> Option<TimeoutDecision> {
    let text = fields.optional_string("on_timeout", NAME_CHARS_MAX)?;
    let decision = text.parse().ok();
    if decision.is_none() {
        fields.refuse("on_timeout", "on_timeout must be 'allow' or 'deny'");
    }
    decision
}
