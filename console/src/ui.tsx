// Small parts that every page uses.
import { signal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { runs } from "./ansi";
import { type Session, words } from "./api";
import { between, type DiffLine, nearChanges, parse } from "./diff";
import { absolute, age, now } from "./format";
import { render } from "./markdown";

export function Markdown({ text }: { text: string }) {
  const element = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const content = render(text);
    if (content) element.current?.replaceChildren(content);
    else if (element.current) element.current.textContent = text;
  }, [text]);
  return <div class="markdown" ref={element} />;
}

export function Terminal({ text }: { text: string }) {
  return (
    <>
      {runs(text).map((run) =>
        run.classes || run.color || run.background ? (
          <span class={run.classes} style={{ color: run.color, backgroundColor: run.background }}>{run.text}</span>
        ) : (
          run.text
        ),
      )}
    </>
  );
}

const FOLDED_LINES = 14;
const SHOWN_CHARS_MAX = 400_000;

export function Output({ text, label = "Output", error = false }: { text: string; label?: string; error?: boolean }) {
  const [open, setOpen] = useState(false);
  const trimmed = text.replace(/\s+$/, "");
  const lines = trimmed.split("\n");
  const folded = !open && lines.length > FOLDED_LINES + 2;
  const shown = folded ? lines.slice(0, FOLDED_LINES).join("\n") : trimmed;
  const cut = shown.length > SHOWN_CHARS_MAX;
  return (
    <div class={error ? "output error" : "output"}>
      <pre tabIndex={0} aria-label={label} role="region">
        <Terminal text={cut ? shown.slice(0, SHOWN_CHARS_MAX) : shown} />
      </pre>
      {cut && <p class="note">Only the first {SHOWN_CHARS_MAX.toLocaleString("en")} characters are shown; the API has all of it.</p>}
      {(folded || open) && (
        <button type="button" class="more" onClick={() => setOpen(!open)}>
          {folded ? `Show ${(lines.length - FOLDED_LINES).toLocaleString("en")} more lines` : "Show less"}
        </button>
      )}
    </div>
  );
}

const FOLDED_DIFF_LINES = 60;

export function Diff({ path, lines }: { path: string; lines: DiffLine[] }) {
  const [open, setOpen] = useState(false);
  const added = lines.filter((line) => line.kind === "add").length;
  const removed = lines.filter((line) => line.kind === "del").length;
  const shown = open ? lines : lines.slice(0, FOLDED_DIFF_LINES);
  return (
    <figure class="diff">
      <figcaption>
        <code>{path}</code>
        <span class="plus">+{added}</span>
        <span class="minus">−{removed}</span>
      </figcaption>
      <pre tabIndex={0} aria-label={`Changes of ${path}`} role="region">
        {shown.map((line) => (
          <span class={`line ${line.kind}`}>
            {(line.before ?? line.after) !== undefined && <span class="number" aria-hidden="true">{line.after ?? line.before}</span>}
            <span class="sign">{line.kind === "add" ? "+" : line.kind === "del" ? "-" : " "}</span>
            {line.text}
          </span>
        ))}
      </pre>
      {lines.length > FOLDED_DIFF_LINES && (
        <button type="button" class="more" onClick={() => setOpen(!open)}>{open ? "Show less" : `Show ${lines.length - FOLDED_DIFF_LINES} more lines`}</button>
      )}
    </figure>
  );
}

export const UnifiedDiff = ({ path, diff }: { path: string; diff: string }) => <Diff path={path} lines={parse(diff)} />;
export const TextDiff = ({ path, before, after }: { path: string; before: string; after: string }) => (
  <Diff path={path} lines={nearChanges(between(before, after))} />
);

export function Age({ time }: { time: string }) {
  return <time dateTime={time} title={absolute(time)}>{age(time, now.value)}</time>;
}

/** When something happened, within a sentence. */
export function Ago({ time }: { time: string }) {
  const since = age(time, now.value);
  return <time dateTime={time} title={absolute(time)}>{since === "now" ? "just now" : `${since} ago`}</time>;
}

const STATUS_WORDS: Record<string, string> = {
  pending: "Starting",
  running: "Working",
  waiting: "Needs you",
  completed: "Idle",
  budget: "At its budget",
  failed: "Failed",
  terminated: "Terminated",
};

/** Why a budget ended a session's last turn, if one did. */
export const budgetReached = (session: Session) =>
  session.status === "completed" && session.failure?.stage === "budget" ? session.failure.message : undefined;

function shownStatus(session: Session, waiting: boolean): string {
  if (session.status === "running" && waiting) return "waiting";
  return budgetReached(session) ? "budget" : session.status;
}

