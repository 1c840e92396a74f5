"""Truncated distributions, densely: what transformers' warpers keep, and sets that a sampler might report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

# Of an untrained model of 99 tokens, whose distributions are nearly flat.
CUTS: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_p": 0.3},
    {"min_p": 0.45},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.45},
]


def kept_of(logits: Tensor, targets: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """(N, V) bool: what the warpers leave of (N, V) logits, and the targets (N,)."""
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    ids: Any = torch.zeros(len(logits), 1, dtype=torch.int64)
    left: Any = warpers(ids, logits)
    return (left > -torch.inf).scatter(1, targets[:, None], True)


def logits_of(model: Any, some: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """(N, V) logits before each of the N tokens of completions, row by row, and these tokens."""
    mask = some.completion_mask[:, 1:]
    logits = model(some.input_ids, some.attention_mask.long()).logits[:, :-1] / temperature
    return logits[mask], some.input_ids[:, 1:][mask]


def within(logits: Tensor, kept: Tensor) -> Tensor:
    """(N, V): log-probs over what is kept."""
    return logits.masked_fill(~kept, -torch.inf).log_softmax(-1)


def random_sets(completions: list[list[int]], vocabulary: int = 99, most: int = 6) -> list[list[list[int]]]:
    """As a sampler reports them: of each token some ids, it among them, in any order; the same for the same tokens."""
    sets = []
    for row in completions:
        generator = torch.Generator().manual_seed(sum((i + 1) * token for i, token in enumerate(row)))
        kept = []
        for token in row:
            count = int(torch.randint(most, (), generator=generator))
            others = torch.randperm(vocabulary, generator=generator)[:count].tolist()
            at = len(others) // 2
            kept.append([*others[:at], token, *others[at:]])
        sets.append(kept)
    return sets


def mask_of(sets: list[list[list[int]]], vocabulary: int = 99) -> Tensor:
    """(N, V) bool of the sets of all completions' tokens."""
    flat = [kept for row in sets for kept in row]
    mask = torch.zeros(len(flat), vocabulary, dtype=torch.bool)
    for place, kept in enumerate(flat):
        mask[place, kept] = True
    return mask
