"""Clocks, memory and processes.

On a CPU every sample is a fresh process (`python -m bench --one SPEC`), because the peak of the resident set can only
be read cleanly once; a run goes round by round over all rows, so that noise of the machine hits every provider alike.
On a GPU one process per case interleaves its providers and times them with events.

Times: `forward_s` ends with the loss (or the log-probs), `backward_s` with the gradients, `both_s` is their sum.
Memory: `peak_extra_bytes` is the peak of the resident set (CPU) or of the allocator (GPU) over what the inputs took
before, the resulting gradients included; `scratch_bytes` leaves those gradients out.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.registry import BASE_ROWS, PROVIDERS, Case, Inputs, Output, Reference, build, errors, fp64_reference, within

ROOT = Path(__file__).resolve().parent.parent
WARM_ROWS = 16
TIMES = ("forward_s", "backward_s", "both_s")


@dataclass(frozen=True)
class Row:
    """One line of a result: a provider on a case, sampled `rounds` times."""

    case: str  # the name of a case
    provider: str
    rounds: int = 1


@dataclass
class Plan:
    """What one run does."""

    name: str
    cases: dict[str, Case]
    rows: list[Row]
    device: str = "cpu"
    threads: int = 2
    together: bool = False  # one process per case rather than per sample
    warmup: int = 1
    check: bool = True  # errors against fp64
    limit_s: float = (
        math.inf
    )  # for the whole run; a process that would pass it is stopped, its finished rounds are kept
    out: Path | None = None
    command: str = ""
    commit: str | None = None
    targets: Sequence[Target] = ()


class Target(Protocol):
    """What a run must reach; see suites.py."""

    def judge(self, result: dict[str, Any]) -> dict[str, Any]: ...


# ------------------------------------------------------------------------------------------------------ one measurement


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class PeakMemory:
    """`with PeakMemory(device) as m: ...`, then `m.extra`: bytes over the level at entry; None if it cannot be read."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.extra: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # freed heap that is still resident would hide what comes next
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts again from here
                self._before = _status_bytes("VmRSS")
            except OSError:
                self._before = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.extra = torch.cuda.max_memory_allocated() - (self._before or 0)
        elif self._before is not None:
            self.extra = max(_status_bytes("VmHWM") - self._before, 0)


