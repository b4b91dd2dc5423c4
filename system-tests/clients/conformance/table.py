"""Writes the reports of the conformance suite as a table into a document, between two markers.

    python table.py DOCUMENT REPORT.json ...      the first report has the runtimes
"""

import json
import sys

BEGIN, END = "<!-- conformance: begin -->", "<!-- conformance: end -->"
RUNTIMES = ["claude", "codex", "gemini", "opencode", "shell"]
document, *files = sys.argv[1:]
first, *others = (json.load(open(file, encoding="utf-8")) for file in files)


def cells(report):
    """Of each check, the result with the runtime that the report begins with."""
    found = {}
    for row in report["checks"]:
        found[row["number"]] = row.get("result") or next(iter(row["runtimes"].values()))["result"]
    return found


columns = [cells(report) for report in others]
head = ["#", "check", first["client"], *(report["client"] for report in others), *RUNTIMES]
lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
for row in first["checks"]:
    runs = {name: cell["result"] for name, cell in row["runtimes"].items()}
    own = "FAIL" if "FAIL" in runs.values() else "pass"
    by_runtime = [runs.get(name, "-") if row["per_runtime"] else "" for name in RUNTIMES]
    line = [str(row["number"]), row["title"], own, *(column.get(row["number"], "-") for column in columns), *by_runtime]
    lines.append("| " + " | ".join(line) + " |")
text = open(document, encoding="utf-8").read()
before, rest = text.split(BEGIN, 1)
after = rest.split(END, 1)[1]
with open(document, "w", encoding="utf-8") as file:
    file.write(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)
