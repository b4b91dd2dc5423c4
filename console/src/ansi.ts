// Terminal output as runs of styled text. Only colours and weights count; everything else that terminals understand is left out.

export interface Run {
  text: string;
  classes: string;
  color?: string;
  background?: string;
}

interface Style {
  bold: boolean;
  dim: boolean;
  italic: boolean;
  underline: boolean;
  inverse: boolean;
  fg: string;
  bg: string;
}

const PLAIN: Style = { bold: false, dim: false, italic: false, underline: false, inverse: false, fg: "", bg: "" };

// CSI (with its parameters), OSC up to its end, and two-character escapes.
// eslint-disable-next-line no-control-regex
const ESCAPE = /\x1b\[([0-9;:?<=>!]*)[ -/]*([@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\|$)|\x1b[PX^_][^\x1b]*(?:\x1b\\|$)|\x1b[ -/]*[0-~]?/g;
// eslint-disable-next-line no-control-regex
const CONTROL = /[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]/g;

/** What a terminal shows of lines that were overwritten by carriage returns: their last text. */
function overwritten(text: string): string {
  return text
    .replace(/\r+\n/g, "\n")
    .split("\n")
    .map((line) => line.slice(line.replace(/\r+$/, "").lastIndexOf("\r") + 1).replace(/\r+$/, ""))
    .join("\n");
}

export function runs(output: string): Run[] {
  const text = output.includes("\r") ? overwritten(output) : output;
  const found: Run[] = [];
  let style = PLAIN;
  let at = 0;
  const push = (part: string) => {
    const clean = part.replace(CONTROL, "");
    if (clean) found.push({ text: clean, ...look(style) });
  };
  for (const match of text.matchAll(ESCAPE)) {
    push(text.slice(at, match.index));
    at = match.index + match[0].length;
    if (match[2] === "m") style = apply(style, match[1] ?? "");
  }
  push(text.slice(at));
  return found;
}

/** The text without colours and controls. */
export const plain = (output: string): string => runs(output).map((run) => run.text).join("");

function look(style: Style): Omit<Run, "text"> {
  const [fg, bg] = style.inverse ? [style.bg || "inverse", style.fg || "inverse"] : [style.fg, style.bg];
  const classes = [style.bold && "ab", style.dim && "ad", style.italic && "ai", style.underline && "au"].filter(Boolean) as string[];
  const found: Omit<Run, "text"> = { classes: "" };
  if (fg.startsWith("rgb")) found.color = fg;
  else if (fg) classes.push(`af${fg}`);
  if (bg.startsWith("rgb")) found.background = bg;
  else if (bg) classes.push(`ag${bg}`);
  found.classes = classes.join(" ");
  return found;
}

/** A colour of the palette of 256: a name for the first 16, else its RGB value. */
function palette(n: number): string {
  if (n < 16) return String(n);
  if (n > 255) return "";
  if (n >= 232) {
    const grey = 8 + (n - 232) * 10;
    return `rgb(${grey},${grey},${grey})`;
  }
  const level = (value: number) => (value === 0 ? 0 : 55 + value * 40);
  const cube = n - 16;
  return `rgb(${level(Math.floor(cube / 36))},${level(Math.floor(cube / 6) % 6)},${level(cube % 6)})`;
}

function apply(before: Style, parameters: string): Style {
  const codes = parameters.split(/[;:]/).map((code) => Number(code) || 0);
  const style = { ...before };
  for (let i = 0; i < codes.length; i++) {
    const code = codes[i] ?? 0;
    if (code === 0) Object.assign(style, PLAIN);
    else if (code === 1) style.bold = true;
    else if (code === 2) style.dim = true;
    else if (code === 3) style.italic = true;
    else if (code === 4) style.underline = true;
    else if (code === 7) style.inverse = true;
    else if (code === 22) style.bold = style.dim = false;
    else if (code === 23) style.italic = false;
    else if (code === 24) style.underline = false;
    else if (code === 27) style.inverse = false;
    else if (code >= 30 && code <= 37) style.fg = String(code - 30);
    else if (code >= 90 && code <= 97) style.fg = String(code - 82);
    else if (code === 39) style.fg = "";
    else if (code >= 40 && code <= 47) style.bg = String(code - 40);
    else if (code >= 100 && code <= 107) style.bg = String(code - 92);
    else if (code === 49) style.bg = "";
    else if (code === 38 || code === 48) {
      let color = "";
      if (codes[i + 1] === 5) {
        color = palette(codes[i + 2] ?? 0);
        i += 2;
      } else if (codes[i + 1] === 2) {
        const byte = (n: number | undefined) => Math.min(255, n ?? 0);
        color = `rgb(${byte(codes[i + 2])},${byte(codes[i + 3])},${byte(codes[i + 4])})`;
        i += 4;
      }
      if (code === 38) style.fg = color;
      else style.bg = color;
    }
  }
  return style;
}
