// Uses the console in a real browser on a stack with the scripted model, as a person does. Prints a line for each check; exits 1 at the first
// that fails. `PIDS_OF_GATEWAYS` is a command that prints the gateways' process ids.
//   AOD_API_URL=… AOD_API_TOKEN=… node e2e/console.mjs
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { api, asks, ended, launch, signIn, until, url } from "./browser.mjs";

const axe = readFileSync(new URL("../node_modules/axe-core/axe.min.js", import.meta.url), "utf8");
const READY = process.env.AOD_READY_FILE;
const browser = await launch();
const context = await browser.newContext({ viewport: { width: 1200, height: 800 } });
const page = await context.newPage();
// Agents start in seconds, but not on a machine that runs all other tests too.
page.setDefaultTimeout(60_000);
const problems = [];
page.on("pageerror", (error) => problems.push(`exception: ${error.message}`));
page.on("console", (message) => {
  if (/Content Security Policy|TrustedHTML|TrustedScript/i.test(message.text())) problems.push(message.text());
});
page.on("dialog", (dialog) => {
  problems.push(`a dialog opened: ${dialog.message()}`);
  void dialog.dismiss();
});
const hosts = new Set();
let scriptBytes = 0;
page.on("request", (request) => hosts.add(new URL(request.url()).origin));
page.on("response", (response) => {
  if (response.url().endsWith(".js")) scriptBytes = Number(response.headers()["content-length"] ?? 0);
});

async function accessible(name) {
  // In a world of its own: the page's policy does not apply to it.
  const session = await context.newCDPSession(page);
  const { frameTree } = await session.send("Page.getFrameTree");
  const { executionContextId } = await session.send("Page.createIsolatedWorld", { frameId: frameTree.frame.id });
  const evaluate = (expression) => session.send("Runtime.evaluate", { expression, contextId: executionContextId, awaitPromise: true, returnByValue: true });
  await evaluate(axe);
  const { result } = await evaluate("axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa'] }).then((found) => found.violations.filter((each) => ['serious', 'critical'].includes(each.impact)).map((each) => each.id + ': ' + each.nodes.map((node) => node.html.slice(0, 160)).slice(0, 3).join(' | ')))");
  assert.deepEqual(result.value, [], `axe on ${name}`);
  await session.detach();
}

