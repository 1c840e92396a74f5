"""Updates by our trainers: what `grpo.train` and `dpo.train` do after a rollout, on a batch that is there already."""

from __future__ import annotations

from typing import Any

import torch

from fused_rlhf.bench.step_batch import Batch
from fused_rlhf.bench.step_cases import Case, Way
from fused_rlhf.bench.step_update import LEARNING_RATE, MAX_GRAD_NORM, Update
from fused_rlhf.trainers import dpo, grpo
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.inputs import Encoded
from fused_rlhf.trainers.minibatches import chunks
from fused_rlhf.trainers.pairs import Pair, Totals
from fused_rlhf.trainers.rollout import Completions


def trainer_of(case: Case, way: Way, model: Any, folder: str) -> Any:
    """Our trainer of this model; its data are a stand-in."""
    options: dict[str, Any] = {
        "output": folder,
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
    loss = grpo.policy_loss if case.trainer == "grpo" else dpo.preference_loss

    def prepare(batch: Batch) -> list[tuple[Any, ...]]:
        return (policy_pieces if case.trainer == "grpo" else preference_pieces)(case, way, trainer, batch)

    def run(pieces: list[tuple[Any, ...]]) -> tuple[float, float]:
        found = trainer.engine.update(loss, pieces)
        return found["loss"], found["grad_norm"]

    return Update(trainer.loaded.model, trainer.engine.optimizer.optimizer, prepare, run)


def policy_pieces(case: Case, way: Way, trainer: Any, batch: Batch) -> list[tuple[Any, ...]]:
    """The arguments of `grpo.policy_loss`, by micro-batches."""
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
    nothing, lengths = torch.zeros(B, 1), batch.completion_mask.sum(dim=1)
    rollout = grpo.Rollout(
        [{}] * B, completions, nothing, nothing[:, 0], lengths, batch.advantages, batch.old, None, ()
    )
    live = [i for i, advantage in enumerate(batch.advantages.tolist()) if advantage or not way.skips]
    some = [rollout[rows] for rows in chunks(live, case.micro_batch)]
    return [(trainer.config, part, B, batch.completion_mask.sum()) for part in some]


def preference_pieces(case: Case, way: Way, trainer: Any, batch: Batch) -> list[tuple[Any, ...]]:
    """The arguments of `dpo.preference_loss`, by micro-batches."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    rows = [ids[:length] for ids, length in zip(batch.input_ids.tolist(), lengths, strict=True)]
    refs = [0.0] * len(rows) if batch.ref is None else batch.ref.tolist()
    pairs = []
    for i in range(0, len(rows), 2):
        chosen, rejected = (row[batch.prompt :] for row in rows[i : i + 2])
        pairs.append(Pair("", "", rows[i][: batch.prompt], chosen, rejected, ref=(refs[i], refs[i + 1])))
    totals = Totals.of(pairs)
    made = [dpo.assemble(trainer, some) for some in chunks(pairs, case.micro_batch // 2)]
    return [(trainer.config, part, totals) for part in made]
