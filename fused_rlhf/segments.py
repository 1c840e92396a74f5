"""Sums over the sequences of a flat batch, in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def precise(values: Tensor) -> Tensor:
    """In fp64 where the device has it: a sum over thousands of tokens may cancel against another one."""
    return values if values.device.type == "mps" else values.double()


@dataclass(frozen=True)
class Sequences:
    """S sequences of N tokens side by side; a sequence may be empty."""

    offsets: Tensor  # (S + 1,) int64
    index: Tensor  # (N,) int64: the sequence each token belongs to

    @staticmethod
    def of(index: Tensor, count: int) -> Sequences:
        """From the ascending (N,) indices of `count` sequences."""
        # Comparing beats counting here: bincount waits for a GPU, and adds in any order there.
        edges = torch.arange(count + 1, device=index.device)
        return Sequences(torch.searchsorted(index.contiguous(), edges), index)

    @property
    def count(self) -> int:
        return self.offsets.numel() - 1

    @cached_property
    def lengths(self) -> Tensor:
        """(S,) int64"""
        return self.offsets.diff()

    @cached_property
    def divisors(self) -> Tensor:
        """(S,) int64: lengths, 1 of an empty sequence."""
        return self.lengths.clamp(min=1)

    @cached_property
    def empty(self) -> Tensor:
        """(S,) bool"""
        return self.lengths == 0

    def sum(self, values: Tensor) -> Tensor:
        """(N,) -> (S,), 0 for an empty sequence; differentiable."""
        if self.count == 0 or values.numel() == 0:
            return values.new_zeros(self.count) + values.sum()
        return torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True)

    def mean(self, values: Tensor) -> Tensor:
        """(N,) -> (S,), 0 for an empty sequence."""
        return self.sum(values) / self.divisors

    def spread(self, values: Tensor) -> Tensor:
        """(S,) -> (N,): to each token its sequence's value."""
        return values[self.index]
