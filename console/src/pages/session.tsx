// One session: the live conversation, open permission requests and queued messages, and the box to write in.
import { useSignal, useSignalEffect } from "@preact/signals";
import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { agentsById, need } from "../agents-by-id";
import { type Input, type Page, type PermissionRequest, type Session, type Turn, type TypedEvent, ApiError, all, create, del, get, patch, post } from "../api";
import { BudgetReached, BudgetSection } from "../budget";
import { Conversation } from "../conversation";
import { type Format, TranscriptDownload } from "../download";
import { count, duration, money, now, plural, short } from "../format";
import { SessionLog } from "../log";
import { go, href } from "../router";
import { Ago, Action, Copy, ErrorBox, Status, budgetReached, statusWord, toast } from "../ui";
import { RawOutput } from "./raw-output";

const REFRESH_MS = 10_000;
const STEERS = new Set(["claude", "codex"]);
const DENIAL_REACHES_MODEL = new Set(["claude", "codex", "opencode"]);

export function SessionPage({ id }: { id: string }) {
  const [session, setSession] = useState<Session>();
  const [error, setError] = useState<unknown>(null);
  const [requests, setRequests] = useState<PermissionRequest[]>([]);
  const [queued, setQueued] = useState<Input[]>([]);
  const [turns, setTurns] = useState<Turn[]>([]);
  const [tab, setTab] = useState<"conversation" | "raw" | "details">();

  const refresh = useCallback(async () => {
    try {
      const [fresh, open, inputs, allTurns] = await Promise.all([
        get<Session>(`/sessions/${id}`),
        get<Page<PermissionRequest>>(`/sessions/${id}/requests?status=open&limit=100`),
        get<Page<Input>>(`/sessions/${id}/inputs?limit=200`),
        all<Turn>(`/sessions/${id}/turns`),
      ]);
      need([fresh.agent_id]);
      setSession(fresh);
      setRequests(open.data.filter((request) => !request.answer).reverse());
      setQueued(inputs.data.filter((input) => input.kind === "message" && (input.status === "queued" || input.status === "delivered")).reverse());
      setTurns(allTurns);
      setError(null);
    } catch (failure) {
      setError(failure);
    }
  }, [id]);

  // Events say that something changed; what is read then is at least as new.
  const log = useMemo(() => {
    let timer: ReturnType<typeof setTimeout> | undefined;
    return new SessionLog(id, (events: TypedEvent[]) => {
      if (!events.some((event) => /^(session\.(status|permission|input)|user\.)/.test(event.type))) return;
      timer ??= setTimeout(() => {
        timer = undefined;
        void refresh();
      }, 150);
    });
  }, [id]);

  const download = useMemo(() => new TranscriptDownload(), [id]);

  useEffect(() => {
    void refresh();
    void log.open();
    let hiddenFor: ReturnType<typeof setTimeout> | undefined;
    const timer = setInterval(() => void refresh(), REFRESH_MS);
    // A browser has few connections for each host: a page that no one sees gives its own back.
    const onVisibility = () => {
      clearTimeout(hiddenFor);
      if (document.hidden) hiddenFor = setTimeout(() => log.pause(true), 30_000);
      else {
        log.pause(false);
        void refresh();
      }
    };
    document.addEventListener("visibilitychange", onVisibility);
    return () => {
      clearInterval(timer);
      clearTimeout(hiddenFor);
      document.removeEventListener("visibilitychange", onVisibility);
      log.close();
      download.cancel();
    };
  }, [id]);

  const agent = agentsById.value.get(session?.agent_id ?? "");
  useEffect(() => {
    const status = session ? statusWord(session, requests.length > 0) : "";
    document.title = `${requests.length > 0 ? `(${requests.length}) ` : ""}${status ? `${status} · ` : ""}${agent?.name ?? "Session"} · Agent on Demand`;
  }, [requests.length, session, agent?.name]);

  if (!session) {
    if (error instanceof ApiError && error.status === 404) {
      return (
        <div class="empty">
          <h1>There is no such session</h1>
          <p>It was deleted, or it belongs to another user.</p>
          <p><a href={href("/")}>Show all sessions</a></p>
        </div>
      );
    }
    return <div class="page"><ErrorBox error={error} retry={() => void refresh()} /></div>;
  }
  const shown = tab ?? (session.runtime === "shell" ? "raw" : "conversation");
  const isActive = session.status === "pending" || session.status === "running";
  return (
    <section class="sessionpage" aria-labelledby="title">
      <header class="sessionhead">
        <div class="row">
          <a class="back" href={href("/")} aria-label="All sessions">←</a>
          <h1 id="title">{agent?.name ?? "Session"}</h1>
          <Status session={session} waiting={requests.length > 0} />
          {session.status !== "failed" && <Live log={log} />}
          <span class="grow" />
          {isActive && (
            <Action class="small danger-quiet" run={() => post(`/sessions/${id}/terminate`).then(refresh)} confirm="This kills the agent and deletes its sandbox. The transcript stays. To stop only what it does now, use Stop.">Terminate</Action>
          )}
          {!isActive && session.status !== "terminated" && (
            <Action class="small danger-quiet" run={() => post(`/sessions/${id}/terminate`).then(refresh)} confirm="This deletes the sandbox with all files in it. The transcript stays.">Terminate</Action>
          )}
          {!isActive && (
            <Action
              class="small danger-quiet"
              run={async () => {
                await del(`/sessions/${id}/delete`);
                toast("Session deleted");
                go("/");
              }}
              confirm="This deletes the session with its transcript, its secrets and its sandbox."
            >
              Delete
            </Action>
          )}
        </div>
        <Facts session={session} turns={turns} model={agent?.model} />
        <div class="tabs" role="tablist" aria-label="Views">
          {(["conversation", "raw", "details"] as const).map((name) => (
            <button type="button" key={name} role="tab" id={`tab-${name}`} aria-controls="view" aria-selected={shown === name} onClick={() => setTab(name)}>
              {{ conversation: "Conversation", raw: "Raw output", details: "Details" }[name]}
            </button>
          ))}
        </div>
      </header>
      <div id="view" role="tabpanel" aria-labelledby={`tab-${shown}`} class="view">
        {shown === "conversation" && <Transcript log={log} session={session} requests={requests} onDecided={() => void refresh()} showRaw={() => setTab("raw")} />}
        {shown === "raw" && <RawOutput id={id} log={log} />}
        {shown === "details" && <Details session={session} turns={turns} download={download} />}
      </div>
      {shown === "details" ? null : <Composer session={session} requests={requests} queued={queued} refresh={refresh} showRequest={() => setTab("conversation")} />}
    </section>
  );
}

