// The public API, called as the browser's signed-in user.
import { signal } from "@preact/signals";
import type { components } from "./openapi";

type Schemas = components["schemas"];
export type Session = Schemas["Session"];
export type Turn = Schemas["Turn"];
export type Input = Schemas["Input"];
export type PermissionRequest = Schemas["PermissionRequest"];
export type Agent = Schemas["Agent"];
export type AgentVersion = Schemas["AgentVersion"];
export type Environment = Schemas["Environment"];
export type Key = Schemas["Key"];
export type Credential = Schemas["Credential"];
export type Budget = Schemas["Budget"];

export interface Page<T> {
  data: T[];
  has_more: boolean;
  next_cursor?: string | null;
}

/** An event of a session, as `GET /sessions/{id}/events` shows it. Fields depend on the type. */
export interface TypedEvent {
  id: number;
  type: string;
  turn: number;
  processed_at?: string;
  // eslint-disable-next-line @typescript-eslint/no-explicit-any
  [field: string]: any;
}

export interface EventPage {
  data: TypedEvent[];
  has_more: boolean;
  last_id: number;
}

export interface Me {
  user: string;
  key_name: string;
  key_prefix: string;
  expires_at: string;
  runtimes: string[];
  default_timeout: number;
}

/** Who is signed in. `undefined`: not known yet. `null`: no one. */
export const me = signal<Me | null | undefined>(undefined);
/** Why the sign-in page is shown, where the user did not ask for it. */
export const signedOutBecause = signal("");

export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly requestId = "",
    /** Seconds after which a repetition may succeed. */
    readonly retryAfter = 0,
  ) {
    super(message);
  }
}

interface FieldError {
  loc: (string | number)[];
  msg: string;
}

function describe(status: number, body: { detail?: string | FieldError[] } | null): string {
  const detail = body?.detail;
  if (Array.isArray(detail)) return detail.map((field) => `${field.loc.join(".")}: ${field.msg.replace(/^Value error, /, "")}`).join("\n");
  if (detail) return detail;
  return status === 503 ? "A service is not available. Try again in a moment." : `The gateway answered ${status}.`;
}

export const HEADERS = { "X-Aod-Console": "1" };
const DEADLINE_MS = 30_000;

async function send(method: string, path: string, body?: unknown, headers: Record<string, string> = {}): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, {
      method,
      headers: { ...HEADERS, ...headers, ...(body === undefined ? {} : { "Content-Type": "application/json" }) },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.timeout(DEADLINE_MS),
      credentials: "same-origin",
    });
  } catch {
    throw new ApiError(0, "The gateway cannot be reached. Check your connection; nothing that was accepted is lost.");
  }
  if (response.ok || response.status === 304) return response;
  const answer = await response.json().catch(() => null);
  const error = new ApiError(response.status, describe(response.status, answer), answer?.request_id ?? "", Number(response.headers.get("Retry-After") ?? 0));
  if (response.status === 401 && !headers.Authorization && path !== "/console/session") signedOut(error.message);
  throw error;
}

/** Shows the sign-in page, which says why. */
export function signedOut(reason: string): void {
  if (me.value) signedOutBecause.value = reason;
  me.value = null;
}

async function call<T>(method: string, path: string, body?: unknown, headers?: Record<string, string>): Promise<T> {
  return (await send(method, path, body, headers)).json() as Promise<T>;
}

export const get = <T>(path: string): Promise<T> => call<T>("GET", path);

export interface Tagged<T> {
  tag: string;
  body: T;
}

/** Returns what is known, the same object, where nothing has changed. */
export async function getTagged<T>(path: string, known?: Tagged<T>): Promise<Tagged<T>> {
  const response = await send("GET", path, undefined, known && { "If-None-Match": known.tag });
  if (response.status === 304 && known) return known;
  return { tag: response.headers.get("ETag") ?? "", body: (await response.json()) as T };
}

export const put = <T>(path: string, body: unknown): Promise<T> => call<T>("PUT", path, body);
export const patch = <T>(path: string, body: unknown): Promise<T> => call<T>("PATCH", path, body);
export const del = <T>(path: string): Promise<T> => call<T>("DELETE", path);
export const post = <T>(path: string, body?: unknown): Promise<T> => call<T>("POST", path, body);
/** Creates an API key, which takes an API key: being signed in is not enough. */
export const createKey = (body: unknown, apiKey: string): Promise<{ key: string }> => call("POST", "/api-keys", body, { Authorization: `Bearer ${apiKey}` });
/** A POST that creates: repeating it with the same key after a lost answer creates nothing again. */
export const create = <T>(path: string, body: unknown, key: string): Promise<T> => call<T>("POST", path, body, { "Idempotency-Key": key });

/** All rows of a list, for lists that a person has written: at most `max`. */
export async function all<T>(path: string, max = 5000): Promise<T[]> {
  const rows: T[] = [];
  let cursor: string | null | undefined = null;
  do {
    const separator = path.includes("?") ? "&" : "?";
    const page: Page<T> = await get<Page<T>>(`${path}${separator}limit=1000${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`);
    rows.push(...page.data);
    cursor = page.has_more ? page.next_cursor : null;
  } while (cursor && rows.length < max);
  return rows;
}

export async function whoAmI(): Promise<void> {
  try {
    me.value = await get<Me>("/console/session");
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) me.value = null;
    else throw error;
  }
}

export async function signIn(key: string): Promise<void> {
  me.value = await post<Me>("/console/session", { api_key: key });
  signedOutBecause.value = "";
}

export async function signOut(): Promise<void> {
  await del("/console/session");
  me.value = null;
}

/** Text of anything that was thrown. */
export function words(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
