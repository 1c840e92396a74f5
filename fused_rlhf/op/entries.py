"""Logits of a few tokens of each row, differentiable, at the cost of these tokens' rows of the head; and which are largest.

z_e = transform(h_n . W_v)          for entries e = (n, v)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_rlhf import backends
from fused_rlhf.backends.tiling import TILE, Operands, slices
from fused_rlhf.door import Door
from fused_rlhf.kernels.interface import (
    Entries,
    EntryGrads,
    Grads,
    Needs,
    Projection,
    Rows,
    Stats,
    TokenGrads,
    live_entries,
)
from fused_rlhf.op.adapter import no_autocast, with_adapter
from fused_rlhf.op.head import Call, Head, check_head
from fused_rlhf.op.once import once_differentiable
from fused_rlhf.op.rows import check_ids

LARGEST_ROWS = 2048  # rows whose logits of TILE columns are held at a time: 32 MB of fp32


def entry_logits(hidden: Tensor, head: Head, temperature: float | Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """(E,) logits of the tokens `ids` (E,) in the rows `rows` (E,), ascending, of hidden (N, H); temperature one or (N,).

    Raises ValueError for an id outside of the vocabulary.
    """
    x, projection, flat = _entered(hidden, head, temperature)
    door = Door()
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    check_ids(door, ids[:, None], everywhere, -(2**62), projection.vocabulary)
    door.read()
    entries = Entries(x, flat, rows, ids)
    with no_autocast(x):
        return _EntryLogits.apply(x, projection.weight, projection.bias, projection.lora_b, entries, projection)


class _EntryLogits(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_b: Tensor | None,
        entries: Entries,
        head: Projection,
    ) -> Tensor:
        z = backends.resolve("auto", hidden).gathered(entries, head)
        ctx.save_for_backward(hidden, weight, bias, lora_b, z)
        ctx.entries, ctx.head = replace(entries, hidden=hidden.new_empty(0)), head
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:  # type: ignore[override]
        hidden, weight, bias, lora_b, z = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[:4])
        head = replace(ctx.head, weight=weight, bias=bias, lora_b=lora_b)
        grads = live_entries(EntryGrads(replace(ctx.entries, hidden=hidden), z, upstream))
        if grads.entries.count == 0:
            return (None,) * 6
        backend = backends.resolve("auto", hidden)
        none = ctx.entries.temperature[:0]
        rows = Rows(hidden[:0], ctx.entries.ids[:0], none)
        with no_autocast(hidden):
            found: Grads = backend.gradients(rows, head, Stats(none, none), TokenGrads(none), needs, entries=grads)
            d_hidden = backend.gathered_hidden(grads, head) if needs.hidden else None
        return (d_hidden, *found[1:], None, None)


@torch.no_grad()
def largest(hidden: Tensor, head: Head, temperature: float | Tensor, k: int) -> Tensor:
    """(N, k) ids of the largest logits of each row, the largest first. Holds LARGEST_ROWS x TILE logits."""
    x, projection, flat = _entered(hidden, head, temperature)
    N, V = len(x), projection.vocabulary
    op = Operands(Rows(x, torch.zeros(N, dtype=torch.int64, device=x.device), flat), projection)
    found = torch.empty(N, k, dtype=torch.int64, device=x.device)
    with no_autocast(x):
        for rows in slices(N, LARGEST_ROWS):
            some = op.x(rows)
            values = op.new(len(some), 0)
            ids = found.new_empty(len(some), 0)
            for columns in slices(V, TILE):
                z = op.new(len(some), columns.stop - columns.start)
                op.logits(some, op.w(columns), rows, columns, z)
                here, at = z.topk(min(k, z.shape[1]), 1)
                values, ids = torch.cat([values, here], 1), torch.cat([ids, at + columns.start], 1)
                values, order = values.topk(min(k, values.shape[1]), 1)
                ids = ids.gather(1, order)
            found[rows] = ids
    return found


def _entered(hidden: Tensor, head: Head, temperature: float | Tensor) -> tuple[Tensor, Projection, Tensor]:
    """-> rows as the backends take them, projection and (N,) temperatures."""
    anything = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    projection, flat = check_head(hidden, head, anything, Call(temperature))
    x = hidden if head.lora is None else with_adapter(hidden, head.lora[0], head.lora[2], projection)
    return x, projection, flat