function Live({ log }: { log: SessionLog }) {
  const connection = log.connection.value;
  if (connection.state === "lost") {
    return <span class="live lost" role="status">Connection lost for {duration(now.value - connection.since)}. {connection.reason} Nothing is lost: the page resumes after the last event.</span>;
  }
  if (connection.state === "ended") return <span class="live ended">Complete</span>;
  return <span class="live" role="status"><span class="dot" aria-hidden="true" />{connection.state === "live" ? "Live" : "Connecting…"}</span>;
}

function Facts({ session, turns, model }: { session: Session; turns: Turn[]; model?: string }) {
  const cost = turns.reduce((sum, turn) => sum + (turn.usage?.cost_usd ?? 0), 0);
  const tokens = turns.reduce((sum, turn) => sum + (turn.usage?.input_tokens ?? 0) + (turn.usage?.output_tokens ?? 0), 0);
  const turn = turns.at(-1);
  const started = turn?.started_at ?? turn?.created_at;
  const isActive = session.status === "pending" || session.status === "running";
  return (
    <div class="facts">
      <span>{session.runtime}{model ? ` · ${model.split("/").at(-1)}` : ""}</span>
      <span>{plural(session.turn_count, "turn")}</span>
      {isActive && started && <span>{session.status === "pending" ? "starting" : "working"} for {duration(now.value - Date.parse(started))}</span>}
      {session.status === "pending" && session.waiting_on && <span>waits for {session.waiting_on}</span>}
      {!isActive && turn?.ended_at && <span>last turn ended <Ago time={turn.ended_at} /></span>}
      {tokens > 0 && <span>{count(tokens)} tokens</span>}
      {cost > 0 && <span>{money(cost)}</span>}
      {session.exit_code ? <span class="bad">exit code {session.exit_code}</span> : null}
    </div>
  );
}

/** How near to the end counts as reading the end. */
const NEAR_END_PX = 80;
const LOAD_AHEAD_PX = 1500;

