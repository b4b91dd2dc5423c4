// What an unmodified `@anthropic-ai/sdk` sees of a server that speaks the Managed Agents API, one check per number of suite.py.
//
//     BASE_URL=http://127.0.0.1:8777 API_KEY=aod_… node suite.mjs [--json FILE] [--only 16,19]
//
// One runtime is enough: suite.py runs the others. Exits with 1 if a check fails.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";

// Where the client is installed, which need not be beside this file.
const require = createRequire(process.env.NODE_MODULES_OF ? `${process.env.NODE_MODULES_OF}/x.js` : import.meta.url);
const entry = require.resolve("@anthropic-ai/sdk");
const sdk = await import(pathToFileURL(entry).href);
const { version } = JSON.parse(readFileSync(join(dirname(entry), "package.json"), "utf8"));
const Anthropic = sdk.default.default ?? sdk.default;
const baseURL = process.env.BASE_URL;
const apiKey = process.env.API_KEY;
const patience = 90_000;
const client = new Anthropic({ apiKey, baseURL });
const { agents, environments, sessions } = client.beta;
const tools = [{ type: "agent_toolset_20260401" }];
const model = "claude-sonnet-4-5";

const message = (text) => ({ type: "user.message", content: [{ type: "text", text }] });
const types = (events) => events.map((event) => event.type);
const isEnd = (event) => event.type === "session.status_idle" && event.stop_reason.type !== "requires_action";
const said = (events) => events.filter((event) => event.type === "agent.message").flatMap((event) => event.content.map((block) => block.text)).join("");
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

async function all(page) {
  const items = [];
  for await (const item of page) items.push(item);
  return items;
}

function inOrder(names, wanted) {
  let at = 0;
  for (const name of names) if (name === wanted[at]) at += 1;
  return at === wanted.length;
}

// A stream that is read in the background.
async function follow(session, params) {
  const begun = Date.now();
  const stream = await sessions.events.stream(session, params);
  const follower = { events: [], ended: false, error: undefined, openedAfter: Date.now() - begun, stream };
  (async () => {
    try {
      for await (const event of stream) follower.events.push(event);
    } catch (error) {
      follower.error = error;
    }
    follower.ended = true;
  })();
  follower.until = async (what, after = 0) => {
    const fits = typeof what === "string" ? (event) => event.type === what : what;
    const deadline = Date.now() + patience;
    for (;;) {
      const index = follower.events.findIndex((event, at) => at >= after && fits(event));
      if (index >= 0) return follower.events.slice(after, index + 1);
      assert.ok(!follower.ended && Date.now() < deadline, `no ${what} in ${types(follower.events)} ${follower.error ?? ""}`);
      await sleep(20);
    }
  };
  return follower;
}

async function turn(session, text, follower) {
  follower ??= await follow(session);
  const start = follower.events.length;
  const sent = await sessions.events.send(session, { events: [message(text)] });
  return { sent: sent.data[0].id, events: await follower.until(isEnd, start), follower };
}

const environment = (await environments.create({ name: `js-${randomUUID()}` })).id;
const agent = (await agents.create({ name: "js", model, tools })).id;
const newSession = async (more = {}) => (await sessions.create({ agent, environment_id: environment, ...more })).id;

const checks = new Map();
const check = (number, title, run) => checks.set(number, { title, run });

