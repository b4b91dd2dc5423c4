//! An agent's MCP servers, as they are sent. The values of headers and variables are secrets.

use std::collections::BTreeMap;

use types::{
    McpServer,
    agent::{McpTransport, REDACTED},
    limits::{AGENT_ITEMS_MAX, BODY_BYTES_MAX},
};

use crate::{
    App,
    agents::json,
    body::{FieldError, Fields},
    error::ApiError,
    secrets::{Kept, Kind},
};

pub fn read(fields: &mut Fields) -> Option<Vec<McpServer>> {
    let servers = fields.objects("mcp_servers", AGENT_ITEMS_MAX, read_one)?;
    for (at, server) in servers.iter().enumerate() {
        if !server.name.is_empty()
            && servers.iter().take(at).any(|earlier| earlier.name == server.name)
        {
            fields.refuse("mcp_servers", &format!("duplicate name: {}", server.name));
        }
    }
    Some(servers)
}

fn read_one(item: &mut Fields) -> McpServer {
    let name = filled(item, "name");
    let transport = match item.optional_string("type", BODY_BYTES_MAX).as_deref() {
        None | Some("url") => McpTransport::Url {
            url: filled(item, "url"),
            headers: item.string_map("headers").unwrap_or_default(),
        },
        Some("stdio") => McpTransport::Stdio {
            command: filled(item, "command"),
            args: item.strings("args").unwrap_or_default(),
            env: item.string_map("env").unwrap_or_default(),
        },
        Some(other) => {
            let why = format!("unknown type: {other}; must be url or stdio");
            item.refuse("type", &why);
            McpTransport::Url { url: String::new(), headers: BTreeMap::new() }
        }
    };
    McpServer { name, transport }
}

/// A text that must be there and say something.
fn filled(item: &mut Fields, name: &str) -> String {
    let text = item.named_string(name, BODY_BYTES_MAX);
    if text.as_deref() == Some("") {
        item.refuse(name, &format!("{name} must not be empty"));
    }
    text.unwrap_or_default()
}

/// What is wrong where `***` stands for a value that is not stored.
pub fn nothing_stored(servers: &[McpServer], stored: &[McpServer]) -> Option<FieldError> {
    for server in servers {
        let known = stored.iter().find(|stored| stored.name == server.name);
        for (name, value) in server.secrets() {
            if value == REDACTED && !known.is_some_and(|known| known.secrets().contains_key(name)) {
                let why = format!(
                    "'{}' of {} is '{REDACTED}', but no value is stored for it",
                    name, server.name
                );
                return Some(FieldError::value("mcp_servers", &why, REDACTED.into()));
            }
        }
    }
    None
}

/// Keeps the servers' secrets, where there are any.
pub async fn keep(
    app: &App,
    user_id: &str,
    servers: &[McpServer],
    base: Option<String>,
) -> Result<Option<Kept>, ApiError> {
    let document: BTreeMap<&str, _> = servers
        .iter()
        .filter(|server| !server.secrets().is_empty())
        .map(|server| (server.name.as_str(), server.secrets()))
        .collect();
    if document.is_empty() {
        return Ok(None);
    }
    app.keep(user_id, Kind::McpServers, &document, base).await.map(Some)
}

/// The servers as they are stored and answered.
pub fn redacted(servers: Vec<McpServer>) -> String {
    json(&servers.into_iter().map(McpServer::redacted).collect::<Vec<_>>())
}