/** A session's status in a word. A completed turn leaves the session idle: it takes the next prompt. */
export const statusWord = (session: Session, waiting: boolean) => STATUS_WORDS[shownStatus(session, waiting)] ?? session.status;

export function Status({ session, waiting }: { session: Session; waiting: boolean }) {
  return (
    <span class={`status ${shownStatus(session, waiting)}`}>
      <span class="dot" aria-hidden="true" />
      {statusWord(session, waiting)}
    </span>
  );
}

export function ErrorBox({ error, retry }: { error: unknown; retry?: () => void }) {
  if (!error) return null;
  return (
    <div class="errorbox" role="alert">
      <span>{words(error)}</span>
      {retry && <button type="button" onClick={retry}>Try again</button>}
    </div>
  );
}

export function Empty({ title, children }: { title: string; children?: ComponentChildren }) {
  return (
    <div class="empty">
      <h2>{title}</h2>
      {children}
    </div>
  );
}

type ActionProps = { run: () => Promise<unknown>; children: ComponentChildren; class?: string; confirm?: string } & { disabled?: boolean; title?: string; "aria-label"?: string };

/** A button for what takes time or may fail. With `confirm` it asks first. */
export function Action({ run, children, class: name, confirm, disabled, ...rest }: ActionProps) {
  const [busy, setBusy] = useState(false);
  const [asking, setAsking] = useState(false);
  const act = async () => {
    setAsking(false);
    setBusy(true);
    try {
      await run();
    } catch (error) {
      toast(words(error), true);
    } finally {
      setBusy(false);
    }
  };
  return (
    <>
      <button type="button" class={name} disabled={busy || disabled} aria-busy={busy} onClick={() => (confirm ? setAsking(true) : void act())} {...rest}>
        {children}
      </button>
      {asking && (
        <Dialog title="Are you sure?" close={() => setAsking(false)}>
          <p>{confirm}</p>
          <div class="row end">
            <button type="button" onClick={() => setAsking(false)}>Cancel</button>
            <button type="button" class="danger" onClick={() => void act()}>{children}</button>
          </div>
        </Dialog>
      )}
    </>
  );
}

export function Dialog({ title, close, children }: { title: string; close: () => void; children: ComponentChildren }) {
  const element = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    element.current?.showModal();
  }, []);
  return (
    <dialog ref={element} aria-label={title} onClose={close} onClick={(event) => event.target === element.current && close()}>
      <div class="dialog">
        <h2>{title}</h2>
        {children}
      </div>
    </dialog>
  );
}

interface Toast {
  id: number;
  text: string;
  error: boolean;
}

const toasts = signal<Toast[]>([]);
let toastId = 0;

export function toast(text: string, error = false): void {
  const id = ++toastId;
  toasts.value = [...toasts.value.slice(-3), { id, text, error }];
  setTimeout(() => (toasts.value = toasts.value.filter((each) => each.id !== id)), error ? 10_000 : 4000);
}

export function Toasts() {
  return (
    <div class="toasts" role="status" aria-live="polite">
      {toasts.value.map((each) => (
        <div key={each.id} class={each.error ? "toast error" : "toast"}>
          <span>{each.text}</span>
          <button type="button" class="quiet" aria-label="Dismiss" onClick={() => (toasts.value = toasts.value.filter((other) => other.id !== each.id))}>×</button>
        </div>
      ))}
    </div>
  );
}

export function Copy({ text, label = "Copy" }: { text: string; label?: string }) {
  const [done, setDone] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setDone(true);
    setTimeout(() => setDone(false), 1500);
  };
  return <button type="button" class="small" onClick={() => void copy()}>{done ? "Copied" : label}</button>;
}

export function Field({ label, hint, children }: { label: string; hint?: ComponentChildren; children: ComponentChildren }) {
  return (
    <label class="field">
      <span class="label">{label}</span>
      {children}
      {hint && <span class="hint">{hint}</span>}
    </label>
  );
}

/** Loads something once, and again when asked. */
export function useLoad<T>(load: () => Promise<T>, dependencies: unknown[] = []): { data: T | undefined; error: unknown; reload: () => void } {
  const [state, setState] = useState<{ data?: T; error?: unknown }>({});
  const [round, setRound] = useState(0);
  useEffect(() => {
    let current = true;
    load().then(
      (data) => current && setState({ data }),
      (error: unknown) => current && setState((before) => ({ data: before.data, error })),
    );
    return () => {
      current = false;
    };
  }, [...dependencies, round]);
  return { data: state.data, error: state.error, reload: () => setRound((n) => n + 1) };
}
