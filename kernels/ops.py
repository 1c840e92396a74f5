"""The Triton backend: the functions of `interface.Backend`, and how they walk over rows and vocabulary.

    statistics rows outermost        scratch: ROWS x (tiles of the vocabulary) x statistics, fp32
    gradients  vocabulary outermost  scratch: dlogits of ROWS rows and a block of the vocabulary; dX in fp32
    one_pass   rows outermost        scratch: rows x V of E, and what dW needs
    divergence rows outermost        scratch: rows x V of both heads' products, in fp32; back the vocabulary
    truncated  rows outermost        scratch: rows x V of products, in fp32

How large these are is said in `blocks.py`. Logits are fp32 in registers (their products in memory, for a divergence) and
never rounded; the products of the backward run in cuBLAS. An fp32 head that computes in half precision is cast block by
block. FLOPs in NVH: statistics 2, gradients 6 (4 with one operand frozen), one_pass 6, divergence 4 and 8 back, truncated
2, and 2 for the rows that keep many tokens. Entries cost their rows of the head alone (`gathered.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor

from fused_rlhf.kernels import statistics as of_shards
from fused_rlhf.kernels.blocks import (
    ROWS,
    divergence_columns,
    divergence_rows,
    gradient_columns,
    memory,
    one_pass_is_faster,
    one_pass_rows,
    padded,
    split_columns,
    truncation_rows,
    unit_columns,
)
from fused_rlhf.kernels.gathered import HeadEntries, gathered_gradient, gathered_logits
from fused_rlhf.kernels.interface import (
    BlockGrads,
    Border,
    BoundObjective,
    BoundPolicy,
    BoundPreference,
    Comparison,
    Cut,
    Entries,
    EntryGrads,
    Grads,
    HeadSink,
    KeptSets,
    Merge,
    MergeTotals,
    Needs,
    Projection,
    RowPairs,
    Rows,
    Shard,
    ShardStats,
    Stats,
    Sums,
    TokenGrads,
    Work,
    indices,
)
from fused_rlhf.kernels.linear_kl import launch_divergence, launch_divergence_dlogits, launch_totals
from fused_rlhf.kernels.linear_logprobs import (
    ColumnBlock,
    Partials,
    RowBlock,
    RowGrads,
    add_split,
    descriptors_fit,
    launch_dlogits,
    launch_finish,
    launch_reference,
    launch_repair,
    launch_stats,
    matmul,
)
from fused_rlhf.kernels.objectives import has_twin, launch_pairs, launch_policy
from fused_rlhf.kernels.scaling import launch_scale
from fused_rlhf.kernels.statistics import parts_of
from fused_rlhf.kernels.tiles import BOUNDED, Tile, arch, device_bytes, multiprocessors, precision, tune
from fused_rlhf.kernels.truncation import Sets, launch_borders, launch_names

__all__ = [
    "divergence",
    "divergence_block",
    "divergence_gradients",
    "filter_columns",
    "gathered",
    "gathered_hidden",
    "gradients",
    "has_normaliser",
    "logits",
    "loss",
    "memory",
    "one_pass",
    "one_pass_block",
    "one_pass_pays",
    "partials",
    "scaled",
    "statistics",
    "truncated",
    "truncation_block",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def on_its_device(function: Function) -> Function:
    """Triton launches on the current device: while the function runs, that is the one its rows lie on."""

    @functools.wraps(function)
    def guarded(first: Any, second: Any, *rest: Any, **more: Any) -> Any:
        of_rows = first.entries if isinstance(first, EntryGrads) else first
        # `loss` takes an objective before its log-probs.
        with torch.cuda.device_of(of_rows.hidden if isinstance(of_rows, Rows | RowPairs | Entries) else second):
            return function(first, second, *rest, **more)

    return cast(Function, guarded)


@on_its_device
def statistics(rows: Rows, head: Projection, outputs: tuple[str, ...]) -> Stats:
    """See `Backend`. A row's statistics have the same bits in any batch and whichever others are asked for.

    Raises:
        RuntimeError: the device or the dtype has no kernel; the message names the backend to use.
    """
    tokens = _tokens(rows, head)
    tile = _tile("stats", tokens, head)
    partials = Partials.empty(tile, min(rows.count, ROWS), head.vocabulary, outputs, rows.hidden.device)
    found = []
    for at in _ranges(rows.count, ROWS):
        some = _slice(tokens, at)
        for block in _blocks(head, _uncut(head)):
            launch_stats(tile, some, block, head, partials)
        stats = launch_finish(some, head, partials)[0]
        if head.grad_filter > 0:
            stats = replace(stats, mass=_masses(tile, stats, partials))
        found.append(stats)
    return Stats.joined(found)


@on_its_device
def partials(rows: Rows, head: Projection, outputs: tuple[str, ...]) -> ShardStats:
    """See `Backend`. Each shard corrects its own log-sum-exp (`exact.py`), as each has its own highest tiles."""
    fp32 = rows.temperature.to(torch.float32)
    if head.vocabulary == 0:
        return ShardStats(of_shards.Partials.none(fp32, outputs), normaliser=torch.full_like(fp32, -torch.inf))
    here = (rows.targets >= 0) & (rows.targets < head.vocabulary)
    tokens = _tokens(_inside(rows, head), head)
    tile = _tile("stats", tokens, head)
    numbers = tuple(parts_of(outputs))
    scratch = Partials.empty(tile, min(rows.count, ROWS), head.vocabulary, numbers, rows.hidden.device)
    found = []
    for at in _ranges(rows.count, ROWS):
        some = _slice(tokens, at)
        for block in _blocks(head, _uncut(head)):
            launch_stats(tile, some, block, head, scratch)
        top = torch.empty_like(some.inv_temperature)
        stats = launch_finish(some, head, scratch, top)[0]
        mass = _masses(tile, stats, scratch) if head.grad_filter > 0 else None
        merged = scratch.merged(stats, top, here[at], head.vocabulary)
        found.append((merged.packed(), stats.normaliser, mass))
    packed, normalisers, masses = zip(*found)
    mass = None if masses[0] is None else torch.cat(masses)
    return ShardStats(of_shards.Partials.unpacked(torch.cat(packed), outputs), mass, torch.cat(normalisers))


def filter_columns(device: torch.device) -> int:
    return _columns(device)


@on_its_device
def gradients(
    rows: Rows,
    head: Projection,
    stats: Stats,
    upstream: TokenGrads,
    needs: Needs,
    filtered: tuple[Tensor, ...] | None = None,
    entries: EntryGrads | None = None,
) -> Grads:
    """See `Backend`. Recomputes the logits: 2NVH, and 2NVH for each of dX and dW.

    Rows whose upstream is zero should be dropped by the caller. fp16 gradients are scaled by a power of two on the
    device, so that dlogits neither overflow nor vanish where the upstream is small. With a border the products are cuBLAS's,
    as those were by which it was found.
    """
    tokens = _tokens(rows, head)
    if not rows.count:
        return _gradients_of_entries(rows, head, needs, entries)
    plain = upstream.entropy is None and upstream.sum_sq is None and upstream.mean_logit is None
    tile = BOUNDED if rows.border is not None else _tile("dlogits", tokens, head, plain)
    N, columns = rows.count, _columns(rows.hidden.device)
    if filtered is None:  # else the blocks are those of `filter_columns`
        columns = gradient_columns(columns, N, rows.hidden.shape[1], head.compute_dtype.itemsize)
    row_grads, unscale = _row_grads(stats, upstream, tokens, head, rows.border)
    ranges: list[slice | Tensor] = list(_ranges(N, ROWS))

    width = min(head.vocabulary, columns)
    scratch = _scratch(min(N, ROWS), width, tokens.x.dtype, rows.hidden.device)
    dx = torch.zeros_like(rows.hidden, dtype=torch.float32) if needs.hidden else None
    # With a single block of rows cuBLAS writes dW itself; it sums in fp32 registers either way.
    fits = head.weight.dtype == tokens.x.dtype and _fills_the_device(head.weight, width)
    sparse = None
    if entries is not None:
        scaled = entries if unscale is None else replace(entries, upstream=entries.upstream / unscale)
        sparse = HeadEntries(scaled, head, columns)
    sink = head.sink(needs, columns, direct=len(ranges) == 1 and unscale is None and fits and sparse is None)
    for number, block in enumerate(_blocks(head, columns)):
        into = sink.open(block.columns)
        if sparse is not None:
            sparse.add(into)
        wanted = ranges
        if filtered is not None and len(filtered[number]) < N:
            wanted = list(filtered[number].split(ROWS))
        for at in wanted:
            some = _slice(tokens, at)
            dz = scratch[: len(some.targets), : len(block.w)]
            sums = launch_dlogits(tile, some, block, head, row_grads.pick(at), dz, into.bias is not None)
            if into.bias is not None and sums is not None:
                into.bias += sums
            if dx is not None and isinstance(at, slice):
                matmul(dz, block.w, dx[at], accumulate=True)
            elif dx is not None and isinstance(at, Tensor):
                part = dx.index_select(0, at)
                matmul(dz, block.w, part, accumulate=True)
                dx.index_copy_(0, at, part)
            _add_head_products(head, into, dz, some.x)
        sink.close(into, unscale)
    if dx is not None:
        dx = (dx if unscale is None else dx.mul_(unscale)).to(rows.hidden.dtype)
    return sink.grads(dx, unscale)


def _gradients_of_entries(rows: Rows, head: Projection, needs: Needs, entries: EntryGrads | None) -> Grads:
    """`gradients` where there are no rows."""
    columns = gradient_columns(_columns(rows.hidden.device), 1, rows.hidden.shape[1], head.compute_dtype.itemsize)
    sparse = None if entries is None else HeadEntries(entries, head, columns)
    sink = head.sink(needs, columns)
    for at in _ranges(head.vocabulary, columns):
        into = sink.open(at)
        if sparse is not None:
            sparse.add(into)
        sink.close(into)
    return sink.grads(torch.zeros_like(rows.hidden) if needs.hidden else None)


@on_its_device
def gathered(entries: Entries, head: Projection) -> Tensor:
    """See `Backend`."""
    arch(entries.hidden.device), precision(head.compute_dtype)  # raise before any work
    return gathered_logits(entries, head)


@on_its_device
def gathered_hidden(grads: EntryGrads, head: Projection) -> Tensor:
    """See `Backend`."""
    return gathered_gradient(grads, head)


@on_its_device
def truncated(rows: Rows, head: Projection, cut: Cut, outputs: tuple[str, ...], whole: bool) -> KeptSets:
    """See `Backend`. The sets are found from cuBLAS's products: which side of its border a token falls on that lies there
    to within rounding may depend on how many rows there are. Statistics are those of the whole vocabulary, less the share of
    what is kept.

    Raises:
        RuntimeError: as `statistics`.
    """
    tokens, device = _tokens(rows, head), rows.hidden.device
    capacity = truncation_rows(rows.count, head.vocabulary)
    scratch = _scratch(capacity, head.vocabulary, torch.float32, device)
    found, names = [], []
    for at in _ranges(rows.count, capacity):
        some = _slice(tokens, at)
        z = scratch[: len(some.targets), : head.vocabulary]
        for block in _blocks(head, _uncut(head)):
            matmul(some.x, block.w.T, z[:, block.columns])
        found.append(launch_borders(some, head, cut.pick(at), z))
        row, ids = launch_names(some, found[-1], z)  # waits for the device, once for each block of rows
        names.append((row + at.start, ids))
    row, ids = (torch.cat(parts) for parts in zip(*names))
    sets = Sets.joined(found)
    of_all = statistics(rows, head, ()) if whole else None
    is_wide = ~sets.narrow
    wide = indices(is_wide, int(is_wide.sum()))
    of_wide = Stats(sets.log_share[:0], sets.log_share[:0])
    if len(wide):
        of_wide = statistics(rows.pick(wide), head, ()) if of_all is None else of_all.pick(wide)
    within = sets.within(of_wide, wide, outputs)
    return KeptSets(row, ids, wide, sets.border(wide), within, sets.added, of_all)


@on_its_device
def logits(rows: Rows, head: Projection) -> Tensor:
    """See `Backend`. Those of `truncated`: `launch_borders` leaves them in the place of the products."""
    tokens = _tokens(_inside(rows, head), head)
    z = _scratch(rows.count, head.vocabulary, torch.float32, rows.hidden.device)[:, : head.vocabulary]
    for block in _blocks(head, _uncut(head)):
        matmul(tokens.x, block.w.T, z[:, block.columns])
    launch_borders(tokens, head, Cut(None, None, None), z)
    return z


def truncation_block(rows: Rows, head: Projection) -> int:
    """See `Backend`."""
    return truncation_rows(rows.count, 8 * head.vocabulary)


@on_its_device
def loss(objective: BoundObjective, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
    """See `Backend`. Repeatable to the bit: a sequence is summed in a fixed order."""
    if not has_twin(objective):
        return objective(slice(0, len(logprobs)), logprobs, entropy)
    if isinstance(objective, BoundPreference):
        contributions, slope = launch_pairs(objective, logprobs)
    else:
        contributions, slope = launch_policy(cast(BoundPolicy, objective), logprobs)
    return contributions, TokenGrads(slope)


@on_its_device
def one_pass(
    rows: Rows,
    head: Projection,
    outputs: tuple[str, ...],
    objective: BoundObjective,
    needs: Needs,
    merge: Merge | None = None,
) -> tuple[Stats, Tensor, Grads]:
    """See `Backend`. 6NVH; rows at which the objective is flat leave before dX and dW.

    Statistics have the bits of `statistics`. What E cannot serve goes through `statistics` and `gradients` (8NVH): fp16
    operands, an adapter on the head, a bias whose gradient is needed, an objective that needs the entropy or is not
    `tokenwise`.
    """
    bias_gradient = needs.bias and head.bias is not None
    tokenwise = objective.tokenwise and not objective.needs_entropy
    plain_head = head.lora_b is None and head.compute_dtype != torch.float16
    if any(needs) and plain_head and tokenwise and not bias_gradient:
        return _one_pass(rows, head, outputs, objective, needs, merge)
    computed = (*outputs, "entropy") if objective.needs_entropy and "entropy" not in outputs else outputs
    if merge is None:
        stats = statistics(rows, head, computed)
    else:
        stats = merge(partials(rows, head, computed), slice(0, rows.count), computed)
    contributions, upstream = loss(objective, stats.logprobs, stats.entropy)
    grads = _gradients_of_live_rows(rows, head, stats, upstream, needs)
    asked = {name: value for name, value in stats.extra.items() if name in outputs}
    return replace(stats, extra=asked), contributions, grads


def one_pass_block(rows: Rows, head: Projection, needs: Needs) -> int:
    """See `Backend`."""
    halves = needs.weight and head.weight.dtype.itemsize == 2
    sizes = rows.count, head.vocabulary, rows.hidden.shape[1], head.compute_dtype.itemsize
    return one_pass_rows(*sizes, halves, device_bytes(rows.hidden.device))


def one_pass_pays(rows: Rows, head: Projection, needs: Needs) -> bool:
    """See `Backend`: where `one_pass` has a way of its own, by `blocks.one_pass_is_faster`."""
    (N, H), device = rows.hidden.shape, rows.hidden.device
    work = Work("one_pass", N, H, head.vocabulary, head.compute_dtype, needs)
    found = replace(work, multiprocessors=multiprocessors(device), device_bytes=device_bytes(device))
    return one_pass_is_faster(found)


def _one_pass(
    rows: Rows,
    head: Projection,
    outputs: tuple[str, ...],
    objective: BoundObjective,
    needs: Needs,
    merge: Merge | None,
) -> tuple[Stats, Tensor, Grads]:
    tokens = _tokens(rows if merge is None else _inside(rows, head), head)
    tile = _tile("stats", tokens, head)
    (N, H), V, device = rows.hidden.shape, head.vocabulary, rows.hidden.device
    capacity = one_pass_block(rows, head, needs) if head.shard is None else head.shard.block
    partials = Partials.empty(tile, capacity, V, outputs, device)
    scratch = _scratch(capacity, V, head.compute_dtype, device)
    dx = torch.zeros_like(rows.hidden) if needs.hidden else None
    sink = _SplitSink(head, needs, several=capacity < N) if needs.weight else None
    # A preference is not tokenwise. The statistics of a shard are not yet those that the loss is of.
    twin = cast(BoundPolicy, objective) if has_twin(objective) and merge is None else None
    found, losses = [], []
    for at in _ranges(N, capacity):
        some = _slice(tokens, at)
        exps = scratch[: len(some.targets), :V]
        reference = launch_reference(some, head)
        row_max = torch.empty_like(reference)
        for block in _blocks(head, _uncut(head)):
            launch_stats(tile, some, block, head, partials, exps[:, block.columns], reference)
        stats, contributions, slope = launch_finish(some, head, partials, row_max, twin, at)
        if merge is not None:
            some = replace(some, targets=rows.targets[at])
            here = (some.targets >= 0) & (some.targets < V)
            of_shard = partials.merged(stats, row_max, here, V)
            stats = merge(ShardStats(of_shard, normaliser=stats.normaliser), at, outputs)
            row_max = cast(Tensor, stats.normaliser)
        if contributions is None or slope is None:
            contributions, upstream = objective(at, stats.logprobs, stats.entropy)
            slope = torch.zeros_like(contributions) if upstream.logprobs is None else upstream.logprobs
        found.append(stats)
        losses.append(contributions)
        factor = launch_repair(tile, some, head, partials, exps, reference, row_max, stats, slope)

        live = _move_to_front(scratch, slope != 0)  # waits for the device, once for each block of rows
        exps = scratch[: len(live), :V]
        x, factor = some.x, factor[:, None]
        if len(live) < len(slope):
            x, factor = x.index_select(0, live), factor.index_select(0, live)
        if not len(live):
            continue
        if dx is not None:
            product = torch.empty((len(live), H), dtype=torch.float32, device=device)
            for i, block in enumerate(_blocks(head, _uncut(head))):
                matmul(exps[:, block.columns], block.w, product, accumulate=i > 0)
            if len(live) < len(slope):
                dx[at].index_copy_(0, live, product.mul_(factor).to(dx.dtype))
            else:
                torch.mul(product, factor, out=dx[at])
            del product
        if sink is not None:
            scaled = torch.mul(x, factor, out=torch.empty_like(x))
            for columns in _ranges(V, sink.width):
                into = sink.open(columns)
                assert into.weight is not None
                matmul(exps[:, columns].T, scaled, into.weight, accumulate=not into.fresh)
                into.fresh = False
                sink.close(into)
    return Stats.joined(found), torch.cat(losses), Grads(dx, None, None) if sink is None else sink.grads(dx)


@on_its_device
def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """See `Backend`."""
    launch_scale(gradient, factor)
    return gradient


def has_normaliser() -> bool:
    return True


@on_its_device
def divergence(rows: RowPairs, of: Comparison, merge: MergeTotals | None = None) -> tuple[Tensor, Sums]:
    """See `Backend`. The products are cuBLAS's: a row's bits may depend on how many rows there are.

    Raises:
        RuntimeError: as `statistics`.
    """
    x, y, inv_temperature = _pairs(rows, of)
    N, V, device = len(x), of.policy.vocabulary, x.device
    capacity = divergence_rows(N, V) if merge is None else cast(Shard, of.policy.shard).block
    z_scratch, r_scratch = (_scratch(capacity, V, torch.float32, device) for _ in range(2))
    value, *sums = (torch.empty(N, dtype=torch.float32, device=device) for _ in ("value", *Sums._fields))
    for at in _ranges(N, capacity):
        z, r = (scratch[: at.stop - at.start, :V] for scratch in (z_scratch, r_scratch))
        for hidden, head, out in ((x, of.policy, z), (y, of.ref, r)):
            for block in _blocks(head, _uncut(head)):
                matmul(hidden[at], block.w.T, out[:, block.columns])
        totals = None if merge is None else merge(launch_totals(of, z, r, inv_temperature[at]))
        launch_divergence(of, z, r, inv_temperature[at], value[at], Sums(*(v[at] for v in sums)), totals)
    return value, Sums(*sums)


def divergence_block(rows: RowPairs, of: Comparison) -> int:
    """See `Backend`."""
    return divergence_rows(len(rows.hidden), of.policy.vocabulary)


@on_its_device
def divergence_gradients(rows: RowPairs, of: Comparison, sums: Sums, upstream: Tensor, needs: Needs) -> Grads:
    """See `Backend`. The products of both heads again: 4NVH, and 2NVH for each of dX and dW; fp16 as in `gradients`."""
    x, y, inv_temperature = _pairs(rows, of)
    policy, N, V, device = of.policy, len(x), of.policy.vocabulary, x.device
    g, unscale = _divergence_upstream(upstream, sums, inv_temperature, policy)
    ranges = list(_ranges(N, ROWS))
    width = divergence_columns(N, V, policy.weight.shape[1], x.dtype.itemsize)
    z_scratch, r_scratch = (_scratch(min(N, ROWS), width, torch.float32, device) for _ in range(2))
    dz_scratch = z_scratch if x.dtype == torch.float32 else _scratch(min(N, ROWS), width, x.dtype, device)
    dx = torch.zeros_like(rows.hidden, dtype=torch.float32) if needs.hidden else None
    fits = policy.weight.dtype == x.dtype and _fills_the_device(policy.weight, width)
    sink = policy.sink(needs, width, direct=len(ranges) == 1 and unscale is None and fits)
    for columns in _ranges(V, width):
        w, ref_w = policy.rows(columns), of.ref.rows(columns)
        into = sink.open(columns)
        for at in ranges:
            z, r, dz = (scratch[: at.stop - at.start, : len(w)] for scratch in (z_scratch, r_scratch, dz_scratch))
            matmul(x[at], w.T, z)
            matmul(y[at], ref_w.T, r)
            some = Sums(*(v[at] for v in sums))
            of_bias = launch_divergence_dlogits(
                of, columns, z, r, inv_temperature[at], some, g[at], dz, into.bias is not None
            )
            if into.bias is not None and of_bias is not None:
                into.bias += of_bias
            if dx is not None:
                matmul(dz, w, dx[at], accumulate=True)
            _add_head_products(policy, into, dz, x[at])
        sink.close(into, unscale)
    if dx is not None:
        dx = (dx if unscale is None else dx.mul_(unscale)).to(rows.hidden.dtype)
    return sink.grads(dx, unscale)


def _pairs(rows: RowPairs, of: Comparison) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of policy and reference, each in the compute dtype of its head, and 1 / temperature (N,)."""
    arch(rows.hidden.device)  # like the next two lines, raises before any work
    precision(of.policy.compute_dtype)
    precision(of.ref.compute_dtype)
    x, y = rows.hidden.to(of.policy.compute_dtype), rows.ref_hidden.to(of.ref.compute_dtype)
    return x, y, rows.temperature.to(torch.float32).reciprocal()


