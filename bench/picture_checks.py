"""What must be true of a family that reads images: a function for each column of bench/pictures.md."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import fused_rlhf as fr
from fused_rlhf.bench.picture_family import Family, apart
from fused_rlhf.bench.picture_rows import MIXED, Chat, Sample, forms, placed, refusals, row_of, said, shot, user
from fused_rlhf.trainers import data, dpo, generation, grpo, pair_rows, pairs, ppo, rollout
from fused_rlhf.trainers.rollout_config import RolloutConfig

BETA = 0.3
NEW = 5  # tokens of a completion, at most
TOKENS = ([5, 6, 7, 8], [9], [6, 5], [8, 8, 5])  # completions of MIXED


# --------------------------------------------------------------------------------------------------------------- forms


def through_prompts(family: Family, row: Sample) -> Any:
    """A row as GRPO and PPO read it."""
    return rollout.encoded(family.loaded, data.gathered("train", [row]), RolloutConfig(), "train")[0]


def through_pairs(family: Family, row: Sample) -> Any:
    """A row as DPO reads it."""
    answers = {"chosen": [said("assistant", "yes")], "rejected": [said("assistant", "no")]}
    encoder = pairs.Encoder(family.tokenizer, family.processor, None)
    return encoder.with_images(encoder.pairs(pair_rows.check([answers | row], "row"))[0])


def is_own(family: Family, got: Any, chat: Chat) -> bool:
    """Whether a prompt is what the processor makes of the chat; of a pair's, all that an answer leaves as it is."""
    (ids, extras), P = family.own(chat), len(got.prompt)
    replaced = len(ids) - P
    if got.prompt != ids[:P] or replaced > (family.name == "llava-onevision"):  # its answers begin with another token
        return False
    if not placed(chat)[1]:
        return not got.extras
    want = {name: x[:, :P] if x.dim() > 1 and x.shape[1] == len(ids) else x for name, x in extras.items()}
    return set(got.extras) == set(want) and all(torch.equal(x, want[name]) for name, x in got.extras.items())


def told(tried: dict[str, bool]) -> str:
    """12/12, or which of them are wrong."""
    wrong = [name for name, right in tried.items() if not right]
    return f"wrong: {', '.join(wrong)}" if wrong else f"{len(tried)}/{len(tried)}"


def right(family: Family, read: Callable[[Family, Sample], Any]) -> str:
    """Forms that become what the processor makes of the same pictures in their parts."""
    tried = forms(family.folder).items()
    return told({name: all(is_own(family, read(family, row), chat) for row, chat in rows) for name, rows in tried})


def refused(family: Family) -> str:
    """Rows that must not be taken, and whether row and field are named."""
    tokens = {family.tokenizer.decode([family.model.config.image_token_id]), family.processor.image_token}  # type: ignore[attr-defined]
    doors = (("train sample 0", through_prompts), ("row 1", through_pairs))
    tried = {}
    for name, (row, field) in refusals(family.folder, tokens).items():
        for where, read in doors:
            if field == "chosen" and read is through_prompts:
                continue
            try:
                read(family, row)
                tried[f"{name} ({where})"] = False
            except ValueError as error:
                tried[f"{name} ({where})"] = str(error).startswith(f"{where}: {field}")
    return told(tried)


# ------------------------------------------------------------------------------------------------------------- batches


def assembled(family: Family, chats: Sequence[Chat], tokens: Sequence[Sequence[int]]) -> rollout.Completions:
    """Rows of a rollout that made these tokens."""
    made = [through_prompts(family, row_of(chat)) for chat in chats]
    ends = generation.eos_ids(family.model, family.tokenizer)
    return rollout.assemble(made, tokens, ends, family.tokenizer, collator=family.collator)


@torch.no_grad()
def batch(family: Family) -> float:
    """Of hidden states."""
    some = assembled(family, MIXED, TOKENS)
    model = family.model
    together = some.rows().through(lambda ids, mask, **extras: fr.lm_head.forward(model, ids, mask, **extras).hidden)
    alone = [family.alone(family.model, chat, tokens)[1] for chat, tokens in zip(MIXED, TOKENS, strict=True)]
    mine = [x[: len(y)] for x, y in zip(together, alone, strict=True)]
    return apart(torch.cat(mine), torch.cat(alone))


@torch.no_grad()
def seen(family: Family) -> float:
    """Nats by which another picture of the same size changes a completion's log-prob."""
    chats = [[user(shot(0, shade), "what?")] for shade in (20, 200)]
    some = assembled(family, chats, [TOKENS[0]] * 2)
    sums = rollout.completion_logprobs(family.model, some, 1.0, "auto").sum(dim=1)
    return (sums[0] - sums[1]).abs().item()


# ----------------------------------------------------------------------------------------------------------------- DPO


