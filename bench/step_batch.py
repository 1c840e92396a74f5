"""The models and batches of `bench.step`: random weights, random tokens, and advantages as they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.bench.step_cases import Body, Case


@dataclass(frozen=True)
class Batch:
    """B sequences, padded on the right to T; those of a prompt side by side, of DPO's pairs the chosen first."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) bool
    completion_mask: Tensor  # (B, T) bool, the tokens that count
    prompt: int  # tokens of every prompt
    advantages: Tensor  # (B,) fp32
    old: Tensor | None = None  # (B, T - 1) fp32, GRPO's old log-probs; None: the current ones
    ref: Tensor | None = None  # (B,) fp64, DPO's reference; None: 0

    def to(self, device: str) -> Batch:
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def rows(self, some: list[int]) -> Batch:
        """Some of the sequences, with the padding of all."""
        picked: dict[str, Any] = {name: x[some] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **picked)

    def chunks(self, size: int) -> Iterator[Batch]:
        """Micro-batches."""
        for start in range(0, len(self.input_ids), size):
            yield self.rows(list(range(start, min(start + size, len(self.input_ids)))))


def build(body: Body, dtype: str = "fp32") -> Any:
    """A model in evaluation mode, of the same weights every time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(body.kind, **body.settings)
    narrow = torch.bfloat16 if dtype == "bf16" else torch.float32
    return AutoModelForCausalLM.from_config(config, dtype=narrow, attn_implementation="sdpa").eval()


def synthetic(case: Case, vocabulary: int) -> Batch:
    """A batch of the case's shape. Ids begin at 8, past what a tokenizer may give a meaning."""
    generator = torch.Generator().manual_seed(1)
    length = case.prompt + max(case.completions)
    input_ids = torch.randint(8, vocabulary, (case.sequences, length), generator=generator)
    group = torch.arange(case.sequences) // len(case.completions)
    input_ids[:, : case.prompt] = input_ids[group * len(case.completions), : case.prompt]
    lengths = case.prompt + torch.tensor(case.completions * case.groups)
    at = torch.arange(length)
    attention_mask = at < lengths[:, None]
    counted = torch.rand(input_ids.shape, generator=generator) < case.active
    counted[torch.arange(case.sequences), lengths - 1] = True
    # Their mean is not 0, so that the loss has a size that errors can be compared with.
    advantages = torch.randn(case.sequences, generator=generator) + 1
    return Batch(
        input_ids.masked_fill(~attention_mask, 0),
        attention_mask,
        attention_mask & (at >= case.prompt) & counted,
        case.prompt,
        advantages.masked_fill(group < case.dead, 0.0),
    )


def short(case: Case) -> Case:
    """One of few tokens, to warm up with."""
    count = 2 if case.trainer == "dpo" else min(case.micro_batch, len(case.completions))
    return replace(case, prompt=8, completions=(4,) * count, groups=1, dead=0, active=1.0, micro_batch=count)
