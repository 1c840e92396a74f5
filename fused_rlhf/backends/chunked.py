"""The op in plain torch with bounded memory: the backend for CPUs, and the twin of `kernels/ops.py` anywhere.

Work is cut into blocks of ROWS rows by TILE columns, small enough that everything done to a tile of logits between two
matrix products happens in cache. Per tile of logits z, with running maximum m:

    s = sum exp(z - m)    e = sum exp(z - m) (z - m)    logprob = (z_y - m) - log s    H = log s - e / s

and back, with p = exp(z - lse) and upstream g (log-prob), k (lse), h (entropy):

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


def row_block(vocabulary: int, itemsize: int) -> int:
    """Rows per block. The same for every function here, so that they see the same bits."""
    return max(32, min(ROWS, ONE_PASS_BYTES // (vocabulary * itemsize) // 32 * 32))


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones: AVX512-BF16 or AMX on a CPU, tensor cores on a GPU."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class Operands:
    """One call's inputs in the dtype of the arithmetic, block by block."""

    def __init__(self, hidden: Tensor, head: Head, temperature: Tensor) -> None:
        self.hidden, self.head, self.temperature = hidden, head, temperature
        self.compute = head.compute_dtype
        self.wide = torch.promote_types(head.compute_dtype, torch.float32)
        self.rows = row_block(head.weight.shape[0], self.wide.itemsize)
        native = self.compute == torch.bfloat16 and native_bf16(hidden.device)
        self.narrow = self.compute if native else self.wide  # the operands of the backward's products
        self.rounded = native and head.round_logits
        scale = torch.full_like(temperature, head.logit_scale)
        # Without a softcap the whole transform is one factor per row, which the (n, H) operand can carry.
        self.row_scale = scale if head.softcap is not None else scale / temperature
        self.scaled = not bool((self.row_scale == 1).all())

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.wide, device=self.hidden.device)

    def x(self, rows: slice) -> Tensor:
        """(n, H) hidden states times row_scale."""
        x = self.hidden[rows].to(self.compute).to(self.wide)
        return x * self.row_scale[rows, None] if self.scaled else x

    def w(self, columns: slice) -> Tensor:
        """(v, H) rows of the head, as the products want them."""
        return self.head.rows(columns).to(self.narrow)

    def logits(self, x: Tensor, w: Tensor, scale: Tensor, temperature: Tensor, columns: slice, out: Tensor) -> Tensor:
        """(n, v) logits into `out`; x (n, H), scale and temperature (n,) are of the same rows."""
        if self.rounded:
            z = out.copy_(x.to(self.narrow) @ w.T)
        else:
            z = torch.mm(x, w.to(self.wide).T, out=out)
        if self.head.bias is not None:
            z.addr_(scale, self.head.bias[columns].to(self.wide))
        cap = self.head.softcap
        if cap is not None:
            z.div_(cap).tanh_().mul_((cap / temperature)[:, None])
        return z


