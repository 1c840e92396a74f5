"""Text made from a result's JSON alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it can be read in a terminal."""
    widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]
    rule = ["-" * w for w in widths]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in [head, rule, *lines])


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def rows(result: dict[str, Any]) -> str:
    """One line per row: times, memory, ratios and errors."""
    head = ["case", "provider", "both", "20-80 %", "forward", "backward", "peak extra", "scratch"]
    head += ["/ dense", "GEMM share", "TFLOP/s", "logprob err", "dX err", "dW err", ""]
    lines = []
    for r in result["rows"]:
        if r["error"]:
            lines.append([r["case"], r["provider"], *["-"] * (len(head) - 3), r["error"][:60]])
            continue
        e = r["errors"]
        span = f"{seconds(r['both_s']['p20'])} - {seconds(r['both_s']['p80'])}"
        times = [seconds(r[k]["median"]) for k in ("forward_s", "backward_s")]
        memory = ["-" if r[k] is None else f"{r[k] / 1e9:.2f} GB" for k in ("peak_extra_bytes", "scratch_bytes")]
        share = "-" if r["gemm_share"] is None else f"{r['gemm_share']:.0%}"
        found = [number(e.get(k), 2) for k in ("logprob_max_abs", "dhidden_rel", "dweight_rel")]
        mark = "WRONG" if r["wrong"] else ""
        both, ratio, rate = seconds(r["both_s"]["median"]), number(r["time_to_dense"]), number(r["gflops"] / 1e3)
        lines.append([r["case"], r["provider"], both, span, *times, *memory, ratio, share, rate, *found, mark])
    return table(head, lines)


def targets(judged: Sequence[dict[str, Any]]) -> str:
    words = {True: "yes", False: "NO", None: "not measured"}
    lines = [[t["what"], f"<= {t['limit']:.3g}", number(t["value"]), words[t["holds"]], t["why"]] for t in judged]
    return table(["figure", "target", "measured", "holds", "why"], lines)


def conditions(result: dict[str, Any]) -> str:
    device = result["device"]
    where = device.get("gpu") or f"{device['cpu']}, {device['threads']} threads, {device['cpu_capability']}"
    libraries = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    shapes = {r["case"]: r["label"] for r in result["rows"]}
    entropy = {r["case"]: r["entropy_nats"] for r in result["rows"] if r["entropy_nats"]}
    lines = [f"{result['suite']} on {where}", libraries, f"commit {result['commit']}, {result['date']}"]
    lines.append(result["command"])
    for name, label in shapes.items():
        e = entropy.get(name)
        peaks = f"; entropy 10/50/90 %: {e['p10']:.2g} / {e['p50']:.2g} / {e['p90']:.2g} nats" if e else ""
        lines.append(f"  {name}: {label}{peaks}")
    return "\n".join([*lines, *result["notes"]])


def render(result: dict[str, Any]) -> str:
    parts = [conditions(result), rows(result)]
    if result.get("targets"):
        parts.append(targets(result["targets"]))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Print a result as Markdown tables.")
    parser.add_argument("result", type=Path, nargs="+")
    for path in parser.parse_args(arguments).result:
        print(render(json.loads(path.read_text())), end="\n\n")


if __name__ == "__main__":
    main()
