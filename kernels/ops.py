"""The Triton backend: the functions of `interface.Backend`, and how they walk over rows and vocabulary.

    statistics rows outermost        scratch: ROWS x (tiles of the vocabulary) x statistics, fp32
    gradients  vocabulary outermost  scratch: ROWS x (64 columns per multiprocessor) of dlogits; dX in fp32
    one_pass   rows outermost        scratch: rows x V of E, at most ONE_PASS_BYTES together with what dW needs
    divergence rows outermost        scratch: rows x V of both heads' fp32 products, DIVERGENCE_BYTES; back the vocabulary

Logits are fp32 in registers (in memory for a divergence) and never rounded; the products of the backward run in cuBLAS. An
fp32 head that computes in half precision is cast block by block. FLOPs in NVH: statistics 2, gradients 6 (4 with one
operand frozen), one_pass 6, divergence 4 and 8 back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
import triton
from torch import Tensor

from fused_rlhf.kernels.interface import (
    BlockGrads,
    BoundObjective,
    BoundPolicy,
    BoundPreference,
    Comparison,
    Grads,
    HeadSink,
    Needs,
    Projection,
    RowPairs,
    Rows,
    Stats,
    Sums,
    TokenGrads,
    Work,
    kept_blocks,
)
from fused_rlhf.kernels.linear_kl import launch_divergence, launch_divergence_dlogits
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
from fused_rlhf.kernels.tiles import Tile, arch, multiprocessors, precision, tune

__all__ = [
    "divergence",
    "divergence_gradients",
    "gradients",
    "loss",
    "mass_blocks",
    "memory",
    "one_pass",
    "statistics",
]

ROWS = 8192  # rows of one launch
COLUMNS_PER_SM = 64  # columns of a vocabulary block of the backward, and of a head that is cast on the way
SPLIT_COLUMNS = 1024  # columns of dW summed at a time in one_pass: the fp32 product stays in L2
ONE_PASS_BYTES = 2_600_000_000  # scratch of one_pass: E, and the low halves of dW when there are several blocks of rows
DIVERGENCE_BYTES = 1 << 30  # scratch of a divergence, and of its backward beside dX in fp32


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
        stats = launch_finish(some, head.vocabulary, partials)[0]
        if head.grad_filter > 0:
            stats = replace(stats, mass=_masses(tile, stats.lse, partials))
        found.append(stats)
    return Stats.joined(found)


def mass_blocks(vocabulary: int, device: torch.device) -> int:
    return triton.cdiv(vocabulary, _columns(device))


def gradients(rows: Rows, head: Projection, stats: Stats, upstream: TokenGrads, needs: Needs) -> Grads:
    """See `Backend`. Recomputes the logits: 2NVH, and 2NVH for each of dX and dW.

    Rows whose upstream is zero should be dropped by the caller. Under head.grad_filter, a vocabulary block is computed
    for the rows that need it alone. fp16 gradients are scaled by a power of two on the device, so that dlogits neither
    overflow nor vanish where the upstream is small.
    """
    tokens = _tokens(rows, head)
    tile = _tile("dlogits", tokens, head, entropy=upstream.entropy is not None)
    N, columns = rows.count, _columns(rows.hidden.device)
    row_grads, unscale = _row_grads(stats, upstream, tokens, head)
    ranges: list[slice | Tensor] = list(_ranges(N, ROWS))
    filtered = _filtered(stats, upstream, rows.targets, head.grad_filter, columns)

    width = min(head.vocabulary, columns)
    scratch = _scratch(min(N, ROWS), width, tokens.x.dtype, rows.hidden.device)
    dx = torch.zeros_like(rows.hidden, dtype=torch.float32) if needs.hidden else None
    # With a single block of rows cuBLAS writes dW itself; it sums in fp32 registers either way.
    fits = head.weight.dtype == tokens.x.dtype and _fills_the_device(head.weight, width)
    sink = head.sink(needs, columns, direct=len(ranges) == 1 and unscale is None and fits)
    for number, block in enumerate(_blocks(head, columns)):
        into = sink.open(block.columns)
        wanted = ranges
        if filtered is not None and len(filtered[number]) < N:
            wanted = list(filtered[number].split(ROWS))
        for at in wanted:
            some = _slice(tokens, at)
            dz = scratch[: len(some.targets), : len(block.w)]
            sums = launch_dlogits(tile, some, block, head, _slice_grads(row_grads, at), dz, into.bias is not None)
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


def loss(objective: BoundObjective, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
    """See `Backend`. Repeatable to the bit: a sequence is summed in a fixed order."""
    if not has_twin(objective):
        return objective(slice(0, len(logprobs)), logprobs, entropy)
    if isinstance(objective, BoundPreference):
        contributions, slope = launch_pairs(objective, logprobs)
    else:
        contributions, slope = launch_policy(cast(BoundPolicy, objective), logprobs)
    return contributions, TokenGrads(slope)


def one_pass(
    rows: Rows, head: Projection, outputs: tuple[str, ...], objective: BoundObjective, needs: Needs
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
        return _one_pass(rows, head, outputs, objective, needs)
    computed = (*outputs, "entropy") if objective.needs_entropy and "entropy" not in outputs else outputs
    stats = statistics(rows, head, computed)
    contributions, upstream = loss(objective, stats.logprobs, stats.entropy)
    grads = _gradients_of_live_rows(rows, head, stats, upstream, needs)
    asked = {name: value for name, value in stats.extra.items() if name in outputs}
    return replace(stats, extra=asked), contributions, grads


def _one_pass_rows(N: int, V: int, H: int, dtype: torch.dtype, low_halves: bool) -> int:
    """Rows that one_pass takes at a time: all N, or what ONE_PASS_BYTES leaves beside the low halves of dW."""
    per_row = _padded(V) * dtype.itemsize
    if N * per_row <= ONE_PASS_BYTES:
        return N
    low = V * H * dtype.itemsize if low_halves else 0
    return min(N, max(1024, (ONE_PASS_BYTES - low) // per_row // 1024 * 1024))


def _one_pass(
    rows: Rows, head: Projection, outputs: tuple[str, ...], objective: BoundObjective, needs: Needs
) -> tuple[Stats, Tensor, Grads]:
    tokens = _tokens(rows, head)
    tile = _tile("stats", tokens, head)
    (N, H), V, device = rows.hidden.shape, head.vocabulary, rows.hidden.device
    halves = needs.weight and head.weight.dtype.itemsize == 2
    capacity = _one_pass_rows(N, V, H, head.compute_dtype, halves)
    partials = Partials.empty(tile, capacity, V, outputs, device)
    scratch = _scratch(capacity, V, head.compute_dtype, device)
    dx = torch.zeros_like(rows.hidden) if needs.hidden else None
    sink = _SplitSink(head, needs, several=capacity < N) if needs.weight else None
    twin = cast(BoundPolicy, objective) if has_twin(objective) else None  # a preference is not tokenwise
    found, losses = [], []
    for at in _ranges(N, capacity):
        some = _slice(tokens, at)
        exps = scratch[: len(some.targets), :V]
        reference = launch_reference(some, head)
        row_max = torch.empty_like(reference)
        for block in _blocks(head, _uncut(head)):
            launch_stats(tile, some, block, head, partials, exps[:, block.columns], reference)
        stats, contributions, slope = launch_finish(some, V, partials, row_max, twin, at)
        if contributions is None or slope is None:
            contributions, upstream = objective(at, stats.logprobs, stats.entropy)
            slope = torch.zeros_like(contributions) if upstream.logprobs is None else upstream.logprobs
        found.append(stats)
        losses.append(contributions)
        factor = launch_repair(tile, some, head, partials, exps, reference, row_max, stats, slope)

        live = _move_to_front(scratch, slope != 0)
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


def divergence(rows: RowPairs, of: Comparison) -> tuple[Tensor, Sums]:
    """See `Backend`. The products are cuBLAS's: a row's bits may depend on how many rows there are.

    Raises:
        RuntimeError: as `statistics`.
    """
    x, y, inv_temperature = _pairs(rows, of)
    N, V, device = len(x), of.policy.vocabulary, x.device
    capacity = _divergence_rows(N, V)
    z_scratch, r_scratch = (_scratch(capacity, V, torch.float32, device) for _ in range(2))
    value, *sums = (torch.empty(N, dtype=torch.float32, device=device) for _ in ("value", *Sums._fields))
    for at in _ranges(N, capacity):
        z, r = (scratch[: at.stop - at.start, :V] for scratch in (z_scratch, r_scratch))
        for hidden, head, out in ((x, of.policy, z), (y, of.ref, r)):
            for block in _blocks(head, _uncut(head)):
                matmul(hidden[at], block.w.T, out[:, block.columns])
        launch_divergence(of, z, r, inv_temperature[at], value[at], Sums(*(v[at] for v in sums)))
    return value, Sums(*sums)


def divergence_gradients(rows: RowPairs, of: Comparison, sums: Sums, upstream: Tensor, needs: Needs) -> Grads:
    """See `Backend`. The products of both heads again: 4NVH, and 2NVH for each of dX and dW; fp16 as in `gradients`."""
    x, y, inv_temperature = _pairs(rows, of)
    policy, N, V, device = of.policy, len(x), of.policy.vocabulary, x.device
    g, unscale = _divergence_upstream(upstream, sums, inv_temperature, policy)
    ranges = list(_ranges(N, ROWS))
    width = _divergence_columns(N, V, policy.weight.shape[1], x.dtype)
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


def _divergence_rows(N: int, V: int) -> int:
    """Rows whose products with both heads fit into DIVERGENCE_BYTES."""
    return max(1, min(N, DIVERGENCE_BYTES // (8 * _padded(V) * 16) * 16))


def _divergence_columns(N: int, V: int, H: int, dtype: torch.dtype) -> int:
    """Columns of a block of the backward: the products, dz and an fp32 dW of it fit into DIVERGENCE_BYTES."""
    return min(V, max(256, DIVERGENCE_BYTES // (_bytes_per_column(N, H, dtype) * 256) * 256))


def _bytes_per_column(N: int, H: int, dtype: torch.dtype) -> int:
    """fp32 dz lies where the policy's products were."""
    return min(N, ROWS) * (8 + (0 if dtype == torch.float32 else dtype.itemsize)) + 4 * H


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


