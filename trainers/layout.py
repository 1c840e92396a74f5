"""How sequences lie in the rows that a model's body reads, and the way back from its hidden states.

    padded     a row for each sequence
    packed     all of a micro-batch end to end in one row
    shared     the same, but a prompt that several sequences begin with is there once

A packed row's positions begin anew with each sequence. What tells its sequences apart is a table that takes the place of
the attention mask (`attention`), or, where a model's attention cannot be chosen, the positions themselves, which transformers'
own masks read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fused_rlhf.trainers.attention import Group

Name = Literal["padded", "packed", "shared"]


@dataclass(frozen=True)
class Layout:
    """How sequences lie, and what the model needs to be told of it."""

    name: Name = "padded"
    table: bool = True  # packed and shared: a table tells the sequences apart; else their positions do
    masked: bool = True  # padded: the model needs the mask of the padding
    why: str = ""  # why it is none that costs less

    def in_words(self) -> str:
        words = {
            "padded": f"padded rows{'' if self.masked else ' without a mask'}, whose prompts and padding skip the head",
            "packed": "packed rows without padding, whose prompts skip the head",
            "shared": "packed rows without padding, a prompt that sequences share once; prompts skip the head",
        }
        return words[self.name] + (f" ({self.why})" if self.why else "")


PADDED = Layout()


@dataclass(frozen=True)
class Row:
    """L tokens of B sequences in one row."""

    groups: Sequence[Group]
    input_ids: Tensor  # (1, L)
    position_ids: Tensor  # (1, L)
    places: Tensor  # (B, T): where a sequence's tokens lie in it


def lay(input_ids: Tensor, lengths: Sequence[int], prompts: Sequence[int] | None) -> Row:
    """Sequences (B, T), padded on the right, end to end; those with the same prompt, so many tokens each, behind one of it."""
    device = input_ids.device
    texts = [ids[:length] for ids, length in zip(input_ids.tolist(), lengths, strict=True)]
    sharing: dict[Any, list[int]] = {}
    for i, ids in enumerate(texts):
        sharing.setdefault(i if prompts is None else tuple(ids[: prompts[i]]), []).append(i)
    groups: list[Group] = []
    tokens: list[int] = []
    positions: list[int] = []
    places = torch.zeros(input_ids.shape, dtype=torch.int64)
    for members in sharing.values():
        first = members[0]
        prompt = lengths[first] if prompts is None or len(members) == 1 else prompts[first]
        start = len(tokens)
        tokens += texts[first][:prompt]
        positions += range(prompt)
        rest = []
        for i in members:
            places[i, :prompt] = torch.arange(start, start + prompt)
            places[i, prompt : lengths[i]] = torch.arange(len(tokens), len(tokens) + lengths[i] - prompt)
            tokens += texts[i][prompt:]
            positions += range(prompt, lengths[i])
            rest.append(lengths[i] - prompt)
        groups.append(Group(prompt, tuple(rest) if len(members) > 1 else ()))
    row = torch.tensor([tokens, positions], device=device)
    return Row(groups, row[:1], row[1:], places.to(device))


def tokens_in(lengths: Sequence[int], prompts: Sequence[Any], sizes: Sequence[int], layout: Layout) -> int:
    """Of the rows that hold sequences with these prompts, `sizes` tokens each."""
    if layout.name == "padded":
        return max(lengths) * len(lengths)
    once = dict(zip(prompts, sizes, strict=True))
    return sum(lengths) - (sum(sizes) - sum(once.values()) if layout.name == "shared" else 0)
