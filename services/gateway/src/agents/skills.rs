//! An agent's skills, as they are sent.

use types::{
    Skill,
    agent::{GithubSkill, GithubTag, InlineSkill, is_skill_name, is_skill_source},
    limits::{
        AGENT_ITEMS_MAX, BODY_BYTES_MAX, SKILL_CONTENT_BYTES_MAX, SKILL_DESCRIPTION_CHARS_MAX,
    },
    skill::check_content,
};

use crate::body::Fields;

pub fn read(fields: &mut Fields) -> Option<Vec<Skill>> {
    let skills = fields.objects("skills", AGENT_ITEMS_MAX, read_one)?;
    for (at, skill) in skills.iter().enumerate() {
        let identity = skill.identity();
        // What is empty was refused already.
        if !identity.1.is_empty()
            && skills.iter().take(at).any(|earlier| earlier.identity() == identity)
        {
            fields.refuse("skills", &format!("duplicate {}: {}", identity.0, identity.1));
        }
    }
    Some(skills)
}

fn read_one(item: &mut Fields) -> Skill {
    let is_github = item.names().any(|name| name == "type");
    let known: &[&str] = if is_github {
        &["type", "source", "description", "name"]
    } else {
        &["name", "description", "content"]
    };
    let unknown: Vec<String> =
        item.names().filter(|name| !known.contains(name)).map(str::to_owned).collect();
    for name in unknown {
        item.refuse(&name, &format!("unknown key: {name}"));
    }
    if is_github { Skill::Github(read_github(item)) } else { Skill::Inline(read_inline(item)) }
}

fn read_github(item: &mut Fields) -> GithubSkill {
    item.literal("type", "github");
    let source = item.named_string("source", BODY_BYTES_MAX);
    if source.as_deref().is_some_and(|source| !is_skill_source(source)) {
        item.refuse("source", "source must be owner/repo");
    }
    let source = source.unwrap_or_default();
    let description = item.optional_string("description", SKILL_DESCRIPTION_CHARS_MAX);
    let name = item.optional_string("name", BODY_BYTES_MAX);
    if name.as_deref().is_some_and(|name| !is_skill_name(name)) {
        item.refuse("name", NAME_RULE);
    }
    GithubSkill { kind: GithubTag::Github, source, description, name }
}

const NAME_RULE: &str = "name must match [a-z0-9][a-z0-9-]{0,63}";

fn read_inline(item: &mut Fields) -> InlineSkill {
    let name = item.named_string("name", BODY_BYTES_MAX);
    if name.as_deref().is_some_and(|name| !is_skill_name(name)) {
        item.refuse("name", NAME_RULE);
    }
    let description = item.named_string("description", SKILL_DESCRIPTION_CHARS_MAX);
    let content = item.named_string("content", BODY_BYTES_MAX);
    if content.as_ref().is_some_and(|content| content.len() > SKILL_CONTENT_BYTES_MAX) {
        item.refuse("content", &format!("content must be at most {SKILL_CONTENT_BYTES_MAX} bytes"));
    } else if let Some(error) = content.as_deref().and_then(|content| check_content(content).err())
    {
        item.refuse("content", &error.to_string());
    }
    InlineSkill {
        name: name.unwrap_or_default(),
        description: description.unwrap_or_default(),
        content: content.unwrap_or_default(),
    }
}