class Clock:
    """Marks in time: `perf_counter` on a CPU, events on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:])]
        return [b - a for a, b in zip(self.marks, self.marks[1:])]


def _clear(inputs: Inputs) -> None:
    inputs.hidden.grad = inputs.weight.grad = None


@cache
def _busy_buffer() -> torch.Tensor:
    return torch.empty(1 << 26, dtype=torch.uint8, device="cuda")


def _keep_busy() -> None:
    """About a millisecond of GPU work, so that launches are queued ahead as in training; it also clears the cache."""
    for _ in range(50):
        _busy_buffer().zero_()


def sample(provider: str, inputs: Inputs) -> tuple[dict[str, Any], Output]:
    """One forward (and backward): its times and memory, and its result, gradients left in `.grad`."""
    device = inputs.hidden.device.type
    _clear(inputs)
    step = PROVIDERS[provider].step(inputs)
    backward = inputs.case.products > 1
    if device == "cuda":
        _busy_buffer()
    clock, cpu = Clock(device), time.process_time()
    with PeakMemory(device) as memory:
        if device == "cuda":
            _keep_busy()
        with torch.set_grad_enabled(backward):
            clock.mark()
            output = step()
            clock.mark()
        if backward:
            assert output.backward is not None or output.loss is not None
            (output.backward or output.loss.backward)()  # type: ignore[union-attr]
            clock.mark()
        spans = clock.spans()
    found: dict[str, Any] = dict(zip(TIMES, [*spans, *([] if backward else [0.0]), sum(spans)]))
    if device == "cpu":  # below 1: the machine was busy with something else, or one thread worked alone
        found["cpu_share"] = (time.process_time() - cpu) / (sum(spans) * torch.get_num_threads())
    found["peak_extra_bytes"] = memory.extra
    if memory.extra is not None:
        grads = [t.grad for t in (inputs.hidden, inputs.weight) if t.grad is not None]
        found["scratch_bytes"] = max(memory.extra - sum(g.numel() * g.element_size() for g in grads), 0)
    return found, output


def measure(
    case: Case,
    providers: Sequence[str],
    device: str,
    reference: Reference,
    rounds: int,
    warmup: int = 1,
    check: bool = True,
    save: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, dict[str, Any]]:
    """Provider -> {"samples": [...], "errors": {...}} or {"error": why not}; interleaved, all in this process.

    `save` gets what there is so far after every round. A provider that leaves the GPU unusable ends the measurement and
    is marked {"fatal": True}.
    """
    reference = Reference(*(r.to(device) for r in reference))
    inputs = build(case, device, reference)
    found: dict[str, dict[str, Any]] = {n: {"samples": [], "entropy_nats": entropy(reference)} for n in providers}

    # On a CPU a few rows wake threads and libraries; on a GPU the full shape compiles what has to be compiled.
    warm = inputs.first(WARM_ROWS) if device == "cpu" else inputs

    def warm_up(name: str) -> None:
        sample(name, warm)

    def once(name: str) -> None:
        figures, output = sample(name, inputs)
        if check and "errors" not in found[name] and not PROVIDERS[name].roof:
            found[name]["errors"] = errors(inputs, reference, output)
        found[name]["samples"].append(figures)

    gc.collect()
    gc.freeze()  # what the imports made need not be looked at again before every sample
    try:
        for body in [warm_up] * warmup + [once] * rounds:
            for name in providers:
                if "error" in found[name]:
                    continue
                try:
                    body(name)
                except Exception as e:  # whatever it is, it is that provider's result
                    traceback.print_exc()
                    found[name]["error"] = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
                _clear(inputs)
                if "error" in found[name] and not _usable(device):
                    found[name]["fatal"] = True
                    return found
            save(found)
        return found
    finally:
        gc.unfreeze()


def _usable(device: str) -> bool:
    """Whether the device still works after an error; frees what the failed provider left."""
    gc.collect()
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


# ------------------------------------------------------------------------------------------------------------ processes


def child(spec: dict[str, Any]) -> None:
    """The other side of `_call`: does one task and writes what it found to spec["out"]."""

    def write(result: dict[str, Any]) -> None:
        new = Path(spec["out"] + ".new")
        new.write_text(json.dumps(result))
        new.replace(spec["out"])  # a child that is killed leaves the last whole answer

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
    env = {**os.environ, "OMP_NUM_THREADS": str(plan.threads), "PYTHONPATH": os.pathsep.join(_python_path())}
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
    # Cases that differ in N, op or objective alone share their base rows.
    key = f"{min(case.N, BASE_ROWS)}-{case.H}-{case.V}-{case.dtype}-{case.seed}.pt"
    spec: dict[str, Any] = {
        "case": asdict(case),
        "device": plan.device,
        "threads": plan.threads,
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
    return found


def _python_path() -> list[str]:
    return [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def run(plan: Plan) -> dict[str, Any]:
    """Carries a plan out and returns the result (see `summarise`), also written to plan.out from the first row on."""
    for row in plan.rows:
        if row.provider not in PROVIDERS:
            raise ValueError(f"provider must be one of {sorted(PROVIDERS)}, got {row.provider!r}")
        if row.case not in plan.cases:
            raise ValueError(f"case must be one of {sorted(plan.cases)}, got {row.case!r}")
    found: dict[Row, dict[str, Any]] = {row: {"samples": []} for row in plan.rows}
    started = time.time()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows, answer in _answers(plan, Path(folder), found):
            for row in rows:
                part = answer[row.provider]
                found[row] |= {**part, "samples": found[row]["samples"] + part["samples"]}
                state = part.get("error") or f"{part['samples'][-1]['both_s']:.4g} s"
                print(
                    f"[{time.time() - started:5.0f} s] {row.case} {row.provider}: {state}", file=sys.stderr, flush=True
                )
            result = summarise(plan, found)
            result["seconds"] = round(time.time() - started, 1)
            if plan.out is not None:
                plan.out.parent.mkdir(parents=True, exist_ok=True)
                plan.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _answers(plan: Plan, scratch: Path, found: dict[Row, dict[str, Any]]) -> Iterator[tuple[list[Row], Found]]:
    end = time.time() + plan.limit_s
    if not plan.together:
        for round_ in range(max(row.rounds for row in plan.rows)):
            for row in plan.rows:
                if round_ < row.rounds and "error" not in found[row]:
                    # The libraries are deterministic enough: one check is enough.
                    check = plan.check and round_ == 0
                    answer = _spawn(plan, scratch, plan.cases[row.case], [row.provider], 1, check, end)
                    if _disturbed(answer[row.provider]["samples"]):
                        again = _spawn(plan, scratch, plan.cases[row.case], [row.provider], 1, False, end)
                        better = max(answer[row.provider]["samples"] + again[row.provider]["samples"], key=_share)
                        answer[row.provider]["samples"] = [{**better, "taken_twice": True}]
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


def _share(sample: dict[str, Any]) -> float:
    return sample.get("cpu_share", 1.0)


def _disturbed(samples: list[dict[str, Any]]) -> bool:
    """A long sample during which the processors were mostly busy with something else."""
    return any(s["both_s"] > 2 and _share(s) < 0.8 for s in samples)


# -------------------------------------------------------------------------------------------------------------- results


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20 % and 80 %."""
    tensor = torch.tensor(sorted(values), dtype=torch.float64)
    low, high = (torch.quantile(tensor, q).item() for q in (0.2, 0.8))
    return {"median": statistics.median(values), "p20": low, "p80": high}


