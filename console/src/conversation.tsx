// Events as a conversation.
import type { ComponentChildren } from "preact";
import { memo } from "preact/compat";
import { useMemo, useState } from "preact/hooks";
import { type PermissionRequest, type Session, type TypedEvent, post, words } from "./api";
import { count, clock, duration, money, now } from "./format";
import { type Item, STOPS, type StagesItem, type ToolItem, type TurnEndItem, between, command, fold, same, str, text, tokens } from "./transcript";
import { Markdown, Output, TextDiff, UnifiedDiff } from "./ui";

interface Props {
  events: readonly TypedEvent[];
  session: Session;
  requests: PermissionRequest[];
  onDecided: () => void;
  denialReaches: boolean;
  showRaw: () => void;
}

/** Event ids of a block. The browser skips whole blocks that are off screen: to watch each item takes it longer than to paint some. */
const BLOCK = 64;

export function Conversation({ events, session, requests, ...shared }: Props) {
  const items = useMemo(() => fold(events), [events]);
  const open = new Map(requests.map((request) => [request.id, request]));
  const blocks: Item[][] = [];
  let number = -1;
  for (const item of items) {
    if (Math.floor(item.key / BLOCK) !== number) blocks.push([]);
    number = Math.floor(item.key / BLOCK);
    blocks.at(-1)?.push(item);
  }
  return (
    <>
      {blocks.map((block, at) => (
        <Block key={Math.floor((block[0]?.key ?? 0) / BLOCK)} items={block} open={open} growing={at === blocks.length - 1} runtime={session.runtime} session={session.id} {...shared} />
      ))}
    </>
  );
}

interface BlockProps extends Omit<ItemProps, "item" | "request"> {
  items: Item[];
  open: ReadonlyMap<number, PermissionRequest>;
  growing: boolean;
}

const Block = memo(
  function Block({ items, open, growing, ...shared }: BlockProps) {
    return (
      <div class={growing ? "block growing" : "block"}>
        {items.map((item) => (
          <ItemView key={item.key} item={item} request={item.kind === "tool" ? open.get(item.key) : undefined} {...shared} />
        ))}
      </div>
    );
  },
  (before, after) =>
    before.growing === after.growing &&
    before.items.length === after.items.length &&
    after.items.every((item, at) => same(before.items[at] as Item, item) && before.open.get(item.key) === after.open.get(item.key)),
);

interface ItemProps {
  item: Item;
  runtime: string;
  session: string;
  request?: PermissionRequest;
  onDecided: () => void;
  denialReaches: boolean;
  showRaw: () => void;
}

const ItemView = memo(
  function ItemView(props: ItemProps) {
    const { item } = props;
    const nested = (item.kind === "tool" ? item.use : item.kind === "event" ? item.event : undefined)?.parent_tool_use_id;
    return (
      <div class={nested ? "item nested" : "item"} data-key={item.key}>
        {item.kind === "tool" ? <Tool {...props} item={item} /> : item.kind === "stages" ? <Stages item={item} /> : item.kind === "end" ? <TurnEnd item={item} /> : <Plain event={item.event} showRaw={props.runtime === "shell" ? props.showRaw : undefined} />}
      </div>
    );
  },
  (before, after) => same(before.item, after.item) && before.request === after.request,
);

function At({ event }: { event: TypedEvent }) {
  return event.processed_at ? <time class="at" dateTime={event.processed_at}>{clock(event.processed_at)}</time> : null;
}

