// A browser for the tests: Debian's Chromium, or what CHROMIUM names.
import { chromium } from "playwright-core";

export const launch = () =>
  chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-dev-shm-usage"] });

export const url = process.env.AOD_API_URL;
const key = process.env.AOD_API_TOKEN;

/** Calls the API with the key, as a program does. */
export async function api(method, path, body) {
  const response = await fetch(url + path, {
    method,
    headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/json" },
    body: body && JSON.stringify(body),
    signal: AbortSignal.timeout(30_000),
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(`${method} ${path}: ${response.status} ${JSON.stringify(answer)}`);
  return answer;
}

export async function signIn(page, path = "/") {
  await page.goto(`${url}/console${path}`);
  await page.getByLabel("API key").fill(key);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("navigation", { name: "Main" }).waitFor();
}

export async function until(what, check, ms = 60_000) {
  const end = Date.now() + ms;
  for (;;) {
    const found = await check().catch(() => undefined);
    if (found) return found;
    if (Date.now() > end) throw new Error(`not within ${ms} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

export const ended = (id) => until(`session ${id} ends its turn`, async () => !["pending", "running"].includes((await api("GET", `/sessions/${id}`)).status));
export const asks = (id) => until(`session ${id} asks`, async () => (await api("GET", `/sessions/${id}/requests?status=open`)).data[0]);
