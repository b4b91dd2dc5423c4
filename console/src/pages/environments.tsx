import { useEffect, useState } from "preact/hooks";
import { type Environment, all, create, del, get, post, put } from "../api";
import { go, href } from "../router";
import { Action, Age, Empty, ErrorBox, Field, toast, useLoad } from "../ui";
import { type Version, Versions } from "./versioned";

const MANAGERS = ["apt", "cargo", "gem", "go", "npm", "pip"] as const;

export function Environments() {
  const { data, error, reload } = useLoad(() => all<Environment>("/environments"));
  useEffect(() => {
    document.title = "Environments · Agent on Demand";
  }, []);
  return (
    <section class="page" aria-labelledby="title">
      <header class="head">
        <h1 id="title">Environments</h1>
        <span class="grow" />
        <a class="button primary" href={href("/environments/new")}>New environment</a>
      </header>
      <ErrorBox error={error} retry={reload} />
      {data?.length === 0 && (
        <Empty title="No environments yet">
          <p>An environment says how a sandbox is set up: packages, variables, a script, and which hosts it may reach.</p>
        </Empty>
      )}
      <ul class="cards">
        {data?.map((environment) => (
          <li key={environment.id}>
            <a class="cardlink" href={href(`/environments/${environment.id}`)}>
              <strong>{environment.name}</strong>
              <span class="hint">{summary(environment)}</span>
              <span class="meta">version {environment.version} · <Age time={environment.updated_at} /></span>
            </a>
          </li>
        ))}
      </ul>
    </section>
  );
}

function summary(environment: Environment): string {
  const packages = Object.values((environment.packages ?? {}) as Record<string, string[]>).flat();
  const networking = environment.networking as { type?: string; allowed_hosts?: string[] | null };
  return [packages.slice(0, 6).join(", "), networking?.type === "limited" ? `may reach ${networking.allowed_hosts?.join(", ") || "nothing"}` : ""].filter(Boolean).join(" · ");
}

export function EnvironmentPage({ id }: { id: string }) {
  const isNew = id === "new";
  const { data, error, reload } = useLoad(async () => {
    if (isNew) return { environment: undefined, versions: [] as Version[] };
    const [environment, versions] = await Promise.all([get<Environment>(`/environments/${id}`), all<Version>(`/environments/${id}/versions`)]);
    return { environment, versions };
  }, [id]);
  useEffect(() => {
    document.title = `${data?.environment?.name ?? "New environment"} · Agent on Demand`;
  }, [data?.environment?.name]);
  const environment = data?.environment;
  return (
    <section class="page" aria-labelledby="title">
      <header class="head">
        <a class="back" href={href("/environments")} aria-label="All environments">←</a>
        <h1 id="title">{isNew ? "New environment" : (environment?.name ?? "Environment")}</h1>
        <span class="grow" />
        {environment && !environment.archived_at && (
          <Action class="small danger-quiet" confirm="An archived environment is used by no new session." run={() => post(`/environments/${id}/archive`).then(() => (toast("Environment archived"), go("/environments")))}>Archive</Action>
        )}
        {environment && (
          <Action class="small danger-quiet" confirm="This deletes the environment with all its versions. It is refused while a session refers to it." run={() => del(`/environments/${id}/delete`).then(() => (toast("Environment deleted"), go("/environments")))}>Delete</Action>
        )}
      </header>
      <ErrorBox error={error} retry={reload} />
      {environment?.archived_at && <p class="warn">This environment is archived: no new session uses it, and it cannot be changed.</p>}
      {data && <EnvironmentForm key={`${id} ${environment?.version}`} environment={environment} done={reload} />}
      {environment && <Versions versions={data.versions} />}
    </section>
  );
}

function EnvironmentForm({ environment, done }: { environment?: Environment; done: () => void }) {
  const networking = (environment?.networking ?? { type: "unrestricted" }) as { type: string; allowed_hosts?: string[] | null };
  const [name, setName] = useState(environment?.name ?? "");
  const [packages, setPackages] = useState<Record<string, string>>(() => Object.fromEntries(Object.entries((environment?.packages ?? {}) as Record<string, string[]>).map(([manager, names]) => [manager, names.join(" ")])));
  const [script, setScript] = useState(environment?.setup_script ?? "");
  const [limited, setLimited] = useState(networking.type === "limited");
  const [hosts, setHosts] = useState((networking.allowed_hosts ?? []).join("\n"));
  const [variables, setVariables] = useState("");
  const [error, setError] = useState<unknown>(null);
  const [key] = useState(() => crypto.randomUUID());
  const names = environment?.env_var_names ?? [];
  const save = async () => {
    setError(null);
    const words = (text: string) => text.split(/\s+/).filter(Boolean);
    const pairs = variables.split("\n").filter((line) => line.includes("=")).map((line) => [line.slice(0, line.indexOf("=")).trim(), line.slice(line.indexOf("=") + 1)]);
    const body = {
      name,
      packages: Object.fromEntries(MANAGERS.map((manager) => [manager, words(packages[manager] ?? "")]).filter(([, list]) => (list as string[]).length > 0)),
      setup_script: script,
      networking: limited ? { type: "limited", allowed_hosts: words(hosts) } : { type: "unrestricted" },
      ...(pairs.length > 0 && { env_vars: Object.fromEntries(pairs) }),
    };
    try {
      if (environment) {
        await put(`/environments/${environment.id}`, { ...body, version: environment.version });
        toast("Saved");
        done();
      } else {
        const { id } = await create<{ id: string }>("/environments", body, key);
        go(`/environments/${id}`, true);
      }
    } catch (failure) {
      setError(failure);
    }
  };
  return (
    <form class="form" onSubmit={(event) => (event.preventDefault(), void save())}>
      <fieldset disabled={!!environment?.archived_at} class="plain">
        <Field label="Name"><input required maxLength={200} value={name} onInput={(event) => setName(event.currentTarget.value)} /></Field>
        <fieldset>
          <legend>Packages</legend>
          <div class="grid2">
            {MANAGERS.map((manager) => (
              <Field key={manager} label={manager}><input placeholder="names, separated by spaces" value={packages[manager] ?? ""} onInput={(event) => setPackages({ ...packages, [manager]: event.currentTarget.value })} /></Field>
            ))}
          </div>
        </fieldset>
        <Field label="Set-up script" hint="Runs once, with bash, before the agent starts."><textarea class="code" rows={5} spellcheck={false} value={script} onInput={(event) => setScript(event.currentTarget.value)} /></Field>
        <Field label="Variables" hint={names.length > 0 ? `Set now: ${names.join(", ")}. Values are never shown; what you write here replaces all of them.` : "NAME=value, one for each line. Values are stored encrypted and never shown again."}>
          <textarea class="code" rows={3} spellcheck={false} placeholder="NAME=value" value={variables} onInput={(event) => setVariables(event.currentTarget.value)} />
        </Field>
        <label class="check"><input type="checkbox" checked={limited} onChange={(event) => setLimited(event.currentTarget.checked)} /> Limit which hosts the sandbox may reach</label>
        {limited && <Field label="Allowed hosts" hint="One for each line; *.example.com allows every subdomain."><textarea class="code" rows={3} value={hosts} onInput={(event) => setHosts(event.currentTarget.value)} /></Field>}
        <ErrorBox error={error} />
        <div class="row end"><button type="submit" class="primary">{environment ? "Save as a new version" : "Create environment"}</button></div>
      </fieldset>
    </form>
  );
}
