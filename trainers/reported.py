"""The sets of tokens that a sampler kept, as it reported them, on their way to the op.

    ids       the kept ones, token by token of the first completion, then of the second ...
    counts    how many of them are each token's

The op takes those of the N tokens that a forward scores, in the order of `Batch.flat`, with offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TokenSets(NamedTuple):
    """Those of the L tokens of one completion."""

    ids: Tensor  # (E,) int32
    counts: Tensor  # (L,) int64

    def first(self, length: int) -> TokenSets:
        """Of its first tokens."""
        counts = self.counts[:length]
        return TokenSets(self.ids[: int(counts.sum())], counts)


@dataclass(frozen=True)
class ReportedSets:
    """Those of B completions. `counts` lies as their log-probs do: entry t is of token t + 1."""

    ids: Tensor  # (E,) int32
    counts: Tensor  # (B, T - 1) int64, 0 outside the completions

    @staticmethod
    def of(rows: Sequence[TokenSets], starts: Sequence[int], length: int) -> ReportedSets:
        """Of completions that start at these tokens of their rows, `length` tokens long."""
        counts = torch.zeros(len(rows), length - 1, dtype=torch.int64)
        for row, (some, start) in enumerate(zip(rows, starts, strict=True)):
            counts[row, start - 1 : start - 1 + len(some.counts)] = some.counts
        return ReportedSets(torch.cat([some.ids for some in rows]), counts)

    def pick(self, rows: Sequence[int], width: int) -> ReportedSets:
        """Of some completions, none of them longer than `width` entries."""
        of_rows = self.ids.split(self.counts.sum(dim=1).tolist())
        return ReportedSets(torch.cat([of_rows[row] for row in rows]), self.counts[rows, :width])

    def to(self, device: torch.device | str) -> ReportedSets:
        return ReportedSets(self.ids.to(device), self.counts.to(device))

    def within(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids and offsets (N + 1,) of the N tokens in a mask of the counts' shape, as the op takes them."""
        inside = torch.repeat_interleave(mask.flatten(), self.counts.flatten(), output_size=len(self.ids))
        return self.ids[inside], torch.nn.functional.pad(self.counts[mask].cumsum(0), (1, 0))

    @staticmethod
    def joined(parts: Sequence[ReportedSets]) -> ReportedSets:
        """The completions of all of them, one after the other."""
        width = max(part.counts.shape[1] for part in parts)
        counts = [torch.nn.functional.pad(part.counts, (0, width - part.counts.shape[1])) for part in parts]
        return ReportedSets(torch.cat([part.ids for part in parts]), torch.cat(counts))
