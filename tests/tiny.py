"""A run of the smallest size, for tests of a trainer's parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fused_rlhf.objectives.reductions import Metrics, least, total
from fused_rlhf.trainers import engine
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.config import TrainConfig
from fused_rlhf.trainers.engine import Engine

IDS = torch.randint(3, 90, (6, 9), generator=torch.Generator().manual_seed(0))
COUNT = 6 * 8  # tokens that they predict


def pieces(*sizes: int) -> list[tuple[torch.Tensor, int]]:
    """What `Engine.update` takes of IDS in micro-batches of these sizes."""
    return [(ids, COUNT) for ids in IDS.split(list(sizes))]


def config(folder: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"hidden_size": 32, "num_layers": 1, "output": str(folder / "run")}
    return TrainConfig(**(options | changes))


def build(folder: Path, num_updates: int = 10, **changes: Any) -> tuple[Engine, models.Loaded]:
    """An engine around the small model, the same for the same options."""
    options = config(folder, **changes)
    accelerator = engine.start(options)
    loaded = models.load_for(options)
    return Engine(options, accelerator, loaded.model, num_updates), loaded


def saved_model(folder: Path, tied: bool = True, **changes: Any) -> str:
    """The folder of a small model with its tokenizer, as if it had been downloaded."""
    torch.manual_seed(0)
    model, tokenizer = models.build(hidden_size=32, num_layers=2)
    if not tied:
        model.config.tie_word_embeddings = False
        model = type(model)(model.config)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def logprob_loss(model: Any, input_ids: torch.Tensor, count: int) -> tuple[torch.Tensor, Metrics]:
    """-mean log-prob of the tokens, as one share of `count` of them."""
    import fused_rlhf as fr

    out = fr.lm_head.logprobs(model, input_ids).logprobs
    found = {"tokens": total(torch.tensor(float(out.numel()))), "worst": least(out.detach().min())}
    return -out.sum() / count, Metrics(found)


def gradients_of_updates(trainer: Any) -> list[list[torch.Tensor]]:
    """A list to which each update of the trainer from now on adds the gradients that it steps by."""
    found: list[list[torch.Tensor]] = []
    step = trainer.engine.optimizer.step

    def keep() -> None:
        found.append([p.grad.clone() for p in trainer.engine.module.parameters() if p.grad is not None])
        step()

    trainer.engine.optimizer.step = keep
    return found
