"""Loops and trainers that take logits, unchanged but for one line: the same losses, without the memory of the logits."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rlhf as fr
from fused_rlhf.deferred.tensor import Deferred
from tests.memory import peak_tensor_bytes
from tests.test_deferred import Pair, gradients, logits_of

transformers = pytest.importorskip("transformers")
from tests.test_lm_head import batch, build, one_thread  # noqa: E402, F401  # the fixture is used by being here

STEPS = 4


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def logps_of(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    logits, labels, mask = logits[:, :-1], ids[:, 1:], mask[:, 1:]
    return (logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2) * mask).sum(-1)


def dpo(model: Any, ref: Any) -> list[float]:
    ids, losses = batch(B=6, T=12), []
    mask = (torch.arange(12) > 3).float().expand(6, 12)
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        with torch.no_grad():
            base = logps_of(ref(ids).logits, ids, mask)
        chosen, rejected = (logps_of(model(ids).logits, ids, mask) - base).chunk(2)
        loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def grpo(model: Any, ref: Any) -> list[float]:
    ids, losses = batch(B=4, T=12), []
    advantages = torch.tensor([1.0, -0.5, 0.3, -0.8]).unsqueeze(1)
    with torch.no_grad():
        old = (ref(ids).logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        logits = model(ids).logits[:, :-1]
        logits = logits / 0.9
        logp = F.log_softmax(logits, dim=-1)
        taken = torch.gather(logp, -1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        entropy = torch.logsumexp(logits, dim=-1) - torch.sum(F.softmax(logits, dim=-1) * logits, dim=-1)
        ratio = (taken - old).exp()
        loss = -(torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + 0.01 * entropy).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def distillation(model: Any, ref: Any) -> list[float]:
    ids, losses = batch(B=4, T=12), []
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        with torch.no_grad():
            teacher = F.log_softmax(ref(ids).logits.view(-1, 257) / 2.0, dim=-1)
        student = F.log_softmax(model(ids).logits.view(-1, 257) / 2.0, dim=-1)
        loss = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


LOOPS = {"dpo": dpo, "grpo": grpo, "distillation": distillation}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_losses_of_a_plain_loop_are_the_same(name: str, family: str) -> None:
    dense = LOOPS[name](build(family).double(), build(family, seed=1).double())
    model, ref = build(family).double(), build(family, seed=1).double()
    with fr.deferred_logits(model), fr.deferred_logits(ref):
        deferred = LOOPS[name](model, ref)
    assert deferred == pytest.approx(dense, abs=1e-6, rel=1e-6)
    assert len(set(dense)) == STEPS


def trained(folder: Path, defer: bool) -> list[float]:
    """By transformers' Trainer, with its evaluation by accuracy."""
    torch.manual_seed(0)
    model = build("qwen2")
    if defer:
        fr.defer(model)
    rows = [{"input_ids": ids, "labels": torch.where(ids % 5 == 0, -100, ids)} for ids in batch(B=16, T=10)]
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows[:4],
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda p: {"right": float((p.predictions[:, :-1] == p.label_ids[:, 1:]).mean())},
    )
    trainer.train()
    return [row[key] for row in trainer.state.log_history for key in ("loss", "eval_loss", "eval_right") if key in row]


def test_losses_of_transformers_trainer_are_the_same(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    dense, deferred = trained(tmp_path / "dense", False), trained(tmp_path / "deferred", True)
    assert len(dense) == STEPS + 2 * 2
    assert deferred == pytest.approx(dense, abs=1e-6, rel=1e-6)


# ----------------------------------------------------------------------------------------------------- other people's code


def test_functions_of_trl() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    pair = Pair()
    calls = {
        "selective_log_softmax": lambda z: utils.selective_log_softmax(z, pair.y, temperature=0.7),
        "several": lambda z: utils.selective_log_softmax(z, torch.stack([pair.y, pair.y + 1], -1)),
        "entropy_from_logits": lambda z: utils.entropy_from_logits(z, chunk_size=4),
        "both": lambda z: sum(utils.selective_log_softmax_and_entropy(z, pair.y)),
    }
    for name, call in calls.items():
        ours, truth = call(pair.deferred()[0]), call(pair.dense()[0])
        torch.testing.assert_close(ours, truth, msg=name)
        for mine, theirs in zip(gradients(ours, pair.leaves), gradients(truth, pair.leaves)):
            torch.testing.assert_close(mine, theirs)


def test_losses_of_transformers() -> None:
    losses = pytest.importorskip("transformers.loss.loss_utils")
    pair = Pair()
    for options in ({}, {"num_items_in_batch": torch.tensor(9)}, {"ignore_index": 5}):
        ours, truth = (losses.ForCausalLMLoss(z, pair.y, 101, **options) for z in (pair.deferred()[0], pair.dense()[0]))
        torch.testing.assert_close(ours, truth)
        for mine, theirs in zip(gradients(ours, pair.leaves), gradients(truth, pair.leaves)):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------ memory

N, H, V = 512, 64, 151_936
WIDE = 4  # bytes


def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).requires_grad_()
    weight = (0.1 * torch.randn(V, H, generator=generator)).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def grpo_loss(logits: Tensor, y: Tensor) -> Tensor:
    logp = (logits / 0.9).log_softmax(-1)
    taken = logp.gather(-1, y[:, None]).squeeze(-1)
    return -(taken.exp() - 0.01 * (logp.exp() * logp).sum(-1)).mean()


@pytest.mark.parametrize("name", ["cross_entropy", "grpo", "kl"])
def test_peak_memory_is_that_of_the_gradients_and_a_tile(name: str) -> None:
    """dW twice (the second where autograd adds that of two nodes), d_hidden, and blocks of logits that N and V do not move."""
    hidden, weight, y = operands()

    def run() -> None:
        logits = logits_of(hidden, weight)
        if name == "cross_entropy":
            F.cross_entropy(logits, y).backward()
        elif name == "grpo":
            grpo_loss(logits, y).backward()
        else:
            ref = logits_of(hidden.detach() + 0.1, weight.detach()).log_softmax(-1)
            F.kl_div(logits.log_softmax(-1), ref, reduction="batchmean", log_target=True).backward()

    peak = peak_tensor_bytes(run)
    dense = N * V * WIDE
    blocks = (320 if name == "kl" else 64) << 20
    assert peak <= 2 * V * H * WIDE + 8 * N * H * WIDE + blocks
    if name != "kl":
        assert peak < dense / 2


def test_peak_memory_without_gradients_is_below_that_of_a_block() -> None:
    hidden, weight, y = operands()
    with torch.no_grad():
        peak = peak_tensor_bytes(lambda: grpo_loss(logits_of(hidden, weight), y))
        topk = peak_tensor_bytes(lambda: logits_of(hidden, weight).topk(5))
    assert max(peak, topk) < 64 << 20


def test_labels_of_a_model_have_flat_memory() -> None:
    small = {"num_hidden_layers": 1, "vocab_size": 32_000, "tie_word_embeddings": True}
    model, ids = build("qwen2", **small), batch(B=8, T=64)

    def peak(defer: bool) -> int:
        with fr.deferred_logits(model) if defer else contextlib.nullcontext():
            return peak_tensor_bytes(lambda: model(ids, labels=ids).loss.backward())

    logits = math.prod(ids.shape) * 32_000 * WIDE
    assert peak(False) > 2 * logits
    assert peak(True) < logits / 2
    assert isinstance(model(ids).logits, Tensor)
    assert not isinstance(model(ids).logits, Deferred)
