// Watches a session of about 50 events a second in a real browser, on a stack whose scripted model answers `keep at it` with hundreds of
// tool uses. Prints what the browser used and how long events took to the screen, as JSON.
//   AOD_API_URL=… AOD_API_TOKEN=… node e2e/busy.mjs [SECONDS]
import { api, launch, signIn, until, url } from "./browser.mjs";

const SECONDS = Number(process.argv[2] ?? 60);
const browser = await launch();
const context = await browser.newContext({ viewport: { width: 1200, height: 800 } });
const page = await context.newPage();
const system = await browser.newBrowserCDPSession();
const cdp = await context.newCDPSession(page);

/** Seconds of CPU of all processes of the browser, by type. */
async function cpu() {
  const { processInfo } = await system.send("SystemInfo.getProcessInfo");
  const byType = {};
  for (const { type, cpuTime } of processInfo) byType[type] = (byType[type] ?? 0) + cpuTime;
  return byType;
}
async function heap() {
  await cdp.send("HeapProfiler.collectGarbage");
  return (await cdp.send("Runtime.getHeapUsage")).usedSize;
}

const agent = await api("POST", "/agents", { name: "Busy", runtime: "claude", model: "claude-sonnet-4-5" });
const { id } = await api("POST", "/sessions", { agent_id: agent.id, prompt: "keep at it" });
try {
  await signIn(page, `/sessions/${id}`);
  await page.getByRole("log", { name: "Transcript" }).waitFor();
  const newest = async () => (await api("GET", `/sessions/${id}/events?order=desc&limit=1`)).last_id;
  await until("the window is full", async () => (await page.locator(".item").count()) > 150);
  // Each new item, with the time of the frame after the one that shows it.
  await page.evaluate(() => {
    window.shownAt = [];
    const itemsIn = (node) => (node.matches?.(".item") ? [node] : [...(node.querySelectorAll?.(".item") ?? [])]);
    new MutationObserver((changes) => {
      const keys = changes.flatMap((change) => [...change.addedNodes].flatMap(itemsIn)).map((item) => Number(item.dataset.key));
      if (keys.length > 0) requestAnimationFrame(() => window.shownAt.push(...keys.map((key) => [key, Date.now()])));
    }).observe(document.querySelector(".column"), { childList: true, subtree: true });
  });
  const [begun, first, used, heapBefore] = [Date.now(), await newest(), await cpu(), await heap()];
  await page.waitForTimeout(SECONDS * 1000);
  const [seconds, last, usedAfter] = [(Date.now() - begun) / 1000, await newest(), await cpu()];
  const heapAfter = await heap();

  const logged = new Map();
  let count = 0;
  for (let after = first; after < last; ) {
    const events = await api("GET", `/sessions/${id}/events?after=${after}&limit=1000`);
    for (const event of events.data) {
      logged.set(event.id, Date.parse(event.processed_at));
      if (event.id <= last) count++;
    }
    after = events.last_id;
  }
  const shown = await page.evaluate(() => window.shownAt);
  const waits = shown.filter(([key]) => logged.has(key)).map(([key, at]) => at - logged.get(key)).sort((a, b) => a - b);
  const share = Object.fromEntries(Object.entries(usedAfter).map(([type, after]) => [type, Math.round(((after - (used[type] ?? 0)) / seconds) * 1000) / 1000]));
  const megabytes = (bytes) => Math.round(bytes / 1e4) / 100;
  const report = {
    events_per_second: Math.round((count / seconds) * 10) / 10,
    cpu_share: Math.round(Object.values(share).reduce((sum, each) => sum + each, 0) * 1000) / 1000,
    cpu_share_by_process: share,
    event_to_pixel_ms: { p50: waits[Math.floor(waits.length / 2)], p95: waits[Math.floor(waits.length * 0.95)], items: waits.length },
    heap_mb: { before: megabytes(heapBefore), after: megabytes(heapAfter) },
  };
  console.log(JSON.stringify(report));
} finally {
  await api("POST", `/sessions/${id}/terminate`).catch(() => undefined);
  await browser.close();
}
