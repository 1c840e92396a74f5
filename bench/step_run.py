"""A run of `bench.step`: a process for each row of a case, which take turns, round by round; and the result.

    ratio      of two rows' times, in each round, where they follow each other: the mean of its logarithm over the rounds, and
               Student's 95 % interval of that
    wrong      further from each sequence by itself than a row may be: `TOLERANCE`, or what dense logits in the same case leave,
               as fp32 rounds in the body, too, and the loss of a pair is of sums of hundreds of log-probs

The processes of a case stay, each with its model, while the others are measured.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fused_rlhf.bench.checkout import HOME
from fused_rlhf.bench.document import commit, device_info, spread, versions
from fused_rlhf.bench.step_cases import Case, Plan, Target, Way

TOLERANCE = {
    "ours": {"loss_rel": 1e-6, "norm_rel": 1e-5, "gradient_rel": 1e-5},
    "trl": {"loss_rel": 1e-4, "norm_rel": 1e-4},
    "dense": {"loss_rel": 1e-4, "norm_rel": 1e-4},
}
# In bf16 a body rounds otherwise wherever its rows lie otherwise.
ROUNDED = {"loss_rel": 0.05, "norm_rel": 0.05, "gradient_rel": 0.1}
# Student's 97.5 % quantile, by the rounds less one; beyond them it changes little.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
BUSY = 0.8  # share of its threads' time below which a sample is disturbed
CHECKED = ("loss", "grad_norm", "peak_bytes", "predicted_bytes", "fused_optimizer")  # of a process's first update
Record = dict[str, Any]


class Failed(RuntimeError):
    """What a process said last."""


class Child:
    """A row's process."""

    def __init__(self, spec: str, device: str, threads: int, log: Path) -> None:
        own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if device == "cpu":
            own["CUDA_VISIBLE_DEVICES"] = ""  # the trainers take the accelerator that they see
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fused_rlhf.bench.step_child", spec],
                cwd=HOME,
                env=os.environ | own,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, what: str) -> Record:
        """Raises Failed where it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(what, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise Failed(self.why())
        return json.loads(answer)

    def finish(self) -> None:
        """Let it end. Raises Failed where it did not do so well."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.process.wait() != 0:
            raise Failed(self.why())

    def why(self) -> str:
        status = self.process.wait()
        last = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return "killed: out of memory?" if status == -9 else last[-1] if last else f"exit status {status}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def measured(
    name: str, case: Case, ways: Sequence[Way], rounds: int, device: str, threads: int, folder: Path
) -> list[Record]:
    """The rows of a case."""
    from fused_rlhf.bench.step_child import spec_of

    def start(way: Way | None) -> Child:
        log = folder / f"{'reference' if way is None else way.name}.log"
        return Child(spec_of(case, way, device, threads, folder), device, threads, log)

    found: dict[Way, Record] = {way: {"samples": [], "error": None} for way in ways}
    children: dict[Way, Child] = {}
    reference = start(None)
    try:
        reference.finish()
        for way in ways:
            children[way] = start(way)
            ask(children[way], "check", found[way])
        for _ in range(rounds):
            for way, child in children.items():
                ask(child, "time", found[way])
    except Failed as error:
        for row in found.values():
            row["error"] = f"each sequence by itself: {error}"
    finally:
        for child in [reference, *children.values()]:
            child.end()
    records = [record(name, case, way, found[way]) for way in ways]
    dense = next((r for r in records if r["way"]["maker"] == "dense" and not r["wrong"]), None)
    for r in records:
        relate(r, records[0])
        if dense is not None:
            tolerate(r, dense["errors"])
    return records


def ask(child: Child, what: str, row: Record) -> None:
    """Put the answer into the row: the first update, or a sample."""
    if row["error"] is None:
        try:
            answer = child.ask(what)
            if what == "check":
                row["check"] = answer
                return
            if answer["cpu_share"] < BUSY:  # something else ran: the less disturbed of two counts
                answer = max(answer, child.ask(what), key=lambda a: a["cpu_share"]) | {"taken_twice": True}
            row["samples"].append(answer)
        except Failed as error:
            row["error"] = str(error)


def record(name: str, case: Case, way: Way, found: Record) -> Record:
    """One row of the result."""
    samples, check = found["samples"], found.get("check", {})
    limits, errors = TOLERANCE[way.maker] if case.dtype == "fp32" else ROUNDED, check.get("errors", {})
    made: Record = {
        "case": name,
        "provider": way.name,
        "label": case.label,
        "shape": asdict(case),
        "way": asdict(way),
        "tokens": case.tokens(way),
        "rounds": len(samples),
        "error": found["error"],
        "errors": errors,
        "tolerance": limits,
        "wrong": beyond(errors, limits),
        **{key: check.get(key) for key in CHECKED},
        "samples": samples,
    }
    if found["error"] is None and samples:
        made["update_s"] = spread([s["seconds"] for s in samples])
        made["cpu_share"] = statistics.median(s["cpu_share"] for s in samples)
    return made