def memory(work: Work) -> float:
    """Statistics per tile, then dlogits of a block of columns and dX in fp32, or, in one pass, exponentials of a block of
    rows and the low halves of a sum of dW over several blocks. A divergence: fp32 products of both heads for a block."""
    N, H, V, itemsize = work.rows, work.hidden_size, work.vocabulary, work.dtype.itemsize
    rows = min(N, ROWS)
    if work.route == "divergence":
        forward = 8.0 * _divergence_rows(N, V) * _padded(V)
        block = _divergence_columns(N, V, H, work.dtype) * _bytes_per_column(N, H, work.dtype)
        return 64 * N + max(forward, block + 4 * N * H + work.gradients if any(work.needs) else 0)
    of_tiles = 8.0 * rows * -(-V // 128)
    if work.route == "forward":
        return of_tiles + 64 * N
    if work.route == "one_pass" and not work.needs_entropy:
        halves = work.needs.weight and itemsize == 2
        block = _one_pass_rows(N, V, H, work.dtype, halves)
        low = V * H * itemsize if halves and block < N else 0
        return block * (V * itemsize + 8 * H + 8 * -(-V // 128)) + low + work.gradients
    columns = COLUMNS_PER_SM * work.multiprocessors
    return max(of_tiles, rows * columns * itemsize + 4 * columns * H) + 4 * N * H + work.gradients


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
        super().__init__(head, needs, SPLIT_COLUMNS, direct=in_place or at_once)
        self.width = head.vocabulary if self.direct else SPLIT_COLUMNS
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


def _masses(tile: Tile, lse: Tensor, partials: Partials) -> Tensor:
    """(n, blocks) probability mass of each vocabulary block of `backward`, from the forward's tiles."""
    n, tiles = len(lse), partials.values.shape[2]
    m, s = partials.values[0, :n], partials.values[1, :n]
    mass = s * torch.exp(m - lse[:, None])
    per_block = _columns(lse.device) // tile.block_v
    blocks = triton.cdiv(tiles, per_block)
    return torch.nn.functional.pad(mass, (0, blocks * per_block - tiles)).view(n, blocks, per_block).sum(2)


def _filtered(
    stats: Stats, grads: TokenGrads, targets: Tensor, grad_filter: float, columns: int
) -> tuple[Tensor, ...] | None:
    """The rows that each vocabulary block is needed for, in ascending order; None: all of them."""
    if stats.mass is None:
        return None
    exact = None if grads.entropy is None else grads.entropy != 0
    keep = kept_blocks(stats.mass, grad_filter, targets, columns, exact)
    return keep.T.nonzero()[:, 1].split(keep.sum(0).tolist())


def _gradients_of_live_rows(rows: Rows, head: Projection, stats: Stats, upstream: TokenGrads, needs: Needs) -> Grads:
    """`gradients` without the rows whose upstream is zero."""
    live = upstream.live(rows.targets).nonzero().squeeze(-1)
    if not any(needs) or not len(live):
        like = (rows.hidden, head.weight, head.bias, head.lora_b)
        return Grads(*(torch.zeros_like(t) if need and t is not None else None for t, need in zip(like, needs)))
    if len(live) == rows.count:
        return gradients(rows, head, stats, upstream, needs)
    grads = gradients(rows.pick(live), head, stats.pick(live), upstream.pick(live), needs)
    if grads.hidden is None:
        return grads
    return grads._replace(hidden=torch.zeros_like(rows.hidden).index_copy_(0, live, grads.hidden))


def _tokens(rows: Rows, head: Projection) -> RowBlock:
    arch(rows.hidden.device), precision(head.compute_dtype)  # raise before any work
    x = rows.hidden.to(head.compute_dtype)
    return RowBlock(x, rows.targets, rows.temperature.to(torch.float32).reciprocal())


def _tile(kernel: str, rows: RowBlock, head: Projection, entropy: bool = False) -> Tile:
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
            h = vector if entropy else None
            out = _scratch(4096, block.w.shape[0], rows.x.dtype, w.device)[:, : block.w.shape[0]]
            launch_dlogits(tile, some, block, head, RowGrads(vector, vector, h, h, vector, vector), out, False)

    full = head.bias is not None or bool(head.transform.curve) or entropy
    name = kernel + "+" if full else kernel
    return tune(name, w.device, head.compute_dtype, descriptors_fit(rows.x, w), H, run)


def _blocks(head: Projection, columns: int) -> Iterator[ColumnBlock]:
    """The vocabulary, `columns` at a time, in the compute dtype."""
    for at in _ranges(head.vocabulary, columns):
        yield ColumnBlock(at.start, head.rows(at), head.bias_of(at))


def _uncut(head: Projection) -> int:
    """Columns of a block where only a cast or an adapter asks for blocks."""
    return head.weight.shape[0] if _whole(head) else _columns(head.weight.device)


def _whole(head: Projection) -> bool:
    """Whether the kernels can read the weight where it lies."""
    return head.weight.dtype == head.compute_dtype and head.lora_b is None


def _columns(device: torch.device) -> int:
    """Columns of a vocabulary block: with ROWS rows its tiles make whole waves over the multiprocessors."""
    return triton.cdiv(COLUMNS_PER_SM * multiprocessors(device), 256) * 256  # every tile's width divides 256


def _ranges(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _slice(rows: RowBlock, at: slice | Tensor) -> RowBlock:
    return RowBlock(rows.x[at], rows.targets[at], rows.inv_temperature[at])


def _padded(columns: int) -> int:
    return triton.cdiv(columns, 64) * 64  # whole 128-byte lines, as descriptors and cuBLAS like them


def _scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty((rows, _padded(columns)), dtype=dtype, device=device)


def _move_to_front(scratch: Tensor, keep: Tensor) -> Tensor:
    """Moves the rows to keep to the front and returns where each came from; holes there are filled from the end."""
    rows = keep.nonzero().squeeze(-1)
    count = len(rows)
    from_end = rows[rows >= count]
    holes = (~keep[:count]).nonzero().squeeze(-1)
    for at in _ranges(len(holes), 256):
        scratch[holes[at]] = scratch.index_select(0, from_end[at])
    order = torch.arange(count, device=rows.device)
    order[holes] = from_end
    return order


def _fills_the_device(weight: Tensor, rows: int | None = None) -> bool:
    """Whether a product of this shape has a tile for every multiprocessor, so that cuBLAS does not split its sum.

    Where it does, it may add the parts in the output's dtype; the caller then takes an fp32 output.
    """
    V, H = weight.shape
    return (rows or V) * H >= 128 * 256 * multiprocessors(weight.device)


def _row_grads(stats: Stats, grads: TokenGrads, rows: RowBlock, head: Projection) -> tuple[RowGrads, Tensor | None]:
    """Upstream per row, and for fp16 what the results must be multiplied by (a power of two, on the device)."""
    slope = rows.inv_temperature * head.transform.logit_scale  # dz / du, without a curve
    g, h, l = (torch.zeros_like(slope) if v is None else v * slope for v in grads)
    unscale = None
    if rows.x.dtype == torch.float16:
        peak = torch.stack((g.abs(), (l - g).abs(), h.abs())).max()
        # |dz| <= 2 (1 + log V) peak: 2^10 leaves room below 65504 and as many bits as there are above the smallest.
        scale = torch.exp2(torch.floor(10 - torch.log2(peak.clamp(1e-30, 1e30))))
        g, h, l, unscale = g * scale, h * scale, l * scale, 1 / scale
    with_entropy = grads.entropy is not None
    entropy = stats.entropy if with_entropy else None
    return RowGrads(g, l - g, h if with_entropy else None, entropy, stats.lse, stats.logprobs), unscale


def _slice_grads(grads: RowGrads, at: slice | Tensor) -> RowGrads:
    h = None if grads.h is None else grads.h[at]
    entropy = None if grads.entropy is None else grads.entropy[at]
    return RowGrads(grads.g[at], grads.l_minus_g[at], h, entropy, grads.lse[at], grads.logprobs[at])
