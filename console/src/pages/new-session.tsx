import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { loadAgents } from "../agents-by-id";
import { type Credential, type Environment, type Page, type Session, all, create, get, me, words } from "../api";
import { go, href } from "../router";
import { Copy, ErrorBox, Field, useLoad } from "../ui";
import { McpWarning } from "./agents";
import { DEFAULT_MODELS, PROVIDERS } from "./runtimes";

interface Secret {
  name: string;
  value: string;
}

const NEW = "new";

export function NewSession() {
  const runtimes = me.value?.runtimes ?? [];
  const { data, error } = useLoad(async () => {
    const [agents, environments, credentials, last] = await Promise.all([
      loadAgents(),
      all<Environment>("/environments"),
      get<Page<Credential>>("/credentials"),
      get<Page<Session>>("/sessions?limit=1"),
    ]);
    return { agents, environments, kinds: new Set(credentials.data.map((credential) => credential.kind)), last: last.data[0] };
  });
  const [agentId, setAgentId] = useState("");
  const [runtime, setRuntime] = useState(runtimes.includes("claude") ? "claude" : (runtimes[0] ?? "claude"));
  const [model, setModel] = useState("");
  const [prompt, setPrompt] = useState("");
  const [environment, setEnvironment] = useState("");
  const [repository, setRepository] = useState("");
  const [branch, setBranch] = useState("");
  const [token, setToken] = useState("");
  const [secrets, setSecrets] = useState<Secret[]>([]);
  const [timeout, setTimeoutSeconds] = useState("");
  const [budget, setBudget] = useState("");
  const [busy, setBusy] = useState(false);
  const [failure, setFailure] = useState<unknown>(null);
  const [language, setLanguage] = useState<"curl" | "python">("curl");
  const keys = useRef({ agent: crypto.randomUUID(), session: crypto.randomUUID(), body: "" });
  useEffect(() => {
    document.title = "New session · Agent on Demand";
  }, []);
  useEffect(() => {
    if (!data) return;
    const used = data.agents.find((agent) => agent.id === data.last?.agent_id);
    setAgentId((used ?? data.agents[0])?.id ?? NEW);
  }, [data]);

  const chosenModel = model.trim() || DEFAULT_MODELS[runtime] || "default";
  const newAgent = { name: `${runtime} · ${chosenModel.split("/").at(-1)}`, runtime, model: chosenModel };
  const body = useMemo(() => {
    const named = secrets.filter((secret) => secret.name);
    return {
      prompt,
      ...(environment && { environment_id: environment }),
      ...(timeout && { timeout: Number(timeout) }),
      ...(budget && { budget: { usd: Number(budget) } }),
      ...(repository && {
        resources: [{ type: "github_repository", url: repository, ...(branch && { checkout: { type: "branch", name: branch } }), ...(token && { authorization_token: token }) }],
      }),
      ...(named.length > 0 && { secret_env_vars: Object.fromEntries(named.map((secret) => [secret.name, secret.value])) }),
    };
  }, [prompt, environment, timeout, budget, repository, branch, token, secrets]);
  const agent = data?.agents.find((each) => each.id === agentId);
  const usedRuntime = agent?.runtime ?? runtime;
  const missing = data && PROVIDERS[usedRuntime]?.length && !PROVIDERS[usedRuntime]?.some((kind) => data.kinds.has(kind));

  const submit = async (event: Event) => {
    event.preventDefault();
    if (!prompt.trim() || busy) return;
    setBusy(true);
    setFailure(null);
    // A repetition after a lost answer starts nothing twice; changed fields are another request.
    const now = JSON.stringify([agentId, newAgent, body]);
    if (keys.current.body !== now) keys.current = { agent: crypto.randomUUID(), session: crypto.randomUUID(), body: now };
    try {
      const agent = agentId === NEW ? (await create<{ id: string }>("/agents", newAgent, keys.current.agent)).id : agentId;
      const session = await create<{ id: string }>("/sessions", { agent_id: agent, ...body }, keys.current.session);
      go(`/sessions/${session.id}`);
    } catch (error) {
      setFailure(error);
      setBusy(false);
    }
  };
  const shownBody = {
    agent_id: agentId === NEW ? "$AGENT_ID" : agentId,
    ...body,
    ...(body.resources && { resources: body.resources.map((each) => ({ ...each, ...("authorization_token" in each && { authorization_token: "…" }) })) }),
    ...(body.secret_env_vars && { secret_env_vars: Object.fromEntries(Object.keys(body.secret_env_vars).map((name) => [name, "…"])) }),
  };
  const snippet = language === "curl" ? curl(shownBody, agentId === NEW ? newAgent : undefined) : python(shownBody, agentId === NEW ? newAgent : undefined);

  return (
    <section class="page" aria-labelledby="title">
      <h1 id="title">New session</h1>
      <ErrorBox error={error} />
      <form class="form" onSubmit={(event) => void submit(event)}>
        <Field label="What should the agent do?">
          <textarea name="prompt" rows={5} autofocus required placeholder="For example: clone the repository, run the tests and fix what fails" value={prompt} onInput={(event) => setPrompt(event.currentTarget.value)} onKeyDown={(event) => event.key === "Enter" && (event.metaKey || event.ctrlKey) && void submit(event)} />
        </Field>
        <div class="grid2">
          <Field label="Agent">
            <select name="agent" value={agentId} onChange={(event) => setAgentId(event.currentTarget.value)}>
              {data?.agents.map((agent) => <option key={agent.id} value={agent.id}>{agent.name} ({agent.runtime})</option>)}
              <option value={NEW}>New agent…</option>
            </select>
          </Field>
          <Field label="Environment">
            <select name="environment" value={environment} onChange={(event) => setEnvironment(event.currentTarget.value)}>
              <option value="">The agent's own</option>
              {data?.environments.map((each) => <option key={each.id} value={each.id}>{each.name}</option>)}
            </select>
          </Field>
        </div>
        {agentId === NEW && (
          <div class="grid2">
            <Field label="Runtime">
              <select name="runtime" value={runtime} onChange={(event) => setRuntime(event.currentTarget.value)}>
                {runtimes.map((each) => <option key={each}>{each}</option>)}
              </select>
            </Field>
            <Field label="Model">
              <input name="model" placeholder={DEFAULT_MODELS[runtime] ?? "any"} value={model} onInput={(event) => setModel(event.currentTarget.value)} />
            </Field>
          </div>
        )}
        {missing && (
          <p class="warn" role="note">No key for {usedRuntime} is stored. <a href={href("/credentials")}>Store one</a>, or pass it as a secret below.</p>
        )}
        {agent && <McpWarning agent={agent} />}
        <details class="options">
          <summary>Repository, secrets, budget, time limit</summary>
          <div class="grid2">
            <Field label="GitHub repository"><input type="url" placeholder="https://github.com/owner/repo" value={repository} onInput={(event) => setRepository(event.currentTarget.value)} /></Field>
            <Field label="Branch"><input placeholder="the default branch" value={branch} onInput={(event) => setBranch(event.currentTarget.value)} /></Field>
            <Field label="Access token" hint="Only for a private repository. Stored encrypted and never shown again."><input type="password" autocomplete="off" value={token} onInput={(event) => setToken(event.currentTarget.value)} /></Field>
            <Field label="Time limit of a turn, in seconds"><input type="number" min={10} max={3600} placeholder={String(me.value?.default_timeout ?? 600)} value={timeout} onInput={(event) => setTimeoutSeconds(event.currentTarget.value)} /></Field>
            <Field label="Budget of the session, in US dollars" hint="It stops there, and continues once you raise it."><input type="number" min={0} step="any" placeholder="the deployment's default" value={budget} onInput={(event) => setBudget(event.currentTarget.value)} /></Field>
          </div>
          <fieldset>
            <legend>Secret environment variables</legend>
            <p class="hint">Stored encrypted, visible to the agent, never shown again.</p>
            {secrets.map((secret, at) => (
              <div class="row" key={at}>
                <input aria-label="Name" placeholder="NAME" value={secret.name} onInput={(event) => setSecrets(secrets.with(at, { ...secret, name: event.currentTarget.value }))} />
                <input aria-label="Value" placeholder="value" type="password" autocomplete="off" value={secret.value} onInput={(event) => setSecrets(secrets.with(at, { ...secret, value: event.currentTarget.value }))} />
                <button type="button" class="small quiet" onClick={() => setSecrets(secrets.toSpliced(at, 1))}>Remove</button>
              </div>
            ))}
            <button type="button" class="small" onClick={() => setSecrets([...secrets, { name: "", value: "" }])}>Add a variable</button>
          </fieldset>
        </details>
        {failure != null && <div class="errorbox" role="alert"><span>{words(failure)}</span></div>}
        <div class="row end"><button type="submit" class="primary" disabled={busy || !prompt.trim() || !data}>{busy ? "Starting…" : "Start session"}</button></div>
      </form>
      <section class="ascode" aria-label="The same as code">
        <div class="row">
          <h2>The same as code</h2>
          <span class="grow" />
          <div class="chips" role="group" aria-label="Language">
            <button type="button" class="chip" aria-pressed={language === "curl"} onClick={() => setLanguage("curl")}>curl</button>
            <button type="button" class="chip" aria-pressed={language === "python"} onClick={() => setLanguage("python")}>Python</button>
          </div>
          <Copy text={snippet} />
        </div>
        <pre class="snippet" tabIndex={0} role="region" aria-label="Code">{snippet}</pre>
      </section>
    </section>
  );
}

