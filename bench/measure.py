"""One measurement: clocks, memory, errors.

Times: `forward_s` ends with the loss (or the log-probs), `backward_s` with the gradients, `both_s` is their sum. On a GPU
they are of events, with work queued in front, so that launches are hidden as they are in training; of a case with `wall`
they are by the clock, from an idle GPU to an idle GPU.
Memory: `peak_extra_bytes` is the peak of the resident set (CPU) or of the allocator (GPU) over what the inputs took
before, the resulting gradients included; `scratch_bytes` leaves those gradients out.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from fused_rlhf.bench.accuracy import errors
from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.document import TIMES
from fused_rlhf.bench.inputs import Inputs, Reference, build
from fused_rlhf.bench.ops import OPS
from fused_rlhf.bench.provider import Output
from fused_rlhf.bench.registry import PROVIDERS

WARM_ROWS = 16
Found = dict[str, dict[str, Any]]  # provider -> {"samples": [...], "errors": {...}} and, when it failed, {"error": why}


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return _status_bytes("VmRSS")


def release() -> None:
    """Give freed heap back: while it is still resident it hides what comes next, and other processes lack it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """`with PeakMemory(device) as m: ...`, then `m.extra`: bytes over the level at entry; None if it cannot be read."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.extra: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        release()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
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
    """Marks in time: `perf_counter` on a CPU, and on a GPU where `wall` is wanted; else events there."""

    def __init__(self, device: str, wall: bool = False) -> None:
        self.device, self.events = device, device == "cuda" and not wall
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.events:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def last(self) -> None:
        """A mark when all is done."""
        if self.device == "cuda" and not self.events:
            torch.cuda.synchronize()
        self.mark()

    def spans(self) -> list[float]:
        if self.events:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:])]
        return [b - a for a, b in zip(self.marks, self.marks[1:])]


def _clear(inputs: Inputs) -> None:
    inputs.hidden.grad = inputs.weight.grad = None


@cache
def _busy_buffer() -> torch.Tensor:
    """One for the whole process: taken during a measurement, its memory would count there."""
    return torch.empty(1 << 26, dtype=torch.uint8, device="cuda")


def _keep_busy() -> None:
    """About a millisecond of GPU work, so that launches are queued ahead as in training; it also clears the cache."""
    for _ in range(50):
        _busy_buffer().zero_()


@contextlib.contextmanager
def products(dtype: str) -> Iterator[None]:
    """Those of fp32 operands as the case has it: in tf32 or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def call(step: Callable[[], Output], case: Case, clock: Clock) -> Output:
    """One forward (and backward), with a mark before, between and after."""
    backward = OPS[case.op].backward
    with torch.set_grad_enabled(backward), products(case.dtype):
        clock.mark()
        output = step()
        if not backward:
            clock.last()
            return output
        clock.mark()
        assert output.backward is not None or output.loss is not None
        (output.backward or output.loss.backward)()  # type: ignore[union-attr]
        clock.last()
    return output


def sample(provider: str, inputs: Inputs) -> tuple[dict[str, Any], Output]:
    """One forward (and backward): its times and memory, and its result, gradients left in `.grad`."""
    device = inputs.hidden.device.type
    _clear(inputs)
    step = PROVIDERS[provider].step(inputs)
    clock, cpu = Clock(device, inputs.case.wall), time.process_time()
    if clock.events:
        _busy_buffer()
    with PeakMemory(device) as memory:
        if clock.events:
            _keep_busy()
        output = call(step, inputs.case, clock)
        spans = clock.spans()
    found: dict[str, Any] = dict(zip(TIMES, [*spans, *([0.0] if len(spans) == 1 else []), sum(spans)]))
    if device == "cpu":  # below 1: the machine was busy with something else, or one thread worked alone
        found["cpu_share"] = (time.process_time() - cpu) / (sum(spans) * torch.get_num_threads())
    found["peak_extra_bytes"] = memory.extra
    if memory.extra is not None:
        grads = [t.grad for t in (inputs.hidden, inputs.weight) if t.grad is not None]
        found["scratch_bytes"] = max(memory.extra - sum(g.numel() * g.element_size() for g in grads), 0)
    return found, output


