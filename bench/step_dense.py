"""Updates by dense logits: the rows padded, as anybody would write it; and each sequence by itself, as the truth, with fp64
after the logits.

GRPO   mean over sequences of mean over tokens of  -min(r A, clip(r, 0.8, 1.2) A),   r = exp(logprob - old)
DPO    -mean over pairs of log sigmoid(0.1 (lr_chosen - lr_rejected)),               lr = sum of logprob - ref
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_rlhf.bench import step_ours
from fused_rlhf.bench.step_batch import Batch
from fused_rlhf.bench.step_cases import Case, Trainer, Way
from fused_rlhf.bench.step_update import Update
from fused_rlhf.objectives.reductions import Metrics


def logprobs(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, prompt: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, T) tokens -> (B, T - prompt) log-probs of the completions, by their logits, which are converted first."""
    kept = input_ids.shape[1] - prompt + 1
    logits = model(input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=kept).logits[:, :-1]
    return logits.log_softmax(dim=-1, dtype=dtype).gather(-1, input_ids[:, prompt:, None]).squeeze(-1)


def grpo(found: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, sequences: int) -> Tensor:
    """The share of some sequences, (B, L), in the loss of `sequences`."""
    ratio, a = (found - old).exp(), advantages[:, None]
    losses = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * mask
    return (losses.sum(dim=1) / mask.sum(dim=1)).sum() / sequences


def dpo(sums: Tensor, ref: Tensor, pairs: int) -> Tensor:
    """The share of some pairs, chosen and rejected in turn, in the loss of `pairs`."""
    rewards = 0.1 * (sums - ref)
    return -logsigmoid(rewards[0::2] - rewards[1::2]).sum() / pairs


def loss_of(model: Any, trainer: Trainer, sequences: int, batch: Batch) -> tuple[Tensor, Metrics]:
    """The share of a micro-batch in the loss of a batch of so many sequences."""
    found = logprobs(model, batch.input_ids, batch.attention_mask, batch.prompt)
    mask = batch.completion_mask[:, batch.prompt :]
    if trainer == "dpo":
        sums = (found * mask).sum(dim=1)
        return dpo(sums, torch.zeros_like(sums) if batch.ref is None else batch.ref, sequences // 2), Metrics({})
    old = found.detach() if batch.old is None else batch.old[:, batch.prompt - 1 :]
    return grpo(found, old, batch.advantages, mask, sequences), Metrics({})


def build(case: Case, way: Way, model: Any, folder: str) -> Update:
    """In the loop of our trainers."""
    trainer = step_ours.trainer_of(case, replace(way, layout="padded"), model, folder)
    whole = trainer.loaded.model

    def prepare(batch: Batch) -> list[tuple[Any, ...]]:
        return [(case.trainer, len(batch.input_ids), some) for some in batch.chunks(case.micro_batch)]

    def run(pieces: list[tuple[Any, ...]]) -> tuple[float, float]:
        found = trainer.engine.update(loss_of, pieces)
        return found["loss"], found["grad_norm"]

    return Update(whole, trainer.engine.optimizer.optimizer, prepare, run)


def separate(case: Case, model: Any, batch: Batch) -> tuple[Batch, dict[str, Any]]:
    """Each sequence by itself, without padding: the batch with old and reference log-probs, made of what the model has
    now and noise; loss, gradient and its norm."""
    generator = torch.Generator().manual_seed(2)
    noise = 0.1 * torch.randn(batch.input_ids.shape, generator=generator)
    old = torch.zeros(batch.input_ids.shape[0], batch.input_ids.shape[1] - 1, device=batch.input_ids.device)
    ref = torch.zeros(len(batch.input_ids), dtype=torch.float64, device=batch.input_ids.device)
    total, kept = 0.0, []
    for i, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
        found = logprobs(model, batch.input_ids[i : i + 1, :length], None, batch.prompt, torch.float64)
        mask = batch.completion_mask[i : i + 1, batch.prompt : length]
        if case.trainer == "grpo":
            own = found.detach().float() + noise[i : i + 1, batch.prompt : length].to(found.device)
            old[i, batch.prompt - 1 : length - 1] = own[0]
            loss = grpo(found, own, batch.advantages[i : i + 1], mask, case.sequences)
        else:
            kept.append((found * mask).sum())
            ref[i] = kept[-1].detach() + 10 * noise[i, 0]
            if len(kept) < 2:
                continue
            loss = dpo(torch.stack(kept), ref[i - 1 : i + 1], case.groups)
            kept = []
        loss.backward()
        total += loss.item()
    gradients = [p.grad for p in model.parameters()]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])).item()
    batch = replace(batch, old=old) if case.trainer == "grpo" else replace(batch, ref=ref)
    return batch, {"loss": total, "grad_norm": norm, "gradients": gradients}