function Plain({ event, showRaw }: { event: TypedEvent; showRaw?: () => void }) {
  switch (event.type) {
    case "session.status_running":
      return (
        <>
          <div class="turnstart"><span>Turn {event.turn}</span><At event={event} /></div>
          <article class="user" aria-label="You">
            <pre class="said">{event.prompt}</pre>
          </article>
          {showRaw && <p class="note">A script prints only raw output. <button type="button" class="link" onClick={showRaw}>Show it</button></p>}
        </>
      );
    case "user.message":
      return (
        <article class="user" aria-label="You">
          <pre class="said">{text(event)}</pre>
          <span class="tag">joined the turn</span>
        </article>
      );
    case "user.interrupt":
      return <p class="mark">You stopped the agent <At event={event} /></p>;
    case "agent.message":
      return (
        <article class="agent" aria-label="Agent">
          <Markdown text={text(event)} />
          {event.aborted && <span class="tag">cut off by the interrupt</span>}
        </article>
      );
    case "agent.thinking":
      return event.text ? (
        <details class="thinking">
          <summary>Thinking</summary>
          <Markdown text={event.text} />
        </details>
      ) : (
        <p class="mark">Thinking</p>
      );
    case "agent.plan":
      return (
        <section class="card plan" aria-label="Plan">
          <h3>Plan</h3>
          <ul>
            {(event.entries as { text: string; status: string }[]).map((entry) => (
              <li class={entry.status}>
                <span class="box" aria-hidden="true">{entry.status === "completed" ? "✓" : entry.status === "in_progress" ? "›" : ""}</span>
                <span>{entry.text}</span>
                <span class="sr">{entry.status.replace("_", " ")}</span>
              </li>
            ))}
          </ul>
        </section>
      );
    case "agent.conversation_started":
      return <p class="mark">{event.resumed ? "The conversation was resumed" : "The agent is ready"}{event.model ? ` · ${event.model}` : ""}</p>;
    case "agent.thread_context_compacted":
      return <p class="mark">The agent summarised its conversation to make room</p>;
    case "session.error":
      return (
        <div class="errorbox" role="note">
          <span>
            <strong>{event.error?.type?.replaceAll("_", " ")}</strong> {event.error?.message}
            {event.error?.retry_status?.type === "retrying" ? " The agent tries again." : ""}
          </span>
        </div>
      );
    case "session.budget":
      return <p class="mark">{event.state === "reached" ? "The budget" : "80 % of the budget"} of the {event.scope} {event.state === "reached" ? "is reached" : "are used"}: {event.limit === "cost_usd" ? `${money(event.used)} of ${money(event.max)}` : `${count(event.used)} of ${count(event.max)} ${event.limit}`} <At event={event} /></p>;
    case "session.input_refused":
      return <div class="errorbox" role="note"><span>A message was refused: {event.message}</span></div>;
    case "session.output_dropped":
      return <p class="mark">{count(event.bytes)} bytes of output were dropped here: the turn printed more than is kept</p>;
    case "agent.tool_result":
    case "agent.mcp_tool_result":
      return (
        <section class="card">
          <header><h3>Result of an earlier tool use</h3></header>
          <Output text={text(event)} error={event.is_error} />
        </section>
      );
    default:
      return (
        <details class="thinking">
          <summary>{event.type}</summary>
          <pre class="said">{JSON.stringify(event, null, 2)}</pre>
        </details>
      );
  }
}

/** What a tool is used with, in one line. */
function headline(input: Record<string, unknown>): string {
  for (const name of ["file_path", "path", "notebook_path", "filePath", "pattern", "query", "url", "description", "title", "prompt"]) {
    const value = str(input[name]);
    if (value) return value.split("\n")[0]?.slice(0, 200) ?? "";
  }
  return "";
}

/** Text with the characters that a person would not see, or that reorder what they see. */
const visible = (text: string): string =>
  text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

function Tool({ item, request, session, onDecided, denialReaches }: ItemProps & { item: ToolItem }) {
  const { use, result } = item;
  const input = (use.input ?? {}) as Record<string, unknown>;
  const shell = command(input);
  const changes = (result?.changes ?? []) as { path: string; diff: string }[];
  const output = result ? text(result) : "";
  const state = request ? "asks" : result ? (result.is_error || result.exit_code ? "failed" : "done") : item.settled?.decision === "denied" ? "denied" : item.over ? "unfinished" : item.request && !item.settled ? "answered" : "running";
  return (
    <section class={`card tool ${state}`} aria-label={`${use.name}: ${state}`}>
      <header>
        <span class="icon" aria-hidden="true" />
        <h3>{use.mcp_server_name ? `${use.mcp_server_name} · ` : ""}{use.name}</h3>
        {!shell && <span class="headline">{headline(input)}</span>}
        <span class="state"><ToolState item={item} state={state} /></span>
      </header>
      {shell && <pre class="command" tabIndex={0} role="region" aria-label="Command"><span aria-hidden="true">$ </span>{request ? visible(shell) : shell}</pre>}
      <Changed input={input} changes={changes} diff={request?.diff || item.request?.diff} />
      {request && !(shell && Object.keys(input).length === 1) && <WholeInput input={input} />}
      {!request && !shell && changes.length === 0 && <InputDetails input={input} open={!!use.mcp_server_name} />}
      {request && <Decide session={session} request={request} onDecided={onDecided} denialReaches={denialReaches} />}
      {output && (changes.length === 0 || result?.is_error) && <Output text={output} label={`Output of ${use.name}`} error={result?.is_error} />}
    </section>
  );
}