class Subject:
    """A case in this process: what is done with each of its providers, one thing after another, and what was found.

    `rounds`: how many samples of each. `importing` is called before a library may be imported.
    """

    def __init__(
        self,
        case: Case,
        rounds: dict[str, int],
        device: str,
        reference: Reference,
        warmup: int = 1,
        check: bool = True,
        importing: Callable[[], object] = lambda: None,
    ) -> None:
        self.case, self.rounds, self.device, self.warmup, self.check = case, rounds, device, warmup, check
        self.importing = importing
        self.reference = Reference(*(r.to(device) for r in reference))
        self.inputs = build(case, device, self.reference)
        # On a CPU a few rows wake threads and libraries; on a GPU the full shape compiles what has to be compiled.
        few = min(case.T, max(1, WARM_ROWS * case.T // case.N))
        self.warm = self.inputs.shorter(few) if device == "cpu" else self.inputs
        self.found: Found = {n: {"samples": [], "entropy_nats": entropy(self.reference)} for n in rounds}

    def bodies(self, name: str) -> list[Callable[[], object]]:
        """What is done with this provider, in order."""
        waits = self.case.wall and self.device == "cuda"
        return [
            partial(self.introduce, name),
            *[partial(sample, name, self.warm)] * self.warmup,
            *[partial(self.meet, name)] * (self.case.lengths > 1),
            *[partial(self.watch, name)] * waits,
            *[partial(self.once, name)] * self.rounds[name],
        ]

    def introduce(self, name: str) -> None:
        self.importing()
        PROVIDERS[name].step(self.inputs)

    def meet(self, name: str) -> None:
        self.found[name]["lengths"] = new_lengths(name, self.inputs)

    def watch(self, name: str) -> None:
        self.found[name]["waits"] = host_waits(name, self.inputs)

    def once(self, name: str) -> None:
        part = self.found[name]
        figures, output = sample(name, self.inputs)
        if self.check and "errors" not in part and not PROVIDERS[name].roof:
            part["errors"] = errors(self.inputs, self.reference, output.loss, output.found)
        part["samples"].append(figures)


Turn = tuple[Subject, str, Callable[[], object]]


def turns(subjects: Sequence[Subject], in_turn: bool) -> Iterator[Turn]:
    """Interleaved round by round over all rows of all cases, or all of a row before the next row's."""
    rows = [[(s, name, body) for body in s.bodies(name)] for s in subjects for name in s.rounds]
    if in_turn:
        return (turn for row in rows for turn in row)
    return (turn for round_ in zip_longest(*rows) for turn in round_ if turn is not None)


def take_turns(subjects: Sequence[Subject], in_turn: bool = False, save: Callable[[], object] = lambda: None) -> None:
    """Fills in what the subjects found; `save` is called after every turn.

    A provider that leaves the GPU unusable ends it all and is marked {"fatal": True}.
    """
    gc.collect()
    gc.freeze()  # what the imports made need not be looked at again before every sample
    try:
        for subject, name, body in turns(subjects, in_turn):
            part = subject.found[name]
            if "error" in part:
                continue
            try:
                body()
            except Exception as e:  # whatever it is, it is that provider's result
                if not _said_in_a_line(e):
                    traceback.print_exc()
                part["error"] = _why(e)
            _clear(subject.inputs)
            if "error" in part and not _usable(subject.device):
                part["fatal"] = True
                return
            save()
    finally:
        gc.unfreeze()


def measure(
    case: Case,
    providers: Sequence[str],
    device: str,
    reference: Reference,
    rounds: int,
    warmup: int = 1,
    check: bool = True,
    in_turn: bool = False,
) -> Found:
    """One case in this process."""
    subject = Subject(case, dict.fromkeys(providers, rounds), device, reference, warmup, check)
    take_turns([subject], in_turn)
    return subject.found


PEERS = ("trl", "liger_kernel")  # of the extra [peers]
INSTALLED_AS = {"quack": "quack-kernels", "cutlass": "nvidia-cutlass-dsl"}  # by the name that is imported


def _said_in_a_line(error: Exception) -> bool:
    """Whether `_why` is all there is to say: what is missing, refused or too large is no fault of the provider."""
    return isinstance(error, (ImportError, ValueError, MemoryError)) or "tried to allocate" in str(error)


def _why(error: Exception) -> str:
    """One line."""
    refused = re.search(r"tried to allocate (\d+) bytes", str(error))
    if refused:
        return f"out of memory: {int(refused[1]) / 1e9:.2f} GB more were refused"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        name = INSTALLED_AS.get(package, package.replace("_", "-"))
        extra = "'fused-rlhf[peers]'" if package in PEERS else name
        return f"needs {package}, which is not installed: pip install {extra}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def new_lengths(provider: str, inputs: Inputs) -> dict[str, Any]:
    """Meets `case.lengths` shorter sequence lengths, each once: how much was compiled, and how long the calls took."""
    case, calls = inputs.case, []
    with Compilations() as compiled:
        for i in range(case.lengths):
            shorter = inputs.shorter(case.T - i)
            calls.append(sample(provider, shorter)[0]["both_s"])
            _clear(shorter)
    return {"count": case.lengths, "triton": compiled.triton, "dynamo": compiled.dynamo, "both_s": calls}


WAIT = "called a synchronizing"  # torch's words, of which it has no constant


def host_waits(provider: str, inputs: Inputs) -> int:
    """How often the host waits for the GPU in one forward (and backward), by torch's debug mode."""
    step = PROVIDERS[provider].step(inputs)
    with waits_warned_of(inputs.hidden.device.type) as caught:
        call(step, inputs.case, Clock("cpu"))
    return sum(WAIT in str(warning.message) for warning in caught)


@contextlib.contextmanager
def waits_warned_of(device: str) -> Iterator[list[warnings.WarningMessage]]:
    """The warnings of what is done inside, among them one for each time that the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")


class Compilations:
    """Counts what is compiled inside the `with`: specialisations of Triton kernels, and graphs of torch.compile.

    Triton has one hook for the whole process; what was there before comes back at the end.
    """

    triton = dynamo = 0

    def __enter__(self) -> Compilations:
        self._graphs = _graphs()
        self._runtime: Any = None
        with contextlib.suppress(ImportError):
            from triton import knobs

            self._runtime, self._hook = knobs.runtime, knobs.runtime.jit_post_compile_hook
            knobs.runtime.jit_post_compile_hook = self._count
        return self

    def _count(self, **_: Any) -> None:
        self.triton += 1

    def __exit__(self, *exception: object) -> None:
        self.dynamo = _graphs() - self._graphs
        if self._runtime is not None:
            self._runtime.jit_post_compile_hook = self._hook


def _graphs() -> int:
    from fused_rlhf import private

    return private.compiled_graphs()


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


def entropy(reference: Reference) -> dict[str, float]:
    """What the inputs are like: entropy of the base rows, in nats."""
    values = reference.entropy.double().cpu()
    quantiles = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    return dict(zip(("p10", "p50", "p90"), quantiles.tolist())) | {"mean": values.mean().item()}
