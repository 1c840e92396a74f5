"""What is asked: an op, a shape and what the batch looks like. Nothing here computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from fused_rlhf.bench.ops import OPS
from fused_rlhf.words import nearest

ITEMSIZE = {"fp32": 4, "tf32": 4, "bf16": 2}  # tf32: fp32 operands, whose products a GPU may round to it
BASE_ROWS = 2048  # tokens that are drawn; those beyond repeat them


class Shape(NamedTuple):
    """Of a model's head."""

    H: int
    V: int


# hidden_size and vocab_size of the published configurations.
MODELS = {
    "qwen2.5-0.5b": Shape(896, 151936),
    "qwen3-0.6b": Shape(1024, 151936),
    "qwen3-8b": Shape(4096, 151936),
    "qwen3-32b": Shape(5120, 151936),
    "llama3-8b": Shape(4096, 128256),
    "gemma3-1b": Shape(1152, 262144),
    "gemma3-27b": Shape(5376, 262208),
    "deepseek-v3": Shape(7168, 129280),
}


@dataclass(frozen=True)
class Case:
    """One problem: N tokens in sequences of T, hidden size H, vocabulary V.

    It answers for its numbers alone; `provider.validate` asks whether its op and objective can be had with them.
    """

    op: str = "grpo"
    objective: str = ""  # grpo and dpo: another objective of the library in its place, by its registered name
    N: int = 2048
    H: int = 896
    V: int = 151936
    T: int = 256
    dtype: str = "fp32"
    beta: float = 0.04  # grpo: weight of the KL to the reference; 0 leaves the reference out
    density: float = 1.0  # share of the positions that are completion tokens; the others are padding at the end
    zero_rows: float = 0.0  # share of the tokens, scattered, whose advantage or upstream gradient is exactly zero
    frozen_head: bool = False
    masters: bool = False  # the head is kept in fp32 and multiplied in bf16, under autocast
    outliers: int = 0  # channels at each end of H that are large in every hidden state, as in trained models
    lengths: int = 1  # how many sequence lengths are met for the first time before the timed rounds
    wall: bool = False  # time by the clock, launches and waits of the host included; on a GPU those waits are counted
    seed: int = 0
    inputs: str = ""  # a model, by its folder or name, whose hidden states and head they are; "": drawn at random
    data: str = ""  # folder with the text that the model reads, GSM8K's test.jsonl

    def __post_init__(self) -> None:
        if self.dtype not in ITEMSIZE:
            meant = nearest(self.dtype, ITEMSIZE)
            raise ValueError(f"dtype must be one of {sorted(ITEMSIZE)}, got {self.dtype!r}{meant}")
        for name in ("N", "H", "V", "T"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.N % self.T:
            raise ValueError(f"T, the length of a sequence, must divide N, got N={self.N} and T={self.T}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if not 0 <= self.zero_rows < 1:
            raise ValueError(f"zero_rows must be in [0, 1), got {self.zero_rows}")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be finite and at least 0, got {self.beta}")
        if self.masters and self.dtype != "bf16":
            raise ValueError(f"masters must be left out unless dtype is bf16, got dtype {self.dtype}")
        if not 0 <= self.outliers <= self.H // 2:
            raise ValueError(f"outliers must be in [0, H / 2 = {self.H // 2}], got {self.outliers}")
        if not 1 <= self.lengths <= self.T:
            raise ValueError(f"lengths must be in [1, T={self.T}], got {self.lengths}")

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def columns(self) -> int:
        """Rows of the head that each token's products are with."""
        op = OPS[self.op]
        return self.V if op.whole else op.ids

    @property
    def products(self) -> tuple[int, int]:
        """Products of 2 N `columns` H operations that the op cannot do without, forward and backward."""
        op = OPS[self.op]
        return op.heads, (1 if self.frozen_head else 2) if op.backward else 0

    @property
    def rows(self) -> tuple[float, float]:
        """Rows that the products cannot do without, forward and backward."""
        tokens = self.density * self.N
        return tokens, tokens * (1 - self.zero_rows)

    @property
    def flops(self) -> float:
        return sum(p * n for p, n in zip(self.products, self.rows)) * 2 * self.columns * self.H

    @property
    def gradient_bytes(self) -> int:
        """Of hidden and, unless frozen, weight."""
        if not OPS[self.op].backward:
            return 0
        of_weight = 0 if self.frozen_head else self.V * (4 if self.masters else self.itemsize)
        return (self.N * self.itemsize + of_weight) * self.H

    @property
    def least_bytes(self) -> int:
        """Operands and vectors read once, gradients written once. Given tokens count as if no two rows shared one."""
        op = OPS[self.op]
        head = min(self.N * self.columns, self.V)
        operands = op.heads * (self.N + head) * self.H * self.itemsize
        return operands + self.gradient_bytes + self.N * (8 + 8 * op.ids + 4 * op.vectors)

    @property
    def input_bytes(self) -> int:
        """What building the inputs takes; the head is drawn in fp32."""
        heads = self.V * self.H * (4 if self.itemsize == 4 else 4 + self.itemsize)
        return heads + 2 * self.N * self.H * self.itemsize + 8 * self.N * OPS[self.op].ids

    @property
    def label(self) -> str:
        extra = [f"T={self.T}"] if self.op in ("dpo", "grpo") else []
        extra += [f"beta={self.beta:g}"] if self.op == "grpo" else []
        extra += [f"{self.density:.0%} of the positions"] if self.density < 1 else []
        extra += [f"{self.zero_rows:.0%} zero gradients"] if self.zero_rows else []
        extra += ["frozen head"] if self.frozen_head else []
        extra += ["fp32 master of the head"] if self.masters else []
        extra += [f"{2 * self.outliers} outlier channels"] if self.outliers else []
        extra += [f"{self.lengths} lengths"] if self.lengths > 1 else []
        extra += ["by the clock"] if self.wall else []
        extra += [f"inputs of {self.inputs}"] if self.inputs else []
        return ", ".join([f"{self.objective or self.op} N={self.N} H={self.H} V={self.V} {self.dtype}", *extra])
