"""TRL 1.16's own losses on given tensors: its trainers' methods, on trainers that were never initialised.

A `Head` is what TRL's models are here: hidden states and a weight, from which log-probs, entropies and logits follow
densely and differentiably, so that autograd carries TRL's loss back to both. Everything else a method reads is a
default of TRL's config class or given by name.

hidden[b, t] predicts targets[b, t]. TRL's rows are one token longer: the first holds the row's number, by which the
stand-in model finds it again.

The counts that normalise our losses, for one micro-batch of B rows with n active tokens, `steps` micro-batches to an
optimizer step and `num_items` active tokens in the generation batch of all ranks:

    grpo, sapo, luspo, gmpo     num_sequences = B steps
    dr_grpo                     num_sequences = B steps, and max_completion_length
    bnpo                        num_tokens = n steps: a local count, it differs between micro-batches
    dapo, cispo, vespo          num_tokens = num_items steps / (steps_per_generation ranks)
    rloo, DPO, KTO, CPO, ORPO   the micro-batch's own: the Trainer divides by `steps`
    entropy bonus               num_tokens = n steps for every loss type; ours divides it by the loss's num_tokens

A fully masked row counts as one of the B.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tests.helpers import dense, dense_logits

POLICY_TRAINERS = {"rloo": (RLOOTrainer, RLOOConfig), "gmpo": (GMPOTrainer, GMPOConfig)}
IMPORTANCE_SAMPLING = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

Result = tuple[Tensor, dict[str, float]]


class Head(torch.nn.Module):
    """A model of TRL's kind: called with `labels` and `fused_lm_head` it scores tokens, without it returns logits."""

    is_gradient_checkpointing = False

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, **transform: Any) -> None:
        super().__init__()
        self.hidden, self.weight, self.targets, self.transform = hidden, weight, targets, transform

    @property
    def input_ids(self) -> Tensor:
        """(B, T + 1): each row's number, then its targets."""
        return torch.cat([torch.arange(len(self.targets))[:, None], self.targets], 1)

    def forward(self, input_ids: Tensor, *, labels: Tensor | None = None, **_: Any) -> SimpleNamespace:
        rows = input_ids[:, 0]
        hidden, targets = self.hidden[rows], self.targets[rows]
        if labels is None:
            last = hidden.new_zeros(len(rows), 1, hidden.shape[-1])
            settings = {"bias": None, "temperature": 1.0, "logit_scale": 1.0, "softcap": None} | self.transform
            return SimpleNamespace(logits=dense_logits(torch.cat([hidden, last], 1), self.weight, **settings))
        live = labels[:, 1:] != -100
        found = dense(hidden, self.weight, targets, **self.transform)
        return SimpleNamespace(
            log_probs=torch.where(live, found["logprobs"], 0.0),
            entropy=torch.where(live, found["entropy"], 0.0),
            log_sum_sq_probs=torch.where(live, found["sum_sq"].log(), 0.0).detach(),
            mean_logits=torch.where(live, found["mean_logit"], 0.0).detach(),
            is_top1=live & found["is_top1"],
        )


