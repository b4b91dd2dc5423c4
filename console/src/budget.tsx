// Budgets of sessions and agents: what is used, the limits, and how to go on once one is reached.
import { useState } from "preact/hooks";
import { type Budget, get, patch } from "./api";
import { count, duration, money } from "./format";
import { Action, ErrorBox, toast, useLoad } from "./ui";

const KINDS = [
  ["usd", "Cost", money],
  ["tokens", "Tokens", count],
  ["requests", "Model requests", count],
  ["seconds", "Running time", (seconds: number) => duration(seconds * 1000)],
] as const;
type Kind = (typeof KINDS)[number][0];

const UNITS: Record<Kind, string> = { usd: "US dollars", tokens: "tokens", requests: "requests", seconds: "seconds" };

/** A session or an agent, by its path in the API. */
export type Budgeted = `/sessions/${string}` | `/agents/${string}`;

/** `round` tells when to read it again. */
export function BudgetSection({ of, round }: { of: Budgeted; round?: unknown }) {
  const { data, error, reload } = useLoad(() => get<Budget>(`${of}/budget`), [of, round]);
  const what = of.startsWith("/agents/") ? "agent" : "session";
  return (
    <section aria-label="Budget">
      <h2>Budget</h2>
      <p class="hint">
        {what === "agent" ? "What all sessions of the agent may use together, counted since its limit was set." : "What the session may use."} No model request is sent once a limit is reached. An empty field is the deployment's default.
      </p>
      <ErrorBox error={error} retry={reload} />
      {data && <Limits key={JSON.stringify(data.own_limits)} of={of} budget={data} done={reload} />}
    </section>
  );
}

function Limits({ of, budget, done }: { of: Budgeted; budget: Budget; done: () => void }) {
  const own = (kind: Kind) => (budget.own_limits[kind] ?? "").toString();
  const [texts, setTexts] = useState<Record<Kind, string>>({ usd: own("usd"), tokens: own("tokens"), requests: own("requests"), seconds: own("seconds") });
  const changed = KINDS.map(([kind]) => kind).filter((kind) => texts[kind].trim() !== own(kind));
  const save = async () => {
    await patch(`${of}/budget`, Object.fromEntries(changed.map((kind) => [kind, texts[kind].trim() === "" ? null : Number(texts[kind])])));
    toast("Budget saved; it holds from the next model request on");
    done();
  };
  return (
    <form onSubmit={(event) => event.preventDefault()}>
      <div class="tablewrap" tabIndex={0} role="region" aria-label="Limits">
        <table>
          <thead>
            <tr><th>What</th><th class="num">Used</th><th class="num">May be used</th><th>Limit set here</th></tr>
          </thead>
          <tbody>
            {KINDS.map(([kind, label, words]) => {
              const [used, limit] = [(budget.used[kind] ?? 0) + (budget.reserved[kind] ?? 0), budget.limits[kind]];
              return (
                <tr key={kind}>
                  <td>{label}</td>
                  <td class="num">
                    {words(used)}
                    {limit != null && limit > 0 && <meter aria-label={`${label} used`} min={0} max={limit} high={limit * 0.8} optimum={0} value={Math.min(used, limit)} />}
                  </td>
                  <td class="num">{limit == null ? "no limit" : words(limit)}</td>
                  <td>
                    <input type="number" min={0} step={kind === "usd" ? "any" : 1} aria-label={`Limit in ${UNITS[kind]}`} placeholder={UNITS[kind]} value={texts[kind]} onInput={(event) => setTexts({ ...texts, [kind]: event.currentTarget.value })} />
                  </td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      <div class="row end"><Action disabled={changed.length === 0} run={save}>Save budget</Action></div>
    </form>
  );
}

/** The limit of the session or its agent that is used up. */
interface Reached {
  of: Budgeted;
  kind: Kind;
  used: number;
}

async function findReached(paths: Budgeted[]): Promise<Reached | null> {
  const budgets = await Promise.all(paths.map(async (of) => [of, await get<Budget>(`${of}/budget`)] as const));
  for (const [of, { limits, used, reserved }] of budgets) {
    for (const [kind] of KINDS) {
      const sum = (used[kind] ?? 0) + (reserved[kind] ?? 0);
      const limit = limits[kind];
      if (limit != null && sum >= limit) return { of, kind, used: Math.max(sum, limit) };
    }
  }
  return null;
}

/** Twice as much as was used, in the numbers that people write. */
const suggestion = ({ kind, used }: Reached): number => (kind === "usd" ? Math.max(0.01, Math.ceil(used * 200) / 100) : Math.max(1, Math.ceil(used * 2)));

/** Says what stopped a session at a budget, and raises it. */
export function BudgetReached({ session, agent, message, resume }: { session: string; agent?: string | null; message: string; resume: () => Promise<unknown> }) {
  const { data, error, reload } = useLoad(() => findReached([`/sessions/${session}`, ...(agent ? ([`/agents/${agent}`] as const) : [])]), [session, agent, message]);
  const [text, setText] = useState<string>();
  const limit = data && (text ?? String(suggestion(data)));
  const raise = async () => {
    if (!data) return;
    await patch(`${data.of}/budget`, { [data.kind]: Number(limit) });
    await resume();
  };
  return (
    <div class="budgetstop" role="status">
      <p>{message}</p>
      <ErrorBox error={error} retry={reload} />
      {data === null && <p>Neither the session nor its agent has a limit that is used up: it is your user's or the deployment's, which your operator raises. The next prompt runs then.</p>}
      {data && (
        <div class="row">
          <label>
            {data.of.startsWith("/agents/") ? "The agent's" : "The session's"} new limit in {UNITS[data.kind]}{" "}
            <input type="number" min={0} step={data.kind === "usd" ? "any" : 1} value={limit ?? ""} onInput={(event) => setText(event.currentTarget.value)} />
          </label>
          <Action class="primary" disabled={!(Number(limit) > data.used)} run={raise}>Raise and continue</Action>
        </div>
      )}
    </div>
  );
}
