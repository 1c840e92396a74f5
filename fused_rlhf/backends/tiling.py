"""How torch backends cut a call: blocks of ROWS rows by TILE columns, and the operands of their products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_rlhf import private
from fused_rlhf.kernels.interface import BlockGrads, Projection, Rows

TILE = 4096  # columns: with ROWS rows of fp32, 8 MB
ROWS = 512
ONE_PASS_BYTES = 320 << 20  # the block of logits that one_pass keeps: fewer rows for a larger vocabulary


def row_block(vocabulary: int, itemsize: int) -> int:
    """Rows per block. The same for every function of a backend, so that they see the same bits."""
    return max(32, min(ROWS, ONE_PASS_BYTES // max(vocabulary * itemsize, 1) // 32 * 32))


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones: AVX512-BF16 or AMX on a CPU, tensor cores on a GPU."""
    return device.type != "cpu" or private.has_native_bf16()


def slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class Operands:
    """One call's inputs in the dtype of the arithmetic, block by block."""

    def __init__(self, rows: Rows, head: Projection) -> None:
        self.hidden, self.targets, self.temperature, self.border = (
            rows.hidden,
            rows.targets,
            rows.temperature,
            rows.border,
        )
        self.head, self.compute, self.wide = head, head.compute_dtype, head.wide
        agreed = 0 if head.shard is None else head.shard.block
        self.rows = agreed or row_block(head.vocabulary, self.wide.itemsize)
        native = self.compute == torch.bfloat16 and native_bf16(rows.hidden.device)
        self.narrow = self.compute if native else self.wide  # the operands of the backward's products
        self.rounded = native and head.round_logits
        self.curved = bool(head.transform.curve)
        scale = torch.full_like(rows.temperature, head.transform.logit_scale)
        # Without a curve the whole transform is one factor per row, which the (n, H) operand can carry.
        self.row_scale = scale if self.curved else scale / rows.temperature

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.wide, device=self.hidden.device)

    def x(self, rows: slice) -> Tensor:
        """(n, H) hidden states times row_scale."""
        return self.hidden[rows].to(self.compute).to(self.wide) * self.row_scale[rows, None]

    def w(self, columns: slice) -> Tensor:
        """(v, H) rows of the head, as the products want them."""
        return self.head.rows(columns).to(self.narrow)

    def logits(self, x: Tensor, w: Tensor, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """(n, v) logits of these rows and columns into `out`; x (n, H) and w (v, H) are theirs."""
        return self.logits_of(x, w, self.row_scale[rows], self.temperature[rows], columns, out)

    def logits_of(
        self, x: Tensor, w: Tensor, scale: Tensor, temperature: Tensor, columns: slice, out: Tensor
    ) -> Tensor:
        """As `logits`, of any rows: x (n, H), scale and temperature (n,)."""
        if self.rounded:
            z = out.copy_(x.to(self.narrow) @ w.T)
        else:
            z = torch.mm(x, w.to(self.wide).T, out=out)
        bias = self.head.bias_of(columns)
        if bias is not None:
            z.addr_(scale, bias.to(self.wide))
        return self.head.transform.apply(z, temperature, out=z) if self.curved else z


def add_head_products(head: Projection, into: BlockGrads, dz: Tensor, x: Tensor) -> None:
    """Adds dz^T x to a block's gradients of weight and adapter; dz (n, v) and x (n, H + copies r) in one dtype."""
    hidden, parts = head.split(x)
    if into.weight is not None:
        add_product_(into.weight, dz.T, hidden, into.fresh)
    if into.lora is not None:
        for part in parts:
            add_product_(into.lora, dz.T, part, first=False)
    into.fresh = False


def add_product_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b, in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)
