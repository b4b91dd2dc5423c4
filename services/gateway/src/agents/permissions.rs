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
    if tool.as_deref().is_some_and(|tool| !is_rule(tool)) {
        rule.refuse("tool", "tool must be a tool's name, the beginning of some followed by *, or a name with a pattern: Bash(git *)");
    }
    let evaluation = rule.named_string("evaluation", NAME_CHARS_MAX);
    let evaluation = evaluation.and_then(|text| parsed(rule, "evaluation", &text));
    PermissionRule { tool: tool.unwrap_or_default(), evaluation: evaluation.unwrap_or_default() }
}

/// As the agent host understands it.
fn is_rule(tool: &str) -> bool {
    let (name, pattern) = match tool.split_once('(') {
        Some((name, rest)) => (name, Some(rest)),
        None => (tool, None),
    };
    match pattern {
        Some(pattern) => {
            !name.is_empty()
                && !name.contains('*')
                && pattern.strip_suffix(')').is_some_and(|pattern| !pattern.trim().is_empty())
        }
        None => {
            !name.is_empty()
                && !name.trim_end_matches('*').contains('*')
                && !name.ends_with("**")
                && !name.contains(')')
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_names_a_tool_some_tools_or_some_calls_of_one() {
        for good in ["Bash", "mcp__*", "*", "Bash(git *)", "Edit(/a (b)/*)", "Bash(git:*)"] {
            assert!(is_rule(good), "{good}");
        }
        for bad in [
            "",
            "a*b",
            "a**",
            "Bash(",
            "Bash()",
            "Bash( )",
            "(git)",
            "Bas*(git)",
            "Bash)",
            "Bash(git) ",
        ] {
            assert!(!is_rule(bad), "{bad}");
        }
    }
}