class Accelerator:
    """One process."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0
    is_main_process = True
    sync_gradients = True

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x

    def pad_across_processes(self, x: Tensor, dim: int, pad_index: float) -> Tensor:
        return x

    def autocast(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


def _defaults(config: Any) -> dict[str, Any]:
    """The defaults of a config dataclass, which itself would ask for devices and folders."""
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(config)
    }


def stand_in(trainer: Any, config: Any, model: Any, settings: dict[str, Any], **attributes: Any) -> Any:
    """A trainer with its configuration and `attributes`, and nothing else."""
    known = _defaults(config)
    if unknown := set(settings) - set(known):
        raise TypeError(f"{sorted(unknown)} are no fields of {config.__name__}")
    args = known | {"steps_per_generation": 1} | settings
    self = object.__new__(trainer)
    self.__dict__.update(args)
    self.__dict__.update(
        args=SimpleNamespace(**args),
        model=model,
        accelerator=Accelerator(),
        state=SimpleNamespace(global_step=0),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    self.__dict__.update(attributes)
    return self


def _result(loss: Tensor, trainer: Any) -> Result:
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items() if values}


# ------------------------------------------------------------------------------------------------------------- policy


def _policy_trainer(model: Any, settings: dict[str, Any], **attributes: Any) -> Any:
    settings = dict(settings)
    name = settings.get("loss_type", "dapo")
    trainer, config = POLICY_TRAINERS.get(name, (GRPOTrainer, GRPOConfig))
    if name in POLICY_TRAINERS:
        del settings["loss_type"]
    defaults = _defaults(config) | settings
    high = defaults["epsilon_high"]
    return stand_in(
        trainer,
        config,
        model,
        settings,
        epsilon_low=defaults["epsilon"],
        epsilon_high=defaults["epsilon"] if high is None else high,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=defaults.get("entropy_coef", 0.0) != 0,
        **attributes,
    )


def policy_loss(
    policy: Head,
    mask: Tensor,
    advantages: Tensor,
    *,
    old: Tensor | None = None,
    ref: Tensor | None = None,
    sampling: Tensor | None = None,
    importance_ratio: Tensor | None = None,
    num_items: int | None = None,
    steps: int = 1,
    **settings: Any,
) -> Result:
    """`_compute_loss` of GRPOTrainer, or with loss_type "gmpo" or "rloo" that of GMPOTrainer or RLOOTrainer.

    Args:
        policy: of B rows of T tokens.
        mask: (B, T), given as TRL's tool_mask (its completion_mask for rloo, which has no other).
        advantages: (B,) or (B, T).
        old, ref, sampling: (B, T) log-probs.
        importance_ratio: of `importance_ratio`, (B, T) or (B, 1).
        num_items: active tokens of the generation batch; default those of `mask`.
        steps: gradient accumulation steps.
        settings: fields of the config class.
    """
    trainer = _policy_trainer(
        policy,
        settings,
        use_vllm=importance_ratio is not None,
        vllm_importance_sampling_correction=importance_ratio is not None,
        current_gradient_accumulation_steps=steps,
    )
    ids, active = policy.input_ids, mask.long()
    whole = settings.get("loss_type") != "rloo"
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids[:, 1:],
        "completion_mask": torch.ones_like(active) if whole else active,
        "advantages": advantages,
        "num_items_in_batch": active.sum() if num_items is None else torch.tensor(num_items),
    }
    if whole:
        inputs["tool_mask"] = active
    else:
        assert old is not None
        inputs["old_logps"] = (old * mask).sum(1)
    named = {
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "sampling_per_token_logps": sampling,
        "importance_sampling_ratio": importance_ratio,
    }
    inputs |= {key: value for key, value in named.items() if value is not None}
    return _result(trainer._compute_loss(policy, inputs), trainer)


def rollout(
    old: Any,
    mask: Tensor,
    *,
    sampling: Tensor | None = None,
    rewards: Tensor | None = None,
    num_generations: int = 1,
    reward_weights: list[float] | None = None,
    **settings: Any,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """GRPOTrainer's `_generate_and_score_completions` on completions that are there already.

    Args:
        old: the `Head` at the time of sampling, (B, T, ...).
        mask: (B, T), given as TRL's tool_mask.
        sampling: (B, T) log-probs of a separate sampler, NaN where it could not score; TRL keeps them in fp32.
        rewards: (B, R), NaN where a function gave none; default zeros, one function.
        settings: fields of GRPOConfig, e.g. vllm_importance_sampling_mode.

    Returns:
        TRL's batch ("advantages", "importance_sampling_ratio", ...) and its metrics.
    """
    found = torch.zeros(len(mask), 1) if rewards is None else rewards
    ids = old.input_ids
    given = (ids[:, :1].tolist(), ids[:, 1:].tolist(), mask.long().tolist(), [""] * len(mask))
    logps = None if sampling is None else sampling.tolist()
    functions = found.shape[1]
    trainer = _policy_trainer(
        old,
        settings,
        use_vllm=sampling is not None,
        environment_factories=None,
        environments=None,
        tools=None,
        pad_to_multiple_of=None,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _generate=lambda prompts: (*given, logps, {}, None, None),
        _calculate_rewards=lambda *_: found,
        num_generations=num_generations,
        reward_weights=torch.tensor([1.0] * functions if reward_weights is None else reward_weights),
        reward_funcs=[None] * functions,
        reward_func_names=[f"reward_{i}" for i in range(functions)],
        _logs={"prompt": [], "completion": [], "rewards": defaultdict(list), "advantages": []},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    batch = trainer._generate_and_score_completions([{"prompt": ""} for _ in range(len(mask))])
    return batch, _result(torch.zeros(()), trainer)[1]


def importance_ratio(
    old: Head, sampling: Tensor, mask: Tensor, mode: str, low: float | None, high: float | None
) -> Tensor:
    """TRL's weights of a separate sampler's tokens: (B, T), or (B, 1) for the sequence modes."""
    batch, _ = rollout(
        old,
        mask,
        sampling=sampling,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    return batch["importance_sampling_ratio"]


# --------------------------------------------------------------------------------------------------------- preference


def _shifted(mask: Tensor) -> Tensor:
    """TRL's completion_mask: of the tokens themselves, where ours is of the positions that predict them."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).long()


def dpo_loss(
    policy: Head, ref: Head | None, mask: Tensor, *, ref_logprobs: Tensor | None = None, **settings: Any
) -> Result:
    """DPOTrainer's `_compute_loss`: P chosen rows, then their P rejected.

    Args:
        policy: of 2P rows.
        ref: the reference, run in the call; or None with
        ref_logprobs: (2P,) TRL's precomputed sums, see `dpo_reference`.
        mask: (2P, T).
        settings: fields of DPOConfig; loss_type one name or several.
    """
    settings = dict(settings)
    names = settings.get("loss_type", ["sigmoid"])
    settings["loss_type"] = [names] if isinstance(names, str) else list(names)
    trainer = _dpo_trainer(policy, ref, settings)
    full = _shifted(mask)
    inputs = {"input_ids": policy.input_ids, "attention_mask": torch.ones_like(full), "completion_mask": full}
    if ref_logprobs is not None:
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref_logprobs.chunk(2)
    return _result(trainer._compute_loss(policy, inputs, False), trainer)


