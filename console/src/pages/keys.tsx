import { useEffect, useState } from "preact/hooks";
import { type Key, all, createKey, del, me } from "../api";
import { absolute } from "../format";
import { Action, Ago, Copy, ErrorBox, Field, toast, useLoad } from "../ui";

const DAY_MS = 86_400_000;

export function Keys() {
  const { data, error, reload } = useLoad(() => all<Key>("/api-keys"));
  const [name, setName] = useState("");
  const [own, setOwn] = useState("");
  const [days, setDays] = useState("90");
  const [fresh, setFresh] = useState<string>();
  useEffect(() => {
    document.title = "API keys · Agent on Demand";
  }, []);
  const make = async () => {
    const expires = days ? { expires_at: new Date(Date.now() + Number(days) * DAY_MS).toISOString() } : {};
    const made = await createKey({ name, ...expires }, own.trim());
    setOwn("");
    setFresh(made.key);
    setName("");
    reload();
  };
  return (
    <section class="page" aria-labelledby="title">
      <h1 id="title">API keys</h1>
      <p class="hint">A key lets a program, or a person who signs in with it, do everything that you can do. A new key expires no later than the key that creates it.</p>
      <form class="row keyform" onSubmit={(event) => event.preventDefault()}>
        <Field label="Name"><input maxLength={100} placeholder="What uses it" value={name} onInput={(event) => setName(event.currentTarget.value)} /></Field>
        <Field label="Expires">
          <select value={days} onChange={(event) => setDays(event.currentTarget.value)}>
            <option value="7">in a week</option>
            <option value="90">in 90 days</option>
            <option value="365">in a year</option>
            <option value="">never</option>
          </select>
        </Field>
        <Field label="Your API key"><input type="password" autocomplete="off" placeholder="Creates the new one" value={own} onInput={(event) => setOwn(event.currentTarget.value)} /></Field>
        <Action class="primary" disabled={!name.trim() || !own.trim()} run={make}>Create key</Action>
      </form>
      {fresh && (
        <div class="fresh" role="status">
          <p><strong>Copy the key now.</strong> It is not shown again.</p>
          <div class="row">
            <code>{fresh}</code>
            <Copy text={fresh} />
            <button type="button" class="small" onClick={() => setFresh(undefined)}>Done</button>
          </div>
        </div>
      )}
      <ErrorBox error={error} retry={reload} />
      <ul class="cards">
        {data?.map((key) => {
          const expired = key.expires_at != null && Date.parse(key.expires_at) < Date.now();
          const mine = key.prefix === me.value?.key_prefix;
          return (
            <li class={key.is_active && !expired ? "cardbox" : "cardbox off"} key={key.id}>
              <div class="row">
                <div class="grow">
                  <strong>{key.name || "unnamed"}</strong>{mine && <span class="tag">you are signed in with it</span>}
                  <p class="meta">
                    <code>{key.prefix}…</code> · created <Ago time={key.created_at} /> · {key.last_used_at ? <>used <Ago time={key.last_used_at} /></> : "never used"}
                    {key.expires_at && <> · {expired ? "expired" : "expires"} {absolute(key.expires_at)}</>}
                    {!key.is_active && " · revoked"}
                  </p>
                </div>
                {key.is_active && !expired && (
                  <Action class="small danger-quiet" aria-label={`Revoke ${key.name}`} confirm={mine ? "You are signed in with this key: you will be signed out." : "Programs that use this key are refused from now on."} run={() => del(`/api-keys/${key.id}`).then(() => (toast("Key revoked"), reload()))}>Revoke</Action>
                )}
              </div>
            </li>
          );
        })}
      </ul>
    </section>
  );
}
