"""One step of our DPO against one of TRL 1.16's `DPOTrainer`: the same token ids and batch, loss, gradient norm, metrics."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

pytest.importorskip("trl", reason="TRL is the oracle")
import datasets
import peft
import trl
from trl.trainer.dpo_trainer import DataCollatorForPreference

from fused_rlhf.trainers import dpo, pair_rows
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.dpo import Config
from fused_rlhf.trainers.pairs import Encoder, collate

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '<eos>' if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = [
    {
        "prompt": f"{'pick '[i % 5 :]}{i}:",
        "chosen": f"{2 * i} {'yes' * (i % 3)}",
        "rejected": f"{2 * i + 1}{'no' * (i % 2)}",
    }
    for i in range(8)
]
CHATS = [
    {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in TEXTS
]
IMPLICIT_CHATS = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHATS]

# Ours and theirs; the batch is the whole data set, beta 0.3.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{
        name: ({"loss_type": (name,)}, {"loss_type": [name]}) for name in ("sigmoid", "ipo", "hinge", "aot", "apo_zero")
    },
    "robust": ({"loss_type": ("robust",), "label_smoothing": 0.1},) * 2,
    "exo_pair": ({"loss_type": ("exo_pair",), "label_smoothing": 0.01},) * 2,
    "mpo": ({"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},) * 2,
    "rpo": ({"rpo_alpha": 0.7}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    "wpo": ({"use_weighting": True},) * 2,
    "ld_alpha": ({"ld_alpha": 0.4},) * 2,
    "forward_kl": ({"f_divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "alpha_divergence": (
        {"f_divergence": "alpha_divergence", "f_alpha": 0.7},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    "lora": ({"lora_r": 4, "lora_alpha": 16.0, "lora_target_modules": ("q_proj", "down_proj")}, {}),
    "precomputed": ({"precompute_ref": True}, {"precompute_ref_log_probs": True}),
    "packed": ({"layout": "packed"}, {}),
    "padded": ({"layout": "padded"}, {}),
    "micro_batches": ({"micro_batch_size": 4}, {}),
}
METRICS = (
    *(f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")),
    *("rewards/margins", "rewards/accuracies", "entropy", "mean_token_accuracy", "num_tokens", "loss", "grad_norm"),
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(level)


def tokenizer() -> PreTrainedTokenizerBase:
    made = models.char_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<system>", "<assistant>"]})
    made.chat_template = TEMPLATE
    return made


def model(seed: int) -> PreTrainedModel:
    """Far from uniform, so that policy and reference differ by much."""
    torch.manual_seed(seed)
    made = models.small_model(tokenizer(), 32, 2, 128)
    for parameter in made.parameters():
        parameter.data.mul_(2.0)
    return made.eval()


def theirs(
    folder: Path, rows: list[dict[str, Any]], policy: Any, ref_model: Any, peft_config: Any = None, **options: Any
) -> Any:
    arguments: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "beta": 0.3,
        "per_device_train_batch_size": len(rows),
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": None,
    }
    return trl.DPOTrainer(
        model=policy,
        ref_model=ref_model,
        args=trl.DPOConfig(**(arguments | options)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def ours(folder: Path, **options: Any) -> Config:
    settings: dict[str, Any] = {
        "beta": 0.3,
        "batch_size": len(TEXTS),
        "micro_batch_size": 2 * len(TEXTS),
        "steps": 1,
        "num_test": 0,
        "sample_steps": 0,
        "save_steps": 0,
        "output": str(folder / "ours"),
    }
    return Config(**(settings | options))


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_trls(tmp_path, name):
    mine, its = CASES[name]
    given: dict[str, Any] = {"model": model(1), "tokenizer": tokenizer(), "ref_model": model(2)}
    if "lora_r" in mine:
        model(1).save_pretrained(tmp_path / "base")
        tokenizer().save_pretrained(tmp_path / "base")
        mine, given = mine | {"model": str(tmp_path / "base")}, {}  # the reference: the adapters off, in both
        settings = {"r": mine["lora_r"], "lora_alpha": 16, "target_modules": list(mine["lora_target_modules"])}
        its = {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", **settings)}
    trainer = theirs(tmp_path, TEXTS, model(1), None if "peft_config" in its else model(2), **its)
    own = dpo.prepare(ours(tmp_path, **mine), TEXTS, **given)
    if "lora_r" in mine:
        set_adapters(trainer.model)
        set_adapters(own.loaded.model)
    trainer.train()
    log = next(row for row in trainer.state.log_history if "grad_norm" in row)
    row = dpo.fit(own).metrics[1]
    assert row["grad_norm"] > 1e-3
    assert abs(row["rewards/margins"]) > 1e-2  # the policy is not its own reference
    wrong = {key: (row[key], log[key]) for key in METRICS if row[key] != pytest.approx(log[key], rel=2e-5, abs=2e-5)}
    assert not wrong


def set_adapters(policy: Any) -> None:
    """Weights that do something: fresh adapters do nothing."""
    torch.manual_seed(3)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)


@pytest.mark.parametrize("rows", [TEXTS, CHATS, IMPLICIT_CHATS], ids=["texts", "chats", "implicit"])
def test_token_ids_and_batches_are_those_of_trl(tmp_path, rows):
    trainer = theirs(tmp_path, rows, model(1), model(2))
    encoded = Encoder(tokenizer(), None, None).pairs(pair_rows.check(rows, "row"))
    for pair, row in zip(encoded, trainer.train_dataset, strict=True):
        assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
    pad = tokenizer().pad_token_id
    expected = DataCollatorForPreference(pad_token_id=pad)(list(trainer.train_dataset))
    batch = collate(encoded, pad)
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.completion_mask.long(), expected["completion_mask"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])
