import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { agentsById, loadAgents, need } from "../agents-by-id";
import { type Page, type Session, type Tagged, getTagged, words } from "../api";
import { age, money, now, plural } from "../format";
import { href } from "../router";
import { Age, Empty, ErrorBox, Status } from "../ui";

const PAGE = 100;
const REFRESH_MS = 2500;
/** A long list is read again as a whole, and so less often. */
const REFRESH_LONG_MS = 10_000;
/** No one sees the list: only its title counts, which says how many sessions need a decision. */
const REFRESH_HIDDEN_MS = 30_000;
const FILTERS = [
  ["", "All"],
  ["waiting", "Needs you"],
  ["running", "Working"],
  ["pending", "Starting"],
  ["completed", "Idle"],
  ["failed", "Failed"],
  ["terminated", "Terminated"],
] as const;

function matches(session: Session, terms: string[], agent: string): boolean {
  const fields = [session.id, session.last_prompt, session.runtime, agent, ...Object.values(session.metadata), ...session.resources.map((each) => each.url)];
  const text = fields.join(" ").toLowerCase();
  return terms.every((term) => text.includes(term));
}

export function Sessions() {
  const [sessions, setSessions] = useState<Session[]>();
  const [filter, setFilter] = useState("");
  const [query, setQuery] = useState("");
  const [wanted, setWanted] = useState(PAGE);
  const [hasMore, setHasMore] = useState(false);
  const [error, setError] = useState<unknown>(null);
  const updated = useRef(0);
  const search = useRef<HTMLInputElement>(null);
  const list = useRef<HTMLUListElement>(null);
  const end = useRef<HTMLDivElement>(null);

  useEffect(() => {
    loadAgents().catch(() => undefined);
  }, []);
  useEffect(() => {
    let stopped = false;
    let timer: ReturnType<typeof setTimeout>;
    // What was read last, by address: the gateway sends only what has changed since.
    let known = new Map<string, Tagged<Page<Session>>>();
    const load = async () => {
      clearTimeout(timer);
      try {
        const status = filter === "waiting" ? "running" : filter;
        const fresh: typeof known = new Map();
        const rows: Session[] = [];
        let cursor = "";
        let more = true;
        while (rows.length < wanted && more) {
          const path = `/sessions?limit=${Math.min(1000, wanted - rows.length)}${status && `&status=${status}`}${cursor && `&cursor=${encodeURIComponent(cursor)}`}`;
          const page = await getTagged<Page<Session>>(path, known.get(path));
          fresh.set(path, page);
          rows.push(...page.body.data);
          more = page.body.has_more;
          cursor = page.body.next_cursor ?? "";
        }
        if (stopped) return;
        const isSame = fresh.size === known.size && [...fresh].every(([path, page]) => known.get(path) === page);
        known = fresh;
        if (!isSame) {
          setSessions(rows);
          setHasMore(more);
          need(rows.map((session) => session.agent_id));
        }
        setError(null);
        updated.current = Date.now();
      } catch (failure) {
        if (!stopped) setError(failure);
      }
      if (stopped) return;
      const pause = document.hidden ? REFRESH_HIDDEN_MS : wanted > PAGE ? REFRESH_LONG_MS : REFRESH_MS;
      clearTimeout(timer);
      timer = setTimeout(() => void load(), pause * (0.8 + Math.random() * 0.4));
    };
    const onVisible = () => {
      if (!document.hidden) void load();
    };
    void load();
    document.addEventListener("visibilitychange", onVisible);
    return () => {
      stopped = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", onVisible);
    };
  }, [filter, wanted]);

  const agents = agentsById.value;
  const shown = useMemo(() => {
    const terms = query.toLowerCase().split(/\s+/).filter(Boolean);
    const isShown = (session: Session) =>
      (filter !== "waiting" || session.waiting_on) && matches(session, terms, agents.get(session.agent_id ?? "")?.name ?? "");
    return (sessions ?? []).filter(isShown);
  }, [sessions, query, filter, agents]);
  const waiting = (sessions ?? []).filter((session) => session.waiting_on && session.status === "running").length;
  useEffect(() => {
    document.title = `${waiting ? `(${waiting}) ` : ""}Sessions · Agent on Demand`;
  }, [waiting]);

  // The next page comes before its place is reached.
  useEffect(() => {
    if (!end.current || !hasMore) return;
    const onSeen: IntersectionObserverCallback = ([entry]) => entry?.isIntersecting && setWanted((n) => n + PAGE * 2);
    const observer = new IntersectionObserver(onSeen, { rootMargin: "800px" });
    observer.observe(end.current);
    return () => observer.disconnect();
  }, [hasMore, sessions?.length]);

  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.metaKey || event.ctrlKey || event.altKey || document.querySelector("dialog[open]")) return;
      if (/^(INPUT|TEXTAREA|SELECT)$/.test((event.target as HTMLElement).tagName)) return;
      if (event.key === "/") {
        event.preventDefault();
        search.current?.focus();
      } else if (event.key === "j" || event.key === "k") {
        const rows = [...(list.current?.querySelectorAll<HTMLElement>("a.session") ?? [])];
        const at = rows.indexOf(document.activeElement as HTMLElement);
        rows[Math.max(0, Math.min(rows.length - 1, at + (event.key === "j" ? 1 : -1)))]?.focus();
      }
    };
    document.addEventListener("keydown", onKey);
    return () => document.removeEventListener("keydown", onKey);
  }, []);

  const reset = () => {
    setQuery("");
    setFilter("");
    setWanted(PAGE);
  };
  return (
    <section class="page wide" aria-labelledby="title">
      <header class="head">
        <h1 id="title">Sessions</h1>
        {error && sessions ? (
          <span class="live lost" role="status">Not up to date for {age(new Date(updated.current).toISOString(), now.value)}: {words(error)}</span>
        ) : (
          sessions && <span class="live" role="status"><span class="dot" aria-hidden="true" />Up to date</span>
        )}
      </header>
      <div class="filters">
        <input
          ref={search}
          type="search"
          aria-label="Search sessions"
          placeholder="Search prompts, agents, ids  ( / )"
          value={query}
          onInput={(event) => setQuery(event.currentTarget.value)}
          onKeyDown={(event) => event.key === "Escape" && (setQuery(""), event.currentTarget.blur())}
        />
        <div class="chips" role="group" aria-label="Status">
          {FILTERS.map(([value, label]) => (
            <button type="button" key={value} class="chip" aria-pressed={filter === value} onClick={() => (setSessions(undefined), setWanted(PAGE), setFilter(value))}>
              {label}
              {value === "waiting" && waiting > 0 && <span class="badge">{waiting}</span>}
            </button>
          ))}
        </div>
      </div>
      {!sessions && <ErrorBox error={error} />}
      {sessions &&
        shown.length === 0 &&
        (query || filter ? (
          <Empty title="No session matches">
            <p>{hasMore ? "Only the sessions loaded so far were searched." : "Try another word or another status."}</p>
            <button type="button" onClick={reset}>Show all sessions</button>
          </Empty>
        ) : (
          <Empty title="No sessions yet">
            <p>A session is an agent at work in its own sandbox. Give it a task, watch what it does, answer what it asks, and send the next prompt.</p>
            <p><a class="button primary" href={href("/new")}>Start your first session</a></p>
          </Empty>
        ))}
      <ul class="sessions" ref={list} aria-label="Sessions">
        {shown.map((session) => (
          <Row key={session.id} session={session} agent={agents.get(session.agent_id ?? "")?.name} />
        ))}
      </ul>
      <div ref={end} class="listend">
        {sessions && shown.length > 0 && (hasMore ? `Loading more than ${plural(sessions.length, "session")}…` : plural(shown.length, "session"))}
      </div>
    </section>
  );
}

function Row({ session, agent }: { session: Session; agent?: string }) {
  const waits = session.waiting_on && <strong>Waits for {session.waiting_on.replace(/ \(request \d+\)$/, "")} · </strong>;
  const failed = session.status === "failed" && session.failure && <strong class="bad">{session.failure.message} · </strong>;
  return (
    <li>
      <a class="session" href={href(`/sessions/${session.id}`)}>
        <Status session={session} waiting={!!session.waiting_on} />
        <span class="prompt">
          {waits || failed}
          {session.last_prompt ?? ""}
        </span>
        <span class="meta agent">{agent ?? (session.agent_id ? "…" : "deleted agent")}</span>
        <span class="meta runtime">{session.runtime}</span>
        <span class="meta turns">{plural(session.turn_count, "turn")}</span>
        <span class="meta cost">{session.exit_code ? <span class="bad">exit {session.exit_code}</span> : session.cost_usd == null ? "" : money(session.cost_usd)}</span>
        <span class="meta age"><Age time={session.updated_at} /></span>
      </a>
    </li>
  );
}
