"""How padded and packed batches become flat rows of real tokens, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from fused_rlhf.checks import check_tensor, shape
from fused_rlhf.kernels.interface import Maybe, Projection, Rows, pick
from fused_rlhf.op.adapter import with_adapter
from fused_rlhf.op.head import Head
from fused_rlhf.segments import Sequences


@dataclass(frozen=True)
class Tokens:
    """The real tokens of a padded or packed batch: N of them, and the sequences they belong to."""

    index: Tensor | None  # (N,) their flat positions; None: all
    targets: Tensor  # (N,)
    temperature: Tensor  # (N,)
    sequences: Sequences
    ignore_index: int

    @property
    def count(self) -> int:
        return self.targets.numel()

    def rows(self, hidden: Tensor, head: Head, projection: Projection) -> Rows:
        """The rows of hidden (..., H), with its graph; with an adapter's activations where the head has one."""
        x = pick(hidden.reshape(-1, hidden.shape[-1]), self.index)
        if head.lora is not None:
            x = with_adapter(x, head.lora[0], head.lora[2], projection)
        return Rows(x, self.targets, self.temperature)

    def vector(self, values: Maybe) -> Maybe:
        """(N,) of a tensor in the shape of the targets, without its graph; None of None."""
        if values is None:
            return values
        flat = values.detach().reshape(-1).to(self.temperature.dtype)
        return cast(Maybe, pick(flat, self.index))


def tokens_of(
    targets: Tensor,
    completion_mask: Tensor | None,
    ignore_index: int,
    vocabulary: int,
    temperature: Tensor,
    sequence_of: Tensor,
    num_sequences: int,
) -> Tokens:
    """The tokens inside the mask whose target is not ignored; temperature and sequence_of are (B T,)."""
    flat = targets.reshape(-1)
    if completion_mask is not None:
        flat = flat.masked_fill(~completion_mask.reshape(-1).bool(), ignore_index)
    index = live_rows(flat, ignore_index, vocabulary)
    some = partial(pick, rows=index)
    sequences = Sequences.of(some(sequence_of), num_sequences)
    return Tokens(index, some(flat), some(temperature), sequences, ignore_index)


def live_rows(targets: Tensor, ignore_index: int, vocabulary: int) -> Tensor | None:
    """Indices of the rows to compute; None for all of them. Refuses a target outside the vocabulary."""
    live = targets != ignore_index
    rows = live.nonzero().squeeze(-1)  # on a GPU this waits for the device: the one sync of the op
    wrong = live & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets must lie in [0, {vocabulary}) or equal ignore_index={ignore_index}, "
            f"got {int(targets[row])} at flat position {row}"
        )
    return None if rows.numel() == targets.numel() else rows


def scatter(values: Maybe, rows: Tensor | None, count: int) -> Maybe:
    """The inverse of `pick`, zero in the rows that were left out."""
    if values is None or rows is None:
        return values
    return cast(Maybe, values.new_zeros((count, *values.shape[1:])).index_copy_(0, rows, values))


def check_temperature(temperature: Tensor) -> None:
    """Of the rows that are computed: those that are left out may hold anything."""
    if not bool((temperature > 0).all() & temperature.isfinite().all()):
        wrong = temperature[~((temperature > 0) & temperature.isfinite())]
        raise ValueError(f"temperature must be positive and finite for every scored token, got {wrong[0]:g}")


def check_shapes(targets: Tensor, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is None:
            continue
        check_tensor(name, value, targets.device)
        if value.shape != targets.shape:
            raise ValueError(f"{name} must have the shape of targets {shape(targets)}, got {shape(value)}")


def flat_sequences(targets: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """The sequence each flat token belongs to, (N,), and how many sequences there are."""
    if targets.dim() == 2:
        if cu_seqlens is not None:
            check_tensor("cu_seqlens", cu_seqlens)
            raise ValueError(f"cu_seqlens must be None for (B, T) targets, got {shape(cu_seqlens)}")
        b, t = targets.shape
        return torch.arange(b, device=targets.device).repeat_interleave(t), b
    if cu_seqlens is None:
        return torch.zeros_like(targets), 1
    check_tensor("cu_seqlens", cu_seqlens, targets.device)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be (B + 1,) integers, int32 or int64, got {shape(cu_seqlens)} {cu_seqlens.dtype}"
        )
    sizes = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != targets.numel() or bool((sizes < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to N={targets.numel()}, got {cu_seqlens.tolist()}")
    return torch.arange(sizes.numel(), device=targets.device).repeat_interleave(sizes), sizes.numel()
