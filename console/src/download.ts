// A session's whole transcript as a file. Pages of the API are written one after the other and let go: a long session takes no more memory.
import { signal } from "@preact/signals";
import { type EventPage, type Session, get } from "./api";
import { MarkdownTranscript } from "./transcript-markdown";

const PAGE = 1000;

export type Format = "markdown" | "json";

interface Writer {
  head: string;
  page: (events: EventPage["data"], isFirst: boolean) => string;
  end: string;
}

function writer(format: Format, session: Session, title: string): Writer {
  if (format === "json") {
    return {
      head: `{"session":${JSON.stringify(session)},"events":[\n`,
      page: (events, isFirst) => (events.length > 0 && !isFirst ? ",\n" : "") + events.map((event) => JSON.stringify(event)).join(",\n"),
      end: "\n]}\n",
    };
  }
  const transcript = new MarkdownTranscript();
  return { head: transcript.head(session, title), page: (events) => events.map((event) => transcript.event(event)).join(""), end: "" };
}

export class TranscriptDownload {
  /** What is being written, and which share of it is done. */
  readonly running = signal<{ format: Format; share: number } | undefined>(undefined);
  private stop = new AbortController();

  cancel(): void {
    this.stop.abort();
    this.running.value = undefined;
  }

  /** Saves the events that the session has by now. */
  async save(format: Format, session: Session, title: string): Promise<void> {
    this.cancel();
    const stop = (this.stop = new AbortController());
    this.running.value = { format, share: 0 };
    try {
      const { head, page, end } = writer(format, session, title);
      const type = format === "json" ? "application/json" : "text/markdown";
      // The browser keeps blobs outside of the page's memory, and large ones on disk.
      const parts = [new Blob([head])];
      const last = (await get<EventPage>(`/sessions/${session.id}/events?order=desc&limit=1`)).last_id;
      let [first, after, isFirst] = [0, 0, true];
      for (let more = true; more && after < last; ) {
        const events = await get<EventPage>(`/sessions/${session.id}/events?after=${after}&limit=${PAGE}`);
        if (stop.signal.aborted) return;
        parts.push(new Blob([page(events.data, isFirst)]));
        isFirst &&= events.data.length === 0;
        first ||= events.data[0]?.id ?? 0;
        after = events.last_id;
        more = events.has_more;
        this.running.value = { format, share: last > first ? Math.min(1, (after - first) / (last - first)) : 1 };
      }
      parts.push(new Blob([end]));
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob(parts, { type }));
      link.download = `session-${session.id}.${format === "json" ? "json" : "md"}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    } finally {
      if (this.stop === stop) this.running.value = undefined;
    }
  }
}