def dpo_reference(ref: Head, mask: Tensor, **settings: Any) -> Tensor:
    """(2P,) sums as DPOTrainer precomputes them, ld_alpha included."""
    full = _shifted(mask)
    inputs = {"input_ids": ref.input_ids, "attention_mask": torch.ones_like(full), "completion_mask": full}
    return torch.cat(_dpo_trainer(ref, ref, settings).compute_ref_log_probs(ref, inputs))


def _dpo_trainer(policy: Head, ref: Head | None, settings: dict[str, Any]) -> Any:
    defaults = _defaults(DPOConfig) | settings
    names, weights = defaults["loss_type"], defaults["loss_weights"]
    return stand_in(
        DPOTrainer,
        DPOConfig,
        policy,
        settings,
        ref_model=ref,
        precompute_ref_logps=ref is None,
        loss_types=names,
        loss_weights=[1.0] * len(names) if weights is None else weights,
    )


def kto_loss(
    policy: Head,
    ref: Head,
    mask: Tensor,
    labels: Tensor,
    *,
    mismatched: tuple[Head, Head, Tensor] | None = None,
    **settings: Any,
) -> Result:
    """KTOTrainer's `_compute_loss`: (S,) bool labels, True for desirable.

    mismatched: policy, reference and mask of the prompts with other rows' completions, for the batch's KL.
    """
    trainer = stand_in(KTOTrainer, KTOConfig, policy, settings, ref_model=ref, precompute_ref_logps=False)
    trainer.calculate_KL = trainer.loss_type == "kto"
    full = _shifted(mask)
    inputs: dict[str, Tensor] = {
        "input_ids": policy.input_ids,
        "attention_mask": torch.ones_like(full),
        "completion_mask": full,
        "label": labels,
    }
    if not trainer.calculate_KL:
        return _result(trainer._compute_loss(policy, inputs, False), trainer)
    assert mismatched is not None
    other, other_ref, other_mask = mismatched
    joined, joined_ref = _joined(policy, other), _joined(ref, other_ref)
    kl_ids = other.input_ids.clone()
    kl_ids[:, 0] += len(labels)
    inputs |= {
        "KL_input_ids": kl_ids,
        "KL_attention_mask": torch.ones_like(kl_ids),
        "KL_completion_mask": _shifted(other_mask),
    }
    trainer.model, trainer.ref_model = joined, joined_ref
    return _result(trainer._compute_loss(joined, inputs, False), trainer)


def _joined(a: Head, b: Head) -> Head:
    """The rows of two heads of one weight as one model."""
    assert a.weight is b.weight
    return Head(torch.cat([a.hidden, b.hidden]), a.weight, torch.cat([a.targets, b.targets]), **a.transform)


def _paired(policy: Head, mask: Tensor, attention: Tensor) -> dict[str, Tensor]:
    """The batch of the trainers that take chosen and rejected apart, with labels in place of masks."""
    ids, full = policy.input_ids, _shifted(mask)
    whole = torch.cat([torch.ones_like(attention[:, :1]), attention], 1).long()
    parts = {"input_ids": ids, "attention_mask": whole, "labels": ids.masked_fill(full == 0, -100)}
    batch = {}
    for name, value in parts.items():
        batch[f"chosen_{name}"], batch[f"rejected_{name}"] = value.chunk(2)
    return batch


def cpo_loss(policy: Head, mask: Tensor, **settings: Any) -> Result:
    """CPOTrainer's `get_batch_loss_metrics` (CPO, and by loss_type and alpha SimPO and AlphaPO): 2P rows, no reference.

    Its logits/* average over every position, padding and prompt included.
    """
    trainer = stand_in(CPOTrainer, CPOConfig, policy, settings, is_encoder_decoder=False, pad_token_id=0)
    return trainer.get_batch_loss_metrics(policy, _paired(policy, mask, torch.ones_like(mask)))


def orpo_loss(policy: Head, mask: Tensor, attention: Tensor | None = None, **settings: Any) -> Result:
    """ORPOTrainer's `get_batch_loss_metrics`: 2P rows, no reference.

    attention: (2P, T) the tokens of prompt and completion, over which its NLL runs; default `mask`.
    """
    trainer = stand_in(ORPOTrainer, ORPOConfig, policy, settings, is_encoder_decoder=False, padding_value=0)
    batch = _paired(policy, mask, mask if attention is None else attention)
    return trainer.get_batch_loss_metrics(policy, batch)
