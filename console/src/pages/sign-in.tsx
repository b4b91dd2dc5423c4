import { useEffect, useState } from "preact/hooks";
import { signIn, signedOutBecause } from "../api";
import { ErrorBox, Field } from "../ui";

export function SignIn() {
  const [key, setKey] = useState("");
  const [error, setError] = useState<unknown>(null);
  const [busy, setBusy] = useState(false);
  useEffect(() => {
    document.title = "Sign in · Agent on Demand";
  }, []);
  const submit = async (event: Event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      await signIn(key.trim());
    } catch (failure) {
      setError(failure);
    } finally {
      setBusy(false);
    }
  };
  return (
    <main class="signin">
      <form onSubmit={(event) => void submit(event)}>
        <img src="/console/icon.svg" alt="" width="44" height="44" />
        <h1>Agent on Demand</h1>
        {signedOutBecause.value && (
          <p class="note" role="status">You were signed out: {signedOutBecause.value}. Sign in again to continue; sessions keep working.</p>
        )}
        <Field label="API key" hint="The key is exchanged for a cookie and not kept in this browser.">
          <input type="password" name="api-key" autocomplete="current-password" placeholder="aod_…" required autofocus value={key} onInput={(event) => setKey(event.currentTarget.value)} />
        </Field>
        <ErrorBox error={error} />
        <button type="submit" class="primary" disabled={busy || !key.trim()}>{busy ? "Signing in…" : "Sign in"}</button>
        <p class="hint">
          No key yet? <code>aod dev</code> prints one; on a server, an operator makes one with <code>aod admin key create</code>.
        </p>
      </form>
    </main>
  );
}