def _divergence_upstream(
    upstream: Tensor, sums: Sums, inv_temperature: Tensor, head: Projection
) -> tuple[Tensor, Tensor | None]:
    """Upstream (n,) times dz / du, and for fp16 what the results must be multiplied by, as in `_row_grads`."""
    g = upstream.to(torch.float32) * inv_temperature * head.transform.logit_scale
    if head.compute_dtype != torch.float16:
        return g, None
    # |p s| <= mean + 1 in every kind, hence |dz| <= |g| (1 + 2 |mean|): 2^14 leaves room below 65504. Without rows: 0.
    bound = torch.nn.functional.pad(g.abs() * (1 + 2 * sums.mean.abs()), (0, 1))
    peak = torch.where(bound.isfinite(), bound, 0.0).max()
    scale = torch.exp2(torch.floor(14 - torch.log2(peak.clamp(1e-30, 1e30))))
    return g * scale, 1 / scale


def _add_head_products(head: Projection, into: BlockGrads, dz: Tensor, x: Tensor) -> None:
    """Adds dz^T x to a block's gradients of weight and adapter; dz (n, v) and x (n, H + copies r) in one dtype."""
    hidden, parts = head.split(x)
    if into.weight is not None:
        matmul(dz.T, hidden, into.weight, accumulate=not into.fresh)
    if into.lora is not None:
        for activations in parts:
            matmul(dz.T, activations, into.lora, accumulate=True)
    into.fresh = False