class _Running:
    """Statistics of one call's rows, merged tile by tile in the order of the vocabulary."""

    def __init__(self, op: Operands, targets: Tensor, outputs: tuple[str, ...]) -> None:
        count, like = targets.numel(), op.temperature
        self.targets, self.outputs, self.vocabulary = targets, outputs, op.head.weight.shape[0]
        self.maximum = torch.full_like(like, -torch.inf)
        self.total = torch.zeros_like(like)
        self.target = torch.zeros_like(like)
        self.weighted = torch.zeros_like(like) if "entropy" in outputs else None
        self.squares = torch.zeros_like(like) if "sum_sq" in outputs else None
        self.logit_sum = torch.zeros_like(like) if "mean_logit" in outputs else None
        self.best = torch.zeros_like(targets) if "is_top1" in outputs else None
        self.log_mass: Tensor | None = None  # (N, tiles) log sum exp z of each tile
        if op.head.grad_filter > 0:
            self.log_mass = op.new(count, mass_blocks(self.vocabulary, like.device))
        self.scratch = [op.new(min(op.rows, count) * TILE) for _ in range(1 + (self.weighted is not None))]

    def update(self, z: Tensor, rows: slice, columns: slice, in_place: bool = False) -> Tensor:
        """Takes in the (n, v) logits of these rows and columns, which it leaves as they are.

        in_place: leaves exp(z - reference) in them instead. Returns the reference, (n,).
        """
        inside = self.targets[rows] - columns.start
        hit = (inside >= 0) & (inside < z.shape[1])
        found = z.gather(1, inside.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
        self.target[rows] = torch.where(hit, found, self.target[rows])
        if self.logit_sum is not None:
            self.logit_sum[rows] += z.sum(1)

        before = self.maximum[rows].clone()
        if self.best is None:
            tile_max = z.amax(1)
        else:
            tile_max, index = z.max(1)
            self.best[rows] = torch.where(tile_max > before, index + columns.start, self.best[rows])
        now = torch.maximum(before, tile_max)
        # A row may have seen nothing but -inf so far; its sums are 0 whatever the reference.
        reference = now.masked_fill(now == -torch.inf, 0.0)
        rescale = (before - reference).exp()
        self.maximum[rows] = now

        first = self.scratch[0][: z.numel()].view(z.shape)
        if self.weighted is None:
            e = torch.sub(z, reference[:, None], out=z if in_place else first).exp_()
        else:
            d = torch.sub(z, reference[:, None], out=first).clamp_(min=_FAR)
            e = torch.exp(d, out=z if in_place else self.scratch[1][: z.numel()].view(z.shape))
            moved = self.weighted[rows] + self.total[rows] * (before - reference).clamp(min=_FAR)
            self.weighted[rows] = rescale * moved + d.mul_(e).sum(1)
        tile_total = e.sum(1)
        self.total[rows] = rescale * self.total[rows] + tile_total
        if self.log_mass is not None:
            self.log_mass[rows, columns.start // TILE] = reference + tile_total.log()
        if self.squares is not None:
            self.squares[rows] = rescale.square() * self.squares[rows] + torch.square(e, out=first).sum(1)
        return reference

    def stats(self, rows: slice = slice(None)) -> Stats:
        total, log_total = self.total[rows], self.total[rows].log()
        lse = self.maximum[rows] + log_total
        return Stats(
            logprobs=(self.target[rows] - self.maximum[rows]) - log_total,
            lse=lse,
            entropy=None if self.weighted is None else log_total - self.weighted[rows] / total,
            sum_sq=None if self.squares is None else self.squares[rows] / total.square(),
            mean_logit=None if self.logit_sum is None else self.logit_sum[rows] / self.vocabulary,
            is_top1=None if self.best is None else self.best[rows] == self.targets[rows],
            mass=None if self.log_mass is None else (self.log_mass[rows] - lse[:, None]).exp(),
        )


@dataclass
class _BackwardBlock:
    """Some rows on their way back: logits become dz tile by tile, and dz goes into the gradients."""

    x: Tensor  # (n, H) times scale
    narrow_x: Tensor
    scale: Tensor  # (n,), as are the next three
    temperature: Tensor
    targets: Tensor
    lse: Tensor
    onehot: Tensor  # dz = onehot at the target + p (constant - slope log p)
    constant: Tensor
    slope: Tensor | None
    keep: Tensor | None  # (n, tiles) bool: the tiles that a filter leaves to a row
    d_x: Tensor | None  # (n, H)
    head: Head

    @staticmethod
    def of(
        op: Operands, x: Tensor, index: slice | Tensor, targets: Tensor, stats: Stats, grads: TokenGrads, needs: Needs
    ) -> _BackwardBlock:
        """`index`: the rows of the call; x, targets, stats and grads are theirs already."""
        temperature = op.temperature[index]
        zero = torch.zeros_like(stats.lse)
        g, h, k = (zero if grad is None else grad.to(op.wide) for grad in grads)
        if op.head.softcap is not None:  # else it is part of scale
            g, h, k = g / temperature, h / temperature, k / temperature
        constant, keep = k - g, None
        if grads.entropy is not None:
            assert stats.entropy is not None
            constant = constant - h * stats.entropy
        if stats.mass is not None:
            exact = None if grads.entropy is None else grads.entropy != 0
            keep = kept_blocks(stats.mass, op.head.grad_filter, targets, TILE, exact)
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
            keep=keep,
            d_x=torch.zeros_like(x) if needs.hidden else None,
            head=op.head,
        )

    def pick(self, index: Tensor) -> _BackwardBlock:
        """Some of these rows, with a d_x of their own."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        some: dict[str, Any] = {k: v[index] for k, v in values.items() if isinstance(v, Tensor)}
        found = replace(self, **some)
        if self.d_x is not None:
            found.d_x = torch.zeros_like(found.x)
        return found

    def add(
        self,
        z: Tensor,
        w: Tensor,
        columns: slice,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        d_lora: Tensor | None,
        first: bool,
        reference: Tensor | None = None,
    ) -> None:
        """Takes in (n, v) logits, which it overwrites; d_weight (v, H) is this tile's, d_bias and d_lora are whole.

        reference: (n,), where z holds exp(logit - reference) already.
        """
        if reference is None:
            dz = self._to_dlogits_(z, columns)
        else:  # never above the lse, but for a row that saw nothing but -inf, whose exponentials are 0
            p_of = (reference - self.lse).clamp(max=0).exp()
            dz = self._add_onehot_(z.mul_((self.constant * p_of)[:, None]), columns)
        if d_bias is not None:
            d_bias[columns].addmv_(dz.T, self.scale)
        dz = dz.to(self.narrow_x.dtype)
        if self.d_x is not None:
            add_product_(self.d_x, dz, w, first=False)
        x, parts = self.head.split(self.narrow_x)
        if d_weight is not None:
            add_product_(d_weight, dz.T, x, first)
        if d_lora is not None:
            for part in parts:
                add_product_(d_lora[columns], dz.T, part, first=False)

    def d_hidden(self) -> Tensor:
        """(n, H), complete once every tile was added."""
        assert self.d_x is not None
        return self.d_x.mul_(self.scale[:, None])

    def _to_dlogits_(self, z: Tensor, columns: slice) -> Tensor:
        keep = None
        if self.head.softcap is not None:  # du/dz of the cap is 1 - tanh^2
            keep = 1 - (z * (self.temperature / self.head.softcap)[:, None]).square_()
        log_p = z.sub_(self.lse[:, None])
        if self.slope is None:
            dz = log_p.exp_().mul_(self.constant[:, None])
        else:
            log_p.clamp_(min=_FAR)
            coefficient = torch.addcmul(self.constant[:, None], log_p, self.slope[:, None], value=-1)
            dz = log_p.exp_().mul_(coefficient)
        self._add_onehot_(dz, columns)
        return dz if keep is None else dz.mul_(keep)

    def _add_onehot_(self, dz: Tensor, columns: slice) -> Tensor:
        inside = self.targets - columns.start
        hit = (inside >= 0) & (inside < dz.shape[1])
        column = inside.clamp(0, dz.shape[1] - 1)[:, None]
        return dz.scatter_add_(1, column, torch.where(hit, self.onehot, 0.0)[:, None])


def forward(hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor, outputs: tuple[str, ...]) -> Stats:
    op = Operands(hidden, head, temperature)
    running = _Running(op, targets, outputs)
    tile = op.new(min(op.rows, targets.numel()) * TILE)
    xs = [(rows, op.x(rows)) for rows in slices(targets.numel(), op.rows)]
    for columns in slices(head.weight.shape[0], TILE):
        w = op.w(columns)
        for rows, x in xs:
            out = tile[: x.shape[0] * w.shape[0]].view(x.shape[0], w.shape[0])
            running.update(op.logits(x, w, op.row_scale[rows], temperature[rows], columns, out), rows, columns)
    return running.stats()


def add_product_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b, in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def _as(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


def _pick(tensors: Stats | TokenGrads, rows: slice | Tensor) -> list[Tensor | None]:
    return [None if t is None else t[rows] for t in tensors]


def mass_blocks(vocabulary: int, device: torch.device) -> int:
    return -(-vocabulary // TILE)


def backward(
    hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor, stats: Stats, grads: TokenGrads, needs: Needs
) -> Grads:
    """Two-phase: vocabulary outermost, the logits of a tile again, each tile of dW finished before the next."""
    op = Operands(hidden, head, temperature)
    weight, bias = head.weight, head.bias
    d_weight = torch.empty_like(weight) if needs.weight else None
    d_bias = torch.zeros_like(bias, dtype=op.wide) if needs.bias and bias is not None else None
    d_lora = torch.zeros_like(head.lora_b, dtype=op.wide) if needs.lora and head.lora_b is not None else None
    tile = op.new(min(op.rows, targets.numel()) * TILE)
    blocks = []
    for rows in slices(targets.numel(), op.rows):
        upstream, known = TokenGrads(*_pick(grads, rows)), Stats(*_pick(stats, rows))  # type: ignore[arg-type]
        blocks.append((rows, _BackwardBlock.of(op, op.x(rows), rows, targets[rows], known, upstream, needs)))
    for number, columns in enumerate(slices(weight.shape[0], TILE)):
        w = op.w(columns)
        d_tile = None
        if d_weight is not None:
            d_tile = d_weight[columns] if weight.dtype == op.wide else op.new(len(w), weight.shape[1])
        first = True
        for _, whole in blocks:
            block, index = whole, None
            if whole.keep is not None:
                index = whole.keep[:, number].nonzero().squeeze(1)
                if index.numel() == 0:
                    continue
                block = whole.pick(index)
            out = tile[: block.x.shape[0] * w.shape[0]].view(block.x.shape[0], w.shape[0])
            z = op.logits(block.x, w, block.scale, block.temperature, columns, out)
            block.add(z, w, columns, d_tile, d_bias, d_lora, first)
            if index is not None and whole.d_x is not None and block.d_x is not None:
                whole.d_x.index_add_(0, index, block.d_x)
            first = False
        if d_weight is not None and d_tile is not None:
            if first:
                d_tile.zero_()
            if weight.dtype != op.wide:
                d_weight[columns] = d_tile
    d_hidden = None
    if needs.hidden:
        d_hidden = torch.empty_like(hidden)
        for rows, block in blocks:
            d_hidden[rows] = block.d_hidden()
    return Grads(d_hidden, d_weight, _as(d_bias, bias), _as(d_lora, head.lora_b))


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
    """Rows outermost: a block's logits are kept until its own loss has turned them into gradients.

    What is kept is exp(z - running maximum), which saves the exponential of the way back, unless that needs z itself.
    Holds one fp32 (V, H) accumulator when the weight is narrower than that.
    """
    op = Operands(hidden, head, temperature)
    weight, bias, count = head.weight, head.bias, targets.numel()
    d_hidden = torch.zeros_like(hidden) if needs.hidden else None
    d_weight = torch.empty_like(weight, dtype=op.wide) if needs.weight else None
    d_bias = torch.zeros_like(bias, dtype=op.wide) if needs.bias and bias is not None else None
    d_lora = torch.zeros_like(head.lora_b, dtype=op.wide) if needs.lora and head.lora_b is not None else None
    running = _Running(op, targets, outputs)
    losses = torch.zeros_like(temperature)
    kept = op.new(min(op.rows, count), weight.shape[0])
    exponentials = head.softcap is None and not objective.needs_entropy
    first = True
    for rows in slices(count, op.rows):
        x = op.x(rows)
        logits = kept[: x.shape[0]]
        references = []
        for columns in slices(weight.shape[0], TILE):
            z = op.logits(x, op.w(columns), op.row_scale[rows], temperature[rows], columns, logits[:, columns])
            references.append(running.update(z, rows, columns, in_place=exponentials))
        stats = running.stats(rows)
        losses[rows], upstream = objective(rows, stats.logprobs, stats.entropy)
        live = upstream.live(targets[rows])
        if not live.any():
            continue
        index = live.nonzero().squeeze(1)
        every = index.numel() == live.numel()
        here = index + rows.start
        known, gradient = Stats(*_pick(stats, index)), TokenGrads(*_pick(upstream, index))  # type: ignore[arg-type]
        block = _BackwardBlock.of(op, x if every else x[index], here, targets[here], known, gradient, needs)
        for columns, reference in zip(slices(weight.shape[0], TILE), references):
            z = logits[:, columns] if every else logits[:, columns].index_select(0, index)
            d_tile = None if d_weight is None else d_weight[columns]
            of_exps = reference[index] if exponentials else None
            block.add(z, op.w(columns), columns, d_tile, d_bias, d_lora, first, of_exps)
        if d_hidden is not None:
            d_hidden[here] = block.d_hidden().to(hidden.dtype)
        first = False
    if d_weight is not None:
        d_weight = torch.zeros_like(weight) if first else d_weight.to(weight.dtype)
    return running.stats(), losses, Grads(d_hidden, d_weight, _as(d_bias, bias), _as(d_lora, head.lora_b))
