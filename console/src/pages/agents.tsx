import { useEffect, useState } from "preact/hooks";
import { loadAgents } from "../agents-by-id";
import { type Agent, type AgentVersion, type Environment, all, create, get, me, post, put } from "../api";
import { BudgetSection } from "../budget";
import { go, href } from "../router";
import { Action, Age, Empty, ErrorBox, Field, toast, useLoad } from "../ui";
import { BLANK, type Draft, TEMPLATES } from "./agent-templates";
import { CAN_ASK, DEFAULT_MODELS, withoutCredential } from "./runtimes";
import { Versions } from "./versioned";

export function Agents() {
  const { data, error, reload } = useLoad(loadAgents);
  useEffect(() => {
    document.title = "Agents · Agent on Demand";
  }, []);
  return (
    <section class="page" aria-labelledby="title">
      <header class="head">
        <h1 id="title">Agents</h1>
        <span class="grow" />
        <a class="button primary" href={href("/agents/new")}>New agent</a>
      </header>
      <ErrorBox error={error} retry={reload} />
      {data?.length === 0 && (
        <Empty title="No agents yet">
          <p>An agent is a template: a runtime, a model, instructions, tools and what it may do without asking. Sessions are started from it.</p>
        </Empty>
      )}
      <ul class="cards">
        {data?.map((agent) => (
          <li key={agent.id}>
            <a class="cardlink" href={href(`/agents/${agent.id}`)}>
              <strong>{agent.name}</strong>
              <span class="hint">{agent.description}</span>
              <span class="meta">{agent.runtime} · {agent.model} · version {agent.version} · <Age time={agent.updated_at} /></span>
            </a>
          </li>
        ))}
      </ul>
    </section>
  );
}

export function AgentPage({ id }: { id: string }) {
  const isNew = id === "new";
  const [template, setTemplate] = useState(BLANK);
  const { data, error, reload } = useLoad(async () => {
    const environments = await all<Environment>("/environments");
    if (isNew) return { environments, agent: undefined, versions: [] };
    const [agent, versions] = await Promise.all([get<Agent>(`/agents/${id}`), all<AgentVersion>(`/agents/${id}/versions`)]);
    return { environments, agent, versions };
  }, [id]);
  useEffect(() => {
    document.title = `${data?.agent?.name ?? "New agent"} · Agent on Demand`;
  }, [data?.agent?.name]);
  return (
    <section class="page" aria-labelledby="title">
      <header class="head">
        <a class="back" href={href("/agents")} aria-label="All agents">←</a>
        <h1 id="title">{isNew ? "New agent" : (data?.agent?.name ?? "Agent")}</h1>
        <span class="grow" />
        {data?.agent && !data.agent.archived_at && (
          <Action class="small danger-quiet" confirm="An archived agent starts no more sessions. Its sessions continue." run={() => post(`/agents/${id}/archive`).then(() => (toast("Agent archived"), go("/agents")))}>Archive</Action>
        )}
      </header>
      <ErrorBox error={error} retry={reload} />
      {data?.agent?.archived_at && <p class="warn">This agent is archived: it starts no more sessions and cannot be changed.</p>}
      {data?.agent && <McpWarning agent={data.agent} />}
      {isNew && (
        <div role="group" aria-label="Start from" class="templates">
          {TEMPLATES.filter(({ draft }) => !draft.runtime || me.value?.runtimes.includes(draft.runtime)).map((each) => (
            <button type="button" key={each.title} aria-pressed={each === template} onClick={() => setTemplate(each)}>
              <strong>{each.title}</strong>
              <span class="hint">{each.about}</span>
            </button>
          ))}
        </div>
      )}
      {data && <AgentForm key={`${id} ${data.agent?.version} ${template.title}`} agent={data.agent} draft={data.agent ?? template.draft} environments={data.environments} done={reload} />}
      {data?.agent && <BudgetSection of={`/agents/${id}`} />}
      {data?.agent && <Versions versions={data.versions} />}
    </section>
  );
}

const json = (value: unknown): string => JSON.stringify(value ?? [], null, 2);

/** Says which MCP servers are called without a credential. */
export function McpWarning({ agent }: { agent: Agent }) {
  const servers = withoutCredential(agent);
  if (servers.length === 0) return null;
  return (
    <p class="warn" role="note">
      {servers.length === 1 ? `The MCP server ${servers[0]} has` : `The MCP servers ${servers.join(", ")} have`} no credential: requests to it carry no header. If it wants one, add <code>headers</code> to the agent.
    </p>
  );
}

