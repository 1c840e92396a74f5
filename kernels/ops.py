"""The Triton backend: the three functions of `interface.py`, and how they walk over rows and vocabulary.

    forward    rows outermost        scratch: ROWS x (tiles of the vocabulary) x statistics, fp32
    backward   vocabulary outermost  scratch: ROWS x (64 columns per multiprocessor) of dlogits; dX in fp32
    one_pass   rows outermost        scratch: rows x V of E, at most ONE_PASS_BYTES together with what dW needs

Logits are fp32 in registers and never rounded; the products of the backward run in cuBLAS. An fp32 head that computes
in half precision is cast block by block. FLOPs in NVH: forward 2, backward 6 (4 with one operand frozen), one_pass 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import triton
from torch import Tensor

from fused_rlhf.kernels.interface import (
    BoundObjective,
    BoundPolicy,
    BoundPreference,
    Grads,
    Head,
    Needs,
    Stats,
    TokenGrads,
    kept_blocks,
)
from fused_rlhf.kernels.linear_logprobs import (
    Block,
    Partials,
    RowGrads,
    Rows,
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

__all__ = ["backward", "evaluate", "forward", "mass_blocks", "one_pass", "one_pass_rows"]

ROWS = 8192  # rows of one launch
COLUMNS_PER_SM = 64  # columns of a vocabulary block of the backward, and of a head that is cast on the way
SPLIT_COLUMNS = 1024  # columns of dW summed at a time in one_pass: the fp32 product stays in L2
ONE_PASS_BYTES = 2_600_000_000  # scratch of one_pass: E, and the low halves of dW when there are several blocks of rows


def forward(hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor, outputs: tuple[str, ...]) -> Stats:
    """See `interface.py`. A row's statistics have the same bits in any batch and whichever others are asked for.

    Raises:
        RuntimeError: the device or the dtype has no kernel; the message names the backend to use.
    """
    tokens = _rows(hidden, head, targets, temperature)
    tile = _tile("stats", tokens, head)
    partials = Partials.empty(tile, min(len(targets), ROWS), head.weight.shape[0], outputs, hidden.device)
    found = []
    for at in _ranges(len(targets), ROWS):
        rows = _slice(tokens, at)
        for block in _blocks(head, _uncut(head)):
            launch_stats(tile, rows, block, head, partials)
        stats = launch_finish(rows, head.weight.shape[0], partials)[0]
        if head.grad_filter > 0:
            stats = stats._replace(mass=_masses(tile, stats.lse, partials))
        found.append(stats)
    return _joined(found)


def mass_blocks(vocabulary: int, device: torch.device) -> int:
    return triton.cdiv(vocabulary, _columns(device))


def backward(
    hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor, stats: Stats, grads: TokenGrads, needs: Needs
) -> Grads:
    """See `interface.py`. Recomputes the logits: 2NVH, and 2NVH for each of dX and dW.

    Rows whose upstream is zero should be dropped by the caller. Under head.grad_filter, a vocabulary block is computed
    for the rows that need it alone. fp16 gradients are scaled by a power of two on the
    device, so that dlogits neither overflow nor vanish where the upstream is small.
    """
    tokens = _rows(hidden, head, targets, temperature)
    tile = _tile("dlogits", tokens, head, entropy=grads.entropy is not None)
    N, (V, H) = len(targets), head.weight.shape
    columns = _columns(hidden.device)
    upstream, unscale = _row_grads(stats, grads, tokens, head)
    ranges: list[slice | Tensor] = list(_ranges(N, ROWS))
    filtered = _filtered(stats, grads, targets, head.grad_filter, columns)

    scratch = _scratch(min(N, ROWS), min(V, columns), tokens.x.dtype, hidden.device)
    dx = torch.zeros_like(hidden, dtype=torch.float32) if needs.hidden else None
    dw = torch.empty_like(head.weight) if needs.weight else None
    db = torch.empty_like(head.bias) if needs.bias and head.bias is not None else None
    d_lora = torch.zeros_like(head.lora_b, dtype=torch.float32) if needs.lora and head.lora_b is not None else None
    # With a single block of rows cuBLAS writes dW itself; it sums in fp32 registers either way.
    direct = len(ranges) == 1 and unscale is None and _fills_the_device(head.weight, min(V, columns))
    dw_block = None
    if needs.weight and not (direct and head.weight.dtype == tokens.x.dtype):
        dw_block = torch.empty((min(V, columns), H), dtype=torch.float32, device=hidden.device)
    for number, block in enumerate(_blocks(head, columns)):
        width = block.w.shape[0]
        sums: Tensor | None = None
        wanted = ranges
        if filtered is not None and len(filtered[number]) < N:
            wanted = list(filtered[number].split(ROWS))
        for i, at in enumerate(wanted):
            rows = _slice(tokens, at)
            dz = scratch[: len(rows.targets), :width]
            added = launch_dlogits(tile, rows, block, head, _slice_grads(upstream, at), dz, db is not None)
            sums = added if sums is None or added is None else sums + added
            if dx is not None and isinstance(at, slice):
                matmul(dz, block.w, dx[at], accumulate=True)
            elif dx is not None and isinstance(at, Tensor):
                some = dx.index_select(0, at)
                matmul(dz, block.w, some, accumulate=True)
                dx.index_copy_(0, at, some)
            x, parts = head.split(rows.x)
            if dw is not None:
                matmul(dz.T, x, dw[block.columns] if dw_block is None else dw_block[:width], accumulate=i > 0)
            if d_lora is not None:
                for part in parts:
                    matmul(dz.T, part, d_lora[block.columns], accumulate=True)
        if not wanted:
            for gradient in (dw, db):
                if gradient is not None:
                    gradient[block.columns] = 0
            continue
        if dw is not None and dw_block is not None:
            dw[block.columns] = dw_block[:width] if unscale is None else dw_block[:width].mul_(unscale)
        if db is not None and sums is not None:
            db[block.columns] = sums if unscale is None else sums * unscale
    if dx is not None:
        dx = (dx if unscale is None else dx.mul_(unscale)).to(hidden.dtype)
    if d_lora is not None and head.lora_b is not None:
        d_lora = (d_lora if unscale is None else d_lora.mul_(unscale)).to(head.lora_b.dtype)
    return Grads(dx, dw, db, d_lora)


def evaluate(objective: BoundObjective, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
    """See `interface.py`. Repeatable to the bit: a sequence is summed in a fixed order."""
    if not has_twin(objective):
        return objective(slice(0, len(logprobs)), logprobs, entropy)
    if isinstance(objective, BoundPreference):
        loss, slope = launch_pairs(objective, logprobs)
    else:
        loss, slope = launch_policy(cast(BoundPolicy, objective), logprobs)
    return loss, TokenGrads(slope)


def one_pass(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: Tensor,
    outputs: tuple[str, ...],
    objective: BoundObjective,
    needs: Needs,
) -> tuple[Stats, Tensor, Grads]:
    """See `interface.py`. 6NVH; rows at which the objective is flat leave before dX and dW.

    Statistics have the bits of `forward`. What E cannot serve goes through `forward` and `backward` (8NVH): fp16
    operands, an adapter on the head, a bias whose gradient is needed, an objective that needs the entropy or is not
    `tokenwise`.
    """
    bias_gradient = needs.bias and head.bias is not None
    tokenwise = objective.tokenwise and not objective.needs_entropy
    plain_head = head.lora_b is None and head.compute_dtype != torch.float16
    if any(needs) and plain_head and tokenwise and not bias_gradient:
        return _one_pass(hidden, head, targets, temperature, outputs, objective, needs)
    computed = (*outputs, "entropy") if objective.needs_entropy and "entropy" not in outputs else outputs
    stats = forward(hidden, head, targets, temperature, computed)
    loss, upstream = evaluate(objective, stats.logprobs, stats.entropy)
    grads = _backward_of_live_rows(hidden, head, targets, temperature, stats, upstream, needs)
    return (stats if computed == outputs else stats._replace(entropy=None)), loss, grads


def one_pass_rows(N: int, head: Head, need_weight: bool) -> int:
    """Rows that one_pass takes at a time: all N, or what ONE_PASS_BYTES leaves beside the low halves of dW."""
    V, H = head.weight.shape
    per_row = _padded(V) * head.compute_dtype.itemsize
    if N * per_row <= ONE_PASS_BYTES:
        return N
    low_halves = V * H * head.weight.dtype.itemsize if need_weight and head.weight.dtype.itemsize == 2 else 0
    return min(N, max(1024, (ONE_PASS_BYTES - low_halves) // per_row // 1024 * 1024))


def _one_pass(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: Tensor,
    outputs: tuple[str, ...],
    objective: BoundObjective,
    needs: Needs,
) -> tuple[Stats, Tensor, Grads]:
    tokens = _rows(hidden, head, targets, temperature)
    tile = _tile("stats", tokens, head)
    (N, H), V = hidden.shape, head.weight.shape[0]
    capacity = one_pass_rows(N, head, needs.weight)
    partials = Partials.empty(tile, capacity, V, outputs, hidden.device)
    scratch = _scratch(capacity, V, head.compute_dtype, hidden.device)
    dx = torch.zeros_like(hidden) if needs.hidden else None
    dw = _WeightGrad(head.weight, several=capacity < N, compute_dtype=head.compute_dtype) if needs.weight else None
    twin = cast(BoundPolicy, objective) if has_twin(objective) else None  # a preference is not tokenwise
    found, losses = [], []
    for at in _ranges(N, capacity):
        rows = _slice(tokens, at)
        exps = scratch[: len(rows.targets), :V]
        reference = launch_reference(rows, head)
        row_max = torch.empty_like(reference)
        for block in _blocks(head, _uncut(head)):
            launch_stats(tile, rows, block, head, partials, exps[:, block.columns], reference)
        stats, loss, slope = launch_finish(rows, V, partials, row_max, twin, at)
        if loss is None or slope is None:
            loss, upstream = objective(at, stats.logprobs, stats.entropy)
            slope = torch.zeros_like(loss) if upstream.logprobs is None else upstream.logprobs
        found.append(stats)
        losses.append(loss)
        factor = launch_repair(tile, rows, head, partials, exps, reference, row_max, stats, slope)

        live = _move_to_front(scratch, slope != 0)
        exps = scratch[: len(live), :V]
        x, factor = rows.x, factor[:, None]
        if len(live) < len(slope):
            x, factor = x.index_select(0, live), factor.index_select(0, live)
        if not len(live):
            continue
        if dx is not None:
            product = torch.empty((len(live), H), dtype=torch.float32, device=hidden.device)
            for i, block in enumerate(_blocks(head, _uncut(head))):
                matmul(exps[:, block.columns], block.w, product, accumulate=i > 0)
            if len(live) < len(slope):
                dx[at].index_copy_(0, live, product.mul_(factor).to(dx.dtype))
            else:
                torch.mul(product, factor, out=dx[at])
            del product
        if dw is not None:
            dw.add(exps, torch.mul(x, factor, out=torch.empty_like(x)))
    return _joined(found), torch.cat(losses), Grads(dx, None if dw is None else dw.value, None)


class _WeightGrad:
    """dW (V, H) in the weight's dtype, summed over blocks of rows at fp32 precision without an fp32 copy of it."""

    def __init__(self, weight: Tensor, several: bool, compute_dtype: torch.dtype) -> None:
        V, H = weight.shape
        self.in_place = weight.dtype == torch.float32
        self.at_once = not several and weight.dtype == compute_dtype and _fills_the_device(weight)
        self.value = torch.empty_like(weight) if self.at_once else torch.zeros_like(weight)
        self.low = torch.zeros_like(weight) if several and not self.in_place else None
        if not (self.in_place or self.at_once):
            self.product = torch.empty((min(V, SPLIT_COLUMNS), H), dtype=torch.float32, device=weight.device)

    def add(self, exps: Tensor, scaled: Tensor) -> None:
        """+= exps.T @ scaled; exps (n, V), scaled (n, H)."""
        if self.in_place:
            matmul(exps.T, scaled, self.value, accumulate=True)
        elif self.at_once:
            matmul(exps.T, scaled, self.value)
        else:
            for columns in _ranges(len(self.value), SPLIT_COLUMNS):
                product = self.product[: columns.stop - columns.start]
                matmul(exps[:, columns].T, scaled, product)
                if self.low is None:
                    self.value[columns] = product
                else:
                    add_split(self.value[columns], self.low[columns], product)


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


