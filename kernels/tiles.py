"""Launch configurations: one frozen record per (kernel, architecture, dtype).

Nothing here depends on N, the number of tokens: a new sequence length neither recompiles nor retunes. With
`FUSED_RLHF_AUTOTUNE=1` a few records are timed at the first launch, once per process and per (kernel, architecture,
dtype, H, transform); the statistics of one process then still come from one record, so that ratios stay exact.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton


@dataclass(frozen=True)
class Tile:
    block_n: int  # rows of a tile
    block_v: int  # columns; divides 256
    block_h: int  # depth of one step of the product
    num_warps: int
    num_stages: int
    exact: int = 4  # tiles of a row of whose best token the logit is computed exactly, see `exact.py`
    slices: int = 2  # the epilogue works on 1 / slices of the columns at a time, to save registers
    group: int = 8  # tiles of rows that share the columns in L2
    tma: bool = False  # tensor descriptors (Hopper and later)
    programs_per_sm: int = 0  # > 0: persistent, that many programs per multiprocessor take tiles in turn
    raw_columns: int = 0  # > 0: the products come from cuBLAS, this many columns at a time, instead of from the kernel

    @property
    def options(self) -> dict[str, object]:
        # Without contraction a statistic has the same bits whichever others are asked for.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}

    @property
    def constants(self) -> dict[str, object]:
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_V": self.block_v,
            "BLOCK_H": self.block_h,
            "GROUP": self.group,
            "SLICES": self.slices,
            "TMA": self.tma,
        }


# How many tiles are corrected depends on how a tensor core adds: Hopper and the Blackwell of data centres keep a bit more
# than the others, see tests/test_exact.py.
_CUT_AT_24 = 15
_AMPERE = Tile(128, 128, 32, num_warps=8, num_stages=4, slices=2, exact=_CUT_AT_24)
_HOPPER = Tile(128, 256, 64, num_warps=8, num_stages=4, slices=4, group=16, tma=True, programs_per_sm=1)
_BLACKWELL = Tile(128, 128, 64, num_warps=8, num_stages=4, slices=4, tma=True, programs_per_sm=1)
_CDNA = Tile(128, 64, 32, num_warps=8, num_stages=2, slices=2, exact=_CUT_AT_24)  # 128 columns take 80 KB of its 64 KB
_SIMT = Tile(64, 64, 16, num_warps=4, num_stages=2, slices=2)
_TF32 = Tile(128, 128, 32, num_warps=8, num_stages=2, slices=2)
_INTERPRETER = Tile(16, 32, 16, num_warps=1, num_stages=1, exact=3, slices=2, group=2, programs_per_sm=1)
RAW = Tile(16, 256, 16, num_warps=8, num_stages=2, slices=2, raw_columns=4096)  # the kernels as an epilogue of cuBLAS
BOUNDED = replace(RAW, slices=1)  # that of rows with a border

# Kernels: "stats" and "dlogits"; "+" after the name: with a bias, a softcap or (dlogits) an entropy gradient, which
# need more registers. dtype "half" is bf16 and fp16; "ieee" and "tf32" are the two ways of multiplying fp32.
KERNELS = ("stats", "stats+", "dlogits", "dlogits+")
TILES: dict[tuple[str, str, str], Tile] = {}
for _kernel in KERNELS:
    for _arch in ("sm_80", "sm_86", "sm_89", "sm_120"):
        TILES[_kernel, _arch, "half"] = _AMPERE
    TILES[_kernel, "sm_90", "half"] = _HOPPER
    TILES[_kernel, "sm_100", "half"] = _BLACKWELL
    TILES[_kernel, "gfx942", "half"] = _CDNA
    for _arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"):
        TILES[_kernel, _arch, "ieee"] = _SIMT
        TILES[_kernel, _arch, "tf32"] = _TF32
    TILES[_kernel, "gfx942", "ieee"] = _SIMT
    TILES[_kernel, "interpreter", "half"] = TILES[_kernel, "interpreter", "ieee"] = _INTERPRETER

# Where the others spill registers:
TILES["stats+", "sm_90", "half"] = replace(_HOPPER, block_v=128, group=12)
for _kernel in KERNELS:
    TILES[_kernel, "sm_100", "ieee"] = replace(_SIMT, slices=1)
    TILES[_kernel, "sm_120", "tf32"] = replace(_TF32, slices=4)
for _kernel in ("stats", "stats+"):
    TILES[_kernel, "sm_100", "tf32"] = replace(_TF32, slices=4)

# Shared memory a block can have; a record must fit its architecture.
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}


@lru_cache
def arch(device: torch.device) -> str:
    """The architecture whose records `device` uses.

    Raises:
        RuntimeError: the device cannot run the kernels; the message names the backend that can.
    """
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if device.type != "cuda":
        raise RuntimeError(f'the Triton kernels need a CUDA or HIP device, got {device}; use backend="chunked"')
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if name in ("gfx90a", "gfx942", "gfx950"):
            return "gfx942"
        raise RuntimeError(
            f'the Triton kernels need matrix cores (gfx90a, gfx942, gfx950), got {name}; use backend="chunked"'
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f'the Triton kernels need compute capability 8.0 or newer, got {major}.{minor}; use backend="chunked"'
        )
    own = f"sm_{major}{minor}"
    # Of one generation, and of what is newer than this file, the record that asks for the least.
    return own if own in SHARED_MEMORY else {8: "sm_86", 9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def device_bytes(device: torch.device) -> int:
    return 80 << 30 if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory


def precision(dtype: torch.dtype) -> str:
    """How products of `dtype` are multiplied: "half", or for fp32 what torch is set to."""
    if dtype in (torch.bfloat16, torch.float16):
        return "half"
    if dtype != torch.float32:
        raise RuntimeError(f'the Triton kernels compute in bf16, fp16 or fp32, got {dtype}; use backend="reference"')
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def lookup(kernel: str, device: torch.device, dtype: torch.dtype, aligned: bool) -> Tile:
    """The record for a launch; `aligned`: the operands suit tensor descriptors (16-byte rows)."""
    name, how = arch(device), precision(dtype)
    if (kernel, name, how) not in TILES:
        raise RuntimeError(f'the Triton kernels have no {how} products on {name}; use backend="chunked"')
    tile = TILES[kernel, name, how]
    if tile.tma and not aligned:
        return TILES[kernel, "sm_86", how]
    return tile


# What a search has found, for as long as the process lives: a second record would give a token other bits.
_tuned: dict[Hashable, Tile] = {}


def candidates(kernel: str, device: torch.device, dtype: torch.dtype, aligned: bool) -> list[Tile]:
    """The record in use first, then its neighbours: other group sizes, one stage fewer, cuBLAS for the products.

    Not that for statistics: cuBLAS adds in an order that depends on the number of rows, and a ratio of old and new
    log-probs would not be exactly 1.
    """
    tile = lookup(kernel, device, dtype, aligned)
    return [
        tile,
        *(replace(tile, group=group) for group in (4, 16) if group != tile.group),
        *([replace(tile, num_stages=tile.num_stages - 1)] if tile.num_stages > 2 else []),
        *([] if kernel.startswith("stats") else [RAW]),
    ]


def tune(
    kernel: str, device: torch.device, dtype: torch.dtype, aligned: bool, key: Hashable, run: Callable[[Tile], object]
) -> Tile:
    """The record for a launch, searched for with FUSED_RLHF_AUTOTUNE=1; `run` launches the kernel with a given one."""
    if os.environ.get("FUSED_RLHF_AUTOTUNE", "0") != "1":
        return lookup(kernel, device, dtype, aligned)
    key = (kernel, device, dtype, aligned, key)
    if key not in _tuned:
        times = {
            tile: triton.testing.do_bench(lambda tile=tile: run(tile), warmup=5, rep=20, return_mode="median")
            for tile in candidates(kernel, device, dtype, aligned)
        }
        _tuned[key] = min(times, key=lambda tile: times[tile])
    return _tuned[key]