class _SplitSink(HeadSink):
    """The gradient of a weight with the rows outermost, summed at fp32 precision without an fp32 copy of it.

    Over several blocks of rows a narrower weight has its sum as two halves: rounded, and what that rounding left.
    """

    def __init__(self, head: Projection, needs: Needs, several: bool) -> None:
        in_place = head.weight.dtype == torch.float32
        at_once = not several and head.weight.dtype == head.compute_dtype and _fills_the_device(head.weight)
        columns = split_columns(head.weight.shape[1])
        super().__init__(head, needs, columns, direct=in_place or at_once)
        self.width = head.vocabulary if self.direct else columns
        self.low: Tensor | None = None
        if several and self.weight is not None and self.scratch is not None:
            self.weight.zero_()
            self.low = torch.zeros_like(self.weight)

    def open(self, columns: slice) -> BlockGrads:
        block = super().open(columns)
        block.fresh |= self.scratch is not None
        return block

    def close(self, block: BlockGrads, scale: Tensor | None = None) -> None:
        if self.low is None or self.weight is None or block.weight is None:
            super().close(block, scale)
        else:
            add_split(self.weight[block.columns], self.low[block.columns], block.weight)
            self.written.add(block.columns.start)

    def grads(self, hidden: Tensor | None, scale: Tensor | None = None) -> Grads:
        if self.weight is not None and not self.written:  # every row was flat
            self.weight.zero_()
        return super().grads(hidden, scale)