def _backward_of_live_rows(
    hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor, stats: Stats, upstream: TokenGrads, needs: Needs
) -> Grads:
    """`backward` without the rows whose upstream is zero."""
    rows = upstream.live(targets).nonzero().squeeze(-1)
    if not any(needs) or not len(rows):
        like = (hidden, head.weight, head.bias, head.lora_b)
        return Grads(*(torch.zeros_like(t) if need and t is not None else None for t, need in zip(like, needs)))
    if len(rows) == len(targets):
        return backward(hidden, head, targets, temperature, stats, upstream, needs)

    def pick(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.index_select(0, rows)

    some = [t.index_select(0, rows) for t in (hidden, targets, temperature)]
    grads = backward(some[0], head, some[1], some[2], Stats(*map(pick, stats)), TokenGrads(*map(pick, upstream)), needs)  # type: ignore[arg-type]
    if grads.hidden is None:
        return grads
    return grads._replace(hidden=torch.zeros_like(hidden).index_copy_(0, rows, grads.hidden))


def _rows(hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor) -> Rows:
    arch(hidden.device), precision(head.compute_dtype)  # raise before any work
    return Rows(hidden.to(head.compute_dtype), targets, temperature.to(torch.float32).reciprocal())


def _tile(kernel: str, rows: Rows, head: Head, entropy: bool = False) -> Tile:
    w = head.weight if _whole(head) else rows.x  # a block made on the way is as aligned as x
    H = rows.x.shape[1]

    def run(tile: Tile) -> None:
        some = Rows(
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

    full = head.bias is not None or head.softcap is not None or entropy
    name = kernel + "+" if full else kernel
    return tune(name, w.device, head.compute_dtype, descriptors_fit(rows.x, w), H, run)


def _blocks(head: Head, columns: int) -> Iterator[Block]:
    """The vocabulary, `columns` at a time, in the compute dtype."""
    for at in _ranges(head.weight.shape[0], columns):
        w = head.rows(at)
        yield Block(at.start, w, None if head.bias is None else head.bias[at])


def _uncut(head: Head) -> int:
    """Columns of a block where only a cast or an adapter asks for blocks."""
    return head.weight.shape[0] if _whole(head) else _columns(head.weight.device)


def _whole(head: Head) -> bool:
    """Whether the kernels can read the weight where it lies."""
    return head.weight.dtype == head.compute_dtype and head.lora_b is None


def _columns(device: torch.device) -> int:
    """Columns of a vocabulary block: with ROWS rows its tiles make whole waves over the multiprocessors."""
    return triton.cdiv(COLUMNS_PER_SM * multiprocessors(device), 256) * 256  # every tile's width divides 256


def _ranges(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _slice(rows: Rows, at: slice | Tensor) -> Rows:
    return Rows(rows.x[at], rows.targets[at], rows.inv_temperature[at])


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


def _row_grads(stats: Stats, grads: TokenGrads, rows: Rows, head: Head) -> tuple[RowGrads, Tensor | None]:
    """Upstream per row, and for fp16 what the results must be multiplied by (a power of two, on the device)."""
    slope = rows.inv_temperature * head.logit_scale  # dz / du, without softcap
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


def _joined(parts: list[Stats]) -> Stats:
    if len(parts) == 1:
        return parts[0]
    merged = (None if columns[0] is None else torch.cat(columns) for columns in zip(*parts))
    return Stats(*merged)  # type: ignore[arg-type]
