// What a session's events say, as a conversation. Pure.
import type { TypedEvent } from "./api";

export interface ToolItem {
  kind: "tool";
  key: number;
  use: TypedEvent;
  result?: TypedEvent;
  request?: TypedEvent;
  settled?: TypedEvent;
  /** The turn ended, so that no result can follow. */
  over: boolean;
}

export interface StagesItem {
  kind: "stages";
  key: number;
  events: TypedEvent[];
}

export interface TurnEndItem {
  kind: "end";
  key: number;
  event: TypedEvent;
  started?: TypedEvent;
  /** What the agent did first. */
  first?: TypedEvent;
}

export interface PlainItem {
  kind: "event";
  key: number;
  event: TypedEvent;
}

export type Item = ToolItem | StagesItem | TurnEndItem | PlainItem;

/** How a turn ended, by the type of its `stop_reason`. */
export const STOPS: Record<string, string> = {
  end_turn: "Turn complete",
  interrupted: "Stopped by you",
  limit: "Stopped at a limit of the agent",
  refusal: "The model refused",
  budget_reached: "Stopped at a budget",
  failed: "Failed",
};

const ACTS = new Set(["agent.message", "agent.thinking", "agent.plan", "agent.tool_use", "agent.mcp_tool_use"]);
const QUIET = new Set(["span.model_request_start", "span.model_request_end"]);

/** Items in the order of events. A tool's result, permission request and decision are part of the tool's item. */
export function fold(events: readonly TypedEvent[]): Item[] {
  const items: Item[] = [];
  const tools = new Map<number, ToolItem>();
  const stages = new Map<number, StagesItem>();
  let running: ToolItem[] = [];
  let started: TypedEvent | undefined;
  let first: TypedEvent | undefined;
  for (const event of events) {
    if (ACTS.has(event.type)) first ??= event;
    const tool = tools.get(event.tool_use_id ?? event.mcp_tool_use_id ?? -1);
    switch (event.type) {
      case "agent.tool_use":
      case "agent.mcp_tool_use": {
        const item: ToolItem = { kind: "tool", key: event.id, use: event, over: false };
        tools.set(event.id, item);
        running.push(item);
        items.push(item);
        break;
      }
      case "agent.tool_result":
      case "agent.mcp_tool_result":
        if (tool && !tool.result) tool.result = event;
        else items.push({ kind: "event", key: event.id, event });
        break;
      case "session.permission_requested":
        if (tool) {
          tool.request = event;
          tool.settled = undefined;
        } else items.push({ kind: "event", key: event.id, event });
        break;
      case "session.permission_settled":
        if (tool) tool.settled = event;
        else items.push({ kind: "event", key: event.id, event });
        break;
      case "session.stage":
      case "session.stage_output": {
        const group = stages.get(event.turn);
        if (group) group.events.push(event);
        else {
          const item: StagesItem = { kind: "stages", key: event.id, events: [event] };
          stages.set(event.turn, item);
          items.push(item);
        }
        break;
      }
      case "session.status_running":
        started = event;
        first = undefined;
        items.push({ kind: "event", key: event.id, event });
        break;
      case "session.status_idle":
      case "session.status_terminated":
        for (const item of running) item.over = true;
        running = [];
        items.push({ kind: "end", key: event.id, event, ...(started?.turn === event.turn && { started, first }) });
        break;
      default:
        if (!QUIET.has(event.type)) items.push({ kind: "event", key: event.id, event });
    }
  }
  return items;
}

/** Whether two items show the same: events themselves never change. */
export function same(a: Item, b: Item): boolean {
  if (a === b) return true;
  if (a.key !== b.key) return false;
  if (a.kind === "tool" && b.kind === "tool") {
    return a.result === b.result && a.request === b.request && a.settled === b.settled && a.over === b.over;
  }
  if (a.kind === "stages" && b.kind === "stages") return a.events.length === b.events.length;
  if (a.kind === "end" && b.kind === "end") return a.started === b.started && a.first === b.first;
  return a.kind === b.kind;
}

export const text = (event: TypedEvent): string =>
  ((event.content ?? []) as { text?: string }[]).map((part) => part.text ?? "").join("\n");

export const str = (value: unknown): string => (typeof value === "string" ? value : value === undefined || value === null ? "" : JSON.stringify(value));

/** What a tool runs in a shell. */
export function command(input: Record<string, unknown>): string {
  const value = input.command ?? input.cmd ?? input.script;
  if (Array.isArray(value)) return value.map(str).join(" ");
  return typeof value === "string" ? value : "";
}

/** Milliseconds from one event to another; none where a time is missing. */
export function between(from?: TypedEvent, to?: TypedEvent): number | undefined {
  return from?.processed_at && to?.processed_at ? Math.max(0, Date.parse(to.processed_at) - Date.parse(from.processed_at)) : undefined;
}

export const tokens = (usage?: Record<string, number>): number =>
  (usage?.input_tokens ?? 0) + (usage?.output_tokens ?? 0) + (usage?.cache_read_input_tokens ?? 0) + (usage?.cache_creation_input_tokens ?? 0);
