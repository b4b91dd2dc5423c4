import { effect, signal } from "@preact/signals";
import { render } from "preact";
import { useEffect } from "preact/hooks";
import { me, signOut, whoAmI } from "./api";
import { AgentPage, Agents } from "./pages/agents";
import { Credentials } from "./pages/credentials";
import { EnvironmentPage, Environments } from "./pages/environments";
import { Keys } from "./pages/keys";
import { NewSession } from "./pages/new-session";
import { SessionPage } from "./pages/session";
import { Sessions } from "./pages/sessions";
import { SignIn } from "./pages/sign-in";
import { Usage } from "./pages/usage";
import { go, href, path } from "./router";
import { Action, Dialog, ErrorBox, Toasts, useLoad } from "./ui";
import "./styles.css";

type Theme = "auto" | "light" | "dark";
const theme = signal<Theme>((localStorage.getItem("theme") as Theme | null) ?? "auto");
effect(() => {
  document.documentElement.dataset.theme = theme.value;
  localStorage.setItem("theme", theme.value);
});
const nextTheme: Record<Theme, Theme> = { auto: "light", light: "dark", dark: "auto" };

const help = signal(false);

const LINKS = [
  ["/", "Sessions"],
  ["/agents", "Agents"],
  ["/environments", "Environments"],
  ["/credentials", "Credentials"],
  ["/keys", "API keys"],
  ["/usage", "Usage"],
] as const;

function Page() {
  const [, first = "", second] = path.value.split("/");
  switch (first) {
    case "":
      return <Sessions />;
    case "sessions":
      return second ? <SessionPage key={second} id={second} /> : <Sessions />;
    case "new":
      return <NewSession />;
    case "agents":
      return second ? <AgentPage key={second} id={second} /> : <Agents />;
    case "environments":
      return second ? <EnvironmentPage key={second} id={second} /> : <Environments />;
    case "credentials":
      return <Credentials />;
    case "keys":
      return <Keys />;
    case "usage":
      return <Usage />;
    default:
      return (
        <div class="empty">
          <h1>There is no such page</h1>
          <p><a href={href("/")}>Show all sessions</a></p>
        </div>
      );
  }
}

const SHORTCUTS: [string, string][] = [
  ["n", "New session"],
  ["s", "All sessions"],
  ["/", "Search the list of sessions"],
  ["j, k", "Next or previous session of the list"],
  ["i", "Write to the agent"],
  ["e", "Go to the end of the transcript"],
  ["Enter", "Send; Shift Enter: new line"],
  ["?", "Show these shortcuts"],
];

function Shell() {
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      if (event.metaKey || event.ctrlKey || event.altKey || event.defaultPrevented) return;
      if (/^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName) || document.querySelector("dialog[open]")) return;
      if (event.key === "n") go("/new");
      else if (event.key === "s") go("/");
      else if (event.key === "?") help.value = true;
      else return;
      event.preventDefault();
    };
    document.addEventListener("keydown", onKey);
    return () => document.removeEventListener("keydown", onKey);
  }, []);
  const section = `/${path.value.split("/")[1] ?? ""}`;
  const active = section === "/sessions" || section === "/new" ? "/" : section;
  return (
    <>
      <a class="skip" href="#main">Skip to the content</a>
      <nav aria-label="Main">
        <a class="brand" href={href("/")}>
          <img src="/console/icon.svg" alt="" width="22" height="22" />
          <span>Agent on Demand</span>
        </a>
        <a class="button primary new" href={href("/new")}>New session</a>
        <div class="links">
          {LINKS.map(([to, label]) => (
            <a key={to} href={href(to)} aria-current={active === to ? "page" : undefined}>{label}</a>
          ))}
        </div>
        <div class="account">
          <span class="who" title={`API key ${me.value?.key_name ?? ""} (${me.value?.key_prefix ?? ""}…)`}>{me.value?.user}</span>
          <button type="button" class="quiet small" onClick={() => (theme.value = nextTheme[theme.value])}>Theme: {theme.value}</button>
          <button type="button" class="quiet small keys" onClick={() => (help.value = true)}>Shortcuts</button>
          <Action class="quiet small" run={signOut}>Sign out</Action>
        </div>
      </nav>
      <main id="main" tabIndex={-1}>
        <Page />
      </main>
      {help.value && (
        <Dialog title="Keyboard shortcuts" close={() => (help.value = false)}>
          <dl class="shortcuts">
            {SHORTCUTS.map(([key, meaning]) => (
              <div key={key}>
                <dt><kbd>{key}</kbd></dt>
                <dd>{meaning}</dd>
              </div>
            ))}
          </dl>
          <div class="row end"><button type="button" onClick={() => (help.value = false)}>Close</button></div>
        </Dialog>
      )}
      <Toasts />
    </>
  );
}

function App() {
  const { error, reload } = useLoad(whoAmI);
  if (me.value === undefined) return error ? <div class="empty"><ErrorBox error={error} retry={reload} /></div> : null;
  return me.value === null ? <SignIn /> : <Shell />;
}

const root = document.getElementById("app");
if (root) render(<App />, root);