def _masses(tile: Tile, stats: Stats, partials: Partials) -> Tensor:
    """(n, blocks) probability mass of each vocabulary block of `backward`, from the forward's tiles."""
    n, tiles = len(stats.lse), partials.values.shape[2]
    m, s = partials.values[0, :n], partials.values[1, :n]
    assert stats.normaliser is not None
    mass = s * torch.exp2(m - stats.normaliser[:, None])
    per_block = _columns(stats.lse.device) // tile.block_v
    blocks = triton.cdiv(tiles, per_block)
    return torch.nn.functional.pad(mass, (0, blocks * per_block - tiles)).view(n, blocks, per_block).sum(2)


def _gradients_of_live_rows(rows: Rows, head: Projection, stats: Stats, upstream: TokenGrads, needs: Needs) -> Grads:
    """`gradients` without the rows whose upstream is zero."""
    nonzero = upstream.live(rows.targets)
    count = int(nonzero.sum()) if any(needs) else 0
    if count == 0:
        return Grads.zeros(rows.hidden, head, needs)
    if count == rows.count:
        return gradients(rows, head, stats, upstream, needs)
    live = indices(nonzero, count)
    grads = gradients(rows.pick(live), head, stats.pick(live), upstream.pick(live), needs)
    if grads.hidden is None:
        return grads
    return grads._replace(hidden=torch.zeros_like(rows.hidden).index_copy_(0, live, grads.hidden))