function Transcript({ log, session, requests, onDecided, showRaw }: { log: SessionLog; session: Session; requests: PermissionRequest[]; onDecided: () => void; showRaw: () => void }) {
  const scroller = useRef<HTMLDivElement>(null);
  const following = useRef(true);
  const lastTop = useRef(0);
  const behind = useSignal(false);
  const events = log.events.value;

  const stick = () => {
    const element = scroller.current;
    if (!element || !following.current || !log.atEnd.value) return;
    element.scrollTop = element.scrollHeight;
    lastTop.current = element.scrollTop;
  };
  useLayoutEffect(stick, [events, requests]);
  useEffect(() => {
    const element = scroller.current;
    if (!element) return;
    // Contents grow after they were rendered, too: what is far away is laid out when it comes near.
    const observer = new ResizeObserver(stick);
    observer.observe(element);
    if (element.firstElementChild) observer.observe(element.firstElementChild);
    return () => observer.disconnect();
  }, [log.ready.value]);

  const onScroll = () => {
    const element = scroller.current;
    if (!element) return;
    const below = element.scrollHeight - element.scrollTop - element.clientHeight;
    // Only a reader who scrolls up leaves the end: the page also scrolls when what is above was laid out.
    if (below < NEAR_END_PX) following.current = true;
    else if (element.scrollTop < lastTop.current - 1) following.current = false;
    lastTop.current = element.scrollTop;
    behind.value = !following.current;
    if (element.scrollTop < LOAD_AHEAD_PX) void loadOlder();
    if (below < LOAD_AHEAD_PX && !log.atEnd.value) void log.loadNewer();
  };
  const loadOlder = async () => {
    const element = scroller.current;
    const anchor = [...(element?.querySelectorAll<HTMLElement>("[data-key]") ?? [])].find((each) => each.getBoundingClientRect().bottom > 0);
    const before = anchor?.getBoundingClientRect().top ?? 0;
    const first = log.events.value[0];
    await log.loadOlder();
    if (log.events.value[0] === first || !element || !anchor) return;
    requestAnimationFrame(() => {
      if (anchor.isConnected) element.scrollTop += anchor.getBoundingClientRect().top - before;
    });
  };
  const toEnd = async () => {
    following.current = true;
    await log.jumpToEnd();
    requestAnimationFrame(() => {
      stick();
      behind.value = false;
    });
  };
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.metaKey || event.ctrlKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test((event.target as HTMLElement).tagName)) return;
      if (event.key === "e") void toEnd();
    };
    document.addEventListener("keydown", onKey);
    return () => document.removeEventListener("keydown", onKey);
  }, []);
  // A short page at the top has nothing to scroll: its history is loaded at once.
  useSignalEffect(() => {
    if (log.ready.value && log.hasOlder.value && scroller.current && scroller.current.scrollHeight <= scroller.current.clientHeight) void log.loadOlder();
  });

  return (
    <div class="transcript">
      <div class="scroller" ref={scroller} onScroll={onScroll} tabIndex={0} role="log" aria-label="Transcript" aria-live="off">
        <div class="column">
          {log.error.value && <ErrorBox error={log.error.value} retry={() => void (log.ready.value ? log.loadOlder() : log.open())} />}
          {log.ready.value && log.hasOlder.value && <p class="note center">Loading earlier events…</p>}
          {log.ready.value && !log.hasOlder.value && events.length > 0 && <p class="note center">Session {short(session.id)} began here</p>}
          <Conversation events={events} session={session} requests={requests} onDecided={onDecided} denialReaches={DENIAL_REACHES_MODEL.has(session.runtime)} showRaw={showRaw} />
          {session.status === "pending" && events.length === 0 && log.ready.value && (
            <p class="note center">{session.waiting_on ? `Waits for ${session.waiting_on}…` : "Starting…"}</p>
          )}
        </div>
      </div>
      {(behind.value || !log.atEnd.value) && (
        <button type="button" class="jump" onClick={() => void toEnd()}>
          ↓ {log.unseen.value > 0 ? plural(log.unseen.value, "new event") : "To the end"}
        </button>
      )}
    </div>
  );
}

