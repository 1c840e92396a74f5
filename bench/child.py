"""The other side of `run._call`, a process of its own: python -m fused_rlhf.bench.child SPEC

It measures the rows of some cases, which take turns, and writes what it found to spec["out"]: after every turn, and before and
after it imports a library, so that its parent can tell the time of imports from that of the work.
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
from fused_rlhf.bench.measure import Subject, take_turns

try:
    import resource  # not on Windows
except ImportError:
    resource = None  # type: ignore[assignment]


def carry_out(spec: dict[str, Any]) -> None:
    subjects: dict[str, Subject] = {}

    def write(importing: bool = False) -> None:
        new = Path(spec["out"] + ".new")
        found = {name: subject.found for name, subject in subjects.items()}
        new.write_text(json.dumps({"importing": importing, "found": found}))
        new.replace(spec["out"])  # a child that is killed leaves the last whole answer

    if spec["memory"] is not None and resource is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (spec["memory"], spec["memory"]))
    torch.set_num_threads(spec["threads"])
    os.chdir(spec["folder"])  # to which a case's paths are relative
    cases, device = {name: Case(**fields) for name, fields in spec["cases"].items()}, spec["device"]
    references = {name: Path(path) for name, path in spec["references"].items()}
    write()
    for name, case in cases.items():
        path = references[name]
        if not path.exists():
            torch.save(fp64_reference(case, device)._asdict(), path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
    if spec["task"] == "reference":
        return
    options = {"warmup": spec["warmup"], "check": spec["check"], "importing": lambda: write(importing=True)}
    for name, case in cases.items():
        reference = Reference(**torch.load(references[name], map_location=device))
        subjects[name] = Subject(case, spec["rounds"][name], device, reference, **options)
    take_turns(list(subjects.values()), spec["in_turn"], write)


if __name__ == "__main__":
    carry_out(json.loads(sys.argv[1]))
