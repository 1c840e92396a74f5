"""Updates by our trainers: what `grpo.train` and `dpo.train` do after a rollout, on a batch that is there already."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fused_rlhf.bench.step_batch import Batch
from fused_rlhf.bench.step_cases import Case, Way
from fused_rlhf.bench.step_update import LEARNING_RATE, MAX_GRAD_NORM, Update
from fused_rlhf.trainers import dpo, grpo, planning
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.attention import Group
from fused_rlhf.trainers.grpo_rollout import Rollout
from fused_rlhf.trainers.inputs import Encoded
from fused_rlhf.trainers.minibatches import turns_of
from fused_rlhf.trainers.pairs import Pair, Totals
from fused_rlhf.trainers.rollout import Completions


def trainer_of(case: Case, way: Way, model: Any, folder: str) -> Any:
    """Our trainer of this model; its data are a stand-in."""
    options: dict[str, Any] = {
        "output": folder,
        "dtype": "bfloat16" if case.dtype == "bf16" else "float32",
        "layout": way.layout,
        "gradient_checkpointing": way.checkpointing,
        "micro_batch_size": case.micro_batch,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": MAX_GRAD_NORM,
        "threads": torch.get_num_threads(),
    }
    tokenizer = models.char_tokenizer()
    if case.trainer == "grpo":
        return grpo.prepare(grpo.Config(**options), model=model, tokenizer=tokenizer)
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    return dpo.prepare(dpo.Config(**options), rows=rows, model=model, tokenizer=tokenizer)


def build(case: Case, way: Way, model: Any, folder: str) -> Update:
    trainer = trainer_of(case, way, model, folder)

    def rollout(batch: Batch) -> Rollout:
        return rollout_of(way, trainer, batch)

    def policy(rollout: Rollout) -> tuple[float, float]:
        found = grpo.update(trainer, rollout)
        return found["loss"], found["grad_norm"]

    def pieces(batch: Batch) -> list[tuple[Any, ...]]:
        return pieces_of(trainer, batch)

    def preference(pieces: list[tuple[Any, ...]]) -> tuple[float, float]:
        found = trainer.engine.update(dpo.preference_loss, pieces)
        return found["loss"], found["grad_norm"]

    prepare, run = (rollout, policy) if case.trainer == "grpo" else (pieces, preference)
    formula = predicted_bytes(case, way, trainer)
    return Update(trainer.loaded.model, trainer.engine.optimizer.optimizer, prepare, run, formula)


def predicted_bytes(case: Case, way: Way, trainer: Any) -> float:
    """The peak over weights, gradients and optimiser, by the plan of a run of one micro-batch."""
    length = case.prompt + max(case.completions)
    batch = replace(trainer.workload, sequences=case.micro_batch, length=length, updates=1)
    need = planning.memory(trainer.engine, trainer.loaded, batch, reference=False)
    if way.layout == "shared":
        groups = [Group(case.prompt, case.completions)]
    else:
        groups = [Group(case.prompt + completion) for completion in case.completions]
    groups *= max(case.micro_batch // len(case.completions), 1)
    need = planning.with_activations(need, trainer.engine, groups, trainer.loaded.layout)
    # The gradients are there before the update: beside them the head's and the embedding's new one.
    return max(need.kept + need.head, need.activations + need.hidden) + need.early


def rollout_of(way: Way, trainer: Any, batch: Batch) -> Rollout:
    """What `grpo.update` takes."""
    B, ids = len(batch.input_ids), batch.input_ids.tolist()
    completions = Completions(
        batch.input_ids,
        batch.attention_mask,
        batch.completion_mask,
        torch.zeros(B, dtype=torch.bool),
        [""] * B,
        [Encoded(row[: batch.prompt]) for row in ids],
        layout=trainer.loaded.layout,
    )
    rewards, lengths = torch.zeros(B, 1), batch.completion_mask.sum(dim=1)
    whole = Rollout([{}] * B, completions, rewards, rewards[:, 0], lengths, batch.advantages, batch.old)
    live = whole.live(trainer.config).tolist() if way.skips else [True] * B
    return replace(whole, turns=turns_of(trainer.engine, [range(B)], live, completions.sizes(), trainer.config))


def pieces_of(trainer: Any, batch: Batch) -> list[tuple[Any, ...]]:
    """The arguments of `dpo.preference_loss`, by micro-batches."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    rows = [ids[:length] for ids, length in zip(batch.input_ids.tolist(), lengths, strict=True)]
    refs = [0.0] * len(rows) if batch.ref is None else batch.ref.tolist()
    pairs = []
    for i in range(0, len(rows), 2):
        chosen, rejected = (row[batch.prompt :] for row in rows[i : i + 2])
        pairs.append(Pair("", "", rows[i][: batch.prompt], chosen, rejected, ref=(refs[i], refs[i + 1])))
    totals = Totals.of(pairs)
    return [(trainer.config, dpo.assemble(trainer, own), totals) for own, _ in dpo.rounds(trainer, pairs)]
