"""Text made from a result's JSON alone: python -m bench.report RESULT.json ... [--plots DIR]"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from fused_rlhf.bench import plots
from fused_rlhf.bench.text import gigabytes, number, seconds, share, table

Record = dict[str, Any]


def read(path: Path) -> Record:
    """A result from its file. Raises ValueError where that is none, OSError where it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{str(path)!r} is no result of the bench: expected JSON ({error})") from None
    rows = found.get("rows") if isinstance(found, dict) else None
    needed = {"case", "provider", "label", "shape", "error", "errors", "wrong"}
    if not isinstance(rows, list) or not all(isinstance(r, dict) and needed <= set(r) for r in rows):
        raise ValueError(
            f"{str(path)!r} is no result of the bench: expected rows with a case and a provider, as --out has"
        )
    return found


def _median(key: str) -> Callable[[Record], str]:
    return lambda r: seconds(r[key]["median"])


def _error(*keys: str) -> Callable[[Record], str]:
    return lambda r: number(next((r["errors"][k] for k in keys if k in r["errors"]), None), 2)


# What a table can show of a row. Results of earlier versions lack the fields read by `get`.
COLUMNS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "both": ("both", _median("both_s")),
    "spread": ("20-80 %", lambda r: f"{seconds(r['both_s']['p20'])} - {seconds(r['both_s']['p80'])}"),
    "forward": ("forward", _median("forward_s")),
    "backward": ("backward", _median("backward_s")),
    "peak": ("peak extra", lambda r: gigabytes(r["peak_extra_bytes"])),
    "predicted": ("formula", lambda r: gigabytes(r.get("predicted_bytes"))),
    "scratch": ("scratch", lambda r: gigabytes(r["scratch_bytes"])),
    "dense": ("/ dense", lambda r: number(r["time_to_dense"])),
    "share": ("GEMM share", lambda r: share(r["gemm_share"])),
    "rate": ("TFLOP/s", lambda r: number(r["gflops"] / 1e3)),
    "value": ("value err", _error("logprob_max_abs", "kl_max_abs", "loss_per_nat")),
    "mean": ("mean value err", _error("logprob_mean_abs")),
    "ratio": ("ratios off by 1 %", lambda r: share(r["errors"].get("ratio_off"))),
    "dx": ("dX err", _error("dhidden_rel")),
    "dw": ("dW err", _error("dweight_rel")),
    "cpu": ("CPU share", lambda r: share(r.get("cpu_share"))),
    # Of whole updates: `bench.step`
    "tokens": ("tokens", lambda r: str(r["tokens"])),
    "update": ("update", _median("update_s")),
    "faster": ("times as fast", lambda r: times(r["speedup"])),
    "activations": ("activations", lambda r: gigabytes(r["peak_bytes"])),
    "less": ("times less", lambda r: number(r["less_memory"])),
    "loss": ("loss err", _error("loss_rel")),
    "norm": ("norm err", _error("norm_rel")),
    "gradient": ("gradient err", _error("gradient_rel")),
}
TIMES = ("both", "spread", "forward", "backward")
STANDARD = (*TIMES, "peak", "predicted", "scratch", "dense", "share", "rate", "value", "dx", "dw")
# Of whole updates
WHOLE = ("tokens", "update", "faster", "activations", "predicted", "less", "loss", "gradient", "norm", "cpu")


def times(ratio: Record | None) -> str:
    """A ratio with its 95 % interval."""
    if ratio is None:
        return "-"
    between = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio.get("low") is not None else ""
    return f"{ratio['value']:.2f}{between}"


def rows(records: Iterable[Record], columns: Sequence[str] = STANDARD) -> str:
    """One line per row; one that failed shows its formula's memory and why."""
    head = ["case", "provider", *(COLUMNS[c][0] for c in columns), ""]
    lines = []
    for r in records:
        if r["error"]:
            cells = [gigabytes(r.get("predicted_bytes")) if c == "predicted" else "-" for c in columns]
            lines.append([r["case"], r["provider"], *cells, shorten(r["error"], 100)])
        else:
            mark = "WRONG" if r["wrong"] else ""
            lines.append([r["case"], r["provider"], *(COLUMNS[c][1](r) for c in columns), mark])
    if not any(line[-1] for line in lines):
        head, lines = head[:-1], [line[:-1] for line in lines]
    return table(head, lines)


