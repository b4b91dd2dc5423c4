//! Tool uses that have no result yet: a checkpoint names them, for their results name their ids.

use std::collections::VecDeque;

use contract::{
    host::event,
    session::{AgentEvent, Checkpoint, DecisionRequested, OpenTool, session_event::Kind},
};

/// Tool uses without a result that are remembered: a result that comes later names none.
const OPEN_TOOLS_MAX: usize = 1000;

/// Adds the pair of a tool use; the oldest goes where there are too many.
pub fn remember(tools: &mut VecDeque<OpenTool>, tool: OpenTool) {
    if tools.len() >= OPEN_TOOLS_MAX {
        tools.pop_front();
    }
    tools.push_back(tool);
}

/// What a reader adds to the checkpoint of an event: the event itself, where it shows a tool use.
pub fn own_tool(kind: Option<&Kind>, id: u64, checkpoint: &mut Checkpoint) {
    let (journal_id, is_mcp) = match kind {
        Some(Kind::Agent(AgentEvent { event: Some(event), is_mcp, .. })) if matches!(event.kind, Some(event::Kind::ToolUse(_))) => {
            (event.id, *is_mcp)
        }
        Some(Kind::DecisionRequested(DecisionRequested { request: Some(request), tool_use: 0 })) => (request.id, false),
        _ => return,
    };
    let mut tools: VecDeque<OpenTool> = std::mem::take(&mut checkpoint.open_tools).into();
    remember(&mut tools, OpenTool { journal_id, event_id: id, is_mcp });
    checkpoint.open_tools = tools.into();
}