def _tokens(rows: Rows, head: Projection) -> RowBlock:
    arch(rows.hidden.device), precision(head.compute_dtype)  # raise before any work
    x = rows.hidden.to(head.compute_dtype)
    if _misplaced(x):
        x = x.clone()
    return RowBlock(x, rows.targets, rows.temperature.to(torch.float32).reciprocal())


def _inside(rows: Rows, head: Projection) -> Rows:
    """With some column of a shard for each target beyond it."""
    return replace(rows, targets=rows.targets.clamp(0, head.vocabulary - 1))


def _tile(kernel: str, rows: RowBlock, head: Projection, plain: bool = True) -> Tile:
    """plain: no upstreams but those of log-probs and lse."""
    w = head.weight if _whole(head) else rows.x  # a block made on the way is as aligned as x
    H = rows.x.shape[1]

    def run(tile: Tile) -> None:
        some = RowBlock(
            rows.x.new_empty((4096, H)).normal_(), rows.targets.new_zeros(4096), rows.inv_temperature.new_ones(4096)
        )
        block = next(_blocks(head, _columns(w.device)))
        if kernel == "stats":
            launch_stats(tile, some, block, head, Partials.empty(tile, 4096, block.w.shape[0], (), w.device))
        else:
            vector = rows.inv_temperature.new_ones(4096)
            h = None if plain else vector
            out = _scratch(4096, block.w.shape[0], rows.x.dtype, w.device)[:, : block.w.shape[0]]
            launch_dlogits(tile, some, block, head, RowGrads(vector, vector, vector, vector, h), out, False)

    full = head.bias is not None or bool(head.transform.curve) or not plain
    name = kernel + "+" if full else kernel
    return tune(name, w.device, head.compute_dtype, descriptors_fit(rows.x, w), H, run)


