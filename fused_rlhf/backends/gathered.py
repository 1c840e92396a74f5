"""Logits of a few tokens of each row, and their gradients, at the cost of these tokens' rows of the head.

    z_e = transform(h_n . W_v)          dh_n = sum_v du_e W_v          dW_v = sum_n du_e h_n

for entries e = (n, v). Rows of the head are fetched a few megabytes at a time. The gradient of the head is summed in the
order of the rows after a stable sort by token: the same bits each time, whatever the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fused_rlhf.backends.tiling import slices
from fused_rlhf.kernels.interface import BlockGrads, Entries, EntryGrads, Projection

BYTES = 2 << 20  # of what is fetched at a time; it stays in cache


def logits(entries: Entries, head: Projection) -> Tensor:
    """(E,)"""
    wide, compute = head.wide, head.compute_dtype
    products = torch.empty(entries.count, dtype=wide, device=entries.ids.device)
    for at in slices(entries.count, _step(entries.hidden, head)):
        x = entries.hidden[entries.rows[at]].to(compute).to(wide)
        products[at] = x.mul_(head.rows(entries.ids[at]).to(wide)).sum(1)
    bias = head.bias_of(entries.ids)
    if bias is not None:
        products += bias.to(wide)
    u = products.mul_(head.transform.logit_scale)[:, None]
    return head.transform.apply(u, entries.temperature[entries.rows].to(wide))[:, 0]


def hidden_gradient(grads: EntryGrads, head: Projection) -> Tensor:
    """(N, H), in the dtype of the hidden states."""
    entries = grads.entries
    by_product = grads.products(head)
    found = torch.zeros_like(entries.hidden)
    for rows, at in _whole_rows(entries, _step(entries.hidden, head)):
        offsets = torch.searchsorted(entries.rows[at], torch.arange(rows.start, rows.stop, device=found.device))
        found[rows] = _sums(head.rows(entries.ids[at]).to(head.wide), None, by_product[at], offsets).to(found.dtype)
    return found


class HeadEntries:
    """What entries add to the gradients of a head, block of columns by block."""

    def __init__(self, grads: EntryGrads, head: Projection) -> None:
        entries, wide = grads.entries, head.wide
        self.head = head
        ids, order = entries.ids.sort(stable=True)
        self.rows, self.by_product = entries.rows[order], grads.products(head)[order]
        self.x = entries.hidden.to(head.compute_dtype).to(wide)
        self.tokens, counts = ids.unique_consecutive(return_counts=True)
        self.ends = counts.cumsum(0)
        self.starts = self.ends - counts

    def add(self, into: BlockGrads) -> None:
        """To the sums of a block, which is `fresh` or not."""
        first, last = torch.searchsorted(self.tokens, self.tokens.new_tensor([into.columns.start, into.columns.stop]))
        if into.weight is not None and into.fresh:
            into.weight.zero_()
        into.fresh = False
        if first == last:
            return
        tokens = self.tokens[first:last] - into.columns.start
        start, stop = self.starts[first], self.ends[last - 1]
        offsets, rows, by_product = self.starts[first:last] - start, self.rows[start:stop], self.by_product[start:stop]
        hidden, parts = self.head.split(self.x)
        if into.weight is not None:
            into.weight.index_add_(0, tokens, _sums(hidden, rows, by_product, offsets).to(into.weight.dtype))
        if into.lora is not None:
            for part in parts:
                into.lora.index_add_(0, tokens, _sums(part, rows, by_product, offsets))
        if into.bias is not None:
            ones = torch.ones_like(self.x[:, :1])
            into.bias.index_add_(0, tokens, _sums(ones, rows, by_product, offsets)[:, 0])


def _step(hidden: Tensor, head: Projection) -> int:
    """Entries whose rows of the head, in the dtype of the sums, are BYTES together."""
    return max(BYTES // (hidden.shape[1] * head.wide.itemsize), 1)


def _whole_rows(entries: Entries, step: int) -> Iterator[tuple[slice, slice]]:
    """Rows, and their entries, at most `step` of these at a time where one row has not more by itself."""
    edges = torch.arange(len(entries.hidden) + 1, device=entries.rows.device)
    offsets = torch.searchsorted(entries.rows, edges).tolist()
    start = 0
    while start < len(offsets) - 1:
        stop = start + 1
        while stop < len(offsets) - 1 and offsets[stop + 1] - offsets[start] <= step:
            stop += 1
        if offsets[stop] > offsets[start]:
            yield slice(start, stop), slice(offsets[start], offsets[stop])
        start = stop


def _sums(table: Tensor, rows: Tensor | None, weights: Tensor, offsets: Tensor) -> Tensor:
    """(bags, H): of each bag of consecutive entries the sum of weights times rows of the table; None: they are its rows."""
    index = torch.arange(len(table), device=table.device) if rows is None else rows
    return embedding_bag(index, table.contiguous(), offsets, mode="sum", per_sample_weights=weights)
