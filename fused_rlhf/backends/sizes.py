"""What a call needs by the backends' own formulas: `python -m fused_rlhf.backends.sizes N V H [DTYPE]` prints a table.

N tokens, V vocabulary, H hidden. GB (1e9 bytes) at the peak beyond the inputs, gradients of hidden and weight included; the
row `dense` is torch over whole logits, by the formula of the reference backend.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence

import torch

from fused_rlhf import backends
from fused_rlhf.kernels.interface import Needs, Route, Work

SHAPES = ((2048, 151936, 896), (16384, 151936, 896), (8192, 128256, 4096), (8192, 262144, 1152))
COLUMNS: tuple[tuple[str, Route, bool], ...] = (
    ("no gradient", "forward", False),
    ("one_pass", "one_pass", True),
    ("one_pass, frozen head", "one_pass", False),
    ("two_phase", "two_phase", True),
    ("two_phase, frozen head", "two_phase", False),
)
ROWS = (("dense", "reference"), ("chunked (CPU)", "chunked"), ("triton (GPU)", "triton"))


def rows(N: int, V: int, H: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, list[float]]]:
    """The name of each implementation, and its bytes in the order of `COLUMNS`. Triton's only where it is installed."""
    for label, name in ROWS:
        if name == "triton" and importlib.util.find_spec("triton") is None:
            continue
        work = [Work(route, N, H, V, dtype, Needs(True, weight, False)) for _, route, weight in COLUMNS]
        yield label, [backends.load(name).memory(w) for w in work]


def table(N: int, V: int, H: int, dtype: torch.dtype = torch.float32) -> str:
    """The rows as Markdown, in GB."""
    head = ["GB", *(name for name, _, _ in COLUMNS)]
    lines = [[label, *(f"{size / 1e9:.2f}" for size in sizes)] for label, sizes in rows(N, V, H, dtype)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def markdown() -> str:
    """A table for each of `SHAPES`, in bf16: what the documentation shows."""
    return "\n\n".join(f"N={N}, V={V}, H={H}, bf16:\n\n{table(N, V, H, torch.bfloat16)}" for N, V, H in SHAPES)


def main(arguments: Sequence[str]) -> int:
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    try:
        N, V, H, *rest = arguments
        (dtype,) = rest or ("bf16",)
        print(table(int(N), int(V), int(H), names[dtype]))
    except (ValueError, KeyError):
        print(f"expected N V H and maybe one of {list(names)}, got {' '.join(arguments)!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
