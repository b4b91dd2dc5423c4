#!/usr/bin/env python3
"""Writes docs/images/session.svg: a real session of the demo stack, as a terminal shows it.

Needs AOD_API_URL and AOD_API_TOKEN of a running stack (`make dev ARGS=--scripted-model`), and `aod` on the PATH.
"""

import html
import pathlib
import re
import selectors
import subprocess
import sys
import time

COLUMNS = 96
LINE = 20
FOLDER = pathlib.Path(__file__).resolve().parent.parent / "docs" / "images"
COLORS = {"prompt": "#8ec07c", "out": "#ebdbb2", "err": "#928374"}


def run(arguments, limit=120):
    """Runs a command; returns its lines as (stream, text), in order, and its standard error."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    watched = selectors.DefaultSelector()
    watched.register(process.stdout, selectors.EVENT_READ, "out")
    watched.register(process.stderr, selectors.EVENT_READ, "err")
    lines, rest, errors = [], {"out": "", "err": ""}, ""
    deadline = time.monotonic() + limit
    while watched.get_map():
        if time.monotonic() > deadline:
            process.kill()
            sys.exit(f"{arguments[0]} took more than {limit} s")
        for key, _ in watched.select(timeout=1):
            data = key.fileobj.read1().decode(errors="replace")
            if not data:
                watched.unregister(key.fileobj)
                continue
            errors += data if key.data == "err" else ""
            *whole, rest[key.data] = (rest[key.data] + data).split("\n")
            lines += [(key.data, line) for line in whole]
    lines += [(stream, text) for stream, text in rest.items() if text]
    if process.wait() != 0:
        sys.exit(f"{' '.join(arguments)} exited with {process.returncode}:\n{errors}")
    return lines, errors


def wrapped(lines):
    for kind, text in lines:
        text = re.sub(r"\x1b\[[0-9;]*m", "", text).expandtabs(4).rstrip()
        for start in range(0, max(len(text), 1), COLUMNS):
            yield kind, text[start : start + COLUMNS]


def svg(lines):
    width, height = COLUMNS * 8.5 + 40, len(lines) * LINE + 64
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" aria-label="Two turns of a session in a terminal">',
        f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#282828"/>',
        *(f'<circle cx="{20 + 18 * n}" cy="20" r="6" fill="{color}"/>' for n, color in enumerate(("#fb4934", "#fabd2f", "#b8bb26"))),
        '<g font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="14" xml:space="preserve">',
    ]
    for number, (kind, text) in enumerate(lines):
        parts.append(f'<text x="20" y="{56 + number * LINE}" fill="{COLORS[kind]}">{html.escape(text)}</text>')
    return "\n".join([*parts, "</g>", "</svg>", ""])


def main():
    first, errors = run(["aod", "run", "write a haiku"])
    session = re.search(r"^session (\S+)", errors, re.MULTILINE).group(1)
    second, _ = run(["aod", "run", "--session", session, "what was my first message?"])
    shown = [("prompt", "$ aod run 'write a haiku'"), *first, ("out", "")]
    shown += [("prompt", f"$ aod run --session {session} 'what was my first message?'"), *second]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "session.svg").write_text(svg(list(wrapped(shown))))


if __name__ == "__main__":
    main()
