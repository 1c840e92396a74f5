"""The op in plain torch with bounded memory: the backend for CPUs, and the twin of `kernels/ops.py` anywhere.

Work is cut into blocks of ROWS rows by TILE columns, small enough that everything done to a tile of logits between two
matrix products happens in cache. With c the target's logit, which needs no pass over the others, a tile of logits z
becomes E = exp(z - c) in place, and per row

    s = sum E     e = sum E (z - c)     logprob = (z_y - c) - log s     lse = c + log s     H = log s - e / s

A row with a logit some 69 above its target's is done again with its largest logit as c. Back, with p = E / s and
upstream g (log-prob), k (lse), h (entropy):

    dz = g onehot(y) + p (k - g - h (log p + H))

Operands are cast to the compute dtype and multiplied in fp32 (fp64 for fp64), so that the logits are never rounded.
Where the device multiplies bf16 natively, the two products of the backward take bf16 operands, and so does that of the
logits when `round_logits` allows it; elsewhere fp32 is faster than bf16 anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.kernels.interface import BoundObjective, Grads, Head, Needs, Stats, TokenGrads, kept_blocks

TILE = 4096  # columns: with ROWS rows of fp32, 8 MB
ROWS = 512
ONE_PASS_BYTES = 320 << 20  # the block of logits that one_pass keeps: fewer rows for a larger vocabulary
_FAR = -1e4  # stands for -inf under an exp that underflows to 0 either way, so that 0 * z is 0
_LARGE = 1e30  # sums beyond it are done again: 1 / s must keep all its digits in fp32


def row_block(vocabulary: int, itemsize: int) -> int:
    """Rows per block. The same for every function here, so that they see the same bits."""
    return max(32, min(ROWS, ONE_PASS_BYTES // (vocabulary * itemsize) // 32 * 32))


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones: AVX512-BF16 or AMX on a CPU, tensor cores on a GPU."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class _Operands:
    """One call's inputs in the dtype of the arithmetic."""

    def __init__(self, hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor) -> None:
        self.hidden, self.head, self.targets, self.temperature = hidden, head, targets, temperature
        self.compute = head.compute_dtype
        self.wide = torch.promote_types(head.compute_dtype, torch.float32)
        self.vocabulary = head.weight.shape[0]
        self.size = row_block(self.vocabulary, self.wide.itemsize)
        native = self.compute == torch.bfloat16 and native_bf16(hidden.device)
        self.narrow = self.compute if native else self.wide  # the operands of the backward's products
        self.rounded = native and head.round_logits
        scale = torch.full_like(temperature, head.logit_scale)
        # Without a softcap the whole transform is one factor per row, which the (n, H) operand can carry.
        self.scale = scale if head.softcap is not None else scale / temperature
        self.scaled = not bool((self.scale == 1).all())

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.wide, device=self.hidden.device)

    def blocks(self) -> list[slice]:
        return list(_slices(self.targets.numel(), self.size))

    def tiles(self) -> Iterator[slice]:
        return _slices(self.vocabulary, TILE)

    def rows(self, index: slice | Tensor) -> _Rows:
        x = self.hidden[index].to(self.compute).to(self.wide)
        scale = self.scale[index]
        return _Rows(x * scale[:, None] if self.scaled else x, scale, self.temperature[index], self.targets[index])

    def w(self, columns: slice | Tensor) -> Tensor:
        """(v, H) rows of the head, as the products want them."""
        return self.head.weight[columns].to(self.compute).to(self.narrow)

    def logits(self, rows: _Rows, w: Tensor, columns: slice, out: Tensor) -> Tensor:
        """(n, v) logits into `out`."""
        if self.rounded:
            z = out.copy_(rows.x.to(self.narrow) @ w.T)
        else:
            z = torch.mm(rows.x, w.to(self.wide).T, out=out)
        if self.head.bias is not None:
            z.addr_(rows.scale, self.head.bias[columns].to(self.wide))
        return self._capped_(z, rows.temperature[:, None])

    def target_logits(self, rows: _Rows) -> Tensor:
        """(n,) logits of the targets to within rounding, finite."""
        z = (rows.x * self.w(rows.targets).to(self.wide)).sum(1)
        if self.head.bias is not None:
            z += rows.scale * self.head.bias[rows.targets].to(self.wide)
        return torch.nan_to_num(self._capped_(z, rows.temperature), nan=0.0, posinf=0.0, neginf=0.0)

    def largest_logits(self, rows: _Rows) -> Tensor:
        """(n,) largest logits; 0 where there is none above -inf."""
        largest = torch.full_like(rows.scale, -torch.inf)
        tile = self.new(rows.x.shape[0] * TILE)
        for columns in self.tiles():
            w = self.w(columns)
            z = self.logits(rows, w, columns, _view(tile, rows.x, w))
            largest = torch.maximum(largest, z.amax(1))
        return largest.masked_fill(largest == -torch.inf, 0.0)

    def _capped_(self, z: Tensor, temperature: Tensor) -> Tensor:
        cap = self.head.softcap
        return z if cap is None else z.div_(cap).tanh_().mul_(cap / temperature)


