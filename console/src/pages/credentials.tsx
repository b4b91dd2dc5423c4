import { useEffect, useState } from "preact/hooks";
import { type Credential, type Page, del, get, put } from "../api";
import { Action, Ago, ErrorBox, toast, useLoad } from "../ui";

const KINDS: [string, string, string][] = [
  ["provider:anthropic", "Anthropic", "For claude, and for opencode with Anthropic's models"],
  ["runtime_token:claude-oauth", "Claude subscription token", "For claude, instead of a key of Anthropic"],
  ["provider:openai", "OpenAI", "For codex, and for opencode with OpenAI's models"],
  ["provider:google", "Google", "For gemini, and for opencode with Google's models"],
  ["backend:sprites", "Sprites", "The account in which your sandboxes run"],
];

export function Credentials() {
  const { data, error, reload } = useLoad(() => get<Page<Credential>>("/credentials"));
  useEffect(() => {
    document.title = "Credentials · Agent on Demand";
  }, []);
  return (
    <section class="page" aria-labelledby="title">
      <h1 id="title">Credentials</h1>
      <p class="hint">Keys with which your agents call models. They are stored encrypted and can be replaced or deleted, but never read again.</p>
      <ErrorBox error={error} retry={reload} />
      <ul class="cards">
        {data && KINDS.map(([kind, name, use]) => <Kind key={kind} kind={kind} name={name} use={use} stored={data.data.find((each) => each.kind === kind)} reload={reload} />)}
      </ul>
    </section>
  );
}

function Kind({ kind, name, use, stored, reload }: { kind: string; name: string; use: string; stored?: Credential; reload: () => void }) {
  const [value, setValue] = useState<string>();
  const save = async () => {
    await put(`/credentials/${kind}`, { value });
    setValue(undefined);
    toast(`${name}: stored`);
    reload();
  };
  return (
    <li class="cardbox">
      <div class="row">
        <div class="grow">
          <strong>{name}</strong>
          <p class="hint">{use}</p>
          <p class="meta">{stored ? <>ends in <code>{stored.hint}</code> · stored <Ago time={stored.updated_at} /></> : "not stored"}</p>
        </div>
        {value === undefined && <button type="button" class="small" aria-label={`${stored ? "Replace" : "Store"} ${name}`} onClick={() => setValue("")}>{stored ? "Replace" : "Store"}</button>}
        {stored && value === undefined && <Action class="small danger-quiet" aria-label={`Delete ${name}`} confirm={`New sessions cannot use ${name} any more.`} run={() => del(`/credentials/${kind}`).then(reload)}>Delete</Action>}
      </div>
      {value !== undefined && (
        <form class="row" onSubmit={(event) => event.preventDefault()}>
          <input class="grow" type="password" autocomplete="off" aria-label={`Value of ${name}`} value={value} onInput={(event) => setValue(event.currentTarget.value)} autofocus />
          <Action class="primary" disabled={!value} run={save}>Save</Action>
          <button type="button" onClick={() => setValue(undefined)}>Cancel</button>
        </form>
      )}
    </li>
  );
}
