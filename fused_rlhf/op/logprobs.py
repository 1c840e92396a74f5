"""The op itself: a pair of custom ops over any flat rows, so that torch.compile keeps it as one node although the number
of real rows depends on the data.

Rows that must cost nothing are dropped here, before any backend sees them: ignored targets on the way forward, rows
whose upstream gradient is exactly zero on the way back.

A custom op takes tensors, numbers and one string, and tensors are what it returns: what is absent has no elements. Its
results follow from the records of `kernels/statistics.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rlhf import backends
from fused_rlhf.door import Door
from fused_rlhf.kernels.interface import (
    EntryGrads,
    Grads,
    Needs,
    Projection,
    Rows,
    Shard,
    Stats,
    TokenGrads,
    indices,
    kept_blocks,
    live_entries,
    pick,
    rows_of_blocks,
)
from fused_rlhf.kernels.statistics import STATISTICS, with_places
from fused_rlhf.kernels.transforms import Transform
from fused_rlhf.op import parallel, streamed
from fused_rlhf.op.adapter import no_autocast
from fused_rlhf.op.rows import check_ids, check_targets, check_temperature, scatter

# Mass and normaliser are for the backward alone.
RESULTS = ("logprobs", "lse", *(name for name in STATISTICS if name != "lse"), "mass", "normaliser", "id_logits")
# Of these for the backward:
KEPT = ("logprobs", "lse", "entropy", "sum_sq", "max_logit", "argmax", "mass", "normaliser", "id_logits")
UPSTREAM = (*TokenGrads._fields, "max_logit", "id_logits")
DIFFERENTIABLE = ("logprobs", "id_logits", *(name for name, record in STATISTICS.items() if record.differentiable))


class _Options(NamedTuple):
    """What is no tensor, as a custom op takes it."""

    ignore_index: int | None
    numbers: list[float]  # logit_scale, the curve's parameter, grad_filter; of a shard the numbers in their order
    names: str  # the curve, the backend, the shard's group and the outputs, between commas
    compute_dtype: torch.dtype
    adapter_dtype: torch.dtype
    round_logits: bool

    @staticmethod
    def of(head: Projection, ignore_index: int | None, outputs: tuple[str, ...], backend: str) -> _Options:
        transform = head.transform
        numbers = [transform.logit_scale, transform.parameter, head.grad_filter]
        group = ""
        if head.shard is not None:
            group, *of_shard = vars(head.shard).values()
            numbers += map(float, of_shard)
        names = ",".join((transform.curve, backend, group, *outputs))
        return _Options(ignore_index, numbers, names, head.compute_dtype, head.adapter_dtype, head.round_logits)

    def head(self, weight: Tensor, bias: Tensor, lora_b: Tensor) -> Projection:
        logit_scale, parameter, grad_filter, *of_shard = self.numbers
        shard = None
        if of_shard:
            world, start, vocabulary, sums, block = map(int, of_shard)
            shard = Shard(self.names.split(",")[2], world, start, vocabulary, bool(sums), block)
        transform = Transform(logit_scale, self.names.split(",")[0], parameter)
        return Projection(
            weight,
            _or_none(bias),
            transform,
            self.compute_dtype,
            self.round_logits,
            grad_filter,
            _or_none(lora_b),
            self.adapter_dtype,
            shard,
        )

    @property
    def backend(self) -> str:
        return self.names.split(",")[1]

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.names.split(",")[3:])


def linear_logprobs(
    rows: Rows, head: Projection, ignore_index: int | None, outputs: tuple[str, ...], backend: str
) -> Stats:
    """Statistics of any flat rows, zero where the target is `ignore_index`; differentiable.

    ignore_index None: a `Door` has let the rows in, and all are to be computed, as it must be of a streamed head.
    """
    if head.stream is not None:
        return streamed.linear_logprobs(rows, head, outputs, backend)
    named = _computed(rows, head, ignore_index, None, outputs, backend)
    return Stats.of(named["logprobs"], {name: named[name] for name in ("lse", *outputs)})


def linear_logprobs_of_ids(
    rows: Rows, head: Projection, ignore_index: int | None, ids: Tensor, outputs: tuple[str, ...], backend: str
) -> tuple[Stats, Tensor]:
    """As `linear_logprobs`; and (N, K) log-probs of the ids, zero where they or the row's target are `ignore_index`."""
    named = _computed(rows, head, ignore_index, ids, outputs, backend)
    counts = _counts(ids, rows.targets, ignore_index)
    of_ids = torch.where(counts, named["id_logits"] - named["lse"][:, None], 0.0)
    return Stats.of(named["logprobs"], {name: named[name] for name in ("lse", *outputs)}), of_ids