function Composer({ session, requests, queued, refresh, showRequest }: { session: Session; requests: PermissionRequest[]; queued: Input[]; refresh: () => Promise<void>; showRequest: () => void }) {
  const draftKey = `draft:${session.id}`;
  const [text, setText] = useState(() => sessionStorage.getItem(draftKey) ?? "");
  const [busy, setBusy] = useState(false);
  const box = useRef<HTMLTextAreaElement>(null);
  const sending = useRef({ text: "", key: "" });
  const active = session.status === "pending" || session.status === "running";
  const closed = session.status === "failed" || session.status === "terminated";
  useEffect(() => sessionStorage.setItem(draftKey, text), [text]);
  useLayoutEffect(() => {
    const element = box.current;
    if (!element) return;
    element.style.height = "auto";
    element.style.height = `${Math.min(element.scrollHeight + 2, 240)}px`;
  }, [text, closed]);
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.key !== "i" || event.metaKey || event.ctrlKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test((event.target as HTMLElement).tagName)) return;
      event.preventDefault();
      box.current?.focus();
    };
    document.addEventListener("keydown", onKey);
    return () => document.removeEventListener("keydown", onKey);
  }, []);

  const send = async (whenBusy: "queue" | "interrupt" | "steer") => {
    if (!text.trim() || busy) return;
    setBusy(true);
    // The same text sent again after a lost answer is one prompt.
    if (sending.current.text !== text) sending.current = { text, key: crypto.randomUUID() };
    try {
      await create(`/sessions/${session.id}/prompt`, { prompt: text, when_busy: whenBusy }, sending.current.key);
      setText("");
      sending.current = { text: "", key: "" };
      void refresh();
    } catch (error) {
      toast(error instanceof Error ? error.message : String(error), true);
    } finally {
      setBusy(false);
      box.current?.focus();
    }
  };
  const stoppedAt = budgetReached(session);
  const resume = async () => {
    await create(`/sessions/${session.id}/prompt`, { prompt: "Continue where you stopped." }, crypto.randomUUID());
    await refresh();
  };
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    // On a phone Enter makes a new line: there is a button to send.
    if (matchMedia("(pointer: coarse)").matches && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    void send("queue");
  };
  if (closed) {
    return (
      <footer class="composer closed">
        {session.status === "failed" ? `This session has failed${session.failure ? `: ${session.failure.message}` : session.exit_code ? ` with exit code ${session.exit_code}` : ""}. It takes no more prompts.` : "This session was terminated. It takes no more prompts."}{" "}
        <a href={href("/new")}>Start a new one</a>
      </footer>
    );
  }
  return (
    <footer class="composer">
      {requests.length > 0 && (
        <button type="button" class="asks" onClick={() => (showRequest(), requestAnimationFrame(() => document.getElementById(`request-${requests[0]?.id}`)?.scrollIntoView({ block: "center" })))}>
          The agent waits for {requests.length === 1 ? `your decision on ${requests[0]?.tool}` : `${requests.length} decisions`} ↑
        </button>
      )}
      {stoppedAt && <BudgetReached session={session.id} agent={session.agent_id} message={stoppedAt} resume={resume} />}
      {queued.length > 0 && (
        <ol class="queue" aria-label="Queued messages">
          {queued.map((input) => (
            <Queued key={input.id} session={session.id} input={input} refresh={refresh} />
          ))}
        </ol>
      )}
      <div class="box">
        <textarea ref={box} rows={1} aria-label="Message to the agent" placeholder={active ? "Write the next message; it is queued while the agent works" : "Write the next prompt"} value={text} onInput={(event) => setText(event.currentTarget.value)} onKeyDown={onKeyDown} />
        <div class="row end">
          {session.status === "running" && (
            <Action class="danger-quiet" run={() => post(`/sessions/${session.id}/interrupt`).then(refresh)} title="Stop what the agent does; the session stays usable">Stop</Action>
          )}
          {active && text.trim() && session.status === "running" && (
            <>
              {STEERS.has(session.runtime) && <button type="button" disabled={busy} onClick={() => void send("steer")} title="The agent reads it while it works">Steer</button>}
              <button type="button" disabled={busy} onClick={() => void send("interrupt")} title="Stop what the agent does, then send">Stop and send</button>
            </>
          )}
          <button type="button" class="primary" disabled={busy || !text.trim()} onClick={() => void send("queue")}>{active ? "Queue" : "Send"}</button>
        </div>
      </div>
    </footer>
  );
}