def settings(family: Family, **more: Any) -> dict[str, Any]:
    """Of one step that leaves the weights nearly as they are."""
    quiet = {"sample_steps": 0, "save_steps": 0, "eval_steps": 0}
    own = {"steps": 1, "micro_batch_size": 4, "learning_rate": 1e-9, "output": str(family.folder / "run")}
    return own | quiet | more


def dpo_trainer(family: Family, chats: Sequence[Chat], **more: Any) -> dpo.DPOTrainer:
    config = dpo.Config(**settings(family, batch_size=len(chats), beta=BETA, num_test=0, **more))
    reference = None if config.lora_r else family.other()
    return dpo.prepare(config, list(map(row_of, chats, range(len(chats)))), ref_model=reference, **family.given())


def dense_dpo(family: Family, trainer: dpo.DPOTrainer, chats: Sequence[Chat]) -> list[float]:
    """Loss and norm of its gradient: -mean log sigmoid(beta (lr_chosen - lr_rejected)), row by row."""
    policy, reference = copy.deepcopy(family.model), family.other()
    losses = []
    for pair in trainer.train:
        chat = chats[int(pair.where.split()[-1]) - 1]
        cut = len(trainer.encoder.with_images(pair).prompt)
        ratios = []
        for tokens in (pair.chosen, pair.rejected):
            with torch.no_grad():
                known = family.alone(reference, chat, tokens, cut)[0].sum()
            ratios.append(family.alone(policy, chat, tokens, cut)[0].sum() - known)
        losses.append(-logsigmoid(BETA * (ratios[0] - ratios[1])))
    loss = torch.stack(losses).mean()
    loss.backward()
    grads = [p.grad.double() for p in policy.parameters() if p.grad is not None]
    return [loss.item(), torch.stack([g.norm() for g in grads]).norm().item()]


def dpo_step(family: Family, chats: Sequence[Chat] = MIXED) -> float:
    """Loss and gradient norm of one step."""
    trainer = dpo_trainer(family, chats)
    want = dense_dpo(family, trainer, chats)
    metrics = trainer.step(1)
    return max(apart(metrics[name], x) for name, x in zip(("loss", "grad_norm"), want, strict=True))


def trl_step(family: Family, chats: Sequence[Chat]) -> float | str:
    """The same of TRL's own step on the same rows in one batch, or what it raises."""
    want = dense_dpo(family, dpo_trainer(family, chats), chats)
    its: Any = None
    try:
        its = trl_trainer(family, [{**row_of(chat, i)} for i, chat in enumerate(chats)])
        its.train()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split()[:10])}"
    log = next(row for row in its.state.log_history if "grad_norm" in row)
    found = max(apart(log[name], x) for name, x in zip(("loss", "grad_norm"), want, strict=True))
    ids = family.own(chats[0])[0]
    theirs = its.data_collator([its.train_dataset[0]])["input_ids"][0].tolist()
    return f"{found:.2g}: its prompts have no BOS" if theirs[: len(ids) - 1] == ids[1:] else found


def trl_trainer(family: Family, rows: list[Sample]) -> Any:
    import datasets
    import trl
    from transformers.trainer_callback import PrinterCallback

    datasets.disable_progress_bars()
    args = trl.DPOConfig(
        output_dir=str(family.folder / "trl"),
        beta=BETA,
        per_device_train_batch_size=len(rows),
        max_steps=1,
        logging_steps=1,
        max_length=None,
        router_aux_loss_coef=0.0 if "moe" in family.name else None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
    )
    given = {"model": copy.deepcopy(family.model), "ref_model": family.other(), "processing_class": family.processor}
    made = trl.DPOTrainer(args=args, train_dataset=datasets.Dataset.from_list(rows), **given)
    made.remove_callback(PrinterCallback)
    return made


# ------------------------------------------------------------------------------------------------------------ rollouts


def rollout_settings(family: Family, **more: Any) -> dict[str, Any]:
    return settings(family, prompts_per_step=len(MIXED), max_new_tokens=NEW, micro_batch_size=3, **more)


def given_samples(family: Family) -> dict[str, Any]:
    """Rows without answers, and a reward that raises where the pictures it gets are not the row's."""

    def reward(completions: Sequence[str], images: Any, number: Sequence[int], **_: Any) -> list[float]:
        for found, i in zip(images, number, strict=True):
            pairs_of = zip(found or [], placed(MIXED[i])[1], strict=True)
            if not all(np.array_equal(np.asarray(mine), np.asarray(its)) for mine, its in pairs_of):
                raise ValueError(f"other pictures than those of row {i}")
        return [float(len(text)) + i for text, i in zip(completions, number, strict=True)]

    rows = [row_of(chat, i) for i, chat in enumerate(MIXED)]
    rows = [{name: row[name] for name in ("prompt", "images", "number")} for row in rows]
    return {"task": rows, "reward_functions": [reward], "ref_model": family.other(), **family.given()}