/** As one word of a shell. */
const quoted = (text: string): string => `'${text.replaceAll("'", `'\\''`)}'`;

function curl(body: object, agent?: object): string {
  const call = (path: string, data: string) => `curl -s ${location.origin}${path} \\\n  -H "Authorization: Bearer $AOD_API_TOKEN" \\\n  -d ${data}`;
  const session = quoted(JSON.stringify(body, null, 2)).replace('"$AGENT_ID"', `"'"$AGENT_ID"'"`);
  return agent ? `AGENT_ID=$(${call("/agents", quoted(JSON.stringify(agent)))} | jq -r .id)\n\n${call("/sessions", session)}` : call("/sessions", session);
}

function literal(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (value && typeof value === "object") return `{${Object.entries(value).map(([key, each]) => `${JSON.stringify(key)}: ${literal(each)}`).join(", ")}}`;
  return JSON.stringify(value);
}

function python(body: Record<string, unknown>, agent?: Record<string, unknown>): string {
  const lines = (of: Record<string, unknown>) => Object.entries(of).map(([key, value]) => `    ${key}=${value === "$AGENT_ID" ? "str(agent.id)" : literal(value)},\n`).join("");
  return `# pip install aod-sdk; reads AOD_API_URL and AOD_API_TOKEN\nfrom aod import Client\n\nclient = Client()\n${agent ? `agent = client.agents.create(\n${lines(agent)})\n` : ""}session = client.sessions.create(\n${lines(body)})\nwith client.sessions.stream(str(session.id)) as events:\n    for event in events:\n        print(event.type, event.extra)\n`;
}
