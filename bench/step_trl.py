"""Updates by TRL's GRPOTrainer and DPOTrainer: their own training step, clipping and optimiser, on a batch that is there
already in place of their generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
import trl
from torch import Tensor

from fused_rlhf.bench.step_batch import Batch
from fused_rlhf.bench.step_cases import Case, Way
from fused_rlhf.bench.step_update import LEARNING_RATE, MAX_GRAD_NORM, Update
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.engine import steps_in_one_kernel

Inputs = dict[str, Tensor]


class PreparedGRPOTrainer(trl.GRPOTrainer):
    """Takes inputs as they come: its own would generate them."""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        return generation_batch


def trainer_of(case: Case, way: Way, model: Any, folder: str) -> Any:
    datasets.disable_progress_bars()
    options: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": case.micro_batch if case.trainer == "grpo" else case.micro_batch // 2,
        "gradient_checkpointing": way.checkpointing,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": MAX_GRAD_NORM,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused" if steps_in_one_kernel(list(model.parameters())) else "adamw_torch",  # as ours
        "bf16": False,
        "use_cpu": model.device.type == "cpu",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    tokenizer, rows = models.char_tokenizer(), [{"prompt": "a", "chosen": "b", "rejected": "c"}] * case.micro_batch
    data = datasets.Dataset.from_list(rows)
    given: dict[str, Any] = {"model": model, "train_dataset": data, "processing_class": tokenizer}
    if case.trainer == "dpo":
        return trl.DPOTrainer(args=trl.DPOConfig(**options, precompute_ref_log_probs=True), **given)
    args = trl.GRPOConfig(**options, num_generations=2, loss_type="grpo", beta=0.0)
    return PreparedGRPOTrainer(args=args, reward_funcs=_no_reward, **given)


def _no_reward(completions: Sequence[Any], **_: Any) -> list[float | None]:
    return [0.0] * len(completions)


def build(case: Case, way: Way, model: Any, folder: str) -> Update:
    trainer = trainer_of(case, way, model, folder)
    trainer.create_optimizer_and_scheduler(1000)
    if way.checkpointing:  # as its `train` does
        kwargs = trainer.args.gradient_checkpointing_kwargs
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    def prepare(batch: Batch) -> list[Inputs]:
        make = policy_inputs if case.trainer == "grpo" else preference_inputs
        return [make(some) for some in batch.chunks(case.micro_batch)]

    def run(pieces: list[Inputs]) -> tuple[float, float]:
        trainer.current_gradient_accumulation_steps = len(pieces)
        losses = [trainer.training_step(trainer.model, some, None) for some in pieces]
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), MAX_GRAD_NORM)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()
        return torch.stack(losses).sum().item(), float(norm)

    return Update(trainer.model, trainer.optimizer, prepare, run)


def policy_inputs(batch: Batch) -> Inputs:
    """What its rollout would hand to its loss."""
    prompts, completions = batch.input_ids[:, : batch.prompt], batch.input_ids[:, batch.prompt :]
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": batch.attention_mask[:, batch.prompt :].long(),
        "tool_mask": batch.completion_mask[:, batch.prompt :].long(),
        "advantages": batch.advantages,
        "num_items_in_batch": batch.completion_mask.sum(),
    }
    return inputs if batch.old is None else inputs | {"old_per_token_logps": batch.old[:, batch.prompt - 1 :]}


def preference_inputs(batch: Batch) -> Inputs:
    """What its collator would make of pairs: the chosen sequences, then the rejected ones."""
    order = [*range(0, len(batch.input_ids), 2), *range(1, len(batch.input_ids), 2)]
    batch = batch.rows(order)
    ref = torch.zeros(len(order), device=batch.input_ids.device) if batch.ref is None else batch.ref.float()
    chosen, rejected = ref.chunk(2)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask.long(),
        "completion_mask": batch.completion_mask.long(),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
