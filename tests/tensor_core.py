"""Products of bf16 matrices with the bits that tensor cores give them, on a CPU: `tensor_core.c`, compiled on the way.

The model of one step is that of arXiv:2511.10909, checked there against devices: 16 products and 25 bits on Hopper and on
the Blackwell of data centres, 8 products and 24 bits on Ampere and Ada.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
LANES = 64  # as there


@dataclass(frozen=True)
class TensorCore:
    fraction: int  # bits that are kept behind the binary point of the largest number of a step
    step: int  # products of a step

    def products(self, x: Tensor, w: Tensor) -> Tensor:
        """(n, H) x (V, H) bf16 -> (n, V) fp32."""
        (n, depth), vocabulary = x.shape, len(w)
        columns = -(-vocabulary // LANES) * LANES
        padded = torch.zeros(depth, columns, dtype=torch.bfloat16)
        padded[:, :vocabulary] = w.T
        values, out = x.float().contiguous(), torch.empty(n, columns)
        row = library().tensor_core_row

        def run(i: int) -> None:
            row(
                out[i].data_ptr(), values[i].data_ptr(), padded.data_ptr(), depth, columns, self.fraction, self.step
            )  # fmt: skip

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, range(n)))
        return out[:, :vocabulary].contiguous()


HOPPER = TensorCore(25, 16)
AMPERE = TensorCore(24, 8)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc"))


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "tensor_core.so")
        flags = ["-O3", "-march=native", "-frounding-math", "-shared", "-fPIC"]
        subprocess.run([str(compiler()), *flags, str(SOURCE), "-o", str(out), "-lm"], check=True)
        loaded = ctypes.CDLL(str(out))
    pointer, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    loaded.tensor_core_row.argtypes = [pointer, pointer, pointer, size, size, number, number]
    loaded.tensor_core_row.restype = None
    return loaded