def _computed(
    rows: Rows, head: Projection, ignore_index: int | None, ids: Tensor | None, outputs: tuple[str, ...], backend: str
) -> dict[str, Tensor]:
    absent = rows.hidden.new_empty(0)
    operands = [absent if t is None else t for t in (head.weight, head.bias, head.lora_b)]
    options = _Options.of(head, ignore_index, with_places(outputs), backend)
    found = torch.ops.fused_rlhf.logprobs(rows.hidden, operands, rows.targets, rows.temperature, ids, *options)
    return dict(zip(RESULTS, found))


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


_OPTIONS = (
    "SymInt? ignore_index, float[] numbers, str names, ScalarType compute_dtype, ScalarType adapter_dtype, "
    "bool round_logits"
)
_OPERANDS = "Tensor hidden, Tensor[] head, Tensor targets, Tensor temperature, Tensor? ids"


# They wait for the device: torch.compile must not capture them in a CUDA graph.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op(
    "fused_rlhf::logprobs",
    mutates_args=(),
    tags=_TAGS,
    schema=f"({_OPERANDS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * len(RESULTS))})",
)
def _logprobs(hidden, head, targets, temperature, ids, *options):  # type: ignore[no-untyped-def]
    asked = _Options(*options)
    projection = asked.head(*head)
    index = None if asked.ignore_index is None else _checked(targets, temperature, ids, asked.ignore_index, projection)
    rows = Rows(hidden, targets, temperature).pick(index)
    if rows.count == 0:
        return _empty(hidden, projection, targets, temperature, ids, asked)
    backend = backends.resolve(asked.backend, hidden)
    with no_autocast(hidden):
        some = None if ids is None else pick(ids, index)
        named = None if some is None else _named(some, asked.ignore_index)
        stats, id_logits = parallel.statistics(backend, rows, projection, asked.outputs, named)
        found = {name: getattr(stats, name) for name in ("logprobs", "lse", "mass", "normaliser")} | {**stats.extra}
        if some is not None and id_logits is not None:
            found["id_logits"] = id_logits.masked_fill_(~_counts(some, rows.targets, asked.ignore_index), 0.0)
    full = [scatter(found.get(name), index, targets.numel()) for name in RESULTS]
    return tuple(
        hidden.new_empty(0, dtype=dtype) if value is None else value for value, dtype in zip(full, _dtypes(temperature))
    )


def _checked(
    targets: Tensor, temperature: Tensor, ids: Tensor | None, ignore_index: int, head: Projection
) -> Tensor | None:
    """The rows that are not ignored, None for all of them."""
    door, live = Door(), targets != ignore_index
    check_targets(door, targets, live, ignore_index, head.vocabulary)
    check_temperature(door, temperature, live)
    if ids is not None:
        check_ids(door, ids, live, ignore_index, head.vocabulary)
    return door.rows(live)


def _named(ids: Tensor, ignore_index: int | None) -> Tensor:
    """One to ignore stands for token 0."""
    return ids if ignore_index is None else ids.masked_fill(ids == ignore_index, 0)


