// Cost and sessions by day and agent, from the sessions of the last weeks.
import { useEffect } from "preact/hooks";
import { agentsById, loadAgents, need } from "../agents-by-id";
import { type Page, type Session, get } from "../api";
import { money, plural } from "../format";
import { Empty, ErrorBox, useLoad } from "../ui";

const DAYS = 28;
const SESSIONS_MAX = 10_000;
const DAY_MS = 86_400_000;

async function recent(): Promise<{ sessions: Session[]; cut: boolean }> {
  const since = Date.now() - DAYS * DAY_MS;
  const sessions: Session[] = [];
  let cursor = "";
  for (;;) {
    const page: Page<Session> = await get(`/sessions?limit=1000${cursor && `&cursor=${encodeURIComponent(cursor)}`}`);
    const fresh = page.data.filter((session) => Date.parse(session.created_at) >= since);
    sessions.push(...fresh);
    if (!page.has_more || fresh.length < page.data.length) return { sessions, cut: false };
    if (sessions.length >= SESSIONS_MAX) return { sessions, cut: true };
    cursor = page.next_cursor ?? "";
  }
}

export function Usage() {
  const { data, error, reload } = useLoad(async () => {
    await loadAgents();
    const found = await recent();
    need(found.sessions.map((session) => session.agent_id));
    return found;
  });
  useEffect(() => {
    document.title = "Usage · Agent on Demand";
  }, []);
  const day = (time: number) => new Date(time).toLocaleDateString("sv");
  const days = Array.from({ length: DAYS }, (_, ago) => day(Date.now() - (DAYS - 1 - ago) * DAY_MS));
  const sessions = data?.sessions ?? [];
  const byDay = new Map(days.map((each) => [each, { cost: 0, count: 0 }]));
  const byAgent = new Map<string, { cost: number; count: number }>();
  for (const session of sessions) {
    const agent = session.agent_id ?? "";
    if (!byAgent.has(agent)) byAgent.set(agent, { cost: 0, count: 0 });
    for (const sum of [byDay.get(day(Date.parse(session.created_at))), byAgent.get(agent)]) {
      if (!sum) continue;
      sum.cost += session.cost_usd ?? 0;
      sum.count += 1;
    }
  }
  const total = [...byDay.values()].reduce((sum, each) => sum + each.cost, 0);
  const agents = [...byAgent].sort(([, a], [, b]) => b.cost - a.cost || b.count - a.count).slice(0, 20);
  return (
    <section class="page" aria-labelledby="title">
      <h1 id="title">Usage</h1>
      <p class="hint">Sessions that began in the last {DAYS} days. Costs are what the agents report; codex and gemini report none.</p>
      <ErrorBox error={error} retry={reload} />
      {data?.cut && <p class="warn">Only the newest {plural(sessions.length, "session")} are counted.</p>}
      {data && sessions.length === 0 && <Empty title="No sessions in this time" />}
      {sessions.length > 0 && (
        <>
          <p class="total"><strong>{money(total)}</strong> · {plural(sessions.length, "session")}</p>
          <Plot title="Cost by day" rows={[...byDay].map(([name, sum]) => [name, sum.cost])} words={money} />
          <Plot title="Sessions by day" rows={[...byDay].map(([name, sum]) => [name, sum.count])} words={(n) => plural(n, "session")} />
          <h2>By agent</h2>
          <div class="tablewrap" tabIndex={0} role="region" aria-label="Usage by agent">
            <table>
              <thead><tr><th>Agent</th><th class="num">Sessions</th><th class="num">Cost</th></tr></thead>
              <tbody>
                {agents.map(([id, sum]) => (
                  <tr key={id}><td>{id ? (agentsById.value.get(id)?.name ?? id) : "deleted agents"}</td><td class="num">{sum.count}</td><td class="num">{money(sum.cost)}</td></tr>
                ))}
              </tbody>
            </table>
          </div>
        </>
      )}
    </section>
  );
}

function Plot({ title, rows, words }: { title: string; rows: [string, number][]; words: (n: number) => string }) {
  const most = Math.max(...rows.map(([, n]) => n)) || 1;
  const width = 100 / rows.length;
  return (
    <figure class="plot">
      <figcaption>{title} <span class="hint">most: {words(most === 1 && rows.every(([, n]) => n === 0) ? 0 : most)}</span></figcaption>
      <svg viewBox="0 0 100 24" preserveAspectRatio="none" role="img" aria-label={`${title}: ${rows.filter(([, n]) => n > 0).map(([name, n]) => `${name} ${words(n)}`).join(", ") || "nothing"}`}>
        {rows.map(([name, n], at) => (
          <rect key={name} x={at * width + width * 0.12} width={width * 0.76} y={24 - (n / most) * 23} height={(n / most) * 23}>
            <title>{name}: {words(n)}</title>
          </rect>
        ))}
      </svg>
      <div class="axis"><span>{rows[0]?.[0]}</span><span>{rows.at(-1)?.[0]}</span></div>
    </figure>
  );
}