def dense(
    family: Family, model: Any, some: rollout.Completions, samples: Sequence[Sample]
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs of each row's completion alone, and what the head got before its tokens."""
    tokens = [ids[mask].tolist() for ids, mask in zip(some.input_ids, some.completion_mask, strict=True)]
    rows = [MIXED[sample["number"]] for sample in samples]
    alone = [family.alone(model, chat, own) for chat, own in zip(rows, tokens, strict=True)]
    return [x for x, _ in alone], [h[-len(own) - 1 : -1] for (_, h), own in zip(alone, tokens, strict=True)]


def sampled_alone(family: Family, found: Any) -> bool:
    """Whether each completion is what its prompt alone gets with its own uniforms."""
    some = found.completions
    drawn = rollout.uniforms(0, 1, len(some.prompts), NEW)
    for i, prompt in enumerate(some.prompts):
        how: dict[str, Any] = {"max_new_tokens": NEW, "uniforms": drawn[i : i + 1], "collator": family.collator}
        one = rollout.generate(family.model, family.tokenizer, [prompt], **how)
        if not torch.equal(one.input_ids[0], some.input_ids[i][some.attention_mask[i]]):
            return False
    return True


def require_first_update(metrics: dict[str, float], mean: str, variance: str) -> None:
    """Raises AssertionError unless the ratios of a rollout's first update are 1, all of them, and its metrics finite."""
    ratios = metrics[mean], metrics[variance]
    assert ratios == (1.0, 0.0), f"ratios of the first update: mean and variance {ratios}"
    assert all(map(math.isfinite, metrics.values())), f"not finite: {metrics}"


def grpo_step(family: Family) -> float:
    """Old and reference log-probs. Raises AssertionError as `require_first_update`, and where completions differ alone."""
    config = grpo.Config(**rollout_settings(family, num_generations=2, num_iterations=2, beta=0.05))
    trainer = grpo.prepare(config, **given_samples(family))
    found = grpo.ready(trainer, 1, grpo.collect(trainer, 1))
    mask = found.completions.completion_mask[:, 1:]
    assert found.old_logprobs is not None and found.ref_logprobs is not None  # noqa: PT018 - for mypy
    with torch.no_grad():
        old, ref = (
            torch.cat(dense(family, model, found.completions, found.samples)[0])
            for model in (family.model, family.other())
        )
    assert sampled_alone(family, found), "completions differ where they are sampled alone"
    metrics = grpo.update(trainer, dataclasses.replace(found, turns=found.turns[:1]))
    require_first_update(metrics, "ratio_mean", "ratio_var")
    return max(apart(found.old_logprobs[mask], old), apart(found.ref_logprobs[mask], ref))


def ppo_step(family: Family) -> float:
    """Old log-probs and values, of both kinds. Raises AssertionError as `grpo_step`."""
    return max(ppo_of(family, value_model) for value_model in ("shared", "copy"))


def ppo_of(family: Family, value_model: str) -> float:
    """With a value head that is not zero."""
    config = ppo.Config(**rollout_settings(family, num_ppo_epochs=2, value_model=value_model))
    trainer = ppo.prepare(config, **given_samples(family))
    module: Any = trainer.engine.module
    head = module.value if value_model == "shared" else module.value.score
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(2))
        found = ppo.collect(trainer, 1)
        samples = data.batch_at(trainer.task.train, config.seed, 0, config.prompts_per_step)
        old, hidden = map(torch.cat, dense(family, family.model, found.completions, samples))
        values = (hidden.double() @ head.weight.double().T + head.bias.double())[:, 0]
    mask = found.completions.completion_mask[:, 1:]
    assert sampled_alone(family, found), "completions differ where they are sampled alone"
    metrics = ppo.update(trainer, dataclasses.replace(found, turns=found.turns[:1]))
    require_first_update(metrics, "val/ratio", "val/ratio_var")
    return max(apart(found.old_logprobs[mask], old), apart(found.values[mask], values))


# ------------------------------------------------------------------------------------------------------------ adapters


def adapters(family: Family) -> int:
    """How many layers have them. Raises AssertionError where a step changes any other weight, or one that sees pictures."""
    trainer = dpo_trainer(family, MIXED, lora_r=2, learning_rate=1e-2)
    model: Any = trainer.loaded.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.step(1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    language = {id(p) for p in model.get_base_model().get_decoder().parameters()}
    inside = {name for name, p in model.named_parameters() if ".lora_" in name and id(p) in language}
    stray = sorted((changed | {name for name in before if ".lora_" in name}) - inside)
    assert changed, "no weight changes"
    assert not stray, f"these are adapted or change: {stray[:3]}"
    return sum(name.endswith("lora_A.default.weight") for name in before)
