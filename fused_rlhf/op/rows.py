"""How padded and packed batches become flat rows of real tokens, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from fused_rlhf.checks import check_tensor, shape
from fused_rlhf.door import Door
from fused_rlhf.kernels.interface import Maybe, Projection, Rows, pick
from fused_rlhf.op.adapter import with_adapter
from fused_rlhf.op.head import Call, Head
from fused_rlhf.op.truncation import ANY, Entered, Sets, end_of, picked, sets_of
from fused_rlhf.segments import Sequences


@dataclass(frozen=True)
class Tokens:
    """The real tokens of a padded or packed batch: N of them, and the sequences they belong to."""

    index: Tensor | None  # (N,) their flat positions; None: all
    targets: Tensor  # (N,)
    temperature: Tensor  # (N,)
    sequences: Sequences
    sets: Sets | None = None  # the sampler's kept sets, given or to be found; None: it cut nothing

    @property
    def count(self) -> int:
        return self.targets.numel()

    @property
    def named(self) -> tuple[Tensor, ...]:
        """Ids and rows of given sets."""
        return (self.sets.ids, self.sets.rows) if isinstance(self.sets, Entered) else ()

    def rows(self, hidden: Tensor, head: Head, projection: Projection) -> Rows:
        """The rows of hidden (..., H), with its graph; with an adapter's activations where the head has one."""
        x = pick(hidden.reshape(-1, hidden.shape[-1]), self.index)
        if head.lora is not None:
            x = with_adapter(x, head.lora[0], head.lora[2], projection)
        return Rows(x, self.targets, self.temperature)

    def of_sequences(self, values: Tensor) -> Tensor:
        """(S,) -> (N,): to each token its sequence's value, without its graph."""
        return self.sequences.spread(values.detach().to(self.temperature.dtype))

    def vector(self, values: Maybe) -> Maybe:
        """(N,) of a tensor in the shape of the targets, without its graph; None of None."""
        if values is None:
            return values
        flat = values.detach().reshape(-1).to(self.temperature.dtype)
        return cast(Maybe, pick(flat, self.index))


def tokens_of(
    door: Door,
    targets: Tensor,
    completion_mask: Tensor | None,
    call: Call,
    head: Projection,
    temperature: Tensor,
    sequence_of: Tensor,
    num_sequences: int,
) -> Tokens:
    """The tokens inside the mask whose target is not ignored, once `door` has let them in.

    temperature and sequence_of are (B T,).
    """
    flat = targets.reshape(-1)
    vocabulary = ANY if call.sharded else head.vocabulary
    live = flat != call.ignore_index
    if completion_mask is not None:
        live = live & completion_mask.reshape(-1).bool()
    check_targets(door, flat, live, call.ignore_index, vocabulary)
    if isinstance(call.temperature, Tensor):
        check_temperature(door, temperature, live)
    sets = sets_of(door, call.kept, call.truncation, flat, live, temperature, vocabulary)
    index = door.rows(live)
    some = partial(pick, rows=index)
    sequences = Sequences.of(some(sequence_of), num_sequences)
    return Tokens(index, some(flat), some(temperature), sequences, picked(sets, index))


def check_targets(door: Door, targets: Tensor, live: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Those of the live rows must lie in the vocabulary; (N,) each."""

    def error(at: int) -> ValueError:
        return ValueError(
            f"targets must lie in [0, {end_of(vocabulary)}) or equal ignore_index={ignore_index}, "
            f"got {int(targets[at])} at flat position {at}"
        )

    door.refuse(live & (targets != targets.clamp(0, vocabulary - 1)), error)


def check_id_shape(ids: Tensor, targets: Tensor) -> None:
    check_tensor("ids", ids, targets.device)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.dim() != targets.dim() + 1 or ids.shape[:-1] != targets.shape:
        expected = f"({', '.join(map(str, targets.shape))}, K)"
        raise ValueError(f"ids must be {expected}, beside targets {shape(targets)}, got {shape(ids)}")


def check_ids(door: Door, ids: Tensor, live: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Those of the live rows, (N, K), must lie in the vocabulary."""

    def error(at: int) -> ValueError:
        return ValueError(
            f"ids must lie in [0, {end_of(vocabulary)}) or equal ignore_index={ignore_index}, "
            f"got {int(ids.reshape(-1)[at])} at flat position {at // ids.shape[1]}, number {at % ids.shape[1]}"
        )

    door.refuse(live[:, None] & (ids != ignore_index) & (ids != ids.clamp(0, vocabulary - 1)), error)


def scatter(values: Maybe, rows: Tensor | None, count: int) -> Maybe:
    """The inverse of `pick`, zero in the rows that were left out."""
    if values is None or rows is None:
        return values
    return cast(Maybe, values.new_zeros((count, *values.shape[1:])).index_copy_(0, rows, values))


def check_temperature(door: Door, temperature: Tensor, live: Tensor | None) -> None:
    """Of the live rows, (N,); None: all. Those that are left out may hold anything."""

    def error(at: int) -> ValueError:
        return ValueError(
            f"temperature must be positive and finite for every scored token, got {temperature[at]:g} "
            f"at flat position {at}"
        )

    wrong = ~((temperature > 0) & (temperature < torch.inf))  # a NaN is neither
    door.refuse(wrong if live is None else live & wrong, error)


def check_shapes(targets: Tensor, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is None:
            continue
        check_tensor(name, value, targets.device)
        if value.shape != targets.shape:
            raise ValueError(f"{name} must have the shape of targets {shape(targets)}, got {shape(value)}")


def flat_sequences(door: Door, targets: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """The sequence each flat token belongs to, (N,), and how many sequences there are; what cu_seqlens hold is checked
    by the door."""
    if targets.dim() == 2:
        if cu_seqlens is not None:
            check_tensor("cu_seqlens", cu_seqlens)
            raise ValueError(f"cu_seqlens must be None for (B, T) targets, got {shape(cu_seqlens)}")
        b, t = targets.shape
        return torch.arange(b, device=targets.device)[:, None].expand(b, t).reshape(-1), b
    if cu_seqlens is None:
        return torch.zeros_like(targets), 1
    check_tensor("cu_seqlens", cu_seqlens, targets.device)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be (B + 1,) integers, int32 or int64, got {shape(cu_seqlens)} {cu_seqlens.dtype}"
        )
    edges, N = cu_seqlens.long(), targets.numel()
    wrong = torch.cat([edges[:1] != 0, edges.diff() < 0, edges[-1:] != N])
    door.refuse(wrong, lambda _: ValueError(f"cu_seqlens must rise from 0 to N={N}, got {cu_seqlens.tolist()}"))
    ends = edges[1:].contiguous()
    return torch.searchsorted(ends, torch.arange(N, device=ends.device), right=True), ends.numel()