function ToolState({ item, state }: { item: ToolItem; state: string }) {
  const begun = item.use.processed_at ? Date.parse(item.use.processed_at) : undefined;
  const ended = item.result?.processed_at ? Date.parse(item.result.processed_at) : undefined;
  const took = begun && ended ? duration(ended - begun) : "";
  switch (state) {
    case "asks":
      return <>needs your decision</>;
    case "answered":
      return <>decision pending</>;
    case "running":
      return <>running{begun ? ` ${duration(Math.max(0, now.value - begun))}` : ""}</>;
    case "denied":
      return <>denied</>;
    case "unfinished":
      return <>no result: the turn ended first</>;
    case "failed":
      return <>{item.settled?.decision === "denied" ? "denied" : item.result?.exit_code ? `exit ${item.result.exit_code}` : "failed"} · {took}</>;
    default:
      return <>{item.settled?.decision === "allowed" ? "allowed · " : ""}{took}</>;
  }
}

/** File changes: as the CLI reports them, else as its input says. */
function Changed({ input, changes, diff }: { input: Record<string, unknown>; changes: { path: string; diff: string }[]; diff?: string | null }): ComponentChildren {
  const path = str(input.file_path ?? input.filePath ?? input.path);
  // Those of an earlier release say nothing of a file that was created.
  const told = changes.filter((change) => change.diff);
  if (told.length > 0) return told.map((change) => <UnifiedDiff key={change.path} path={change.path} diff={change.diff} />);
  if (diff) return <UnifiedDiff path={path || "changes"} diff={diff} />;
  const [before, after] = [input.old_string ?? input.oldString, input.new_string ?? input.newString];
  if (typeof before === "string" && typeof after === "string") return <TextDiff path={path} before={before} after={after} />;
  if (path && typeof input.content === "string") return <TextDiff path={path} before="" after={input.content} />;
  return null;
}

/** All that a person allows: nothing is left out, folded or invisible. */
function WholeInput({ input }: { input: Record<string, unknown> }) {
  return <pre class="input" tabIndex={0} role="region" aria-label="Input">{visible(JSON.stringify(input, null, 2))}</pre>;
}

function InputDetails({ input, open }: { input: Record<string, unknown>; open: boolean }) {
  const shown = Object.entries(input).filter(([name]) => !["old_string", "new_string", "oldString", "newString", "content"].includes(name));
  if (shown.length === 0) return null;
  return (
    <details class="input" open={open}>
      <summary>Input</summary>
      <pre tabIndex={0} role="region" aria-label="Input">{JSON.stringify(Object.fromEntries(shown), null, 2)}</pre>
    </details>
  );
}

function Decide({ session, request, onDecided, denialReaches }: { session: string; request: PermissionRequest; onDecided: () => void; denialReaches: boolean }) {
  const [busy, setBusy] = useState("");
  const [denying, setDenying] = useState(false);
  const [message, setMessage] = useState("");
  const [error, setError] = useState("");
  const decide = async (decision: string) => {
    setBusy(decision);
    setError("");
    try {
      await post(`/sessions/${session}/requests/${request.id}`, { decision, ...(decision === "deny" && message.trim() ? { message: message.trim() } : {}) });
    } catch (failure) {
      setError(words(failure));
    }
    setBusy("");
    onDecided();
  };
  return (
    <div class="decide" id={`request-${request.id}`} role="group" aria-label={`Permission to use ${request.tool}`}>
      <p><strong>May the agent use {request.tool}?</strong>{request.reason ? ` ${request.reason}` : ""}</p>
      {error && <p class="bad" role="alert">{error}</p>}
      {denying ? (
        <div class="row">
          {denialReaches && <input aria-label="Why not" placeholder="Tell the agent why, or what to do instead" value={message} onInput={(event) => setMessage(event.currentTarget.value)} onKeyDown={(event) => event.key === "Enter" && void decide("deny")} autofocus />}
          <button type="button" class="danger" disabled={!!busy} onClick={() => void decide("deny")}>Deny</button>
          <button type="button" onClick={() => setDenying(false)}>Back</button>
        </div>
      ) : (
        <div class="row">
          <button type="button" class="primary" disabled={!!busy} onClick={() => void decide("allow")}>Allow</button>
          <button type="button" disabled={!!busy} onClick={() => void decide("allow_for_session")}>Allow {request.tool} for this session</button>
          <button type="button" class="danger-quiet" disabled={!!busy} onClick={() => setDenying(true)}>Deny…</button>
        </div>
      )}
    </div>
  );
}

