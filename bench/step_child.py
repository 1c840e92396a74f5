"""A process of `bench.step`, which makes the updates of one row: python -m fused_rlhf.bench.step_child SPEC

It builds its model, then answers each line it reads with one of JSON: "check", an update whose memory is measured and whose
gradient is compared with that of each sequence by itself, or "time". Without a way in SPEC it makes that comparison's file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.bench.measure import Clock, PeakMemory, release
from fused_rlhf.bench.step_batch import Batch, build, short, synthetic
from fused_rlhf.bench.step_cases import BODIES, Case, Way
from fused_rlhf.bench.step_update import Update

REFERENCE = "reference.pt"


def update_of(case: Case, way: Way, model: Any, folder: str) -> Update:
    if way.maker == "trl":
        from fused_rlhf.bench import step_trl as maker
    elif way.maker == "dense":
        from fused_rlhf.bench import step_dense as maker  # type: ignore[no-redef]
    else:
        from fused_rlhf.bench import step_ours as maker  # type: ignore[no-redef]
    return maker.build(case, way, model, folder)


def refer(case: Case, device: str, path: Path) -> None:
    """Write the batch, and what each of its sequences by itself gives."""
    from fused_rlhf.bench.step_dense import separate

    body = BODIES[case.body]
    model = build(body, case.dtype).to(device)
    batch, found = separate(case, model, synthetic(case, body.vocabulary).to(device))
    torch.save({"batch": {**vars(batch)}, **found}, path)


class Measured:
    """One row: an update that is warm, and its batch."""

    def __init__(self, case: Case, way: Way, device: str, folder: Path) -> None:
        body = BODIES[case.body]
        self.device, self.reference = device, folder / REFERENCE
        self.update = update_of(case, way, build(body, case.dtype).to(device), str(folder / "out"))
        self.pieces = self.update.prepare(Batch(**torch.load(self.reference)["batch"]).to(device))
        self.warm_up(case, body.vocabulary)

    def warm_up(self, case: Case, vocabulary: int) -> None:
        """Threads and libraries; the optimiser's state is there from now on."""
        self.update.run(self.update.prepare(synthetic(short(case), vocabulary).to(self.device)))

    def check(self) -> dict[str, Any]:
        """Memory over what weights, gradients and optimiser take, and errors."""
        parameters = list(self.update.model.parameters())
        for p in parameters:
            p.grad = torch.empty_like(p).fill_(0.0)
        seen: list[Tensor] = []

        def keep(*_: Any) -> None:
            seen.extend(p.grad for p in parameters if p.grad is not None)

        hook = self.update.optimizer.register_step_pre_hook(keep)
        with PeakMemory(self.device) as memory:
            loss, norm = self.update.run(self.pieces)
        hook.remove()
        found = {"loss": loss, "grad_norm": norm, "errors": self.errors(loss, norm, seen)}
        fused = bool(self.update.optimizer.defaults.get("fused"))
        memories = {"peak_bytes": memory.extra, "predicted_bytes": self.update.predicted_bytes}
        return found | memories | {"fused_optimizer": fused}

    def errors(self, loss: float, norm: float, gradients: list[Tensor]) -> dict[str, float]:
        """Relative, against each sequence by itself."""
        truth = torch.load(self.reference, map_location=self.device)  # let go again: other processes need the room
        pairs = zip(gradients, truth["gradients"], strict=True)
        squares = sum((mine - its).double().square().sum().item() for mine, its in pairs)
        return {
            "loss_rel": abs(loss / truth["loss"] - 1),
            "norm_rel": abs(norm / truth["grad_norm"] - 1),
            "gradient_rel": squares**0.5 / truth["grad_norm"],
        }

    def time(self) -> dict[str, Any]:
        clock, cpu = Clock(self.device), time.process_time()
        clock.mark()
        loss, norm = self.update.run(self.pieces)
        clock.mark()
        (seconds,) = clock.spans()
        busy = (time.process_time() - cpu) / (seconds * torch.get_num_threads())
        share = busy if self.device == "cpu" else 1.0
        return {"seconds": seconds, "loss": loss, "grad_norm": norm, "cpu_share": share, "load": os.getloadavg()[0]}


def main(spec: dict[str, Any]) -> None:
    # Libraries print to the standard output, where the answers go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(spec["threads"])
    case, folder = Case(**{**spec["case"], "completions": tuple(spec["case"]["completions"])}), Path(spec["folder"])
    if spec["way"] is None:
        refer(case, spec["device"], folder / REFERENCE)
        return
    row = Measured(case, Way(**spec["way"]), spec["device"], folder)
    for line in sys.stdin:
        answer = {"check": row.check, "time": row.time}[line.strip()]()
        release()
        print(json.dumps(answer), file=answers, flush=True)


def spec_of(case: Case, way: Way | None, device: str, threads: int, folder: Path) -> str:
    """What such a process is started with."""
    made = None if way is None else asdict(way)
    spec = {"case": asdict(case), "way": made, "device": device, "threads": threads, "folder": str(folder)}
    return json.dumps(spec)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
