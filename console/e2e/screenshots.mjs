// Takes a screenshot of every page, in light and dark and at three widths, of a stack with the scripted model.
//   AOD_API_URL=… AOD_API_TOKEN=… node e2e/screenshots.mjs FOLDER
import { mkdirSync } from "node:fs";
import { api, asks, ended, launch, signIn, url } from "./browser.mjs";

const folder = process.argv[2] ?? "screenshots";
mkdirSync(folder, { recursive: true });

async function example() {
  const agents = (await api("GET", "/agents")).data;
  const agent = async (body) => agents.find((each) => each.name === body.name) ?? (await api("POST", "/agents", body));
  const model = "claude-sonnet-4-5";
  const writer = await agent({ name: "Haiku writer", description: "Writes poems about sandboxes", runtime: "claude", model });
  const careful = await agent({ name: "Careful fixer", description: "Asks before it runs a command", runtime: "claude", model, permissions: { default: "allow", rules: [{ tool: "Bash", evaluation: "ask" }] } });
  if (writer.version === 1) await api("PUT", `/agents/${writer.id}`, { version: 1, system: "You write haiku.\nFive, seven, five.", description: "Writes haiku" });
  const shell = await agent({ name: "Nightly script", runtime: "shell", model: "none" });
  const environments = (await api("GET", "/environments")).data;
  const environment = environments[0] ?? (await api("POST", "/environments", { name: "web", packages: { apt: ["ripgrep", "jq"], npm: ["typescript"] }, env_vars: { CI: "1" }, networking: { type: "limited", allowed_hosts: ["*.github.com"] } }));
  const start = async (agent_id, prompt) => (await api("POST", "/sessions", { agent_id, prompt })).id;
  const haiku = await start(writer.id, "write a haiku about sandboxes, and show me the file");
  const failed = await start(shell.id, "echo starting; ls --color=always /; echo 'disk is full' >&2; exit 2");
  const waiting = await start(careful.id, "run: rm -rf /workspace/build && cargo test --workspace");
  const markdown = await start(writer.id, "Here is what I know:\n\n## Findings\n\n- **Two** tests fail\n- `cargo test` takes 40 s\n\n```rust\nfn main() {\n    println!(\"hello\");\n}\n```\n\n| crate | tests |\n| --- | --- |\n| gateway | 47 |\n| auth | 4 |\n\n> Quote of the day");
  const thrifty = await agent({ name: "Thrifty reader", runtime: "claude", model, mcp_servers: [{ name: "docs", url: "https://mcp.example.com/mcp" }] });
  const stopped = (await api("POST", "/sessions", { agent_id: thrifty.id, prompt: "write a haiku", budget: { requests: 2, usd: 5 } })).id;
  await Promise.all([ended(stopped), ended(haiku), ended(failed), ended(markdown), asks(waiting)]);
  await api("POST", `/sessions/${haiku}/prompt`, { prompt: "run: printf '\\033[32mok\\033[0m 1\\n\\033[31mFAILED\\033[0m 2\\n'; exit 3" });
  await api("POST", `/sessions/${waiting}/prompt`, { prompt: "and then run the linter", when_busy: "queue" });
  await ended(haiku);
  return { agent: writer.id, environment: environment.id, thrifty: thrifty.id, haiku, failed, waiting, markdown, stopped };
}

const ids = await example();
const pages = {
  sessions: "/",
  session: `/sessions/${ids.haiku}`,
  waiting: `/sessions/${ids.waiting}`,
  markdown: `/sessions/${ids.markdown}`,
  budget: `/sessions/${ids.stopped}`,
  details: `/sessions/${ids.stopped}#Details`,
  raw: `/sessions/${ids.failed}`,
  new: "/new",
  agents: "/agents",
  agent: `/agents/${ids.agent}`,
  "agent-new": "/agents/new",
  "agent-mcp": `/agents/${ids.thrifty}`,
  environment: `/environments/${ids.environment}`,
  credentials: "/credentials",
  keys: "/keys",
  usage: "/usage",
};
const browser = await launch();
try {
  for (const theme of ["light", "dark"]) {
    const context = await browser.newContext({ colorScheme: theme, reducedMotion: "reduce" });
    const page = await context.newPage();
    for (const [name, width, height] of [["wide", 1280, 800], ["tablet", 820, 1000], ["phone", 390, 780]]) {
      await page.setViewportSize({ width, height });
      if (name === "wide") {
        await page.goto(`${url}/console/`);
        await page.getByLabel("API key").waitFor();
        await page.screenshot({ path: `${folder}/sign-in-${theme}-${name}.png` });
        await signIn(page);
      }
      for (const [title, path] of Object.entries(pages)) {
        const [address, tab] = path.split("#");
        await page.goto(`${url}/console${address}`);
        await page.getByRole("heading", { level: 1 }).waitFor();
        if (tab) await page.getByRole("tab", { name: tab }).click();
        await page.waitForTimeout(900);
        await page.screenshot({ path: `${folder}/${title}-${theme}-${name}.png` });
      }
    }
    await context.close();
  }
} finally {
  await browser.close();
}
