"""Processes: what runs when, in how much memory, and for how long.

On a CPU every sample is a fresh process (child.py), because the peak of the resident set can only be read cleanly once; a
run goes round by round over all rows, so that noise of the machine hits every provider alike. On a GPU one process per
case, or group of cases, interleaves its rows and times them with events.

Rows that took turns carry the same `run`: times of other rows are not compared with theirs.

On a CPU, a row that by its provider's formula would not fit is not started, and a process that wants more memory than
it may have is refused it by the system: the machine never swaps.

A run's time is that of its measurements: while a process starts or imports a library, the clock stands. A run on a busy
machine takes longer, and has the same rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fused_rlhf.bench.cases import BASE_ROWS, Case
from fused_rlhf.bench.checkout import HOME
from fused_rlhf.bench.document import predicted_bytes, summarise
from fused_rlhf.bench.ops import OPS
from fused_rlhf.bench.plan import Plan, Row

PROCESS_BYTES = 1 << 30  # a Python with torch and a peer in it
MARGIN_BYTES = 1 << 30  # of the machine's memory, left alone
IMPORT_S = 300.0  # longer than that no import takes: its process hangs
POLL_S = 0.05
OUT_OF_TIME = "out of time"

Found = dict[str, dict[str, dict[str, Any]]]  # case -> provider -> as `measure` returns it
Watch = Callable[[Found], object]  # gets what a child has found so far


def quiet(found: Found) -> None:
    """Watches nothing."""


@dataclass(frozen=True)
class Task:
    """Of one process."""

    rows: list[Row]  # that take turns
    check: bool


class Meter:
    """Seconds that a run has used up."""

    def __init__(self, count_imports: bool = False) -> None:
        self.used = 0.0
        self.count_imports = count_imports

    def add(self, seconds: float, importing: bool) -> None:
        if self.count_imports or not importing:
            self.used += seconds


def _call(plan: Plan, spec: dict[str, Any], meter: Meter, until: float, watch: Watch = quiet) -> str | None:
    """Runs one child to its end, or until the meter reads `until`; why it failed, or None."""
    answer = Path(spec["out"])
    answer.unlink(missing_ok=True)
    if meter.used >= until:
        return OUT_OF_TIME
    env = {**os.environ, "OMP_NUM_THREADS": str(plan.threads)}
    last, imports, seen = time.monotonic(), 0.0, None
    # A file rather than a pipe, which nobody would empty meanwhile.
    with tempfile.TemporaryFile("w+") as errors, _ended(command_of(spec), env, errors) as process:
        while process.poll() is None:
            time.sleep(POLL_S)
            with contextlib.suppress(OSError):
                if answer.stat().st_mtime_ns != seen:
                    seen = answer.stat().st_mtime_ns
                    watch(json.loads(answer.read_text())["found"])
            importing = seen is None or json.loads(answer.read_text())["importing"]
            step, last = time.monotonic() - last, time.monotonic()
            imports += step if importing else 0.0
            meter.add(step, importing)
            if imports > IMPORT_S:
                return f"stopped: its imports took more than {IMPORT_S:g} s"
            if meter.used >= until:
                return OUT_OF_TIME
        errors.seek(0)
        said = errors.read()
    if "Traceback" in said:
        print(said, file=sys.stderr)
    if process.returncode == 0:
        return None
    last_line = (said.strip().splitlines() or ["no message"])[-1]
    killed = " (killed: out of memory?)" if process.returncode == -9 else ""
    return f"process ended with {process.returncode}{killed}: {last_line}"


def command_of(spec: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "fused_rlhf.bench.child", json.dumps(spec)]


@contextlib.contextmanager
def _ended(command: list[str], env: dict[str, str], errors: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the `with`."""
    process = subprocess.Popen(command, cwd=HOME, env=env, stdout=subprocess.DEVNULL, stderr=errors, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _spawn(plan: Plan, scratch: Path, meter: Meter, task: Task, until: float, watch: Watch = quiet) -> Found:
    """The rows' part of `take_turns` in a process of its own, whatever becomes of it."""
    memory = _memory(plan)
    found = {} if memory is None or not plan.predict else _too_large(plan, task.rows, memory)
    rows = [row for row in task.rows if row.provider not in found.get(row.case, {})]
    if not rows:
        return found
    cases = {row.case: plan.cases[row.case] for row in rows}
    references = {name: scratch / _reference(case) for name, case in cases.items()}
    spec: dict[str, Any] = {
        "cases": {name: asdict(case) for name, case in cases.items()},
        "rounds": {name: {row.provider: row.rounds for row in rows if row.case == name} for name in cases},
        "folder": os.getcwd(),
        "device": plan.device,
        "threads": plan.threads,
        "memory": memory,
        "references": {name: str(path) for name, path in references.items()},
        "out": str(scratch / "answer.json"),
    }
    # In a process of its own, whose memory is given back; where the sizes are small, it is not worth one.
    apart = not plan.in_turn and not all(path.exists() for path in references.values())
    failed = _call(plan, {**spec, "task": "reference"}, meter, until) if apart else None
    answered: Found = {}
    if failed is None:
        options = {"check": task.check, "warmup": plan.warmup, "in_turn": plan.in_turn}
        failed = _call(plan, {**spec, "task": "measure", **options}, meter, until, watch)
        if (answer := Path(spec["out"])).exists():
            answered = json.loads(answer.read_text())["found"]
    for row in rows:  # a child that was stopped may have finished some rounds
        part = answered.get(row.case, {}).get(row.provider, {"samples": []})
        if not part["samples"] and failed == OUT_OF_TIME:
            part.setdefault("error", _not_reached(plan, meter, f"{row.case}/{row.provider}"))
        elif not part["samples"]:
            part.setdefault("error", failed or "stopped when another provider made the device unusable")
        found.setdefault(row.case, {})[row.provider] = part
    return found


def _reference(case: Case) -> str:
    """The file of the fp64 reference: cases that differ in N, objective or, but for what is sampled, op share it; a run has one
    model at most."""
    rows = f"{min(case.N, BASE_ROWS)}-{case.H}-{case.V}-{case.outliers}"
    op = case.op if OPS[case.op].values == "sampled" else ""
    return f"{rows}-{case.dtype}-{case.seed}-{bool(case.inputs)}-{op}.pt"


def _not_reached(plan: Plan, meter: Meter, row: str) -> str:
    """Why, and what would reach it."""
    more = float(f"{max(3 * plan.limit_s, 10):.0e}")
    return f"not reached in {meter.used:.0f} of {plan.limit_s:g} s: --limit {more:g} or --only {shlex.quote(row)}"


def _memory(plan: Plan) -> int | None:
    """Bytes that the next process may take, on a CPU of which that is known."""
    if plan.device != "cpu" or sys.platform != "linux":
        return None
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            there = int(line.split()[1]) * 1024 - MARGIN_BYTES
            return int(there if plan.memory is None else min(there, plan.memory))
    return None


def _too_large(plan: Plan, rows: Sequence[Row], memory: int) -> Found:
    """Those whose predicted peak, with the inputs of all, exceeds the memory."""
    found: Found = {}
    inputs = sum(plan.cases[name].input_bytes for name in {row.case for row in rows})
    for row in rows:
        peak = predicted_bytes(row.provider, plan.cases[row.case], plan.device) or 0.0
        need = inputs + peak + PROCESS_BYTES
        if need > memory:
            error = f"not started: needs {need / 1e9:.1f} GB by its formula, {memory / 1e9:.1f} GB are there"
            found.setdefault(row.case, {})[row.provider] = {"samples": [], "error": error}
    return found


class Progress:
    """A line about each row as it ends, or about each of its rounds where those are processes of their own."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.started = plan, time.monotonic()
        self.lines, self.of = 0, sum(1 if plan.together else row.rounds for row in plan.rows)
        self.ended: set[Row] = set()

    def tell(self, row: Row, part: dict[str, Any]) -> None:
        self.lines += 1
        self.ended.add(row)
        at = f"[{time.monotonic() - self.started:5.0f} s] {self.lines:{len(str(self.of))}}/{self.of}"
        print(f"{at} {_progress(self.plan, row, part)}", file=sys.stderr, flush=True)

    def watch(self, rows: Sequence[Row], found: Found) -> None:
        """Of a process that has these rows, while it goes on."""
        for row in rows:
            part = found.get(row.case, {}).get(row.provider, {"samples": []})
            if row not in self.ended and ("error" in part or len(part["samples"]) >= row.rounds):
                self.tell(row, part)


def run(plan: Plan) -> dict[str, Any]:
    """Carries a plan out and returns the result (see `summarise`), also written to plan.out from the first row on."""
    found: dict[Row, dict[str, Any]] = {row: {"samples": []} for row in plan.rows}
    progress, meter = Progress(plan), Meter(plan.count_imports)
    if plan.out is not None:
        plan.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for rows, answer in _answers(plan, Path(folder), meter, progress, found):
            for row in rows:
                part = answer[row.case][row.provider]
                if row not in progress.ended or not plan.together:
                    progress.tell(row, part)
                if found[row]["samples"] and meter.used >= plan.limit_s:
                    part.pop("error", None)  # the time was up, nothing else is wrong: its earlier rounds stand
                found[row] |= {**part, "samples": found[row]["samples"] + part["samples"]}
            if plan.out is not None:
                _write(plan, found, progress)
    return _write(plan, found, progress)


def _write(plan: Plan, found: dict[Row, dict[str, Any]], progress: Progress) -> dict[str, Any]:
    """The result of what there is."""
    result = summarise(plan, found)
    result["seconds"] = round(time.monotonic() - progress.started, 1)
    if plan.out is not None:
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


def _answers(
    plan: Plan, scratch: Path, meter: Meter, progress: Progress, found: dict[Row, dict[str, Any]]
) -> Iterator[tuple[list[Row], Found]]:
    if not plan.together:
        run = _new_run()
        for round_ in range(max(row.rounds for row in plan.rows)):
            for row in plan.rows:
                if round_ < row.rounds and "error" not in found[row]:
                    # The libraries are deterministic enough: one check is enough.
                    task = Task([replace(row, rounds=plan.repeats)], plan.check and round_ == 0)
                    part = _spawn(plan, scratch, meter, task, plan.limit_s)[row.case][row.provider]
                    if _disturbed(part["samples"]):
                        again = _spawn(plan, scratch, meter, replace(task, check=False), plan.limit_s)
                        better = max(part["samples"], again[row.case][row.provider]["samples"], key=_share)
                        part["samples"] = [{**sample, "taken_twice": True} for sample in better]
                    yield [row], {row.case: {row.provider: {**part, "run": run}}}
        return
    for position, rows in enumerate(plan.processes):
        # One that hangs leaves the later ones half of the time, at least.
        until = meter.used + (plan.limit_s - meter.used) / min(len(plan.processes) - position, 2)
        left, answer = rows, Found()
        while left:
            run = _new_run()
            fresh = _spawn(plan, scratch, meter, Task(left, plan.check), until, partial(progress.watch, rows))
            for row in left:
                part = fresh[row.case][row.provider]
                answer.setdefault(row.case, {})[row.provider] = {**part, "run": run}
            # One that broke the device took the others' process with it: again, without it.
            fatal = [row for row in left if fresh[row.case][row.provider].get("fatal")]
            left = [row for row in left if row not in fatal] if fatal else []
        yield rows, answer


def _new_run() -> str:
    return uuid.uuid4().hex[:12]


def _share(samples: Sequence[dict[str, Any]]) -> float:
    """Of the processors' time, in the worst of the samples."""
    return min((s.get("cpu_share", 1.0) for s in samples), default=0.0)


def _disturbed(samples: Sequence[dict[str, Any]]) -> bool:
    """A long sample during which the processors were mostly busy with something else."""
    return any(s["both_s"] > 2 for s in samples) and _share(samples) < 0.8