def summarise(plan: Plan, found: dict[Row, dict[str, Any]]) -> dict[str, Any]:
    """The JSON document: conditions, then one flat record per row."""
    records = [_record(plan.cases[row.case], row, found[row]) for row in plan.rows]
    for record in records:
        if record["error"] is None:
            _relate(record, records)
    packages = {p for row in plan.rows for p in PROVIDERS[row.provider].packages}
    bf16 = any(plan.cases[row.case].dtype == "bf16" for row in plan.rows)
    result: dict[str, Any] = {
        "suite": plan.name,
        "command": plan.command,
        "commit": plan.commit or commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_info(plan.device, plan.threads),
        "versions": versions(packages | {"triton", "transformers"}),
        "notes": [NO_BF16] if plan.device == "cpu" and bf16 and not bf16_products() else [],
        "rows": records,
    }
    result["targets"] = [target.judge(result) for target in plan.targets]
    return result


NO_BF16 = (
    "This CPU has no bf16 instructions (capability below AVX512), and torch's bf16 matrix products are far slower on "
    "it than fp32 ones. Ratios to dense bf16 or to TRL in bf16 say what the machine lacks, not how the algorithms "
    "compare; dense-fp32, which converts the operands first, is the useful yardstick for bf16 operands here."
)


def bf16_products() -> bool:
    """Whether torch has fast bf16 matrix products on this CPU; without, dense bf16 takes minutes at any real size."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


def _record(case: Case, row: Row, found: dict[str, Any]) -> dict[str, Any]:
    provider, samples = PROVIDERS[row.provider], found["samples"]
    tolerance = provider.tolerance[case.dtype]
    record: dict[str, Any] = {
        "case": row.case,
        "provider": row.provider,
        "label": case.label,
        "op": case.op,
        "shape": asdict(case),
        "rounds": len(samples),
        "error": found.get("error") or (None if samples else "not run"),
        "entropy_nats": found.get("entropy_nats"),
        "errors": found.get("errors", {}),
        "tolerance": tolerance._asdict(),
    }
    record["wrong"] = not within(record["errors"], tolerance)
    if record["error"] is None:
        record |= {key: spread([s[key] for s in samples]) for key in TIMES}
        seconds = record["both_s"]["median"]
        record["us_per_token"] = seconds / case.N * 1e6
        record["gflops"] = case.flops / seconds / 1e9
        for key in ("peak_extra_bytes", "scratch_bytes", "cpu_share"):
            values = [s[key] for s in samples if s.get(key) is not None]
            record[key] = statistics.median(values) if values else None
        if provider.roof:  # the products of a backward that recomputes the logits
            record["recompute_s"] = spread([s["both_s"] + s["forward_s"] for s in samples])
        record["samples"] = samples
    return record


def _relate(record: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Ratios to other rows of the same run: dense torch on the same case, bare products of the same operands."""
    good = [r for r in records if r["error"] is None]
    seconds = record["both_s"]["median"]
    dense = next((r for r in good if r["case"] == record["case"] and r["provider"] == "dense"), None)
    record["time_to_dense"] = seconds / dense["both_s"]["median"] if dense else None
    record["memory_to_dense"] = None
    if dense and dense["peak_extra_bytes"] and record["peak_extra_bytes"] is not None:
        record["memory_to_dense"] = record["peak_extra_bytes"] / dense["peak_extra_bytes"]
    bare: list[float] = []
    for roof in good:
        same = all(roof["shape"][k] == record["shape"][k] for k in ("H", "V", "dtype"))
        if PROVIDERS[roof["provider"]].roof and same and roof["shape"]["op"] != "logprobs_fwd":
            forward, backward = (roof[k]["median"] / roof["shape"]["N"] for k in ("forward_s", "backward_s"))
            products = Case(**record["shape"]).products
            each = backward / (Case(**roof["shape"]).products - 1)
            bare.append((forward + (products - 1) * each) * record["shape"]["N"])
    # The least products that the op needs, bare and in the faster of the ways tried, over the time taken.
    record["gemm_share"] = min(bare) / seconds if bare else None


def versions(packages: set[str]) -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{name: version(name) for name in sorted(packages)}}


def device_info(device: str, threads: int) -> dict[str, Any]:
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    info: dict[str, Any] = {
        "kind": device,
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return info


def commit() -> str | None:
    """The commit of this checkout, "-dirty" after it when files differ; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def entropy(reference: Reference) -> dict[str, float]:
    """What the inputs are like: entropy of the base rows, in nats."""
    values = reference.entropy.double().cpu()
    quantiles = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    return dict(zip(("p10", "p50", "p90"), quantiles.tolist())) | {"mean": values.mean().item()}
