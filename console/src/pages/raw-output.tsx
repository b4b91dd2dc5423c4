// What the agent's CLI printed in its newest turn, byte for byte, followed live.
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { SessionLog } from "../log";
import { type Connection, follow } from "../sse";
import { Terminal } from "../ui";

interface Chunk {
  key: number;
  stderr: boolean;
  text: string;
}

/** Characters that are held; the stream of the API has everything. */
const HELD_CHARS = 1_000_000;
const CHUNK_CHARS = 16_000;

export function RawOutput({ id, log }: { id: string; log: SessionLog }) {
  const [chunks, setChunks] = useState<Chunk[]>([]);
  const [dropped, setDropped] = useState(false);
  const [connection, setConnection] = useState<Connection>({ state: "connecting" });
  const scroller = useRef<HTMLDivElement>(null);
  const following = useRef(true);
  const turn = log.events.value.findLast((event) => event.type === "session.status_running");

  useEffect(() => {
    if (!log.ready.value) return;
    const stop = new AbortController();
    let held: Chunk[] = [];
    let chars = 0;
    let scheduled = false;
    const show = () => {
      scheduled = false;
      setChunks([...held]);
    };
    setDropped(false);
    void follow({
      url: (last) => `/sessions/${id}/stream?since=${last}`,
      after: turn?.id ?? 0,
      signal: stop.signal,
      onConnection: setConnection,
      onFrames: (frames) => {
        let goesOn = true;
        for (const frame of frames) {
          const event = JSON.parse(frame.data) as { type: string; data?: string; stream?: string };
          if (event.type === "exit" || event.type === "error" || event.type === "terminated") goesOn = false;
          if (event.type !== "output" || !event.data) continue;
          const stderr = event.stream === "stderr";
          const last = held.at(-1);
          chars += event.data.length;
          if (last && last.stderr === stderr && last.text.length < CHUNK_CHARS) held[held.length - 1] = { ...last, text: last.text + event.data };
          else held.push({ key: Number(frame.id), stderr, text: event.data });
        }
        while (chars > HELD_CHARS && held.length > 1) {
          chars -= held.shift()?.text.length ?? 0;
          setDropped(true);
        }
        if (!scheduled) {
          scheduled = true;
          setTimeout(show, 30);
        }
        return goesOn;
      },
    });
    return () => stop.abort();
  }, [id, turn?.id, log.ready.value]);
  useLayoutEffect(() => {
    if (following.current && scroller.current) scroller.current.scrollTop = scroller.current.scrollHeight;
  }, [chunks]);

  return (
    <div class="scroller raw" ref={scroller} tabIndex={0} role="region" aria-label="Raw output" onScroll={(event) => (following.current = event.currentTarget.scrollHeight - event.currentTarget.scrollTop - event.currentTarget.clientHeight < 40)}>
      {dropped && <p class="note">Earlier output of this turn is not shown here. <code>curl</code> on the Details page shows how to read all of it.</p>}
      <pre>
        {chunks.map((chunk) => (
          <span key={chunk.key} class={chunk.stderr ? "stderr" : ""}><Terminal text={chunk.text} /></span>
        ))}
      </pre>
      {chunks.length === 0 && <p class="note">{connection.state === "ended" ? "This turn printed nothing." : "Nothing was printed yet."}</p>}
    </div>
  );
}
