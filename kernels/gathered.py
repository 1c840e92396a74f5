"""Logits of a few tokens of each row, and their gradients, at the cost of these tokens' rows of the head.

    z_e = transform(h_n . W_v)          dh_n = sum_v du_e W_v          dW_v = sum_n du_e h_n

for entries e = (n, v). `entry_kernel` computes one logit from fp32 sums. Both gradients are sums over adjacent entries of a
weight times a row of a table: of the head over a row's entries, of the hidden states over a token's, once they are sorted
by token. A program of `segment_kernel` owns what it writes, and adds in the order of the entries: no atomics.

E entries, N tokens, H hidden, V vocabulary, r the rank of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_rlhf.kernels.exact import exact_scores
from fused_rlhf.kernels.interface import BlockGrads, Entries, EntryGrads, Projection
from fused_rlhf.kernels.linear_logprobs import TRITON_DTYPES
from fused_rlhf.kernels.primitives import LN2, curve_of, unit_of

GROUP = 8  # entries of a segment that are read at a time, and summed apart
BLOCK_H = 512  # columns of a table that a program takes


@triton.jit
def entry_kernel(
    x_ptr,  # (N, H), with an adapter (N, H + copies R)
    w_ptr,  # (V, H) in a dtype of its own
    lora_ptr,  # (V, R) or None
    bias_ptr,  # (V,) or None
    inv_temperature_ptr,  # (N,)
    rows_ptr,  # (E,) int64
    ids_ptr,  # (E,) int64
    logits_ptr,  # (E,) fp32 out
    H,
    R,
    stride_xn,
    stride_wv,
    stride_lora,
    logit_scale,
    parameter,
    CURVE: tl.constexpr,
    COMPUTE: tl.constexpr,  # dtypes, as in `exact_scores`
    ADAPTER: tl.constexpr,
    T_PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    e = tl.program_id(0) + tl.arange(0, 1)
    n = tl.load(rows_ptr + tl.program_id(0))
    token = tl.load(ids_ptr + e)
    score = exact_scores(
        x_ptr + n * stride_xn, w_ptr, lora_ptr, bias_ptr, token, token >= 0, unit_of(tl.load(inv_temperature_ptr + n)),
        H, R, stride_wv, stride_lora, logit_scale, parameter, CURVE, COMPUTE, ADAPTER, T_PARTS, BLOCK_H,
    )  # fmt: skip
    tl.store(logits_ptr + e, score * LN2)


def gathered_logits(entries: Entries, head: Projection) -> Tensor:
    """(E,) fp32; the bits of each do not depend on the others."""
    logits = torch.empty(entries.count, dtype=torch.float32, device=entries.ids.device)
    if not entries.count:
        return logits
    x, lora = entries.hidden.to(head.compute_dtype), head.lora_b
    entry_kernel[(entries.count,)](
        x, head.weight, lora, head.bias, entries.temperature.to(torch.float32).reciprocal(), entries.rows, entries.ids,
        logits, head.weight.shape[1], 0 if lora is None else lora.shape[1], x.stride(0), head.weight.stride(0),
        0 if lora is None else lora.stride(0), head.transform.logit_scale, head.transform.parameter,
        CURVE=curve_of(head.transform).apply, COMPUTE=TRITON_DTYPES[x.dtype],
        ADAPTER=TRITON_DTYPES[head.adapter_dtype], T_PARTS=head.t_parts, BLOCK_H=1024, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return logits


@triton.jit
def part_of(values, OPERAND: tl.constexpr, COMPUTE: tl.constexpr, PART: tl.constexpr):
    """Values rounded to OPERAND, as the PART-th of the numbers in COMPUTE that add up to them; in fp32."""
    left = values.to(OPERAND).to(tl.float32)
    for _ in tl.static_range(PART):
        left -= left.to(COMPUTE).to(tl.float32)
    return left.to(COMPUTE).to(tl.float32)


@triton.jit(do_not_specialize=["origin"])
def segment_kernel(
    table_ptr,  # (rows, H), or None: ones
    index_ptr,  # (E,) int64: the row of the table that each entry takes
    weights_ptr,  # (E,) fp32
    starts_ptr,  # (segments,) int64, as are the next two
    ends_ptr,
    places_ptr,  # the row of `out` plus `origin`; None: the segment's own number
    out_ptr,  # (rows of its own, H)
    origin,
    H,
    stride_table,
    stride_out,
    OPERAND: tl.constexpr,  # as in `part_of`
    COMPUTE: tl.constexpr,
    PART: tl.constexpr,
    ADD: tl.constexpr,  # to what is there; an empty segment leaves that as it is
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    segment = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    start = tl.load(starts_ptr + segment)
    end = tl.load(ends_ptr + segment)
    if ADD:  # noqa: SIM102 - a constant, which leaves no branch
        if start >= end:
            return
    acc = tl.zeros((GROUP, BLOCK_H), tl.float32)
    for first in range(start, end, GROUP):
        e = first + tl.arange(0, GROUP)
        weight = tl.load(weights_ptr + e, mask=e < end, other=0.0)[:, None]
        if table_ptr is None:
            acc += weight
        else:
            index = tl.load(index_ptr + e, mask=e < end, other=0)
            mask = (e < end)[:, None] & (offs < H)[None, :]
            values = tl.load(table_ptr + index[:, None] * stride_table + offs[None, :], mask=mask, other=0.0)
            acc += weight * part_of(values, OPERAND, COMPUTE, PART)
    total = tl.sum(acc, 0)
    place = segment.to(tl.int64)
    if places_ptr is not None:
        place = tl.load(places_ptr + segment) - origin
    out = out_ptr + place * stride_out + offs
    if ADD:
        total += tl.load(out, mask=offs < H, other=0.0)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=offs < H)


@dataclass(frozen=True)
class _Segments:
    """Ranges of adjacent entries, and what their sums are made of."""

    index: Tensor  # (E,)
    weights: Tensor  # (E,)
    starts: Tensor  # (segments,)
    ends: Tensor
    places: Tensor | None = None

    def pick(self, at: slice) -> _Segments:
        """Some of the segments."""
        places = None if self.places is None else self.places[at]
        return _Segments(self.index, self.weights, self.starts[at], self.ends[at], places)

    def sum(
        self, table: Tensor | None, out: Tensor, head: Projection, operand: torch.dtype, part: int = 0,
        origin: int | None = None,
    ) -> None:  # fmt: skip
        """Writes (rows, H) sums into `out`; with an `origin`, adds them to its rows `places - origin`."""
        H, width = out.shape[1], 1 if table is None else BLOCK_H
        segment_kernel[(len(self.starts), triton.cdiv(H, width))](
            table, self.index, self.weights, self.starts, self.ends, self.places, out, origin or 0, H,
            0 if table is None else table.stride(0), out.stride(0), OPERAND=TRITON_DTYPES[operand],
            COMPUTE=TRITON_DTYPES[head.compute_dtype], PART=part, ADD=origin is not None, GROUP=GROUP, BLOCK_H=width,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def gathered_gradient(grads: EntryGrads, head: Projection) -> Tensor:
    """(N, H + copies r): that of the hidden states, in their dtype."""
    entries = grads.entries
    count, H = len(entries.hidden), head.weight.shape[1]
    offsets = torch.searchsorted(entries.rows, torch.arange(count + 1, device=entries.rows.device))
    segments = _Segments(entries.ids, grads.products(head), offsets[:-1], offsets[1:])
    found = torch.empty_like(entries.hidden)
    segments.sum(head.weight, found[:, :H], head, head.compute_dtype)
    if head.lora_b is not None:
        for block, (_, part) in zip(found[:, H:].chunk(head.copies, 1), head.adapter_pairs):
            segments.sum(head.lora_b, block, head, head.adapter_dtype, part)
    return found


class HeadEntries:
    """What entries add to the gradients of a head, block of `columns` columns by block. Waits for the device once."""

    def __init__(self, grads: EntryGrads, head: Projection, columns: int) -> None:
        entries = grads.entries
        ids, order = entries.ids.sort(stable=True)
        # A segment for each entry: the first of its token has them all, the others have none.
        start = torch.arange(len(ids), device=ids.device)
        first = torch.searchsorted(ids, ids) == start
        end = torch.where(first, torch.searchsorted(ids, ids, right=True), start)
        self.segments = _Segments(entries.rows[order], grads.products(head)[order], start, end, ids)
        edges = torch.arange(0, head.vocabulary + columns, columns, device=ids.device)
        self.edges: list[int] = torch.searchsorted(ids, edges).tolist()
        self.head, self.columns = head, columns
        self.hidden, self.parts = head.split(entries.hidden.to(head.compute_dtype))

    def add(self, into: BlockGrads) -> None:
        """To the sums of a block, which is `fresh` or not."""
        origin, compute = into.columns.start, self.head.compute_dtype
        number = origin // self.columns
        segments = self.segments.pick(slice(self.edges[number], self.edges[number + 1]))
        if not len(segments.starts):
            return
        if into.weight is not None:
            if into.fresh:
                into.weight.zero_()
            segments.sum(self.hidden, into.weight, self.head, compute, origin=origin)
        into.fresh = False
        if into.lora is not None:
            for part in self.parts:
                segments.sum(part, into.lora, self.head, compute, origin=origin)
        if into.bias is not None:
            segments.sum(None, into.bias[:, None], self.head, compute, origin=origin)