def _blocks(head: Projection, columns: int) -> Iterator[ColumnBlock]:
    """The vocabulary, `columns` at a time, in the compute dtype."""
    for at in _ranges(head.vocabulary, columns):
        w = head.rows(at)
        yield ColumnBlock(at.start, w.clone() if _misplaced(w) else w, head.bias_of(at))


def _uncut(head: Projection) -> int:
    """Columns of a block where only a cast, an adapter or a copy asks for blocks."""
    return head.weight.shape[0] if _whole(head) else _columns(head.weight.device)


def _whole(head: Projection) -> bool:
    """Whether the kernels can read the weight where it lies."""
    return head.weight.dtype == head.compute_dtype and head.lora_b is None and not _misplaced(head.weight)


def _misplaced(operand: Tensor) -> bool:
    """Whether tensor descriptors could address a copy of it, but not it: as a view into a flat buffer may lie anywhere."""
    return operand.data_ptr() % 16 != 0 and operand.stride(0) * operand.element_size() % 16 == 0


def _columns(device: torch.device) -> int:
    return unit_columns(multiprocessors(device))


def _ranges(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _slice(rows: RowBlock, at: slice | Tensor) -> RowBlock:
    return RowBlock(rows.x[at], rows.targets[at], rows.inv_temperature[at])


def _scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty((rows, padded(columns)), dtype=dtype, device=device)


def _move_to_front(scratch: Tensor, keep: Tensor) -> Tensor:
    """Moves the rows to keep to the front and returns where each came from; holes there are filled from the end.

    Waits for the device once: for how many rows are kept, and how many of them are moved.
    """
    order = torch.arange(len(keep), device=keep.device)
    total = keep.sum()
    hole = ~keep & (order < total)
    count, moved = torch.stack((total, hole.sum())).tolist()
    if moved:
        holes, from_end = indices(hole, moved), indices(keep, count)[count - moved :]
        for at in _ranges(moved, 256):
            scratch[holes[at]] = scratch.index_select(0, from_end[at])
        order[holes] = from_end
    return order[:count]


def _fills_the_device(weight: Tensor, rows: int | None = None) -> bool:
    """Whether a product of this shape has a tile for every multiprocessor, so that cuBLAS does not split its sum.

    Where it does, it may add the parts in the output's dtype; the caller then takes an fp32 output.
    """
    V, H = weight.shape
    return (rows or V) * H >= 128 * 256 * multiprocessors(weight.device)


def _row_grads(
    stats: Stats, grads: TokenGrads, rows: RowBlock, head: Projection, border: Border | None
) -> tuple[RowGrads, Tensor | None]:
    """Upstream per row, and for fp16 what the results must be multiplied by (a power of two, on the device)."""
    slope = rows.inv_temperature * head.transform.logit_scale  # dz / du, without a curve
    g, h, l, s, m = (torch.zeros_like(slope) if v is None else v * slope for v in grads)
    found = {"g": g, "constant": l - g}
    if grads.entropy is not None:
        found["h"], found["constant"] = h, found["constant"] - h * stats["entropy"]
    if grads.sum_sq is not None:
        found["square"], found["constant"] = 2 * s, found["constant"] - 2 * s * stats["sum_sq"]
    if grads.mean_logit is not None:
        found["flat"] = m / head.all_columns
    unscale = None
    if rows.x.dtype == torch.float16:
        peak = torch.stack([vector.abs().max() for vector in found.values()]).max()
        # |dz| <= |g| + |c| + |h| / e + |square| + |flat| < 5 peak: 2^13 leaves room below 65504.
        scale = torch.exp2(torch.floor(13 - torch.log2(peak.clamp(1e-30, 1e30))))
        found, unscale = {name: vector * scale for name, vector in found.items()}, 1 / scale
    assert stats.normaliser is not None
    return RowGrads(**found, normaliser=stats.normaliser, logprobs=stats.logprobs, border=border), unscale
