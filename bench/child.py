"""The other side of `run._call`, a process of its own: python -m fused_rlhf.bench.child SPEC

It does one task and writes what it found to spec["out"]: after every round, and before and after it imports a library, so
that its parent can tell the time of imports from that of the work.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.inputs import Reference, fp64_reference
from fused_rlhf.bench.measure import Found, measure

try:
    import resource  # not on Windows
except ImportError:
    resource = None  # type: ignore[assignment]


def carry_out(spec: dict[str, Any]) -> None:
    def write(found: Found, importing: bool = False) -> None:
        new = Path(spec["out"] + ".new")
        new.write_text(json.dumps({"importing": importing, "found": found}))
        new.replace(spec["out"])  # a child that is killed leaves the last whole answer

    if spec["memory"] is not None and resource is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (spec["memory"], spec["memory"]))
    torch.set_num_threads(spec["threads"])
    os.chdir(spec["folder"])  # to which a case's paths are relative
    case, device = Case(**spec["case"]), spec["device"]
    path = Path(spec["reference"])
    write({})
    if not path.exists():
        torch.save(fp64_reference(case, device)._asdict(), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    if spec["task"] == "reference":
        return
    reference = Reference(**torch.load(path, map_location=device))
    options = {key: spec[key] for key in ("rounds", "warmup", "check", "in_turn")}
    write(measure(case, spec["providers"], device, reference, save=write, **options))


if __name__ == "__main__":
    carry_out(json.loads(sys.argv[1]))