const STAGES: Record<string, string> = {
  create_sprite: "Create the sandbox",
  install_runtime: "Install the agent",
  network_policy: "Apply the network policy",
  env_file: "Write the environment",
  git_credentials: "Set up git credentials",
  packages: "Install packages",
  provision_setup: "Run the set-up",
  runtime_config: "Configure the agent",
  skills: "Install skills",
  runtime_start: "Start the agent",
};

function Stages({ item }: { item: StagesItem }) {
  const stages = new Map<string, { state: string; ms?: number; message?: string; restored?: boolean; output: string; since?: string }>();
  for (const event of item.events) {
    const stage = stages.get(event.stage) ?? { state: "started", output: "", since: event.processed_at };
    if (event.type === "session.stage_output") stage.output += event.data;
    else Object.assign(stage, { state: event.state, ms: event.duration_ms ?? stage.ms, message: event.message ?? stage.message, restored: event.restored });
    stages.set(event.stage, stage);
  }
  const rows = [...stages].filter(([name, stage]) => name !== "runtime_start" || stage.state === "failed");
  if (rows.length === 0) return null;
  const failed = rows.some(([, stage]) => stage.state === "failed");
  const busy = !failed && rows.some(([, stage]) => stage.state === "started");
  const total = rows.reduce((sum, [, stage]) => sum + (stage.ms ?? 0), 0);
  const longest = Math.max(1, ...rows.map(([, stage]) => stage.ms ?? 0));
  return (
    <details class={failed ? "stages failed" : "stages"} open={failed || busy}>
      <summary>{failed ? "The sandbox could not be set up" : busy ? "Setting up the sandbox…" : `Sandbox ready in ${duration(total)}`}</summary>
      <ul>
        {rows.map(([name, stage]) => (
          <li class={stage.state}>
            <span class="name">{STAGES[name] ?? name}{stage.restored && " (restored)"}</span>
            <span class="bar" aria-hidden="true"><span style={{ width: `${Math.max(1, ((stage.ms ?? 0) / longest) * 100)}%` }} /></span>
            <span class="ms">{stage.state === "started" ? "…" : duration(stage.ms ?? 0)}</span>
            {stage.message && <p class="bad">{stage.message}</p>}
            {stage.output && <Output text={stage.output} label={`Output of ${name}`} />}
          </li>
        ))}
      </ul>
    </details>
  );
}

function TurnEnd({ item }: { item: TurnEndItem }) {
  const { event, started, first } = item;
  if (event.type === "session.status_terminated") return <p class="turnend terminated">Session terminated <At event={event} /></p>;
  const reason = event.stop_reason?.type ?? "end_turn";
  const [took, waited, used] = [between(started, event), between(started, first), tokens(event.usage)];
  return (
    <div class={`turnend ${reason}`}>
      <span>{STOPS[reason] ?? reason}{event.exit_code ? `, exit code ${event.exit_code}` : ""}</span>
      {took !== undefined && <span>{duration(took)}</span>}
      {waited !== undefined && <span title="From the start of the turn to the first message or tool use of the agent">first reply after {duration(waited)}</span>}
      {used > 0 && <span>{count(used)} tokens</span>}
      {event.usage?.cost_usd != null && <span>{money(event.usage.cost_usd)}</span>}
      <At event={event} />
      {event.failure && <p class="bad">{event.failure.message}</p>}
    </div>
  );
}