@dataclass
class _Rows:
    """Some rows of a call."""

    x: Tensor  # (n, H) times scale
    scale: Tensor  # (n,), as are the next two
    temperature: Tensor
    targets: Tensor

    def pick(self, index: Tensor) -> _Rows:
        return _Rows(*(getattr(self, f.name)[index] for f in fields(self)))

    def target_columns(self, columns: slice, width: int) -> tuple[Tensor, Tensor]:
        """(n, 1) column of the target in this tile, in range, and (n,) whether it is there."""
        inside = self.targets - columns.start
        return inside.clamp(0, width - 1)[:, None], (inside >= 0) & (inside < width)


class _Statistics:
    """Statistics of some rows, summed tile by tile in the order of the vocabulary."""

    def __init__(self, op: _Operands, rows: _Rows, outputs: tuple[str, ...], reference: Tensor) -> None:
        self.rows, self.reference, self.vocabulary = rows, reference, op.vocabulary

        def zeros(name: str) -> Tensor | None:
            return torch.zeros_like(reference) if name in outputs else None

        self.total, self.target = torch.zeros_like(reference), torch.zeros_like(reference)
        self.weighted, self.squares, self.logit_sum = zeros("entropy"), zeros("sum_sq"), zeros("mean_logit")
        self.best = torch.zeros_like(rows.targets) if "is_top1" in outputs else None
        self.maximum = torch.full_like(reference, -torch.inf)  # with best alone
        self.log_mass: list[Tensor] | None = [] if op.head.grad_filter > 0 else None  # (n,) of each tile

    def update(self, z: Tensor, columns: slice) -> None:
        """Takes in the (n, v) logits of these columns, which become E."""
        column, here = self.rows.target_columns(columns, z.shape[1])
        self.target = torch.where(here, z.gather(1, column).squeeze(1), self.target)
        if self.logit_sum is not None:
            self.logit_sum += z.sum(1)
        if self.best is not None:
            largest, index = z.max(1)
            self.best = torch.where(largest > self.maximum, index + columns.start, self.best)
            self.maximum = torch.maximum(self.maximum, largest)
        z.sub_(self.reference[:, None])
        if self.weighted is None:
            z.exp_()
        else:
            e = z.clamp_(min=_FAR).exp()
            self.weighted += z.mul_(e).sum(1)
            z.copy_(e)
        if self.squares is not None:
            self.squares += z.square().sum(1)
        tile_total = z.sum(1)
        self.total += tile_total
        if self.log_mass is not None:
            self.log_mass.append(self.reference + tile_total.log())

    def too_large(self) -> Tensor:
        """(n,) rows whose reference was too low for their sums."""
        fine = self.total < _LARGE
        return ~fine if self.squares is None else ~(fine & (self.squares < _LARGE))

    def stats(self) -> Stats:
        total, log_total = self.total, self.total.log()
        lse = self.reference + log_total
        return Stats(
            logprobs=(self.target - self.reference) - log_total,
            lse=lse,
            entropy=None if self.weighted is None else log_total - self.weighted / total,
            sum_sq=None if self.squares is None else self.squares / total.square(),
            mean_logit=None if self.logit_sum is None else self.logit_sum / self.vocabulary,
            is_top1=None if self.best is None else self.best == self.rows.targets,
            mass=None if self.log_mass is None else (torch.stack(self.log_mass, 1) - lse[:, None]).exp(),
        )