def _counts(ids: Tensor, targets: Tensor, ignore_index: int | None) -> Tensor:
    """(N, K) bool: which of the ids are asked for."""
    if ignore_index is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return (ids != ignore_index) & (targets != ignore_index)[:, None]


def _dtypes(temperature: Tensor) -> list[torch.dtype]:
    """Of RESULTS."""
    special = {name: record.dtype for name, record in STATISTICS.items() if record.dtype is not None}
    return [special.get(name, temperature.dtype) for name in RESULTS]


def _empty(
    hidden: Tensor, head: Projection, targets: Tensor, temperature: Tensor, ids: Tensor | None, asked: _Options
) -> tuple[Tensor, ...]:
    """Zeros of the op's result shapes; what was not asked for has no elements."""
    count = targets.numel()
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("logprobs", "lse", *asked.outputs), (count,))
    backend = backends.resolve(asked.backend, hidden)
    if backend.has_normaliser():
        shapes["normaliser"] = (count,)
    if head.grad_filter > 0:
        columns = backend.filter_columns(hidden.device)
        shapes["mass"] = (count, -(-head.vocabulary // columns) if columns else 0)
    if ids is not None:
        shapes["id_logits"] = tuple(ids.shape)
    return tuple(
        torch.zeros(shapes.get(name, (0,)), dtype=dtype, device=hidden.device)
        for name, dtype in zip(RESULTS, _dtypes(temperature))
    )


@_logprobs.register_fake
def _(hidden, head, targets, temperature, ids, *options):  # type: ignore[no-untyped-def]
    asked = _Options(*options)
    return _empty(hidden, asked.head(*head), targets, temperature, ids, asked)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, head, targets, temperature, ids, *options = inputs
    found = dict(zip(RESULTS, output))
    kept = [found[name] for name in KEPT]
    ctx.save_for_backward(hidden, *head, targets, temperature, ids, *kept)
    ctx.mark_non_differentiable(*(value for name, value in found.items() if name not in DIFFERENTIABLE))
    ctx.set_materialize_grads(False)
    ctx.options = options


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple:
    hidden, weight, bias, lora_b, targets, temperature, ids, *kept = ctx.saved_tensors
    absent = hidden.new_empty(0)
    given = dict(zip(RESULTS, upstream))
    need_hidden, need_head = ctx.needs_input_grad[:2]
    grads = torch.ops.fused_rlhf.logprobs_backward(
        [absent if given[name] is None else given[name] for name in UPSTREAM],
        hidden,
        [weight, bias, lora_b],
        targets,
        temperature,
        ids,
        kept,
        [bool(need) for need in (need_hidden, *need_head)],
        *ctx.options,
    )
    d_hidden, *d_head = (g if need else None for g, need in zip(grads, (need_hidden, *need_head)))
    return (d_hidden, d_head, *[None] * (3 + len(ctx.options)))


_logprobs.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(
    "fused_rlhf::logprobs_backward",
    mutates_args=(),
    tags=_TAGS,
    schema=f"(Tensor[] upstream, {_OPERANDS}, Tensor[] kept, bool[] needs, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _logprobs_backward(upstream, hidden, head, targets, temperature, ids, kept, needs, *options):  # type: ignore[no-untyped-def]
    asked, wanted = _Options(*options), Needs(*needs)
    by_name = dict(zip(UPSTREAM, map(_or_none, upstream)))
    given = TokenGrads(*(by_name[name] for name in TokenGrads._fields))
    backend, projection = backends.resolve(asked.backend, hidden), asked.head(*head)
    found = {name: value for name, value in zip(KEPT, kept) if value.numel()}
    rows = Rows(hidden, targets, temperature)
    entries = _entry_grads(rows, ids, found, by_name, asked.ignore_index)
    live, keep = given.live(targets), None
    if asked.ignore_index is not None:
        live &= targets != asked.ignore_index
    if "mass" in found:
        keep = _kept(found["mass"], projection, targets, backend.filter_columns(hidden.device), given, live)
    # The one wait of the backward: how many rows are live, and how many each vocabulary block keeps of them.
    counts = live.sum()[None] if keep is None else torch.cat([live.sum()[None], keep.sum(0)])
    count, *of_blocks = counts.tolist()
    if count == 0 and entries is None:
        return _materialise(Grads(None, None, None), (hidden, *head), wanted)
    some = None if count == targets.numel() else indices(live, count)
    filtered = None if keep is None else rows_of_blocks(pick(keep, some), of_blocks)
    extra = {name: value for name, value in found.items() if name in ("entropy", "sum_sq")}
    logprobs, lse, *_ = kept
    stats = Stats(logprobs, lse, extra, normaliser=found.get("normaliser")).pick(some)
    with no_autocast(hidden):
        some_rows, some_grads = rows.pick(some), given.pick(some)
        own = parallel.own_entry_grads(entries, projection)
        grads = parallel.gradients(backend, some_rows, projection, stats, some_grads, wanted, filtered, own)
        # One sum over the ranks: of the live rows alone where no other can have an entry.
        d_hidden = grads.hidden if entries is not None else parallel.summed(grads.hidden, projection.shard)
        d_hidden = scatter(d_hidden, some, targets.numel())
        if d_hidden is not None and own is not None:
            d_hidden = d_hidden + backend.gathered_hidden(own, projection)
        if entries is not None:
            d_hidden = parallel.summed(d_hidden, projection.shard)
    return _materialise(grads._replace(hidden=d_hidden), (hidden, *head), wanted)


def _entry_grads(
    rows: Rows,
    ids: Tensor | None,
    found: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor | None],
    ignore_index: int | None,
) -> EntryGrads | None:
    """Gradients of single logits that are not zero: of the ids, and of each row's largest logit; None where there are none."""
    by_ids, by_max = upstream["id_logits"], upstream["max_logit"]
    parts = []
    if ids is not None and by_ids is not None:
        by_ids = torch.where(_counts(ids, rows.targets, ignore_index), by_ids, 0.0)
        parts.append((_named(ids, ignore_index), found["id_logits"], by_ids))
    if by_max is not None:
        if ignore_index is not None:
            by_max = by_max.masked_fill(rows.targets == ignore_index, 0.0)
        parts.append((found["argmax"][:, None], found["max_logit"][:, None], by_max[:, None]))
    if not parts:
        return None
    columns, logits, grads = (torch.cat(some, 1) for some in zip(*parts))
    entries = live_entries(EntryGrads(parallel.entries_of(rows, columns), logits.reshape(-1), grads.reshape(-1)))
    return entries if entries.entries.count else None


def _kept(mass: Tensor, head: Projection, targets: Tensor, columns: int, given: TokenGrads, live: Tensor) -> Tensor:
    """`kept_blocks` (N, blocks) of the live rows, none of the others. A rank may leave out its share of what all may."""
    exact = None
    for vector in (given.entropy, given.mean_logit):
        if vector is not None:
            exact = vector != 0 if exact is None else exact | (vector != 0)
    inside, share = targets.masked_fill(~live, 0), head.grad_filter
    if head.shard is not None:
        inside, share = (inside - head.shard.start).clamp(0, head.vocabulary - 1), share / head.shard.world
    return kept_blocks(mass, share, inside, columns, exact) & live[:, None]


def _materialise(grads: Grads, operands: tuple[Tensor, ...], needs: Needs) -> tuple[Tensor, ...]:
    """Zeros where a needed gradient was not computed, no elements where it is not needed."""
    absent = operands[0].new_empty(0)
    return tuple(
        grad if grad is not None else (torch.zeros_like(like) if need else absent.clone())
        for grad, like, need in zip(grads, operands, needs)
    )


@_logprobs_backward.register_fake
def _(upstream, hidden, head, targets, temperature, ids, kept, needs, *options):  # type: ignore[no-untyped-def]
    return _materialise(Grads(None, None, None), (hidden, *head), Needs(*needs))