function Queued({ session, input, refresh }: { session: string; input: Input; refresh: () => Promise<void> }) {
  const [editing, setEditing] = useState<string>();
  const path = `/sessions/${session}/inputs/${input.id}`;
  if (editing !== undefined) {
    return (
      <li>
        <textarea aria-label="Queued message" value={editing} onInput={(event) => setEditing(event.currentTarget.value)} />
        <Action class="small" disabled={!editing.trim()} run={() => patch(path, { text: editing }).then(() => (setEditing(undefined), refresh()))}>Save</Action>
        <button type="button" class="small" onClick={() => setEditing(undefined)}>Cancel</button>
      </li>
    );
  }
  return (
    <li>
      <span class="tag">{input.status === "delivered" ? "on its way" : input.when_busy === "steer" ? "joins the turn" : "queued"}</span>
      <span class="text">{input.text}</span>
      {input.status === "queued" && (
        <>
          <button type="button" class="small quiet" onClick={() => setEditing(input.text ?? "")}>Edit</button>
          <Action class="small quiet" run={() => del(path).then(refresh)}>Remove</Action>
        </>
      )}
    </li>
  );
}

const FORMATS: [Format, string][] = [
  ["markdown", "Markdown"],
  ["json", "JSON"],
];

function Download({ session, download }: { session: Session; download: TranscriptDownload }) {
  const running = download.running.value;
  const title = agentsById.value.get(session.agent_id ?? "")?.name ?? "Session";
  return (
    <section aria-label="Transcript">
      <h2>Transcript</h2>
      <p class="hint">All events until now, in Markdown to read or in JSON to process.</p>
      <div class="row download">
        {running ? (
          <>
            <progress aria-label="Download" max={1} value={running.share} />
            <span class="meta">{Math.floor(running.share * 100)} %</span>
            <button type="button" onClick={() => download.cancel()}>Cancel</button>
          </>
        ) : (
          FORMATS.map(([format, label]) => <Action key={format} run={() => download.save(format, session, title)}>Download as {label}</Action>)
        )}
      </div>
    </section>
  );
}

function Details({ session, turns, download }: { session: Session; turns: Turn[]; download: TranscriptDownload }) {
  return (
    <div class="scroller">
      <div class="column details">
        <h2>Turns</h2>
        <div class="tablewrap" tabIndex={0} role="region" aria-label="Turns">
          <table>
            <thead>
              <tr><th>Turn</th><th>Prompt</th><th>Status</th><th class="num">Waited</th><th class="num">Ran</th><th class="num">Tokens in / out</th><th class="num">Cost</th></tr>
            </thead>
            <tbody>
              {turns.map((turn) => (
                <tr key={turn.turn_number}>
                  <td>{turn.turn_number}</td>
                  <td class="clip">{turn.prompt.slice(0, 200)}</td>
                  <td>{turn.status}{turn.exit_code ? <span class="bad"> exit {turn.exit_code}</span> : null}</td>
                  <td class="num">{turn.started_at ? duration(Date.parse(turn.started_at) - Date.parse(turn.created_at)) : ""}</td>
                  <td class="num">{turn.started_at ? duration((turn.ended_at ? Date.parse(turn.ended_at) : now.value) - Date.parse(turn.started_at)) : ""}</td>
                  <td class="num">{turn.usage ? `${count(turn.usage.input_tokens ?? 0)} / ${count(turn.usage.output_tokens ?? 0)}` : "not reported"}</td>
                  <td class="num">{turn.usage?.cost_usd == null ? "not reported" : money(turn.usage.cost_usd)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
        <BudgetSection of={`/sessions/${session.id}`} round={turns.at(-1)?.ended_at} />
        <Download session={session} download={download} />
        <h2>Session</h2>
        <dl class="facts-list">
          <dt>Id</dt><dd><code>{session.id}</code> <Copy text={session.id} /></dd>
          <dt>Created</dt><dd><Ago time={session.created_at} /></dd>
          {session.agent_id && <><dt>Agent</dt><dd><a href={href(`/agents/${session.agent_id}`)}>{agentsById.value.get(session.agent_id)?.name ?? session.agent_id}</a></dd></>}
          {session.environment_id && <><dt>Environment</dt><dd><a href={href(`/environments/${session.environment_id}`)}>{session.environment_id}</a></dd></>}
          {session.resources.map((resource) => (
            <><dt>Repository</dt><dd><code>{resource.url}</code> at <code>{resource.mount_path}</code></dd></>
          ))}
          {Object.entries(session.metadata).map(([key, value]) => (
            <><dt>{key}</dt><dd>{value}</dd></>
          ))}
        </dl>
        <h2>The same with curl</h2>
        <pre class="snippet" tabIndex={0}>{`curl -sN "${location.origin}/sessions/${session.id}/events?stream=true" \\\n  -H "Authorization: Bearer $AOD_API_TOKEN"`}</pre>
      </div>
    </div>
  );
}