@dataclass
class _BackwardRows:
    """Some rows on their way back: E becomes dz tile by tile, and dz goes into the gradients."""

    rows: _Rows
    narrow_x: Tensor
    lse: Tensor  # (n,), as are the next five; p = E / total
    total: Tensor
    onehot: Tensor  # dz = onehot at the target + p (constant - slope log p)
    constant: Tensor
    slope: Tensor | None
    keep: Tensor | None  # (n, tiles) bool: the tiles that a filter leaves to a row
    d_x: Tensor | None  # (n, H)
    softcap: float | None

    @staticmethod
    def of(op: _Operands, rows: _Rows, total: Tensor, stats: Stats, grads: TokenGrads, needs: Needs) -> _BackwardRows:
        zero, cap = torch.zeros_like(stats.lse), op.head.softcap
        g, h, k = (zero if grad is None else grad.to(op.wide) for grad in grads)
        if cap is not None:  # else it is part of the rows' scale
            g, h, k = g / rows.temperature, h / rows.temperature, k / rows.temperature
        constant, keep = k - g, None
        if grads.entropy is not None:
            assert stats.entropy is not None
            constant = constant - h * stats.entropy
        if stats.mass is not None:
            exact = None if grads.entropy is None else grads.entropy != 0
            keep = kept_blocks(stats.mass, op.head.grad_filter, rows.targets, TILE, exact)
        if cap is not None:
            g = g * _cap_slope(stats.logprobs + stats.lse, rows.temperature, cap)
        return _BackwardRows(
            rows=rows,
            narrow_x=rows.x.to(op.narrow),
            lse=stats.lse,
            total=total,
            onehot=g,
            constant=constant,
            slope=None if grads.entropy is None else h,
            keep=keep,
            d_x=torch.zeros_like(rows.x) if needs.hidden else None,
            softcap=cap,
        )

    def pick(self, index: Tensor) -> _BackwardRows:
        """Some of these rows, with a d_x of their own."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        some: dict[str, Any] = {k: v[index] for k, v in values.items() if isinstance(v, Tensor)}
        found = replace(self, **some, rows=self.rows.pick(index))
        if self.d_x is not None:
            found.d_x = torch.zeros_like(found.rows.x)
        return found

    def add(
        self, e: Tensor, w: Tensor, columns: slice, d_weight: Tensor | None, d_bias: Tensor | None, first: bool
    ) -> None:
        """Takes in E (n, v), which it overwrites; d_weight (v, H) is this tile's, d_bias (V,) the whole."""
        dz = self._to_dlogits_(e, columns)
        if d_bias is not None:
            d_bias[columns].addmv_(dz.T, self.rows.scale)
        dz = dz.to(self.narrow_x.dtype)
        if self.d_x is not None:
            _add_product_(self.d_x, dz, w, first=False)
        if d_weight is not None:
            _add_product_(d_weight, dz.T, self.narrow_x, first)

    def d_hidden(self) -> Tensor:
        """(n, H), complete once every tile was added."""
        assert self.d_x is not None
        return self.d_x.mul_(self.rows.scale[:, None])

    def _to_dlogits_(self, e: Tensor, columns: slice) -> Tensor:
        log_p = None
        if self.slope is not None or self.softcap is not None:
            log_p = e.log().sub_(self.total.log()[:, None]).clamp_(min=_FAR)
        if self.slope is None:
            dz = e.mul_((self.constant / self.total)[:, None])
        else:
            assert log_p is not None
            coefficient = torch.addcmul(self.constant[:, None], log_p, self.slope[:, None], value=-1)
            dz = e.mul_(coefficient.div_(self.total[:, None]))
        if self.softcap is not None:
            assert log_p is not None
            dz.mul_(_cap_slope(log_p.add_(self.lse[:, None]), self.rows.temperature[:, None], self.softcap))
        column, here = self.rows.target_columns(columns, e.shape[1])
        return dz.scatter_add_(1, column, torch.where(here, self.onehot, 0.0)[:, None])