def beyond(errors: dict[str, float], limits: dict[str, float]) -> bool:
    return any(not errors.get(key, 0.0) <= limit for key, limit in limits.items())


def tolerate(r: Record, errors: dict[str, float]) -> None:
    """Let a row be as far off as these errors, which are those of dense logits."""
    r["tolerance"] = {key: max(limit, errors.get(key, 0.0)) for key, limit in r["tolerance"].items()}
    r["wrong"] = beyond(r["errors"], r["tolerance"])


def relate(r: Record, base: Record) -> None:
    """How much faster than the case's first row it is, and how much less memory it takes."""
    r["base"] = base["provider"]
    r["speedup"] = {"value": 1.0, "low": None, "high": None} if r is base and not r["error"] else ratio(base, r)
    r["less_memory"] = less(base, r)


def ratio(slower: Record, faster: Record) -> dict[str, float | None] | None:
    """The time of one over that of the other, and its interval."""
    if slower["error"] or faster["error"]:
        return None
    pairs = zip(slower["samples"], faster["samples"], strict=True)
    return interval([math.log(a["seconds"] / b["seconds"]) for a, b in pairs])


def interval(logs: Sequence[float]) -> dict[str, float | None] | None:
    """exp of their mean, and of its 95 % interval: None where there are fewer than two."""
    if not logs:
        return None
    mean, n = statistics.fmean(logs), len(logs)
    if n == 1:
        return {"value": math.exp(mean), "low": None, "high": None}
    half = STUDENT[min(n - 2, len(STUDENT) - 1)] * statistics.stdev(logs) / math.sqrt(n)
    return {"value": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def less(more: Record, r: Record) -> float | None:
    """The memory of one over that of the other."""
    known = more["error"] is None and r["error"] is None and more["peak_bytes"] and r["peak_bytes"]
    return more["peak_bytes"] / r["peak_bytes"] if known else None


def judge(target: Target, records: Sequence[Record]) -> Record:
    """-> value and holds; holds is None where it was not measured. A wrong row cannot hold."""
    named = {r["provider"]: r for r in records if r["case"] == target.case}
    ways = [way.name for way in (target.slower, target.faster)]
    made: Record = {"what": target.what, "case": target.case, "rows": ways, "of": target.of, "least": target.least}
    made |= {"value": None, "low": None, "high": None, "holds": None, "why": ""}
    missing = [name for name in ways if name not in named or named[name]["error"]]
    if missing:
        return made | {"why": f"{', '.join(missing)} not measured"}
    slower, faster = (named[name] for name in ways)
    if target.of == "seconds":
        made |= ratio(slower, faster) or {}
    else:
        made["value"] = less(slower, faster)
    if made["value"] is not None:
        made["holds"] = made["value"] >= target.least
    wrong = [name for name in ways if named[name]["wrong"]]
    return made | ({"holds": False, "why": f"{', '.join(wrong)} disagrees"} if wrong else {})


def busy(records: Sequence[Record]) -> list[str]:
    """What is to be said where something else ran meanwhile."""
    shares = {f"{r['case']}/{r['provider']}": r["cpu_share"] for r in records if r.get("cpu_share", 1.0) < BUSY}
    if not shares:
        return []
    rows = ", ".join(f"{name} {value:.0%}" for name, value in shares.items())
    return [f"Less than {BUSY:.0%} of their threads' time, as something else ran or one thread worked alone: {rows}."]


def run(plan: Plan, *, rounds: int, device: str, threads: int, command: str, out: Path | None) -> Record:
    """All cases, one after the other; `out` is written after each."""
    result: Record = {
        "suite": "step",
        "command": command,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_info(device, threads),
        "versions": versions({"torch", "transformers", "trl", "accelerate"}),
        "rounds": rounds,
        "notes": [],
        "rows": [],
        "targets": [],
    }
    for name, case in plan.cases.items():
        with tempfile.TemporaryDirectory() as folder:
            result["rows"] += measured(name, case, plan.ways[name], rounds, device, threads, Path(folder))
        result["targets"] = [judge(target, result["rows"]) for target in plan.targets]
        result["notes"] = busy(result["rows"])
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
    return result
