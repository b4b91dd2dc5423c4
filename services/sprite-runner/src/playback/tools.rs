//! Tool uses without a result. A checkpoint contains their ids, because their results refer to
//! them.

use std::collections::VecDeque;

use contract::{
    host::event,
    session::{AgentEvent, Checkpoint, DecisionRequested, OpenTool, session_event::Kind},
};

/// How many tool uses without a result are remembered. The result of a forgotten one names no tool
/// use.
const OPEN_TOOLS_MAX: usize = 1000;

/// Adds a tool use, and forgets the oldest if there are too many.
pub fn remember(tools: &mut VecDeque<OpenTool>, tool: OpenTool) {
    if tools.len() >= OPEN_TOOLS_MAX {
        tools.pop_front();
    }
    tools.push_back(tool);
}

/// Adds the tool use that an event shows to the checkpoint of the same event.
pub fn own_tool(kind: Option<&Kind>, id: u64, checkpoint: &mut Checkpoint) {
    let (journal_id, is_mcp) = match kind {
        Some(Kind::Agent(AgentEvent { event: Some(event), is_mcp, .. }))
            if matches!(event.kind, Some(event::Kind::ToolUse(_))) =>
        {
            (event.id, *is_mcp)
        }
        Some(Kind::DecisionRequested(DecisionRequested {
            request: Some(request),
            tool_use: 0,
        })) => (request.id, false),
        _ => return,
    };
    let mut tools: VecDeque<OpenTool> = std::mem::take(&mut checkpoint.open_tools).into();
    remember(&mut tools, OpenTool { journal_id, event_id: id, is_mcp });
    checkpoint.open_tools = tools.into();
}
