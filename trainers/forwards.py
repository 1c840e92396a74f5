"""Sequences, prompts and completions, on their way through a model's body.

    Rows     padded on the right, with what belongs to their pictures
    Batch    rows, and their completions' tokens that count: in whatever layout the body reads them, the states before these
             tokens come out, N of them, one sequence's after the other's, as the op takes them

The token after a shared prompt is predicted by the prompt's last state, in as many sequences as share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf.lm_head import HeadInputs
from fused_rlhf.trainers.attention import table_of
from fused_rlhf.trainers.inputs import Encoded
from fused_rlhf.trainers.layout import PADDED, Layout, lay

if TYPE_CHECKING:
    from fused_rlhf.trainers.collation import Collator

Extras = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """B rows padded on the right to T, for a forward."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Any  # (B, T); None where the model needs none
    extras: Sequence[Extras]
    prompts: Sequence[int]  # ids of each that its extras speak of
    collator: Collator | None

    def __getitem__(self, rows: Sequence[int]) -> Rows:
        """Some of them, of the same length."""
        extras, prompts = [self.extras[row] for row in rows], [self.prompts[row] for row in rows]
        return Rows(self.input_ids[rows], self.attention_mask[rows], extras, prompts, self.collator)

    def lengths(self) -> list[int]:
        """Tokens of each."""
        return self.attention_mask.sum(dim=1).tolist()

    def pictures(self) -> Extras:
        """What a forward of all rows takes for their pictures."""
        if self.collator is None:
            return {}
        device, length = self.input_ids.device, self.input_ids.shape[1]
        made = self.collator.collate(self.extras, self.prompts, length)
        return {name: x.to(device) for name, x in made.items()}

    def through(self, call: Callable[..., Tensor]) -> Tensor:
        """(B, T, ...): `call(input_ids, attention_mask, **pictures)`, of all rows at once where they may share a batch."""
        own = self.collator
        spare = own.spare if own is not None and own.always and not any(self.extras) else None
        if own is not None and spare is not None and own.share == "all":
            return self._with(spare).through(call)[:-1, : self.input_ids.shape[1]]
        groups = [list(range(len(self.prompts)))] if own is None else own.groups(self.extras)
        if len(groups) == 1:
            result = call(self.input_ids, self.attention_mask, **self.pictures())
        else:
            some = [self[rows] for rows in groups]
            parts = [call(part.input_ids, part.attention_mask, **part.pictures()) for part in some]
            order = torch.tensor([row for rows in groups for row in rows], device=self.input_ids.device).argsort()
            result = torch.cat(parts)[order]
        if own is not None and spare is not None:
            result = result + 0.0 * alone(spare, own, self.input_ids.device).through(call).sum()
        return result

    def _with(self, spare: Encoded) -> Rows:
        """The same and the spare row."""
        length = max(self.input_ids.shape[1], len(spare.ids))
        room = length - self.input_ids.shape[1]
        ids, mask = (torch.nn.functional.pad(x, (0, room)) for x in (self.input_ids, self.attention_mask))
        last = torch.zeros_like(ids[:1])
        last[0, : len(spare.ids)] = torch.tensor(spare.ids)
        shown = torch.zeros_like(mask[:1])
        shown[0, : len(spare.ids)] = 1
        extras, prompts = [*self.extras, spare.extras], [*self.prompts, len(spare.ids)]
        return replace(
            self,
            input_ids=torch.cat([ids, last]),
            attention_mask=torch.cat([mask, shown]),
            extras=extras,
            prompts=prompts,
        )


def alone(row: Encoded, collator: Collator, device: Any, more: Sequence[int] = ()) -> Rows:
    """One row and a completion of it."""
    ids = torch.tensor([[*row.ids, *more]], device=device)
    return Rows(ids, torch.ones_like(ids), [row.extras], [len(row.ids)], collator)


@dataclass(frozen=True)
class Batch:
    """B sequences, prompts and completions, and how they lie."""

    rows: Rows  # padded on the right
    completion_mask: Tensor  # (B, T) bool, True at the N tokens of completions that count
    layout: Layout = PADDED

    def states(self, call: Callable[..., Tensor]) -> Tensor:
        """(N, ...): what `call(input_ids, attention_mask, **model_inputs)`, (rows, length, ...), has before each token."""
        rows, counted = self.rows, self.completion_mask[:, 1:]
        if self.layout.name == "padded":
            found = (rows if self.layout.masked else replace(rows, attention_mask=None)).through(call)
            places = torch.arange(counted.numel() + len(counted), device=counted.device).view(rows.input_ids.shape)
        else:
            row = lay(rows.input_ids, rows.lengths(), rows.prompts if self.layout.name == "shared" else None)
            table = table_of(row.groups, counted.device) if self.layout.table else None
            found, places = call(row.input_ids, table, position_ids=row.position_ids), row.places
        index, found = places[:, :-1][counted], found.flatten(0, 1)
        # Its backward sums what a state is used for in a fixed order, which that of indexing does not.
        return torch.nn.functional.embedding(index, found) if found.dim() == 2 else found[index]

    def head_inputs(self, model: Any, **more: Any) -> HeadInputs:
        """What a model's forward leaves for its head, `hidden` (N, H); the auxiliary loss is the mean over rows."""
        parts: list[tuple[HeadInputs, int]] = []

        def call(input_ids: Tensor, attention_mask: Tensor | None, **extras: Tensor) -> Tensor:
            made = fr.lm_head.forward(model, input_ids, attention_mask, **extras, **more)
            parts.append((made, len(input_ids)))
            return made.hidden

        hidden, first = self.states(call), parts[0][0]
        if len(parts) == 1 or first.aux_loss is None:
            return replace(first, hidden=hidden)
        total = sum(count for _, count in parts)
        losses = [made.aux_loss * count / total for made, count in parts if made.aux_loss is not None]
        return replace(first, hidden=hidden, aux_loss=torch.stack(losses).sum())

    @property
    def targets(self) -> Tensor:
        """(N,) the tokens of the completions."""
        return self.flat(self.rows.input_ids[:, 1:])

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) where each sequence's tokens begin among the N."""
        return torch.nn.functional.pad(self.completion_mask[:, 1:].sum(dim=1).cumsum(0), (1, 0))

    def flat(self, values: Tensor) -> Tensor:
        """(B, T - 1) -> (N,)."""
        return values[self.completion_mask[:, 1:]]

    def spread(self, values: Tensor) -> Tensor:
        """(N,) -> (B, T - 1), 0 elsewhere."""
        counted = self.completion_mask[:, 1:]
        return torch.zeros(counted.shape, dtype=values.dtype, device=values.device).masked_scatter(counted, values)
