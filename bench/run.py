"""Processes: what runs when, in how much memory, and for how long.

On a CPU every sample is a fresh process (`python -m bench --one SPEC`), because the peak of the resident set can only
be read cleanly once; a run goes round by round over all rows, so that noise of the machine hits every provider alike.
On a GPU one process per case interleaves its providers and times them with events.

On a CPU, a row that by its provider's formula would not fit is not started, and a process that wants more memory than
it may have is refused it by the system: the machine never swaps.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.document import ROOT, predicted_bytes, summarise
from bench.inputs import BASE_ROWS, Reference, fp64_reference
from bench.measure import measure
from bench.plan import Plan, Row

PROCESS_BYTES = 1 << 30  # a Python with torch and a peer in it
MARGIN_BYTES = 1 << 30  # of the machine's memory, left alone


def child(spec: dict[str, Any]) -> None:
    """The other side of `_call`: does one task and writes what it found to spec["out"]."""

    def write(result: dict[str, Any]) -> None:
        new = Path(spec["out"] + ".new")
        new.write_text(json.dumps(result))
        new.replace(spec["out"])  # a child that is killed leaves the last whole answer

    if spec["memory"] is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (spec["memory"], spec["memory"]))
    torch.set_num_threads(spec["threads"])
    case, device = Case(**spec["case"]), spec["device"]
    path = Path(spec["reference"])
    if spec["task"] == "reference":
        torch.save(fp64_reference(case, device)._asdict(), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        result: dict[str, Any] = {}
    else:
        reference = Reference(**torch.load(path, map_location=device))
        options = {key: spec[key] for key in ("rounds", "warmup", "check")}
        result = measure(case, spec["providers"], device, reference, save=write, **options)
    write(result)


def _call(plan: Plan, spec: dict[str, Any], until: float) -> str | None:
    """Runs one child to its end; why it failed, or None."""
    Path(spec["out"]).unlink(missing_ok=True)
    left = None if until == math.inf else max(until - time.time(), 1.0)
    env = {**os.environ, "OMP_NUM_THREADS": str(plan.threads)}
    command = [sys.executable, "-m", "bench", "--one", json.dumps(spec)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return f"stopped after {left:.0f} s"
    if "Traceback" in done.stderr:
        print(done.stderr, file=sys.stderr)
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    killed = " (killed: out of memory?)" if done.returncode == -9 else ""
    return f"process ended with {done.returncode}{killed}: {last}"


Found = dict[str, dict[str, Any]]  # provider -> {"samples": [...], "errors": {...}} and, when it failed, {"error": why}


def _spawn(
    plan: Plan, scratch: Path, case: Case, providers: list[str], rounds: int, check: bool, until: float
) -> Found:
    """`measure` in a process of its own, whatever becomes of it."""
    memory = _memory(plan)
    refused = {} if memory is None or not plan.predict else _too_large(plan, case, providers, memory)
    if len(refused) == len(providers):
        return refused
    providers = [name for name in providers if name not in refused]
    # Cases that differ in N, op or objective alone share their base rows.
    key = f"{min(case.N, BASE_ROWS)}-{case.H}-{case.V}-{case.dtype}-{case.seed}.pt"
    spec: dict[str, Any] = {
        "case": asdict(case),
        "device": plan.device,
        "threads": plan.threads,
        "memory": memory,
        "reference": str(scratch / key),
        "out": str(scratch / "answer.json"),
    }
    failed = None if (scratch / key).exists() else _call(plan, {**spec, "task": "reference"}, until)
    found: Found = {}
    if failed is None:
        options = {"providers": providers, "rounds": rounds, "warmup": plan.warmup, "check": check}
        failed = _call(plan, {**spec, "task": "measure", **options}, until)
        if (answer := Path(spec["out"])).exists():
            found = json.loads(answer.read_text())
    for name in providers:  # a child that was stopped may have finished some rounds
        part = found.setdefault(name, {"samples": []})
        if not part["samples"]:
            part.setdefault("error", failed or "stopped when another provider made the device unusable")
    return found | refused


def _memory(plan: Plan) -> int | None:
    """Bytes that the next process may take, on a CPU of which that is known."""
    if plan.device != "cpu" or sys.platform != "linux":
        return None
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            there = int(line.split()[1]) * 1024 - MARGIN_BYTES
            return int(there if plan.memory is None else min(there, plan.memory))
    return None


def _too_large(plan: Plan, case: Case, providers: Sequence[str], memory: int) -> Found:
    """Those whose inputs and predicted peak exceed the memory."""
    found: Found = {}
    for name in providers:
        need = case.input_bytes + (predicted_bytes(name, case, plan.device) or 0.0) + PROCESS_BYTES
        if need > memory:
            error = f"not started: needs {need / 1e9:.1f} GB by its formula, {memory / 1e9:.1f} GB are there"
            found[name] = {"samples": [], "error": error}
    return found


def run(plan: Plan) -> dict[str, Any]:
    """Carries a plan out and returns the result (see `summarise`), also written to plan.out from the first row on."""
    found: dict[Row, dict[str, Any]] = {row: {"samples": []} for row in plan.rows}
    started = time.time()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows, answer in _answers(plan, Path(folder), found):
            for row in rows:
                part = answer[row.provider]
                print(f"[{time.time() - started:5.0f} s] {_progress(plan, row, part)}", file=sys.stderr, flush=True)
                if found[row]["samples"] and time.time() >= started + plan.limit_s:
                    part.pop("error", None)  # the time was up, nothing else is wrong: its earlier rounds stand
                found[row] |= {**part, "samples": found[row]["samples"] + part["samples"]}
            result = summarise(plan, found)
            result["seconds"] = round(time.time() - started, 1)
            if plan.out is not None:
                plan.out.parent.mkdir(parents=True, exist_ok=True)
                plan.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _progress(plan: Plan, row: Row, part: dict[str, Any]) -> str:
    """A line about one answer; where the memory is limited, with a bar of how much of it was taken."""
    if "error" in part:
        return f"{row.case} {row.provider}: {part['error']}"
    last = part["samples"][-1]
    peak = last["peak_extra_bytes"]
    state = f"{last['both_s']:.4g} s" + ("" if peak is None else f", {peak / 1e9:.2f} GB")
    bar = "" if plan.memory is None or peak is None else "  " + "#" * max(1, round(50 * peak / plan.memory))
    return f"{row.case} {row.provider}: {state}{bar}"


def _answers(plan: Plan, scratch: Path, found: dict[Row, dict[str, Any]]) -> Iterator[tuple[list[Row], Found]]:
    end = time.time() + plan.limit_s
    if not plan.together:
        for round_ in range(max(row.rounds for row in plan.rows)):
            for row in plan.rows:
                if round_ < row.rounds and "error" not in found[row]:
                    # The libraries are deterministic enough: one check is enough.
                    check = plan.check and round_ == 0
                    spawn = partial(_spawn, plan, scratch, plan.cases[row.case], [row.provider], plan.repeats)
                    answer = spawn(check, end)
                    found_here = answer[row.provider]
                    if _disturbed(found_here["samples"]):
                        again = spawn(False, end)[row.provider]["samples"]
                        better = max(found_here["samples"], again, key=_share)
                        found_here["samples"] = [{**sample, "taken_twice": True} for sample in better]
                    yield [row], answer
        return
    names = list(dict.fromkeys(row.case for row in plan.rows))
    for position, name in enumerate(names):
        # A case that hangs leaves the later ones half of the time, at least.
        until = time.time() + (end - time.time()) / min(len(names) - position, 2)
        rows = [row for row in plan.rows if row.case == name]
        left, answer = [row.provider for row in rows], Found()
        while left:
            rounds = max(row.rounds for row in rows)
            fresh = _spawn(plan, scratch, plan.cases[name], left, rounds, plan.check, until)
            answer |= fresh
            # One that broke the device took the others' process with it: again, without it.
            fatal = [p for p in left if fresh[p].get("fatal")]
            left = [p for p in left if p not in fatal] if fatal else []
        yield rows, answer


def _share(samples: Sequence[dict[str, Any]]) -> float:
    """Of the processors' time, in the worst of the samples."""
    return min((s.get("cpu_share", 1.0) for s in samples), default=0.0)


def _disturbed(samples: Sequence[dict[str, Any]]) -> bool:
    """A long sample during which the processors were mostly busy with something else."""
    return any(s["both_s"] > 2 for s in samples) and _share(samples) < 0.8
