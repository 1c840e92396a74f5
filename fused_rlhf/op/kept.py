"""Log-probs of the distribution that a truncated sampler drew from: renormalised over the tokens it kept.

    logprob = z_y - lse_S      lse_S = log sum_{v in S} exp z_v      H_S, Q_S = sum_{v in S} p_v^2 likewise

S is given, or found from the logits. Sets of a few tokens are named one by one, and work on them never touches the rest of
the vocabulary, forward or backward; rows whose sets are large go through the backend's products with a border. With
upstream g, k, h, s of logprob, lse, entropy and sum_sq, for v in S

    dz_v = g (1[v = y] - p_v) + k p_v - h p_v (log p_v + H) + 2 s p_v (p_v - Q)

The log-probs of the whole vocabulary, where they are wanted too, come from the same pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_rlhf import backends
from fused_rlhf.kernels.interface import (
    Backend,
    Cut,
    Entries,
    EntryGrads,
    Grads,
    KeptSets,
    Needs,
    Projection,
    Rows,
    Stats,
    TokenGrads,
    live_entries,
    pick,
)
from fused_rlhf.kernels.statistics import Partials, parts_of, reference_of
from fused_rlhf.op import parallel, sharded_sets
from fused_rlhf.op.adapter import no_autocast
from fused_rlhf.op.once import once_differentiable
from fused_rlhf.op.truncation import Entered, Sets
from fused_rlhf.segments import Sequences

FULL = "full_logprobs"
ADDED = "target_added"


def kept_statistics(rows: Rows, head: Projection, sets: Sets, outputs: tuple[str, ...], backend: str) -> Stats:
    """As `linear_logprobs` of `op.logprobs`, over kept sets; differentiable once in hidden and head.

    outputs: of WITHIN. A computed set says in `target_added` whether the target had to be added.
    """
    statistics = tuple(name for name in outputs if name not in ("lse", FULL))
    names = ("lse", *statistics, *((FULL,) if FULL in outputs else ()), *((ADDED,) if isinstance(sets, Cut) else ()))
    with no_autocast(rows.hidden):
        logprobs, *found = _Kept.apply(
            rows.hidden, head.weight, head.bias, head.lora_b, rows, head, sets, statistics, FULL in outputs, backend
        )
    return Stats.of(logprobs, dict(zip(names, found)))


@dataclass(frozen=True)
class _Small:
    """Statistics over sets that are named, of N rows; rows without entries hold nothing of use."""

    entries: Entries  # of this rank's columns, where the head is sharded
    logits: Tensor  # (E,)
    at_target: Tensor  # (E,) bool
    stats: Stats
    of_all: Stats | None  # over the whole vocabulary, where that is wanted

    @staticmethod
    def of(
        backend: Backend, rows: Rows, head: Projection, sets: Entered, outputs: tuple[str, ...], whole: bool
    ) -> _Small:
        named = Entries(rows.hidden, rows.temperature, sets.rows, sets.ids)
        entries, here = parallel.own_entries(named, head)
        at_target = sets.ids == rows.targets[sets.rows]
        if here is not None:
            at_target = at_target[here]
        z = backend.gathered(entries, head) if entries.count else rows.temperature.new_empty(0)
        partials = _partials(z, at_target, Sequences.of(entries.rows, rows.count), rows.temperature, outputs)
        partials, of_all = parallel.within_sets(backend, rows, head, partials, outputs, whole)
        stats = Stats.of(*partials.finish(rows.targets, head.vocabulary, outputs))
        return _Small(entries, z, at_target, stats, of_all)

    def upstream(self, grads: TokenGrads) -> Tensor:
        """(E,): dloss / dlogits."""
        row, stats = self.entries.rows, self.stats
        zero = torch.zeros_like(stats.lse)
        g, h, k, s = (zero if grad is None else grad.to(zero.dtype) for grad in grads[:4])
        log_p = self.logits - stats.lse[row]
        p = log_p.exp()
        by_all = (k - g)[row]
        # From the log-prob itself, so that 1 - p keeps its digits where p is near 1.
        by_target = k[row] * p - (g * stats.logprobs.expm1())[row]
        dz = torch.where(self.at_target, by_target, by_all * p)
        if grads.entropy is not None:
            assert stats.entropy is not None
            dz = dz - h[row] * torch.where(p > 0, p * (log_p + stats.entropy[row]), p)
        if grads.sum_sq is not None:
            dz = dz + 2 * s[row] * p * (p - stats["sum_sq"][row])
        return dz


def _partials(z: Tensor, at_target: Tensor, of_rows: Sequences, like: Tensor, outputs: tuple[str, ...]) -> Partials:
    """Of entries with logits z (E,), some of them their row's target; in the dtype of `like` (N,)."""
    if not len(z):
        return Partials.none(like, outputs)
    top = torch.segment_reduce(z, "max", lengths=of_rows.lengths, unsafe=True)
    depth = z - of_rows.spread(reference_of(top))
    exps = depth.exp()
    terms = {"entropy": torch.where(exps > 0, exps * depth, exps), "sum_sq": exps.square()}
    parts = {name: of_rows.sum(terms[name]) for name in parts_of(outputs)}
    return Partials(top, of_rows.sum(exps), of_rows.sum(torch.where(at_target, z, 0.0)), parts)


