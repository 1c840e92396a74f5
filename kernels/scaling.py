"""A gradient that is there already, times a number that is on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_rlhf.kernels.tiles import multiprocessors

BLOCK = 4096
PROGRAMS = 8  # a multiprocessor


@triton.jit
def scale_kernel(x_ptr, factor_ptr, rows, width, BLOCK: tl.constexpr):
    """x (rows, width) *= factor, in fp32; a factor of 1 costs the read of it."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            row_ptr = x_ptr + tl.full((), row, tl.int64) * width
            for start in range(0, width, BLOCK):
                offs = start + tl.arange(0, BLOCK)
                x = tl.load(row_ptr + offs, mask=offs < width)
                tl.store(row_ptr + offs, (x.to(tl.float32) * factor).to(x.dtype), mask=offs < width)


def launch_scale(x: Tensor, factor: Tensor) -> None:
    """x, contiguous, in place; factor () fp32. torch would round the factor to a half-precision x's dtype first."""
    rows, width = (1, x.numel()) if x.dim() == 1 else x.shape
    programs = min(rows, PROGRAMS * multiprocessors(x.device))
    scale_kernel[(programs,)](x, factor, rows, width, BLOCK)
