// Server-sent events over fetch: unlike EventSource it shows the status of a refusal, and when the connection was lost.
import { ApiError, HEADERS, signedOut } from "./api";

export interface Frame {
  id: string;
  data: string;
}

/** Cuts a byte stream into events, at whatever bytes it is split. Comments are left out. */
export class FrameReader {
  private text = "";
  private readonly decoder = new TextDecoder();

  push(bytes: Uint8Array): Frame[] {
    this.text += this.decoder.decode(bytes, { stream: true });
    const blocks = this.text.split("\n\n");
    this.text = blocks.pop() ?? "";
    const frames: Frame[] = [];
    for (const block of blocks) {
      let id = "";
      const data: string[] = [];
      for (const line of block.split("\n")) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line.startsWith("id:")) id = line.slice(3).trim();
      }
      if (data.length > 0) frames.push({ id, data: data.join("\n") });
    }
    return frames;
  }
}

export type Connection = { state: "connecting" | "live" | "ended" } | { state: "lost"; since: number; reason: string };

/** The gateway sends something at least every 15 s. */
const SILENCE_MS = 25_000;
const RETRY_MIN_MS = 300;
const RETRY_MAX_MS = 10_000;

export interface Following {
  /** The address that resumes after an event. */
  url: (last: number) => string;
  after: number;
  /** Returns whether the stream is to be followed further. */
  onFrames: (frames: Frame[]) => boolean;
  onConnection: (connection: Connection) => void;
  signal: AbortSignal;
}

/** Follows a stream until it ends, and resumes after the last event whenever the connection is lost. */
export async function follow({ url, after, onFrames, onConnection, signal }: Following): Promise<void> {
  let last = after;
  let attempts = 0;
  let lostSince = 0;
  onConnection({ state: "connecting" });
  while (!signal.aborted) {
    let reason = "The gateway closed the connection.";
    const attempt = new AbortController();
    const abort = () => attempt.abort();
    signal.addEventListener("abort", abort, { once: true });
    let watchdog = setTimeout(abort, SILENCE_MS);
    try {
      const response = await fetch(url(last), { headers: { ...HEADERS, Accept: "text/event-stream" }, signal: attempt.signal, cache: "no-store" });
      if (response.status === 204) return onConnection({ state: "ended" });
      if (response.status === 401) {
        const body = await response.json().catch(() => null);
        return signedOut(body?.detail ?? "");
      }
      if (response.status === 404) throw new ApiError(404, "The session does not exist any more.");
      if (!response.ok || !response.body) throw new ApiError(response.status, `The gateway answered ${response.status}.`);
      onConnection({ state: "live" });
      lostSince = 0;
      const reader = response.body.getReader();
      const frames = new FrameReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        clearTimeout(watchdog);
        watchdog = setTimeout(abort, SILENCE_MS);
        attempts = 0;
        const read = frames.push(value);
        for (const frame of read) if (frame.id) last = Number(frame.id);
        if (read.length > 0 && !onFrames(read)) {
          attempt.abort();
          return onConnection({ state: "ended" });
        }
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && error.status === 404) return onConnection({ state: "ended" });
      reason = error instanceof ApiError ? error.message : attempt.signal.aborted ? "The gateway went silent." : "The gateway cannot be reached.";
    } finally {
      clearTimeout(watchdog);
      signal.removeEventListener("abort", abort);
    }
    lostSince ||= Date.now();
    onConnection({ state: "lost", since: lostSince, reason });
    const wait = Math.min(RETRY_MAX_MS, RETRY_MIN_MS * 2 ** attempts++);
    await new Promise((resolve) => setTimeout(resolve, wait * (0.5 + Math.random() / 2)));
  }
}