/** `agent`: the one that is changed, `draft`: what the fields hold first. */
function AgentForm({ agent, draft, environments, done }: { agent?: Agent; draft: Draft; environments: Environment[]; done: () => void }) {
  const runtimes = me.value?.runtimes ?? [];
  const [name, setName] = useState(draft.name ?? "");
  const [description, setDescription] = useState(draft.description ?? "");
  const [runtime, setRuntime] = useState(draft.runtime ?? runtimes[0] ?? "claude");
  const [model, setModel] = useState(draft.model ?? "");
  const [system, setSystem] = useState(draft.system ?? "");
  const [environment, setEnvironment] = useState(draft.environment_id ?? "");
  const [permission, setPermission] = useState<string>(draft.permissions?.default ?? "allow");
  const [rules, setRules] = useState(json(draft.permissions?.rules));
  const [servers, setServers] = useState(json(draft.mcp_servers));
  const [skills, setSkills] = useState(json(draft.skills));
  const [error, setError] = useState<unknown>(null);
  const [key] = useState(() => crypto.randomUUID());
  const asks = CAN_ASK.has(runtime);
  const save = async () => {
    setError(null);
    const parse = (label: string, text: string): unknown => {
      try {
        return JSON.parse(text || "[]");
      } catch {
        throw new Error(`${label}: not valid JSON`);
      }
    };
    try {
      const old = (agent?.permissions ?? {}) as object;
      const body = {
        name,
        description,
        runtime,
        model: model || DEFAULT_MODELS[runtime] || "default",
        system,
        environment_id: environment || null,
        mcp_servers: parse("MCP servers", servers),
        skills: parse("Skills", skills),
        ...(asks && { permissions: { ...old, default: permission, rules: parse("Rules", rules) } }),
      };
      if (agent) {
        await put(`/agents/${agent.id}`, { ...body, version: agent.version });
        toast("Saved");
        done();
      } else {
        const { id } = await create<{ id: string }>("/agents", body, key);
        go(`/agents/${id}`, true);
      }
    } catch (failure) {
      setError(failure);
    }
  };
  return (
    <form class="form" onSubmit={(event) => (event.preventDefault(), void save())}>
      <fieldset disabled={!!agent?.archived_at} class="plain">
        <div class="grid2">
          <Field label="Name"><input required maxLength={200} value={name} onInput={(event) => setName(event.currentTarget.value)} /></Field>
          <Field label="Description"><input value={description} onInput={(event) => setDescription(event.currentTarget.value)} /></Field>
          <Field label="Runtime">
            <select value={runtime} onChange={(event) => setRuntime(event.currentTarget.value)}>
              {runtimes.map((each) => <option key={each}>{each}</option>)}
            </select>
          </Field>
          <Field label="Model"><input placeholder={DEFAULT_MODELS[runtime]} value={model} onInput={(event) => setModel(event.currentTarget.value)} /></Field>
          <Field label="Environment">
            <select value={environment} onChange={(event) => setEnvironment(event.currentTarget.value)}>
              <option value="">None</option>
              {environments.map((each) => <option key={each.id} value={each.id}>{each.name}</option>)}
            </select>
          </Field>
          {asks && (
            <Field label="When it wants to use a tool" hint="Rules below decide first.">
              <select value={permission} onChange={(event) => setPermission(event.currentTarget.value)}>
                <option value="allow">Allow</option>
                <option value="ask">Ask you</option>
                <option value="deny">Deny</option>
              </select>
            </Field>
          )}
        </div>
        <Field label="Instructions" hint="The system prompt of every turn."><textarea rows={4} value={system} onInput={(event) => setSystem(event.currentTarget.value)} /></Field>
        <details class="options" open={!agent && !!(draft.mcp_servers ?? draft.permissions)}>
          <summary>Rules, MCP servers, skills</summary>
          {asks && <Field label="Rules" hint={'For example [{"tool": "Bash", "evaluation": "ask"}]. The first rule that names a tool decides.'}><textarea class="code" rows={3} spellcheck={false} value={rules} onInput={(event) => setRules(event.currentTarget.value)} /></Field>}
          <Field label="MCP servers" hint={'For example [{"name": "docs", "url": "https://example.com/mcp", "headers": {"Authorization": "Bearer …"}}]. Values shown as *** are kept.'}><textarea class="code" rows={4} spellcheck={false} value={servers} onInput={(event) => setServers(event.currentTarget.value)} /></Field>
          <Field label="Skills" hint={'For example [{"name": "style", "description": "House style", "content": "…"}].'}><textarea class="code" rows={4} spellcheck={false} value={skills} onInput={(event) => setSkills(event.currentTarget.value)} /></Field>
        </details>
        <ErrorBox error={error} />
        <div class="row end"><button type="submit" class="primary">{agent ? "Save as a new version" : "Create agent"}</button></div>
      </fieldset>
    </form>
  );
}