check(1, "a wrong key", async () => {
  await assert.rejects(() => new Anthropic({ apiKey: "wrong", baseURL }).beta.agents.list(), (error) => {
    assert.ok(error instanceof Anthropic.AuthenticationError && error.error.error.type === "authentication_error");
    return error.requestID?.startsWith("req_");
  });
});
check(3, "environments.create", async () => {
  const config = { type: "cloud", networking: { type: "limited", allowed_hosts: ["example.com"] } };
  const made = await environments.create({ name: `js-${randomUUID()}`, config });
  assert.equal(made.config.networking.allow_mcp_servers, false);
  assert.deepEqual(made.config.packages.pip, []);
});
check(6, "agents.create", async () => {
  const made = await agents.create({ name: "js", model, system: "Be brief.", tools });
  assert.deepEqual([made.version, made.model.id, made.mcp_servers, made.archived_at], [1, model, [], null]);
});
check(7, "agents.update with versions", async () => {
  const made = await agents.create({ name: "js", model, tools });
  assert.equal((await agents.update(made.id, { version: 1, description: "x" })).version, 2);
  await assert.rejects(() => agents.update(made.id, { version: 1, description: "y" }), Anthropic.ConflictError);
});
check(10, "an agent that does not exist", () => assert.rejects(() => agents.retrieve("agent_none"), Anthropic.NotFoundError));
check(11, "paging over agents", async () => {
  const ids = (await all(agents.list({ limit: 1 }))).map((each) => each.id);
  assert.equal(new Set(ids).size, ids.length);
  assert.ok(ids.includes(agent));
});
check(12, "sessions.create", async () => {
  const made = await sessions.create({ agent, environment_id: environment, title: "t", metadata: { a: "b" } });
  assert.deepEqual([made.status, made.type, made.agent.type, made.resources, made.vault_ids], ["idle", "session", "agent", [], []]);
});
check(14, "the stream opens at once", async () => {
  const follower = await follow(await newSession());
  assert.ok(follower.openedAfter < 1000, `${follower.openedAfter} ms`);
  follower.stream.controller.abort();
});
check(15, "the same id in the answer and on the stream", async () => {
  const { sent, events } = await turn(await newSession(), "hello");
  assert.ok(sent.startsWith("sevt_") && events.some((event) => event.id === sent));
});
check(16, "a plain turn", async () => {
  const { events } = await turn(await newSession(), "hello");
  const order = ["user.message", "session.status_running", "session.thread_status_running", "span.model_request_start", "agent.message", "span.model_request_end", "session.usage", "session.status_idle"];
  assert.ok(inOrder(types(events), order), types(events).join());
  assert.equal(events.at(-1).stop_reason.type, "end_turn");
});
check(17, "a turn with tools", async () => {
  const { events } = await turn(await newSession(), "run: echo tool-42");
  const ids = events.map((event) => event.id);
  const results = events.filter((event) => event.type === "agent.tool_result");
  assert.ok(results.length > 0 && said(events).includes("tool-42"), types(events).join());
  for (const result of results) assert.ok(ids.includes(result.tool_use_id) && ids.indexOf(result.tool_use_id) < ids.indexOf(result.id));
});
check(18, "retrieve after the idle event", async () => {
  const session = await newSession();
  await turn(session, "hello");
  const got = await sessions.retrieve(session);
  assert.ok(got.status === "idle" && got.usage.output_tokens > 0, JSON.stringify(got));
});
check(19, "history is the stream", async () => {
  const session = await newSession();
  const { follower } = await turn(session, "hello");
  const seen = follower.events.filter((event) => event.processed_at).map((event) => event.id);
  const listed = (await all(sessions.events.list(session))).map((event) => event.id);
  assert.deepEqual(listed, seen);
  const reversed = (await all(sessions.events.list(session, { order: "desc", limit: 2 }))).map((event) => event.id);
  assert.deepEqual(reversed, listed.toReversed());
  const only = await all(sessions.events.list(session, { types: ["session.status_idle"] }));
  assert.deepEqual(types(only), ["session.status_idle"]);
});
check(20, "the next turn remembers", async () => {
  const session = await newSession();
  const { follower } = await turn(session, "run: echo first");
  const { events } = await turn(session, "what was my first message?", follower);
  assert.ok(said(events).includes("Your first message was: run: echo first"), said(events));
});
check(21, "messages queue", async () => {
  const session = await newSession();
  const follower = await follow(session);
  await sessions.events.send(session, { events: [message("run: sleep 2; echo one")] });
  const second = (await sessions.events.send(session, { events: [message("two")] })).data[0];
  assert.equal(second.processed_at, null);
  const first = await follower.until(isEnd);
  const rest = await follower.until(isEnd, first.length);
  assert.equal(rest.filter((event) => event.id === second.id && event.processed_at).length, 1);
});
check(22, "an interrupt", async () => {
  const session = await newSession();
  const follower = await follow(session);
  await sessions.events.send(session, { events: [message("run: timeout 60 tail -f /dev/null; echo no")] });
  await follower.until("agent.tool_use");
  await sleep(500);
  await sessions.events.send(session, { events: [{ type: "user.interrupt" }] });
  const events = await follower.until(isEnd);
  assert.equal(events.at(-1).stop_reason.type, "end_turn");
  assert.ok(events.some((event) => event.type === "user.interrupt"));
});
check(24, "initial_events", async () => {
  const made = await sessions.create({ agent, environment_id: environment, initial_events: [message("hello")] });
  assert.equal(made.status, "running");
});
check(26, "a stream that is dropped and reopened", async () => {
  const session = await newSession();
  const follower = await follow(session);
  await sessions.events.send(session, { events: [message("run: sleep 2; echo one")] });
  await follower.until("session.status_running");
  follower.stream.controller.abort();
  const again = await follow(session);
  const seen = new Set([...follower.events, ...(await all(sessions.events.list(session)))].map((event) => event.id));
  await again.until(isEnd);
  for (const event of again.events) seen.add(event.id);
  assert.deepEqual(seen, new Set((await all(sessions.events.list(session))).map((event) => event.id)));
});
check(29, "sessions.update", async () => {
  const session = await newSession({ metadata: { a: "b", c: "d" } });
  const updated = await sessions.update(session, { title: "u", metadata: { a: null } });
  assert.deepEqual([updated.title, updated.metadata], ["u", { c: "d" }]);
});
check(31, "sessions.archive", async () => {
  const session = await newSession();
  const { follower } = await turn(session, "hello");
  assert.equal((await sessions.archive(session)).status, "terminated");
  await follower.until("session.status_terminated");
  await assert.rejects(() => sessions.events.send(session, { events: [message("x")] }), Anthropic.BadRequestError);
});
check(32, "sessions.delete", async () => {
  const session = await newSession();
  const { follower } = await turn(session, "hello");
  assert.equal((await sessions.delete(session)).type, "session_deleted");
  await follower.until("session.deleted");
  await assert.rejects(() => sessions.retrieve(session), Anthropic.NotFoundError);
});
check(36, "bad bodies", async () => {
  const session = await newSession();
  await assert.rejects(() => sessions.events.send(session, { events: [{ type: "nope" }] }), Anthropic.BadRequestError);
  await assert.rejects(() => sessions.events.send(session, { events: [] }), Anthropic.BadRequestError);
});
check(39, "a tool that asks", async () => {
  const policy = { name: "bash", permission_policy: { type: "always_ask" } };
  const asking = await agents.create({ name: "js", model, tools: [{ type: "agent_toolset_20260401", configs: [policy] }] });
  const session = await newSession({ agent: asking.id });
  const follower = await follow(session);
  await sessions.events.send(session, { events: [message("run: echo allowed-42")] });
  const asked = await follower.until((event) => event.type === "session.status_idle");
  assert.equal(asked.at(-1).stop_reason.type, "requires_action");
  const [tool_use_id] = asked.at(-1).stop_reason.event_ids;
  await sessions.events.send(session, { events: [{ type: "user.tool_confirmation", tool_use_id, result: "allow" }] });
  assert.ok(said(await follower.until(isEnd, asked.length)).includes("allowed-42"));
});
check(47, "vaults and a credential", async () => {
  const { vaults } = client.beta;
  const vault = await vaults.create({ display_name: "v" });
  const auth = { type: "environment_variable", secret_name: "CONFORMANCE", secret_value: "s3cr3t-value", networking: { type: "unrestricted" } };
  const credential = await vaults.credentials.create(vault.id, { auth });
  assert.ok(credential.auth.secret_name === "CONFORMANCE" && !JSON.stringify(credential).includes("s3cr3t-value"));
  await assert.rejects(() => vaults.credentials.create(vault.id, { auth }), Anthropic.ConflictError);
  assert.deepEqual((await sessions.retrieve(await newSession({ vault_ids: [vault.id] }))).vault_ids, [vault.id]);
  assert.ok((await vaults.archive(vault.id)).archived_at);
  await assert.rejects(() => newSession({ vault_ids: [vault.id] }), Anthropic.BadRequestError);
  assert.equal((await vaults.delete(vault.id)).type, "vault_deleted");
});
check(51, "files into and out of a sandbox", async () => {
  const { files } = client.beta;
  const uploaded = await files.upload({ file: await sdk.toFile(Buffer.from("from the client"), "in.txt", { type: "text/plain" }) });
  assert.ok(uploaded.filename === "in.txt" && uploaded.size_bytes === 15);
  const session = await newSession({ resources: [{ type: "file", file_id: uploaded.id, mount_path: "in.txt" }] });
  const follower = await follow(session);
  await sessions.events.send(session, { events: [message("run: cp /mnt/session/uploads/in.txt /mnt/session/outputs/out.txt")] });
  await follower.until(isEnd);
  const outputs = await all(await files.list({ scope_id: session, betas: ["managed-agents-2026-04-01"] }));
  assert.deepEqual(outputs.map((file) => file.filename), ["out.txt"]);
  assert.equal(await (await files.download(outputs[0].id)).text(), "from the client");
  assert.equal((await files.delete(uploaded.id)).type, "file_deleted");
});

const options = Object.fromEntries(process.argv.slice(2).flatMap((word, at, words) => (word.startsWith("--") ? [[word.slice(2), words[at + 1]]] : [])));
const only = options.only ? new Set(options.only.split(",").map(Number)) : new Set(checks.keys());
const jobs = [...checks].filter(([number]) => only.has(number));
const results = new Map();
await Promise.all(
  Array.from({ length: 4 }, async () => {
    for (let job = jobs.shift(); job; job = jobs.shift()) {
      const [number, { title, run }] = job;
      let result = "pass";
      try {
        await run();
      } catch (error) {
        result = "FAIL";
        console.error(`${number} ${title}: ${String(error.message ?? error).slice(0, 500)}`);
      }
      results.set(number, { number, title, result });
    }
  }),
);
const report = { client: `@anthropic-ai/sdk ${version}`, checks: [...results.values()].sort((a, b) => a.number - b.number) };
if (options.json) writeFileSync(options.json, JSON.stringify(report, null, 1));
const failed = report.checks.filter((each) => each.result === "FAIL").map((each) => each.number);
console.log(`${report.client}: ${report.checks.length - failed.length} passed; failed: ${failed.join() || "none"}`);
process.exit(failed.length ? 1 : 0);
