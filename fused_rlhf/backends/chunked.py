"""The op in plain torch with bounded memory: the backend for CPUs, and the twin of `kernels/ops.py` anywhere.

Work is cut into blocks of ROWS rows by TILE columns, small enough that everything done to a tile of logits between two
matrix products happens in cache. The statistics of a tile are those of
`kernels/statistics.py`; back, with p = exp(z - lse) and upstream g (log-prob), k (lse), h (entropy), s (sum_sq, Q) and
m (mean_logit):

    dz = g onehot(y) + p (k - g - h (log p + H) + 2 s (p - Q)) + m / V

Operands are cast to the compute dtype and multiplied in fp32 (fp64 for fp64), so that the logits are never rounded.
Where the device multiplies bf16 natively, the two products of the backward take bf16 operands, and so does that of the
logits when `round_logits` allows it; elsewhere fp32 is faster than bf16 anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.backends import gathered as entry_products
from fused_rlhf.backends import tiling, truncation
from fused_rlhf.backends.chunked_divergence import (
    divergence,
    divergence_block,
    divergence_gradients,
    divergence_memory,
)
from fused_rlhf.backends.tiling import Operands, slices
from fused_rlhf.kernels.interface import (
    BlockGrads,
    Border,
    BoundObjective,
    Cut,
    Entries,
    EntryGrads,
    Grads,
    KeptSets,
    Merge,
    Needs,
    Projection,
    Rows,
    ShardStats,
    Stats,
    TokenGrads,
    Work,
    indices,
)
from fused_rlhf.kernels.statistics import FAR, Partials, Tile, parts_of, reference_of

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


class _Running:
    """Statistics of one call's rows, merged tile by tile in the order of the vocabulary."""

    def __init__(self, op: Operands, rows: Rows, outputs: tuple[str, ...]) -> None:
        like, head = op.temperature, op.head
        self.targets, self.outputs, self.vocabulary = rows.targets, outputs, head.vocabulary
        records = parts_of(outputs)
        self.of_logits = {name: r.of_logits for name, r in records.items() if r.of_logits}
        self.of_exps = {name: r.of_exps for name, r in records.items() if r.of_exps}
        self.reads_column = any(record.reads_column for record in records.values())
        self.reads_depth = any(record.reads_depth for record in records.values())
        self.partials = Partials.none(like, outputs)
        self.log_mass: Tensor | None = None  # (N, tiles) log sum exp z of each tile
        if head.grad_filter > 0:
            self.log_mass = op.new(rows.count, -(-self.vocabulary // tiling.TILE))
        size = min(op.rows, rows.count) * tiling.TILE
        self.exps, self.work = op.new(size), op.new(size) if self.of_exps else None

    def update(self, z: Tensor, rows: slice, columns: slice, in_place: bool = False) -> Tensor:
        """Takes in the (n, v) logits of these rows and columns, which it leaves as they are.

        in_place: leaves exp(z - reference) in them instead. Returns the reference, (n,).
        """
        inside = self.targets[rows] - columns.start
        hit = (inside >= 0) & (inside < z.shape[1])
        found = z.gather(1, inside.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
        maximum, column = z.max(1) if self.reads_column else (z.amax(1), None)
        tile = Tile(z, columns, maximum, column)
        parts = {name: of_logits(tile) for name, of_logits in self.of_logits.items()}

        before = self.partials[rows]
        reference = reference_of(torch.maximum(before.maximum, maximum))
        tile.exps = z if in_place else self.exps[: z.numel()].view(z.shape)
        tile.work = None if self.work is None else self.work[: z.numel()].view(z.shape)
        if self.reads_depth:
            depth = torch.sub(z, reference[:, None], out=tile.work).clamp_(min=FAR)
            torch.exp(depth, out=tile.exps)
        else:
            torch.sub(z, reference[:, None], out=tile.exps).exp_()
        total = tile.exps.sum(1)
        parts |= {name: of_exps(tile) for name, of_exps in self.of_exps.items()}
        here = Partials(maximum, total, torch.where(hit, found, 0.0), parts)
        self.partials[rows] = before.moved(reference).joined(here)
        if self.log_mass is not None:
            self.log_mass[rows, columns.start // tiling.TILE] = reference + total.log()
        return reference

    def stats(self, rows: slice = slice(None)) -> Stats:
        logprobs, found = self.partials[rows].finish(self.targets[rows], self.vocabulary, self.outputs)
        mass = None if self.log_mass is None else (self.log_mass[rows] - found["lse"][:, None]).exp()
        return Stats.of(logprobs, found, mass)

    def of_shard(self, rows: slice = slice(None)) -> ShardStats:
        partials, mass = self.partials[rows], None
        if self.log_mass is not None:
            own = partials.maximum + partials.total.log()
            mass = (self.log_mass[rows] - own[:, None]).exp()
        return ShardStats(partials, mass)


@dataclass
class _BackwardBlock:
    """Some rows on their way back: logits become dz tile by tile, and dz goes into the gradients."""

    x: Tensor  # (n, H) times scale
    narrow_x: Tensor
    scale: Tensor  # (n,), as are the next three
    temperature: Tensor
    targets: Tensor
    lse: Tensor
    onehot: Tensor  # dz = onehot at the target + p (constant - slope log p + square p) + flat
    constant: Tensor
    slope: Tensor | None
    square: Tensor | None
    flat: Tensor | None
    d_x: Tensor | None  # (n, H)
    head: Projection
    border: Border | None = None

    @staticmethod
    def of(
        op: Operands, x: Tensor, index: slice | Tensor, stats: Stats, grads: TokenGrads, needs: Needs
    ) -> _BackwardBlock:
        """`index`: the rows of the call; x, stats and grads are theirs already."""
        targets = op.targets[index]
        temperature = op.temperature[index]
        zero = torch.zeros_like(stats.lse)
        upstream = [zero if grad is None else grad.to(op.wide) for grad in grads]
        # Without a curve the temperature is part of scale.
        g, h, k, s, m = (grad / temperature for grad in upstream) if op.curved else upstream
        constant = k - g
        if grads.entropy is not None:
            assert stats.entropy is not None
            constant = constant - h * stats.entropy
        if grads.sum_sq is not None:
            constant = constant - 2 * s * stats["sum_sq"]
        return _BackwardBlock(
            x=x,
            narrow_x=x.to(op.narrow),
            scale=op.row_scale[index],
            temperature=temperature,
            targets=targets,
            lse=stats.lse,
            onehot=g,
            constant=constant,
            slope=None if grads.entropy is None else h,
            square=None if grads.sum_sq is None else 2 * s,
            flat=None if grads.mean_logit is None else m / op.head.all_columns,
            d_x=torch.zeros_like(x) if needs.hidden else None,
            head=op.head,
            border=None if op.border is None else op.border.pick(index),
        )

    def pick(self, index: Tensor) -> _BackwardBlock:
        """Some of these rows, with a d_x of their own."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        some: dict[str, Any] = {k: v[index] for k, v in values.items() if isinstance(v, Tensor)}
        found = replace(self, **some, border=None if self.border is None else self.border.pick(index))
        if self.d_x is not None:
            found.d_x = torch.zeros_like(found.x)
        return found

    def add(self, z: Tensor, w: Tensor, into: BlockGrads, reference: Tensor | None = None) -> None:
        """Takes in the (n, v) logits of the columns of `into`, which it overwrites; w is their rows of the head.

        reference: (n,), where z holds exp(logit - reference) already.
        """
        if reference is None:
            dz = self._to_dlogits_(z, into.columns)
        else:  # never above the lse, but for a row that saw nothing but -inf, whose exponentials are 0
            p_of = (reference - self.lse).clamp(max=0).exp()
            dz = self._add_onehot_(z.mul_((self.constant * p_of)[:, None]), into.columns)
        if into.bias is not None:
            into.bias.addmv_(dz.T, self.scale)
        dz = dz.to(self.narrow_x.dtype)
        if self.d_x is not None:
            tiling.add_product_(self.d_x, dz, w, first=False)
        tiling.add_head_products(self.head, into, dz, self.narrow_x)

    def d_hidden(self) -> Tensor:
        """(n, H), complete once every tile was added."""
        assert self.d_x is not None
        return self.d_x.mul_(self.scale[:, None])

    def _to_dlogits_(self, z: Tensor, columns: slice) -> Tensor:
        slope = self.head.transform.slope(z, self.temperature)
        if self.border is not None:
            z.masked_fill_(truncation.outside(z, columns, self.targets, self.border), -torch.inf)
        log_p, coefficient = z.sub_(self.lse[:, None]), self.constant[:, None]
        if self.slope is not None:
            log_p.clamp_(min=FAR)
            coefficient = torch.addcmul(coefficient, log_p, self.slope[:, None], value=-1)
        p = log_p.exp_()
        if self.square is not None:
            coefficient = torch.addcmul(coefficient, p, self.square[:, None])
        dz = p.mul_(coefficient)
        if self.flat is not None:
            dz += self.flat[:, None]
        self._add_onehot_(dz, columns)
        return dz if slope is None else dz.mul_(slope)

    def _add_onehot_(self, dz: Tensor, columns: slice) -> Tensor:
        inside = self.targets - columns.start
        hit = (inside >= 0) & (inside < dz.shape[1])
        column = inside.clamp(0, dz.shape[1] - 1)[:, None]
        return dz.scatter_add_(1, column, torch.where(hit, self.onehot, 0.0)[:, None])


def statistics(rows: Rows, head: Projection, outputs: tuple[str, ...]) -> Stats:
    return _merged(rows, head, outputs).stats()


def _merged(rows: Rows, head: Projection, outputs: tuple[str, ...]) -> _Running:
    op = Operands(rows, head)
    running = _Running(op, rows, outputs)
    tile = op.new(min(op.rows, rows.count) * tiling.TILE)
    xs = [(some, op.x(some)) for some in slices(rows.count, op.rows)]
    for columns in slices(head.vocabulary, tiling.TILE):
        w = op.w(columns)
        for some, x in xs:
            out = tile[: x.shape[0] * w.shape[0]].view(x.shape[0], w.shape[0])
            running.update(op.logits(x, w, some, columns, out), some, columns)
    return running


def partials(rows: Rows, head: Projection, outputs: tuple[str, ...]) -> ShardStats:
    if head.vocabulary == 0:
        return ShardStats(Partials.none(rows.temperature.to(head.wide), outputs))
    return _merged(rows, head, outputs).of_shard()


def filter_columns(device: torch.device) -> int:
    return tiling.TILE


def gradients(
    rows: Rows,
    head: Projection,
    stats: Stats,
    upstream: TokenGrads,
    needs: Needs,
    filtered: tuple[Tensor, ...] | None = None,
    entries: EntryGrads | None = None,
) -> Grads:
    """Two-phase: vocabulary outermost, the logits of a tile again, each tile of dW finished before the next."""
    op = Operands(rows, head)
    sparse = None if entries is None else entry_products.HeadEntries(entries, head)
    sink = head.sink(needs, tiling.TILE)
    tile = op.new(min(op.rows, rows.count) * tiling.TILE)
    blocks = [
        (some, _BackwardBlock.of(op, op.x(some), some, stats.pick(some), upstream.pick(some), needs))
        for some in slices(rows.count, op.rows if filtered is None else rows.count)
    ]
    for number, columns in enumerate(slices(head.vocabulary, tiling.TILE)):
        into = sink.open(columns)
        if sparse is not None:
            sparse.add(into)
        if not blocks:
            sink.close(into)
            continue
        w = op.w(columns)
        parts: list[tuple[_BackwardBlock, Tensor | None]] = [(block, None) for _, block in blocks]
        if filtered is not None:  # one block of all rows, from which each tile takes its own
            parts = [(parts[0][0], index) for index in filtered[number].split(op.rows) if len(index)]
        for whole, index in parts:
            block = whole if index is None else whole.pick(index)
            out = tile[: block.x.shape[0] * w.shape[0]].view(block.x.shape[0], w.shape[0])
            block.add(op.logits_of(block.x, w, block.scale, block.temperature, columns, out), w, into)
            if index is not None and whole.d_x is not None and block.d_x is not None:
                whole.d_x.index_add_(0, index, block.d_x)
        sink.close(into)
    d_hidden = None
    if needs.hidden:
        d_hidden = torch.empty_like(rows.hidden)
        for some, block in blocks:
            d_hidden[some] = block.d_hidden()
    return sink.grads(d_hidden)


def gathered(entries: Entries, head: Projection) -> Tensor:
    return entry_products.logits(entries, head)


def gathered_hidden(grads: EntryGrads, head: Projection) -> Tensor:
    return entry_products.hidden_gradient(grads, head)


def logits(rows: Rows, head: Projection) -> Tensor:
    op = Operands(rows, head)
    z = op.new(rows.count, head.vocabulary)
    for some in slices(rows.count, op.rows):
        x = op.x(some)
        for columns in slices(head.vocabulary, tiling.TILE):
            op.logits(x, op.w(columns), some, columns, z[some, columns])
    return z


def truncation_block(rows: Rows, head: Projection) -> int:
    return tiling.row_block(8 * head.vocabulary, head.wide.itemsize)


def truncated(rows: Rows, head: Projection, cut: Cut, outputs: tuple[str, ...], whole: bool) -> KeptSets:
    """Rows outermost: a block's logits are kept until its sets are found."""
    op = Operands(rows, head)
    running = _Running(op, rows, ())
    kept = op.new(min(op.rows, rows.count), head.vocabulary)
    found, stats = [], []
    for some in slices(rows.count, op.rows):
        x = op.x(some)
        z = kept[: x.shape[0]]
        for columns in slices(head.vocabulary, tiling.TILE):
            running.update(op.logits(x, op.w(columns), some, columns, z[:, columns]), some, columns)
        sets = truncation.find(z, running.partials.total[some], rows.targets[some], cut.pick(some))
        stats.append(_statistics_within(z, rows.pick(sets.wide + some.start), head, sets, outputs))
        found.append(sets.after(some.start))
    sets = truncation.Sets.joined(found)
    return KeptSets(
        sets.rows, sets.ids, sets.wide, sets.border, Stats.joined(stats), sets.added, running.stats() if whole else None
    )


def _statistics_within(
    z: Tensor, rows: Rows, head: Projection, sets: truncation.Sets, outputs: tuple[str, ...]
) -> Stats:
    """Of the wide rows of a block with logits (n, V), over what is kept of them."""
    running = _Running(Operands(rows, head), rows, outputs)
    for columns in slices(head.vocabulary, tiling.TILE) if rows.count else ():
        some = z[:, columns]
        if rows.count < len(z):
            some = some.index_select(0, sets.wide)
        some.masked_fill_(truncation.outside(some, columns, rows.targets, sets.border), -torch.inf)
        running.update(some, slice(0, rows.count), columns)
    return running.stats()


def loss(objective: BoundObjective, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
    return objective(slice(0, logprobs.numel()), logprobs, entropy)


def one_pass(
    rows: Rows,
    head: Projection,
    outputs: tuple[str, ...],
    objective: BoundObjective,
    needs: Needs,
    merge: Merge | None = None,
) -> tuple[Stats, Tensor, Grads]:
    """Rows outermost: a block's logits are kept until its own loss has turned them into gradients.

    What is kept is exp(z - running maximum), which saves the exponential of the way back, unless that needs z itself.
    Holds one fp32 (V, H) accumulator when the weight is narrower than that.
    """
    op = Operands(rows, head)
    sink = head.sink(needs, tiling.TILE, again=True)
    d_hidden = torch.zeros_like(rows.hidden) if needs.hidden else None
    running = _Running(op, rows, outputs)
    losses = torch.zeros_like(rows.temperature)
    kept = op.new(min(op.rows, rows.count), head.vocabulary)
    exponentials = not (op.curved or objective.needs_entropy)
    found = []
    for some in slices(rows.count, op.rows):
        x = op.x(some)
        logits = kept[: x.shape[0]]
        references = []
        for columns in slices(head.vocabulary, tiling.TILE):
            z = op.logits(x, op.w(columns), some, columns, logits[:, columns])
            references.append(running.update(z, some, columns, in_place=exponentials))
        stats = running.stats(some) if merge is None else merge(running.of_shard(some), some, outputs)
        found.append(stats)
        losses[some], upstream = objective(some, stats.logprobs, stats.entropy)
        live = upstream.live(rows.targets[some])
        count = int(live.sum())  # of each block of rows: a GPU is waited for once a block
        if count == 0:
            continue
        index = indices(live, count)
        every = count == live.numel()
        here = index + some.start
        block = _BackwardBlock.of(op, x if every else x[index], here, stats.pick(index), upstream.pick(index), needs)
        for columns, reference in zip(slices(head.vocabulary, tiling.TILE), references):
            z = logits[:, columns] if every else logits[:, columns].index_select(0, index)
            into = sink.open(columns)
            block.add(z, op.w(columns), into, reference[index] if exponentials else None)
            sink.close(into)
        if d_hidden is not None:
            d_hidden[here] = block.d_hidden().to(rows.hidden.dtype)
    return Stats.joined(found), losses, sink.grads(d_hidden)


def one_pass_block(rows: Rows, head: Projection, needs: Needs) -> int:
    return tiling.row_block(head.vocabulary, head.wide.itemsize)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    return gradient.mul_(factor)


def has_normaliser() -> bool:
    return False


def one_pass_pays(rows: Rows, head: Projection, needs: Needs) -> bool:
    return True


def memory(work: Work) -> float:
    """Tiles that stay in cache; one pass and the divergence keep a block of whole rows.

    Both passes hold the rows' operands and gradients in fp32, and one pass under a bf16 head its dW.
    """
    N, H, V = work.rows, work.hidden_size, work.vocabulary
    if work.route == "divergence":
        return divergence_memory(work)
    rows = min(tiling.row_block(V, 4), N)
    tiles = (3 if work.needs_entropy else 2) * 4.0 * rows * min(tiling.TILE, V)
    if work.route == "forward":
        return tiles + 4 * N * H
    if work.route == "one_pass":
        wide = 4 * V * H if work.dtype.itemsize < 4 and work.needs.weight else 0
        return 4.0 * rows * (V + 3 * H) + tiles + wide + work.gradients
    return tiles + (8 + work.dtype.itemsize) * N * H + work.gradients