def lengths(records: Iterable[Record]) -> str:
    """What meeting new sequence lengths cost."""
    lines = []
    for r in records:
        if r.get("lengths"):
            met = r["lengths"]
            times = f"{seconds(min(met['both_s']))} - {seconds(max(met['both_s']))}"
            lines.append([r["case"], r["provider"], *(str(met[k]) for k in ("count", "triton", "dynamo")), times])
    head = ["case", "provider", "new lengths", "Triton compilations", "torch.compile graphs", "their calls"]
    return table(head, lines) if lines else ""


def waits(records: Iterable[Record]) -> str:
    """How often the host waited for the GPU."""
    lines = [[r["case"], r["provider"], str(r["waits"])] for r in records if r.get("waits") is not None]
    return table(["case", "provider", "waits of the host in a call"], lines) if lines else ""


def runs(records: Iterable[Record]) -> list[str]:
    """The cases of each run, whose rows took turns; where there are several, so that nobody compares across them."""
    cases: dict[str | None, dict[str, None]] = {}
    for r in records:
        if not r["error"]:
            cases.setdefault(r.get("run"), {})[r["case"]] = None
    named = " | ".join(", ".join(names) for names in cases.values())
    return [f"several runs, and times compare within one alone: {named}"] if len(cases) > 1 else []


def targets(judged: Sequence[Record]) -> str:
    words = {True: "yes", False: "NO", None: "not measured"}
    lines = []
    for t in judged:
        limit = f">= {t['least']:.3g}" if "least" in t else f"<= {t['limit']:.3g}"
        found = times(t) if "least" in t and t["value"] is not None else number(t["value"])
        lines.append([t["what"], limit, found, words[t["holds"]], t["why"]])
    return table(["figure", "target", "measured", "holds", "why"], lines)


def device_name(result: Record) -> str:
    device = result["device"]
    return device.get("gpu") or f"{device['cpu']}, {device['threads']} threads, {device['cpu_capability']}"


def conditions(result: Record) -> str:
    libraries = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    shapes = {r["case"]: r["label"] for r in result["rows"]}
    entropy = {r["case"]: r["entropy_nats"] for r in result["rows"] if r.get("entropy_nats")}
    lines = [f"{result['suite']} on {device_name(result)}", libraries]
    lines += [f"commit {result['commit']}, {result['date']}", result["command"]]
    for name, label in shapes.items():
        e = entropy.get(name)
        peaks = f"; entropy 10/50/90 %: {e['p10']:.2g} / {e['p50']:.2g} / {e['p90']:.2g} nats" if e else ""
        lines.append(f"  {name}: {label}{peaks}")
    return "\n".join([*lines, *runs(result["rows"]), *result["notes"]])


def render(result: Record) -> str:
    columns = WHOLE if result["suite"] == "step" else STANDARD
    parts = [conditions(result), rows(result["rows"], columns), lengths(result["rows"]), waits(result["rows"])]
    if result.get("targets"):
        parts.append(targets(result["targets"]))
    return "\n\n".join(filter(None, parts))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Print a result as Markdown tables.")
    parser.add_argument("result", type=Path, nargs="+")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw it there, too (needs matplotlib)")
    args = parser.parse_args(arguments)
    try:
        results = [read(path) for path in args.result]
    except (ValueError, OSError) as error:
        raise SystemExit(f"python -m bench.report: error: {error}") from None
    for result in results:
        print(render(result), end="\n\n")
        if args.plots:
            print("\n".join(str(p) for p in plots.draw(result, args.plots)))


if __name__ == "__main__":
    main()