const open = async (id) => {
  await page.goto(`${url}/console/sessions/${id}`);
  await page.getByRole("heading", { level: 1 }).waitFor();
};
async function downloaded(format) {
  const download = page.waitForEvent("download", { timeout: 300_000 });
  await page.getByRole("button", { name: `Download as ${format}` }).click();
  const file = await download;
  return { name: file.suggestedFilename(), text: readFileSync(await file.path(), "utf8") };
}
const composer = () => page.getByLabel("Message to the agent");
const checks = {
  async "a wrong key is refused, and a right one signs in"() {
    await page.goto(`${url}/console/`);
    await accessible("sign-in");
    await page.getByLabel("API key").fill(`aod_${"x".repeat(43)}`);
    await page.getByRole("button", { name: "Sign in" }).click();
    await page.getByText("Invalid API key").waitFor();
    await signIn(page);
    const cookies = await context.cookies();
    const cookie = cookies.find((each) => each.name === "aod_console");
    assert.ok(cookie.httpOnly && cookie.sameSite === "Strict" && cookie.expires > Date.now() / 1000);
    const stored = await page.evaluate(() => JSON.stringify({ ...localStorage, ...sessionStorage }) + document.cookie);
    assert.ok(!stored.includes("aod_"), stored);
    assert.ok(scriptBytes > 0 && scriptBytes < 150_000, `${scriptBytes} bytes of script`);
    console.log(`    scripts of the first view: ${scriptBytes} bytes`);
  },
  async "the cookie alone calls nothing: the header of the console is needed"() {
    const statuses = await page.evaluate(async () => {
      const status = async (headers) => (await fetch("/sessions?limit=1", { headers })).status;
      return [await status({}), await status({ "X-Aod-Console": "1" })];
    });
    assert.deepEqual(statuses, [401, 200]);
  },
  async "a session starts in seconds, and is shown in the order of its events"() {
    await page.goto(`${url}/console/`);
    await page.getByRole("button", { name: "Terminated" }).click();
    await page.getByText("No session matches").waitFor();
    await accessible("an empty list");
    await page.getByRole("button", { name: "Show all sessions" }).click();
    const begun = Date.now();
    await page.getByRole("link", { name: "New session" }).click();
    await page.getByRole("combobox", { name: "Agent" }).selectOption("new");
    await page.getByLabel("What should the agent do?").fill("write a haiku");
    await page.getByRole("button", { name: "Start session" }).click();
    await page.getByRole("log", { name: "Transcript" }).waitFor();
    console.log(`    from the list to the started session: ${Date.now() - begun} ms`);
    await page.getByLabel("Write: done").getByText("/workspace/haiku.txt").first().waitFor();
    // All of the new file.
    await page.getByLabel("Write: done").getByText("+3", { exact: true }).waitFor();
    await page.getByText("a frog jumps into the shell").first().waitFor();
    await page.getByText("Turn complete").waitFor();
    const order = await page.locator(".item").evaluateAll((items) => items.map((item) => Number(item.dataset.key)));
    assert.deepEqual(order, [...order].sort((a, b) => a - b), "events are in their order");
    await accessible("a session");
  },
  async "a message is queued, changed and withdrawn; the agent is stopped"() {
    await composer().fill("run: tail -f /dev/null");
    await composer().press("Enter");
    await page.locator(".status.running").waitFor();
    await composer().fill("a queued message");
    await composer().press("Enter");
    const queue = page.getByRole("list", { name: "Queued messages" });
    await queue.getByText("a queued message").waitFor();
    await queue.getByRole("button", { name: "Edit" }).click();
    await page.getByLabel("Queued message", { exact: true }).fill("a changed message");
    await queue.getByRole("button", { name: "Save" }).click();
    await queue.getByText("a changed message").waitFor();
    await queue.getByRole("button", { name: "Remove" }).click();
    await queue.waitFor({ state: "detached" });
    await page.getByRole("button", { name: "Stop", exact: true }).click();
    await page.getByText("Stopped by you").waitFor();
    await page.locator(".status.completed").waitFor();
  },
  async "the list of sessions is polled cheaply, and shows what others start"() {
    await page.goto(`${url}/console/`);
    await page.getByText("Up to date").waitFor();
    const unchanged = () => page.waitForResponse((response) => /\/sessions\?limit=/.test(response.url()) && response.status() === 304);
    const first = await unchanged();
    assert.equal((await first.body().catch(() => "")).length, 0);
    const agent = await api("POST", "/agents", { name: "Elsewhere", runtime: "claude", model: "claude-sonnet-4-5" });
    const { id } = await api("POST", "/sessions", { agent_id: agent.id, prompt: "started by a program" });
    await page.getByText("started by a program").waitFor();
    await ended(id);
    await page.getByRole("link", { name: "started by a program" }).getByText("Idle").waitFor();
    await unchanged();
  },
  async "a permission request shows in list and title, and is answered in place"() {
    const agent = await api("POST", "/agents", { name: "Asks first", runtime: "claude", model: "claude-sonnet-4-5", permissions: { rules: [{ tool: "Bash", evaluation: "ask" }] } });
    const { id } = await api("POST", "/sessions", { agent_id: agent.id, prompt: "run: echo allowed-by-hand" });
    await asks(id);
    await page.goto(`${url}/console/`);
    await page.getByText("Waits for a decision on Bash").waitFor();
    assert.match(await page.title(), /^\(1\)/);
    await page.getByText("Waits for a decision on Bash").click();
    await page.getByText("May the agent use Bash?").waitFor();
    assert.match(await page.title(), /^\(1\) Needs you/);
    await accessible("a permission request");
    await page.getByRole("button", { name: "Allow", exact: true }).click();
    await page.getByLabel("Output of Bash").getByText("allowed-by-hand").waitFor();
    await page.getByText("Turn complete").waitFor();
    await composer().fill("run: echo not-this");
    await composer().press("Enter");
    await page.getByRole("button", { name: "Deny…" }).click();
    await page.getByLabel("Why not").fill("use the other one");
    await page.getByRole("button", { name: "Deny", exact: true }).click();
    await page.getByText("denied").first().waitFor();
    await until("the turn ends", async () => (await page.getByText("Turn complete").count()) === 2);
    assert.ok(!/^\(/.test(await page.title()));
  },
  async "a session that a budget stopped goes on with one click; budgets are shown and set"() {
    const agent = await api("POST", "/agents", { name: "On a budget", runtime: "claude", model: "claude-sonnet-4-5" });
    const { id } = await api("POST", "/sessions", { agent_id: agent.id, prompt: "write a haiku", budget: { requests: 2 } });
    await open(id);
    await page.getByText("Stopped at a budget").waitFor();
    await page.getByText("The budget of the session is reached: 2 of 2 requests").waitFor();
    await page.getByText("At its budget", { exact: true }).waitFor();
    assert.match(await page.title(), /At its budget/);
    await accessible("a reached budget");
    await page.getByRole("button", { name: "Raise and continue" }).click();
    await page.getByText("Turn complete").waitFor();
    assert.equal((await api("GET", `/sessions/${id}/budget`)).limits.requests, 4);
    assert.equal(await page.getByRole("button", { name: "Raise and continue" }).count(), 0);
    await page.getByRole("tab", { name: "Details" }).click();
    await page.getByRole("meter", { name: "Model requests used" }).waitFor();
    await page.getByLabel("Limit in US dollars").fill("2.5");
    await page.getByLabel("Limit in requests").fill("");
    await accessible("the details of a session");
    await page.getByRole("button", { name: "Save budget" }).click();
    await until("the budget is saved", async () => (await api("GET", `/sessions/${id}/budget`)).own_limits.usd === 2.5);
    assert.equal((await api("GET", `/sessions/${id}/budget`)).own_limits.requests, null);
    await page.goto(`${url}/console/agents/${agent.id}`);
    await page.getByLabel("Limit in tokens").fill("1");
    await page.getByRole("button", { name: "Save budget" }).click();
    await until("the budget is saved", async () => (await api("GET", `/agents/${agent.id}/budget`)).own_limits.tokens === 1);
    // The agent's budget counts from now on: the turn after the next one is stopped, and the page raises the agent's.
    for (const prompt of ["one", "two"]) {
      await api("POST", `/sessions/${id}/prompt`, { prompt });
      await ended(id);
    }
    await open(id);
    await page.getByLabel("The agent's new limit in tokens").waitFor();
    await page.getByRole("button", { name: "Raise and continue" }).click();
    await until("the turn ends", async () => (await page.getByText("Turn complete").count()) === 3);
  },
  async "a transcript is downloaded whole, in Markdown and in JSON"() {
    const agent = await api("POST", "/agents", { name: "Poet", runtime: "claude", model: "claude-sonnet-4-5" });
    const { id } = await api("POST", "/sessions", { agent_id: agent.id, prompt: "write a haiku" });
    await ended(id);
    await api("POST", `/sessions/${id}/prompt`, { prompt: "run: printf '\\033[31mred\\033[0m\\n'; echo '```'; exit 3" });
    await ended(id);
    await open(id);
    await page.getByRole("tab", { name: "Details" }).click();
    const { name, text } = await downloaded("JSON");
    assert.equal(name, `session-${id}.json`);
    const transcript = JSON.parse(text);
    assert.equal(transcript.session.id, id);
    assert.deepEqual(transcript.events, (await api("GET", `/sessions/${id}/events`)).data);
    const markdown = (await downloaded("Markdown")).text;
    const parts = ["## Turn 1", "**You**\n\nwrite a haiku", "**Tool: Write**", "**Result of Write**", "*Turn complete", "## Turn 2", "````\nExit code 3\nred\n```\n````", "*Turn complete"];
    let at = 0;
    for (const part of parts) {
      at = markdown.indexOf(part, at);
      assert.ok(at >= 0, `${part} in its place of\n${markdown}`);
    }
  },
  async "what agents and users write is never run or loaded"() {
    const attack = [
      "<img src=x onerror=alert(1)><script>alert(2)</script><svg onload=alert(3)></svg><iframe srcdoc='<script>alert(4)</script>'></iframe>",
      "[link](javascript:alert(5)) [data](data:text/html,<script>alert(6)</script>) ![image](https://attacker.invalid/pixel.png)",
      "<style>*{display:none}</style><a href='javascript:alert(7)' style='position:fixed;inset:0'>over all</a>",
      "\u001b]8;;javascript:alert(8)\u0007click\u001b]8;;\u0007 \u001b[31;1mred\u001b[0m <math><mtext></mtext><mglyph><style><img src onerror=alert(9)></style></mglyph></math>",
    ].join("\n\n");
    const agent = await api("POST", "/agents", { name: `<img src=x onerror=alert(1)>${"n".repeat(100)}`, description: attack, system: attack, runtime: "claude", model: "claude-sonnet-4-5", mcp_servers: [] });
    const environment = await api("POST", "/environments", { name: "<b onclick=alert(1)>bold</b>", setup_script: `: '${attack.replaceAll("'", "")}'` });
    await api("POST", "/api-keys", { name: "<script>alert(1)</script>" });
    const { id } = await api("POST", "/sessions", { agent_id: agent.id, prompt: attack, metadata: { "<img src=x onerror=alert(1)>": attack } });
    await ended(id);
    await api("POST", `/sessions/${id}/prompt`, { prompt: `run: printf '%s\\n' '<img src=x onerror=alert(1)>' '\\033[31mred\\033[0m'; echo '</pre><script>alert(1)</script>'` });
    await ended(id);
    const shell = await api("POST", "/agents", { name: "shell", runtime: "shell", model: "none" });
    const raw = await api("POST", "/sessions", { agent_id: shell.id, prompt: "printf '\\033]0;<script>alert(1)</script>\\007<img src=x onerror=alert(1)>\\n'; exit 7" });
    await ended(raw.id);
    for (const path of ["/", `/sessions/${id}`, `/sessions/${raw.id}`, `/agents/${agent.id}`, "/agents", `/environments/${environment.id}`, "/environments", "/keys", "/new", "/usage"]) {
      await page.goto(`${url}/console${path}`);
      await page.getByRole("heading", { level: 1 }).waitFor();
      await page.waitForTimeout(400);
      if (path === `/sessions/${id}`) {
        await page.getByRole("tab", { name: "Details" }).click();
        await page.getByRole("tab", { name: "Conversation" }).click();
        await page.getByText("Turn complete").first().waitFor();
        const links = await page.locator(".markdown a").evaluateAll((all) => all.map((each) => [each.getAttribute("href"), each.rel]));
        assert.ok(links.every(([href, rel]) => (href === null || /^https?:/.test(href)) && (href === null || rel.includes("noopener"))), JSON.stringify(links));
      }
      if (path === `/sessions/${raw.id}`) await page.getByText("exit code 7").first().waitFor();
      const bad = await page.evaluate(() => [...document.querySelectorAll("main script, main iframe, main style, main svg:not([role=img]), main img, main math, main [onerror], main [onclick], main [onload]")].map((each) => each.outerHTML));
      assert.deepEqual(bad, [], path);
      await accessible(path);
    }
  },
  async "every other page works without serious faults of accessibility, in dark too"() {
    await page.emulateMedia({ colorScheme: "dark" });
    for (const path of ["/", "/new", "/agents/new", "/environments/new", "/credentials", "/keys", "/usage", "/nowhere"]) {
      await page.goto(`${url}/console${path}`);
      await page.getByRole("heading", { level: 1 }).waitFor();
      await page.waitForTimeout(300);
      await accessible(`${path} in dark`);
    }
    await page.emulateMedia({ colorScheme: "light" });
  },
  async "agents are changed, compared; credentials are stored; keys are shown once and revoked"() {
    await page.goto(`${url}/console/agents/new`);
    await page.getByRole("button", { name: "With an MCP server" }).click();
    await page.getByLabel("MCP servers").fill('[{"name": "docs", "url": "https://mcp.example.com/mcp"}]');
    await page.getByRole("button", { name: "Create agent" }).click();
    await page.getByRole("heading", { name: "Researcher" }).waitFor();
    await page.getByText("The MCP server docs has no credential").waitFor();
    await accessible("an agent without a credential");
    await page.goto(`${url}/console/agents/new`);
    await page.getByRole("button", { name: "Careful engineer" }).click();
    await accessible("the templates of agents");
    await page.getByRole("textbox", { name: "Name", exact: true }).fill("Made in the console");
    await page.getByRole("button", { name: "Create agent" }).click();
    await page.getByRole("heading", { name: "Made in the console" }).waitFor();
    await page.getByLabel("Instructions").fill("Be brief.");
    await page.getByRole("button", { name: "Save as a new version" }).click();
    await page.getByLabel("Changes of Version 1 to 2").getByText("Be brief.").waitFor();
    await page.getByLabel("Changes of Version 1 to 2").getByText("You change code in small steps.").waitFor();
    await page.goto(`${url}/console/credentials`);
    await page.getByRole("button", { name: "Store OpenAI" }).or(page.getByRole("button", { name: "Replace OpenAI" })).click();
    await page.getByLabel("Value of OpenAI").fill("sk-never-shown-again-1234");
    await page.getByRole("button", { name: "Save" }).click();
    await page.getByText("1234").waitFor();
    assert.ok(!(await page.content()).includes("never-shown-again"));
    await page.goto(`${url}/console/keys`);
    await page.getByRole("textbox", { name: "Name", exact: true }).fill("temporary");
    await page.getByLabel("Your API key").fill(process.env.AOD_API_TOKEN);
    await page.getByRole("button", { name: "Create key" }).click();
    const key = await page.locator(".fresh code").textContent();
    assert.match(key, /^aod_/);
    await page.getByRole("button", { name: "Revoke temporary" }).click();
    await page.getByRole("dialog").getByRole("button", { name: "Revoke" }).click();
    await page.getByText("revoked", { exact: false }).first().waitFor();
    assert.equal((await fetch(`${url}/sessions`, { headers: { Authorization: `Bearer ${key}` } })).status, 401);
  },
  async "a page goes on without loss when the gateway is killed"() {
    if (!READY) return;
    const agents = (await api("GET", "/agents")).data;
    const { id } = await api("POST", "/sessions", { agent_id: agents.find((each) => each.name === "Made in the console").id, prompt: "slowly" });
    await open(id);
    await page.getByText("The agent is ready").waitFor();
    for (const { pid } of JSON.parse(readFileSync(READY, "utf8")).services.gateway) process.kill(pid, "SIGKILL");
    await page.getByText(/Connection lost/).waitFor();
    await page.getByText("One word after the other", { exact: false }).waitFor();
    await page.getByText("Turn complete").waitFor({ timeout: 60_000 });
    await page.locator(".live", { hasText: "Live" }).waitFor();
    const log = (await api("GET", `/sessions/${id}/events`)).data;
    const shown = await page.locator(".item").evaluateAll((items) => items.map((item) => Number(item.dataset.key)));
    assert.equal(new Set(shown).size, shown.length, "nothing twice");
    for (const event of log.filter((each) => each.type === "agent.message")) assert.ok(shown.includes(event.id), "nothing lost");
  },
  async "a session of 100,000 events opens at its end at once and scrolls to its beginning and back"() {
    const id = process.env.AOD_LONG_SESSION;
    if (!id) return;
    const begun = Date.now();
    await open(id);
    await page.getByText("Turn complete").waitFor();
    console.log(`    the end of the long session is shown after ${Date.now() - begun} ms`);
    assert.ok(Date.now() - begun < 10_000, "it takes no longer than a short session");
    const scroller = page.getByRole("log", { name: "Transcript" });
    const first = async () => Number(await page.locator(".item").first().getAttribute("data-key"));
    const before = await first();
    for (let i = 0; i < 12; i++) {
      await scroller.evaluate((element) => (element.scrollTop = 0));
      await page.waitForTimeout(150);
    }
    assert.ok((await first()) < before, "earlier events are loaded");
    const items = await page.locator(".item").count();
    assert.ok(items <= 600, `${items} items are held`);
    await page.getByRole("button", { name: /To the end/ }).click();
    await page.getByText("Turn complete").waitFor();
    await page.getByRole("tab", { name: "Details" }).click();
    // What the page holds, without garbage.
    const memory = await context.newCDPSession(page);
    let most = 0;
    const measure = async () => {
      await memory.send("HeapProfiler.collectGarbage");
      most = Math.max(most, (await memory.send("Runtime.getHeapUsage")).usedSize);
    };
    const timer = setInterval(() => void measure().catch(() => undefined), 200);
    const saving = Date.now();
    const { text } = await downloaded("JSON");
    clearInterval(timer);
    const { events } = JSON.parse(text);
    console.log(`    ${events.length} events downloaded in ${Date.now() - saving} ms, ${text.length / 1e6} MB; the page held at most ${most / 1e6} MB`);
    assert.ok(events.length >= 100_000 && events.every((event, at) => at === 0 || event.id > events[at - 1].id));
    assert.ok(most > 0 && most < 30e6, `${most} bytes are held`);
  },
  async "a session that has expired or was signed out elsewhere asks to sign in again"() {
    await page.goto(`${url}/console/`);
    await page.getByRole("navigation", { name: "Main" }).waitFor();
    // Another tab signs out; this one notices at its next request.
    await page.evaluate(() => fetch("/console/session", { method: "DELETE", headers: { "X-Aod-Console": "1" } }));
    await page.getByText("You were signed out").waitFor();
    await signIn(page);
    await page.getByRole("button", { name: "Sign out" }).click();
    await page.getByLabel("API key").waitFor();
    assert.deepEqual((await context.cookies()).filter((each) => each.name.includes("aod_console")), []);
  },
};

let failed = 0;
const only = process.env.ONLY;
for (const [name, check] of Object.entries(checks)) {
  if (only && !name.includes(only) && !name.startsWith("a wrong key")) continue;
  const begun = Date.now();
  try {
    await check();
    assert.deepEqual(problems, []);
    console.log(`ok ${name} (${Date.now() - begun} ms)`);
  } catch (error) {
    failed = 1;
    console.log(`FAILED ${name}: ${error.stack}`);
    await page.screenshot({ path: process.env.FAILURE_SCREENSHOT ?? "/tmp/console-failure.png" }).catch(() => undefined);
    break;
  }
}
assert.deepEqual([...hosts], [new URL(url).origin], "no other host is asked");
await browser.close();
process.exit(failed);