def _cap_slope(z: Tensor, temperature: Tensor, softcap: float) -> Tensor:
    """d capped / d uncapped = 1 - tanh^2, from z = softcap tanh(.) / temperature."""
    return 1 - (z * (temperature / softcap)).square()


def _view(tile: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """The front of a flat scratch as (n, v)."""
    return tile[: x.shape[0] * w.shape[0]].view(x.shape[0], w.shape[0])


def _add_product_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b, in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def _pick(tensors: Stats | TokenGrads, rows: slice | Tensor) -> list[Tensor | None]:
    return [None if t is None else t[rows] for t in tensors]


def _sweep(op: _Operands, blocks: list[_Rows], outputs: tuple[str, ...], references: list[Tensor]) -> list[_Statistics]:
    """Statistics of blocks of rows, vocabulary outermost."""
    found = [_Statistics(op, rows, outputs, reference) for rows, reference in zip(blocks, references)]
    tile = op.new(max(rows.x.shape[0] for rows in blocks) * TILE)
    for columns in op.tiles():
        w = op.w(columns)
        for rows, statistics in zip(blocks, found):
            statistics.update(op.logits(rows, w, columns, _view(tile, rows.x, w)), columns)
    return found


def mass_blocks(vocabulary: int, device: torch.device) -> int:
    return -(-vocabulary // TILE)


def forward(hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor, outputs: tuple[str, ...]) -> Stats:
    op = _Operands(hidden, head, targets, temperature)
    blocks = [op.rows(index) for index in op.blocks()]
    parts = []
    for rows, found in zip(blocks, _sweep(op, blocks, outputs, [op.target_logits(rows) for rows in blocks])):
        stats = found.stats()
        index = found.too_large().nonzero().squeeze(1)
        if index.numel():
            some = rows.pick(index)
            (again,) = _sweep(op, [some], outputs, [op.largest_logits(some)])
            pairs = zip(stats, again.stats())
            stats = Stats(*(None if b is None else a.index_copy(0, index, b) for a, b in pairs))  # type: ignore
        parts.append(stats)
    return Stats(*(None if values[0] is None else torch.cat(values) for values in zip(*parts)))  # type: ignore[arg-type]


def backward(
    hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor, stats: Stats, grads: TokenGrads, needs: Needs
) -> Grads:
    """Two-phase: vocabulary outermost, the logits of a tile again, each tile of dW finished before the next."""
    op = _Operands(hidden, head, targets, temperature)
    weight, bias = head.weight, head.bias
    d_weight = torch.empty_like(weight) if needs.weight else None
    d_bias = torch.zeros_like(bias, dtype=op.wide) if needs.bias and bias is not None else None
    tile = op.new(min(op.size, targets.numel()) * TILE)
    blocks = []
    for index in op.blocks():
        upstream, known = TokenGrads(*_pick(grads, index)), Stats(*_pick(stats, index))  # type: ignore[arg-type]
        total = torch.ones_like(known.lse)
        blocks.append(_BackwardRows.of(op, op.rows(index), total, known, upstream, needs))
    for number, columns in enumerate(op.tiles()):
        w = op.w(columns)
        d_tile = None
        if d_weight is not None:
            d_tile = d_weight[columns] if weight.dtype == op.wide else op.new(*w.shape)
        first = True
        for whole in blocks:
            some, kept = whole, None
            if whole.keep is not None:
                kept = whole.keep[:, number].nonzero().squeeze(1)
                if kept.numel() == 0:
                    continue
                some = whole.pick(kept)
            z = op.logits(some.rows, w, columns, _view(tile, some.rows.x, w))
            some.add(z.sub_(some.lse[:, None]).exp_(), w, columns, d_tile, d_bias, first)
            if kept is not None and whole.d_x is not None and some.d_x is not None:
                whole.d_x.index_add_(0, kept, some.d_x)
            first = False
        if d_weight is not None and d_tile is not None:
            if first:
                d_tile.zero_()
            if weight.dtype != op.wide:
                d_weight[columns] = d_tile
    d_hidden = None
    if needs.hidden:
        d_hidden = torch.empty_like(hidden)
        for index, block in zip(op.blocks(), blocks):
            d_hidden[index] = block.d_hidden()
    return Grads(d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype))


def evaluate(objective: BoundObjective, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
    return objective(slice(0, logprobs.numel()), logprobs, entropy)


def one_pass(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: Tensor,
    outputs: tuple[str, ...],
    objective: BoundObjective,
    needs: Needs,
) -> tuple[Stats, Tensor, Grads]:
    """Rows outermost: E of a block is kept until its own loss has turned it into gradients.

    Holds one fp32 (V, H) accumulator when the weight is narrower than that.
    """
    op = _Operands(hidden, head, targets, temperature)
    weight, bias, count = head.weight, head.bias, targets.numel()
    d_hidden = torch.zeros_like(hidden) if needs.hidden else None
    d_weight = torch.empty_like(weight, dtype=op.wide) if needs.weight else None
    d_bias = torch.zeros_like(bias, dtype=op.wide) if needs.bias and bias is not None else None
    kept = op.new(min(op.size, count), op.vocabulary)
    losses, parts, first = torch.zeros_like(temperature), [], True
    for at in op.blocks():
        rows = op.rows(at)
        exps = kept[: rows.x.shape[0]]
        found = _fill(op, rows, outputs, op.target_logits(rows), exps)
        if (again := found.too_large()).any():
            reference = torch.where(again, op.largest_logits(rows), found.reference)
            found = _fill(op, rows, outputs, reference, exps)
        stats = found.stats()
        parts.append(stats)
        losses[at], upstream = objective(at, stats.logprobs, stats.entropy)
        live = torch.zeros_like(rows.targets, dtype=torch.bool)
        for g in upstream:
            if g is not None:
                live |= g != 0
        index = live.nonzero().squeeze(1)
        if index.numel() == 0:
            continue
        every = index.numel() == live.numel()
        known, gradient = Stats(*_pick(stats, index)), TokenGrads(*_pick(upstream, index))  # type: ignore[arg-type]
        some = _BackwardRows.of(op, rows if every else rows.pick(index), found.total[index], known, gradient, needs)
        for columns in op.tiles():
            e = exps[:, columns] if every else exps[:, columns].index_select(0, index)
            some.add(e, op.w(columns), columns, None if d_weight is None else d_weight[columns], d_bias, first)
        if d_hidden is not None:
            d_hidden[at.start + index] = some.d_hidden().to(hidden.dtype)
        first = False
    if d_weight is not None:
        d_weight = torch.zeros_like(weight) if first else d_weight.to(weight.dtype)
    d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
    joined = Stats(*(None if values[0] is None else torch.cat(values) for values in zip(*parts)))  # type: ignore
    return joined, losses, Grads(d_hidden, d_weight, d_bias)


def _fill(op: _Operands, rows: _Rows, outputs: tuple[str, ...], reference: Tensor, exps: Tensor) -> _Statistics:
    """Statistics of one block of rows, whose E stays in `exps` (n, V)."""
    found = _Statistics(op, rows, outputs, reference)
    for columns in op.tiles():
        found.update(op.logits(rows, op.w(columns), columns, exps[:, columns]), columns)
    return found
