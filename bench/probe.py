"""python -m bench.probe: every op of ours once, at shapes that no tile divides, for tools that watch a GPU's memory.

    compute-sanitizer --tool memcheck python -m bench.probe

Exit status 1 where a row failed or was wrong.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fused_rlhf.bench.command import DEVICES
from fused_rlhf.bench.registry import OPS, PROVIDERS, Case

OURS = ("ours", "ours-one_pass", "ours-two_phase", "ours-lora")
SHAPE = Case(N=132, H=136, V=1003, T=33, dtype="bf16")


def cases() -> Iterator[Case]:
    """Each op; then rows that do not suit tensor descriptors, fp32, padding, flat rows, a frozen head."""
    yield from (replace(SHAPE, op=op) for op in OPS)
    for change in ({"H": 100}, {"dtype": "fp32"}, {"dtype": "tf32"}, {"density": 0.5}, {"frozen_head": True}):
        yield replace(SHAPE, **change)  # type: ignore[arg-type]
    yield replace(SHAPE, beta=0.0, zero_rows=0.8)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.probe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    device = parser.parse_args(arguments).device
    # Every tensor with an allocation of its own, so that one byte too far is seen.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    from fused_rlhf.bench.inputs import fp64_reference
    from fused_rlhf.bench.measure import measure

    good = True
    for case in cases():
        names = [name for name in OURS if PROVIDERS[name].takes(case)]
        for name, found in measure(case, names, device, fp64_reference(case, device), rounds=1, warmup=0).items():
            right = "error" not in found and PROVIDERS[name].tolerance[case.dtype].allows(found["errors"])
            print(f"{case.label}: {name}: {'ok' if right else found.get('error', 'WRONG')}", flush=True)
            good &= right
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
