// Unified diffs, and differences between two texts.

export interface DiffLine {
  kind: "add" | "del" | "same" | "hunk";
  text: string;
  before?: number;
  after?: number;
}

/** Lines of a unified diff, or of the hunks of one. */
export function parse(diff: string): DiffLine[] {
  const lines: DiffLine[] = [];
  let before = 0;
  let after = 0;
  let numbered = false;
  for (const line of diff.replace(/\n$/, "").split("\n")) {
    const hunk = /^@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@/.exec(line);
    if (hunk) {
      before = Number(hunk[1]);
      after = Number(hunk[2]);
      numbered = true;
      lines.push({ kind: "hunk", text: line });
    } else if (!numbered && /^(---|\+\+\+|diff |index |new file|deleted file|Index:|={5,})/.test(line)) {
      continue;
    } else if (line.startsWith("+")) {
      lines.push({ kind: "add", text: line.slice(1), after: numbered ? after++ : undefined });
    } else if (line.startsWith("-")) {
      lines.push({ kind: "del", text: line.slice(1), before: numbered ? before++ : undefined });
    } else if (line.startsWith("\\")) {
      lines.push({ kind: "hunk", text: line });
    } else {
      lines.push({ kind: "same", text: line.slice(1), before: numbered ? before++ : undefined, after: numbered ? after++ : undefined });
    }
  }
  return lines;
}

const CELLS_MAX = 4_000_000;

/** The lines that lead from one text to another. Long texts are shown as removed and added. */
export function between(old: string, fresh: string): DiffLine[] {
  const [a, b] = [old === "" ? [] : old.split("\n"), fresh === "" ? [] : fresh.split("\n")];
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const [x, y] = [a.slice(start, a.length - end), b.slice(start, b.length - end)];
  const same = (text: string): DiffLine => ({ kind: "same", text });
  const middle: DiffLine[] = [];
  if (x.length * y.length > CELLS_MAX) {
    // One by one: so many arguments at once overflow the stack.
    for (const text of x) middle.push({ kind: "del", text });
    for (const text of y) middle.push({ kind: "add", text });
  } else {
    const width = y.length + 1;
    const longest = new Uint32Array((x.length + 1) * width);
    for (let i = x.length - 1; i >= 0; i--) {
      for (let j = y.length - 1; j >= 0; j--) {
        longest[i * width + j] =
          x[i] === y[j] ? longest[(i + 1) * width + j + 1]! + 1 : Math.max(longest[(i + 1) * width + j]!, longest[i * width + j + 1]!);
      }
    }
    let [i, j] = [0, 0];
    while (i < x.length || j < y.length) {
      if (i < x.length && j < y.length && x[i] === y[j]) {
        middle.push(same(x[i]!));
        i++;
        j++;
      } else if (j >= y.length || (i < x.length && longest[(i + 1) * width + j]! >= longest[i * width + j + 1]!)) {
        middle.push({ kind: "del", text: x[i++]! });
      } else {
        middle.push({ kind: "add", text: y[j++]! });
      }
    }
  }
  return [...a.slice(0, start).map(same), ...middle, ...a.slice(a.length - end).map(same)];
}

/** Leaves out what is far from any change. */
export function nearChanges(lines: DiffLine[], context = 3): DiffLine[] {
  const near = new Set<number>();
  lines.forEach((line, at) => {
    if (line.kind === "same") return;
    for (let i = at - context; i <= at + context; i++) near.add(i);
  });
  const shown: DiffLine[] = [];
  let skipped = false;
  lines.forEach((line, at) => {
    if (near.has(at)) {
      if (skipped) shown.push({ kind: "hunk", text: "⋯" });
      skipped = false;
      shown.push(line);
    } else skipped = true;
  });
  return shown;
}
