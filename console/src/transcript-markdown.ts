// A session's events as a Markdown document, one event after the other. Pure.
import { plain } from "./ansi";
import type { Session, TypedEvent } from "./api";
import { count, duration, money } from "./format";
import { STOPS, between, command, text, tokens } from "./transcript";

/** A block of code whose fence is longer than any in the text. */
function fenced(content: string, language = ""): string {
  let longest = 2;
  for (const [ticks] of content.matchAll(/`+/g)) longest = Math.max(longest, ticks.length);
  const fence = "`".repeat(longest + 1);
  return `${fence}${language}\n${content.replace(/\n*$/, "\n")}${fence}\n\n`;
}

const quoted = (content: string): string => `${content.trimEnd().replace(/^/gm, "> ")}\n\n`;
const said = (who: string, content: string): string => `**${who}**\n\n${content.trimEnd()}\n\n`;

export class MarkdownTranscript {
  /** Names of tools that run, by the event of their use. */
  private readonly tools = new Map<number, string>();
  private started?: TypedEvent;

  head(session: Session, title: string): string {
    const raw = session.runtime === "shell" ? "\nA script prints only raw output, which is not part of this file.\n" : "";
    return `# ${title}\n\nSession ${session.id} · ${session.runtime} · created ${session.created_at}\n${raw}\n`;
  }

  event(event: TypedEvent): string {
    switch (event.type) {
      case "session.status_running":
        this.started = event;
        return `## Turn ${event.turn}${event.processed_at ? ` · ${event.processed_at}` : ""}\n\n${said("You", event.prompt ?? "")}`;
      case "user.message":
        return said("You, during the turn", text(event));
      case "user.interrupt":
        return "*You stopped the agent*\n\n";
      case "agent.message":
        return said("Agent", plain(text(event)));
      case "agent.thinking":
        return event.text ? quoted(event.text) : "";
      case "agent.plan":
        return `${(event.entries as { text: string; status: string }[]).map((entry) => `- [${entry.status === "completed" ? "x" : " "}] ${entry.text}`).join("\n")}\n\n`;
      case "agent.tool_use":
      case "agent.mcp_tool_use": {
        const name = event.mcp_server_name ? `${event.mcp_server_name} · ${event.name}` : event.name;
        this.tools.set(event.id, name);
        const shell = command(event.input ?? {});
        return `**Tool: ${name}**\n\n${shell ? fenced(shell, "sh") : fenced(JSON.stringify(event.input ?? {}, null, 2), "json")}`;
      }
      case "agent.tool_result":
      case "agent.mcp_tool_result": {
        const use = event.tool_use_id ?? event.mcp_tool_use_id;
        const name = this.tools.get(use) ?? "an earlier tool use";
        this.tools.delete(use);
        const failed = event.exit_code ? `, exit code ${event.exit_code}` : event.is_error ? ", failed" : "";
        const changes = ((event.changes ?? []) as { path: string; diff: string }[]).filter((change) => change.diff);
        const output = plain(text(event));
        return `**Result of ${name}${failed}**\n\n${output.trim() ? fenced(output) : ""}${changes.map((change) => `\`${change.path}\`\n\n${fenced(change.diff, "diff")}`).join("")}`;
      }
      case "session.permission_settled":
        return `*Tool use ${event.decision}*\n\n`;
      case "session.budget":
        return `*${event.state === "reached" ? "The budget of the" : "80 % of the budget of the"} ${event.scope} ${event.state === "reached" ? "is reached" : "are used"}*\n\n`;
      case "session.error":
        return `*Error: ${event.error?.message ?? event.error?.type}*\n\n`;
      case "session.status_idle": {
        this.tools.clear();
        const reason = event.stop_reason?.type ?? "end_turn";
        const took = between(this.started, event);
        const used = tokens(event.usage);
        const facts = [
          `${STOPS[reason] ?? reason}${event.exit_code ? `, exit code ${event.exit_code}` : ""}`,
          took === undefined ? "" : duration(took),
          used > 0 ? `${count(used)} tokens` : "",
          event.usage?.cost_usd == null ? "" : money(event.usage.cost_usd),
          event.failure?.message ?? "",
        ];
        return `*${facts.filter(Boolean).join(" · ")}*\n\n`;
      }
      case "session.status_terminated":
        return "*Session terminated*\n";
      default:
        return "";
    }
  }
}
