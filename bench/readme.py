"""The tables of the READMEs, from committed results: python -m bench --readme

A place for a table says what it shows, and everything between its two lines is generated:

    <!-- bench: cpu-2core/matrix.json | cases=grpo,dpo | providers=dense,ours | columns=both,peak -->
    <!-- bench end -->

The path is under bench/results; without cases or providers all are shown, without columns the usual ones
(`report.COLUMNS`); with show=targets it is of what the run had to reach. Under the table stands where it ran, and what the
result has to say of itself.
"""

from __future__ import annotations

import json
import re

from fused_rlhf.bench import checkout, report

FILES = ("README.md", "bench/README.md")
PLACE = re.compile(r"(<!-- bench: (?P<what>[^>]*?) -->\n)(?P<body>.*?)(<!-- bench end -->)", re.DOTALL)
COLUMNS = ("both", "dense", "peak", "value", "dx")


def filled(text: str, folder: str) -> str:
    """The text with every table as its result has it; `folder`: that of the results, as the text would link to it."""
    return PLACE.sub(lambda found: found[1] + section(found["what"], folder) + found[4], text)


def section(what: str, folder: str) -> str:
    """What stands between the two lines of a place."""
    path, *options = (word.strip() for word in what.split("|"))
    chosen = dict(option.split("=", 1) for option in options)
    unknown = set(chosen) - {"cases", "providers", "columns", "show"}
    if unknown:
        raise ValueError(
            f"a table takes cases, providers, columns and show, got {', '.join(sorted(unknown))} in {what!r}"
        )
    file = checkout.needed("a table") / "bench/results" / path
    if not file.exists():
        return f"\n{path} was not measured yet.\n\n"
    result = json.loads(file.read_text())
    if chosen.get("show") == "targets":
        return f"\n{report.targets(result['targets'])}\n\n"
    lists = {key: [word.strip() for word in value.split(",")] for key, value in chosen.items()}
    records = [
        r
        for r in result["rows"]
        if r["case"] in lists.get("cases", [r["case"]]) and r["provider"] in lists.get("providers", [r["provider"]])
    ]
    if not records:
        raise ValueError(f"{path} has no such rows: {what!r}")
    shapes = {r["case"]: r["label"] for r in records}
    cases = "; ".join(label if len(shapes) == 1 else f"{name}: {label}" for name, label in shapes.items())
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v and name in PEERS)
    where = f"{cases}. {report.device_name(result)}; {versions}; commit {result['commit']}, {result['date'][:10]}"
    source = f"[{path}]({folder}{path}), `{result['command']}`"
    notes = "".join(f"\n{note}\n" for note in result["notes"])
    return f"\n{report.rows(records, lists.get('columns', COLUMNS))}\n\n{where} ({source}).\n{notes}\n"


PEERS = ("torch", "triton", "trl", "liger_kernel", "cut-cross-entropy", "verl")


def update(write: bool = True) -> list[tuple[str, bool]]:
    """Fills in the files; -> (file, whether it changed or would)."""
    root, changes = checkout.needed("--readme"), []
    for name in FILES:
        path = root / name
        text = path.read_text()
        new = filled(text, "results/" if name.startswith("bench/") else "bench/results/")
        changes.append((name, new != text))
        if write and new != text:
            path.write_text(new)
    return changes