class _Kept(torch.autograd.Function):
    """-> logprobs, lse, the other statistics, the full log-probs where `whole`, and of a cut which targets were added."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_b: Tensor | None,
        rows: Rows,
        head: Projection,
        sets: Sets,
        outputs: tuple[str, ...],
        whole: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        computed = backends.resolve(backend, hidden)
        found = None
        adds = isinstance(sets, Cut)
        if adds and not rows.count:
            sets = Entered(rows.targets, rows.targets)
        if isinstance(sets, Cut):
            found = sharded_sets.truncated(computed, rows, head, sets, outputs, whole)
            small = _Small.of(computed, rows, head, Entered(found.rows, found.ids), outputs, False)
            of_all = found.whole
        else:
            small = _Small.of(computed, rows, head, sets, outputs, whole)
            of_all = small.of_all
        stats = small.stats if found is None else _with(small.stats, found)
        ctx.save_for_backward(hidden, weight, bias, lora_b)
        ctx.rows, ctx.head, ctx.small, ctx.found, ctx.of_all = rows, head, small, found, of_all
        ctx.backend, ctx.outputs = backend, outputs
        full = [] if of_all is None else [of_all.logprobs]
        added = [rows.targets.bool() if found is None else found.added] if adds else []
        ctx.mark_non_differentiable(*added)
        ctx.set_materialize_grads(False)
        return (stats.logprobs, stats.lse, *(stats.extra[name] for name in outputs), *full, *added)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple:  # type: ignore[override]
        hidden, weight, bias, lora_b = ctx.saved_tensors
        given = dict(zip(("logprobs", "lse", *ctx.outputs, FULL), upstream))
        grads = TokenGrads(given["logprobs"], given.get("entropy"), given["lse"], given.get("sum_sq"))
        full = given.get(FULL) if ctx.of_all is not None else None
        backend = backends.resolve(ctx.backend, hidden)
        needs = Needs(*ctx.needs_input_grad[:4])
        rows = replace(ctx.rows, hidden=hidden)
        head = replace(ctx.head, weight=weight, bias=bias, lora_b=lora_b)
        small: _Small = ctx.small
        live = grads.live(rows.targets)
        if full is not None:
            live |= full != 0
        if not live.any():  # on every rank of a sharded head alike
            return (*Grads.zeros(hidden, head, needs), *[None] * 6)
        entries = live_entries(EntryGrads(replace(small.entries, hidden=hidden), small.logits, small.upstream(grads)))
        dense = _dense(rows, ctx.of_all, full, ctx.found, grads)
        with no_autocast(hidden):
            some = entries if entries.entries.count else None
            found = parallel.gradients(backend, dense.rows, head, dense.stats, dense.grads, needs, entries=some)
            d_hidden = backend.gathered_hidden(entries, head) if needs.hidden else None
        if d_hidden is not None and found.hidden is not None:
            for at, part in zip(dense.index, found.hidden.split([len(at) for at in dense.index])):
                d_hidden.index_copy_(0, at, d_hidden.index_select(0, at) + part)
        return (parallel.summed(d_hidden, head.shard), *found[1:], *[None] * 6)


def _with(small: Stats, found: KeptSets) -> Stats:
    """The statistics of all rows: of the wide ones what was found with their sets."""
    if not len(found.wide):
        return small

    def put(values: Tensor, of_wide: Tensor) -> Tensor:
        return values.index_copy(0, found.wide, of_wide)

    extra = {name: put(value, found.stats.extra[name]) for name, value in small.extra.items()}
    return Stats(put(small.logprobs, found.stats.logprobs), put(small.lse, found.stats.lse), extra)


@dataclass(frozen=True)
class _Dense:
    """What goes through the products with the whole head."""

    rows: Rows
    stats: Stats
    grads: TokenGrads
    index: list[Tensor]  # where they come from: those over the whole vocabulary, then those with a border


def _dense(rows: Rows, of_all: Stats | None, full: Tensor | None, found: KeptSets | None, grads: TokenGrads) -> _Dense:
    none = rows.targets.new_empty(0)
    every = none if of_all is None or full is None else (full != 0).nonzero().squeeze(1)
    wide = none if found is None else found.wide
    of_wide = grads.pick(wide)
    live = of_wide.live(wide).nonzero().squeeze(1)
    if not len(live):
        if of_all is None or full is None:
            of_all, full = Stats(rows.temperature, rows.temperature), rows.temperature
        return _Dense(rows.pick(every), of_all.pick(every), TokenGrads(pick(full, every)), [every])
    assert found is not None
    within, of_wide = found.stats.pick(live), of_wide.pick(live)
    bounded = replace(rows.pick(wide[live]), border=found.border.pick(live))
    if not len(every):
        return _Dense(bounded, within, of_wide, [wide[live]])
    assert of_all is not None
    assert full is not None
    lead = torch.zeros_like(of_all.lse[every])
    whole = replace(of_all.pick(every), extra=dict.fromkeys(within.extra, lead))

    def after(value: Tensor | None, before: Tensor = lead) -> Tensor | None:
        return None if value is None else torch.cat([before, value.to(before.dtype)])

    g = torch.zeros_like(within.lse) if of_wide.logprobs is None else of_wide.logprobs
    upstream = TokenGrads(after(g, full[every].to(lead.dtype)), *map(after, of_wide[1:]))
    joined = Rows.joined([rows.pick(every), bounded]), Stats.joined([whole, within])
    return _Dense(*joined, upstream, [every, wide[live]])
