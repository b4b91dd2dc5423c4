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
}

export interface PlainItem {
  kind: "event";
  key: number;
  event: TypedEvent;
}

export type Item = ToolItem | StagesItem | TurnEndItem | PlainItem;

const QUIET = new Set(["span.model_request_start", "span.model_request_end"]);

/** Items in the order of events. A tool's result, permission request and decision are part of the tool's item. */
export function fold(events: readonly TypedEvent[]): Item[] {
  const items: Item[] = [];
  const tools = new Map<number, ToolItem>();
  const stages = new Map<number, StagesItem>();
  let running: ToolItem[] = [];
  let started: TypedEvent | undefined;
  for (const event of events) {
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
        items.push({ kind: "event", key: event.id, event });
        break;
      case "session.status_idle":
      case "session.status_terminated":
        for (const item of running) item.over = true;
        running = [];
        items.push({ kind: "end", key: event.id, event, started: started?.turn === event.turn ? started : undefined });
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
  if (a.kind === "end" && b.kind === "end") return a.started === b.started;
  return a.kind === b.kind;
}

export const text = (event: TypedEvent): string =>
  ((event.content ?? []) as { text?: string }[]).map((part) => part.text ?? "").join("\n");
