// The part of a session's log that the page holds: a window over any number of events, which ends at the live end or is left behind it.
import { signal } from "@preact/signals";
import { type EventPage, type TypedEvent, get } from "./api";
import { type Connection, type Frame, follow } from "./sse";

const PAGE = 200;
/** Events that are held; the page stays fast however long a session is. */
export const HELD_MAX = 600;
/** Between two renderings: a fast agent does not keep the browser busy. */
const RENDER_MS = 32;
/** Live events that are kept while the window is left behind the end. */
const WAITING_MAX = 2000;

export class SessionLog {
  readonly events = signal<readonly TypedEvent[]>([]);
  readonly hasOlder = signal(false);
  /** Live events are shown as they come. Otherwise the reader is far above, and `unseen` counts them. */
  readonly atEnd = signal(true);
  readonly unseen = signal(0);
  readonly connection = signal<Connection>({ state: "connecting" });
  readonly ready = signal(false);
  readonly error = signal("");
  private arriving: TypedEvent[] = [];
  private waiting: TypedEvent[] = [];
  private droppedThrough = 0;
  private scheduled = false;
  private rendered = 0;
  private loading = false;
  private stop = new AbortController();
  private last = 0;

  constructor(
    private readonly id: string,
    /** Called with each live event, whatever the window shows. */
    private readonly onLive: (events: TypedEvent[]) => void,
  ) {}

  async open(): Promise<void> {
    try {
      const older = await this.before(undefined);
      if (this.stop.signal.aborted) return;
      this.events.value = older;
      this.last = older.at(-1)?.id ?? 0;
      this.ready.value = true;
      this.connect();
    } catch (error) {
      this.error.value = error instanceof Error ? error.message : String(error);
    }
  }

  close(): void {
    this.stop.abort();
  }

  /** Stops following while the page is hidden, and resumes after the last event. */
  pause(paused: boolean): void {
    if (!this.ready.value || paused === this.stop.signal.aborted) return;
    if (paused) this.stop.abort();
    else {
      this.stop = new AbortController();
      this.connect();
    }
  }

  private connect(): void {
    const following = {
      url: (last: number) => `/sessions/${this.id}/events?stream=true&after=${last}`,
      after: this.last,
      onFrames: (frames: Frame[]) => this.take(frames),
      onConnection: (connection: Connection) => (this.connection.value = connection),
      signal: this.stop.signal,
    };
    void follow(following);
  }

  private take(frames: Frame[]): boolean {
    let goesOn = true;
    const events: TypedEvent[] = [];
    for (const frame of frames) {
      const event = JSON.parse(frame.data) as TypedEvent;
      if (event.type === "session.deleted") goesOn = false;
      else if (event.id > this.last) {
        this.last = event.id;
        events.push(event);
        if (event.type === "session.status_terminated") goesOn = false;
      }
    }
    this.arriving.push(...events);
    // A hidden page has no frames.
    if (!this.scheduled) {
      this.scheduled = true;
      const soon = () => (document.hidden ? this.flush() : requestAnimationFrame(() => this.flush()));
      setTimeout(soon, Math.max(0, this.rendered + RENDER_MS - performance.now()));
    }
    return goesOn;
  }

  private flush(): void {
    this.scheduled = false;
    this.rendered = performance.now();
    const fresh = this.arriving;
    this.arriving = [];
    if (fresh.length === 0) return;
    if (this.atEnd.value) {
      const all = [...this.events.value, ...fresh];
      if (all.length > HELD_MAX) this.hasOlder.value = true;
      this.events.value = all.length > HELD_MAX ? all.slice(-HELD_MAX + PAGE) : all;
    } else {
      this.unseen.value += fresh.length;
      this.waiting.push(...fresh);
      const excess = this.waiting.splice(0, Math.max(0, this.waiting.length - WAITING_MAX));
      this.droppedThrough = excess.at(-1)?.id ?? this.droppedThrough;
    }
    this.onLive(fresh);
  }

  private async before(id: number | undefined): Promise<TypedEvent[]> {
    const found: TypedEvent[] = [];
    let before = id;
    // Raw output lies between typed events: a page may be short, and empty.
    for (;;) {
      const page = await get<EventPage>(`/sessions/${this.id}/events?order=desc&limit=${PAGE - found.length}${before === undefined ? "" : `&before=${before}`}`);
      found.push(...page.data);
      before = page.last_id;
      if (found.length >= PAGE || !page.has_more) {
        this.hasOlder.value = page.has_more;
        return found.reverse();
      }
    }
  }

  async loadOlder(): Promise<void> {
    const first = this.events.value[0];
    if (this.loading || !first || !this.hasOlder.value) return;
    this.loading = true;
    try {
      const older = await this.before(first.id);
      const all = [...older, ...this.events.value];
      if (all.length > HELD_MAX) {
        if (this.atEnd.value) this.leaveEnd(all.slice(HELD_MAX));
        this.events.value = all.slice(0, HELD_MAX);
      } else this.events.value = all;
      this.error.value = "";
    } catch (error) {
      this.error.value = error instanceof Error ? error.message : String(error);
    } finally {
      this.loading = false;
    }
  }

  private leaveEnd(left: TypedEvent[]): void {
    this.atEnd.value = false;
    this.unseen.value = 0;
    this.waiting = left.slice(-WAITING_MAX);
    this.droppedThrough = left.length > WAITING_MAX ? (left.at(-WAITING_MAX - 1)?.id ?? 0) : 0;
  }

  async loadNewer(): Promise<void> {
    const last = this.events.value.at(-1);
    if (this.loading || this.atEnd.value || !last) return;
    this.loading = true;
    try {
      const page = await get<EventPage>(`/sessions/${this.id}/events?after=${last.id}&limit=${PAGE}`);
      let newer = page.data;
      // The rest is here already.
      const through = newer.at(-1)?.id ?? last.id;
      if (Math.max(through, page.last_id) >= this.droppedThrough) {
        newer = [...newer, ...this.waiting.filter((event) => event.id > through)];
        this.waiting = [];
        this.unseen.value = 0;
        this.atEnd.value = true;
      }
      const all = [...this.events.value, ...newer];
      if (all.length > HELD_MAX) this.hasOlder.value = true;
      this.events.value = all.slice(-HELD_MAX);
    } catch (error) {
      this.error.value = error instanceof Error ? error.message : String(error);
    } finally {
      this.loading = false;
    }
  }

  async jumpToEnd(): Promise<void> {
    if (this.atEnd.value) return;
    const newest = await this.before(undefined);
    const through = newest.at(-1)?.id ?? 0;
    this.events.value = [...newest, ...this.waiting.filter((event) => event.id > through)].slice(-HELD_MAX);
    this.waiting = [];
    this.unseen.value = 0;
    this.atEnd.value = true;
  }
}
