"""TRL 1.16's trainers on our op against the same trainers on TRL's own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import forks, launch, trl_configs
from tests.gsm8k import GSM8K, needs_gsm8k
from tests.helpers import dense, inputs, plausible_logits, relative, worst

pytest.importorskip("trl")
import accelerate
import datasets
import peft
import tokenizers
import transformers
import trl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.trainer import utils as trl_utils

from fused_rlhf import functional
from fused_rlhf.integrations import trl as ours
from fused_rlhf.kernels.interface import Rows

V = 96
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 16, "num_key_value_heads": 2, "final_logit_softcapping": 3.0}),
    "cohere": ("cohere", {"logit_scale": 0.3, "tie_word_embeddings": False}),
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "experts_implementation": "eager", **EXPERTS}),
}


class FusedGMPOTrainer(ours.FusedGRPOTrainer, GMPOTrainer):
    """As the module's docstring says to do it."""


TRAINERS: dict[str, tuple[type, type, type]] = {
    "DPO": (trl.DPOTrainer, ours.FusedDPOTrainer, trl.DPOConfig),
    "GRPO": (trl.GRPOTrainer, ours.FusedGRPOTrainer, trl.GRPOConfig),
    "RLOO": (trl.RLOOTrainer, ours.FusedRLOOTrainer, trl.RLOOConfig),
    "KTO": (trl.KTOTrainer, ours.FusedKTOTrainer, trl.KTOConfig),
    "SFT": (trl.SFTTrainer, ours.FusedSFTTrainer, trl.SFTConfig),
    "GMPO": (GMPOTrainer, FusedGMPOTrainer, GMPOConfig),
}
ROLLOUTS = ("GRPO", "RLOO", "GMPO")
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.utils.logging.set_verbosity(level)


@pytest.fixture(autouse=True, scope="module")
def no_state_left() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(V - 4))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One saved model for each of `MODELS`, with its tokenizer: the trainers load their reference from there."""
    root = tmp_path_factory.mktemp("trl")
    for name, (model_type, changes) in MODELS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**SMALL, **IDS, **changes})
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return root


def rows(trainer: str) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(1)

    def text(length: int) -> str:
        return " ".join(f"w{int(i)}" for i in torch.randint(V - 4, (length,), generator=generator))

    def row(i: int) -> dict[str, Any]:
        if trainer == "DPO":
            return {"prompt": text(3 + i % 3), "chosen": " " + text(2 + i % 4), "rejected": " " + text(3 + i % 2)}
        if trainer == "KTO":
            return {"prompt": text(3 + i % 3), "completion": " " + text(2 + i % 4), "label": i % 2 == 0}
        return {"text": text(4 + i % 5)} if trainer == "SFT" else {"prompt": text(3 + i % 3)}

    return datasets.Dataset.from_list([row(i) for i in range(12)])


class Reward:
    """A number from the token ids, so that no two completions tie; keeps what it has seen."""

    __name__ = "reward"

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.seen += completion_ids
        return [sum((i + 1) * token for i, token in enumerate(ids)) % 17 / 4 for ids in completion_ids]


def make(
    name: str, cls: type, folder: Path, model: Any = "llama", peft_config: Any = None, **changes: Any
) -> tuple[Any, Reward]:
    """A trainer of the kind `name`, of class `cls`, and the reward function it was given."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "report_to": [],
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-5,  # no steps of full length along gradients that are rounding alone
        "lr_scheduler_type": "constant",
    }
    if name in ROLLOUTS:
        arguments |= {"num_generations": 4, "max_completion_length": 6, "max_steps": 4, "learning_rate": 3e-3}
    arguments |= changes
    reward = Reward()
    kind = model if isinstance(model, str) else "llama"
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    if peft_config == "prompt":
        peft_config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    elif isinstance(peft_config, dict):
        peft_config = peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **peft_config})
    data = rows(name)
    rollouts = changes.pop("rollout_func", None)
    arguments.pop("rollout_func", None)
    torch.manual_seed(0)
    trainer = cls(
        model=model,
        args=TRAINERS[name][2](**arguments),
        train_dataset=data,
        eval_dataset=data.select(range(4)) if "eval_steps" in changes else None,
        processing_class=AutoTokenizer.from_pretrained(folder / kind),
        peft_config=peft_config,
        **({"reward_funcs": reward} if name in ROLLOUTS else {}),
        **({"rollout_func": rollouts} if rollouts else {}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, reward


class Calls:
    """Counts calls of TRL's kernel and of our op, and the rows that each of ours was asked to score."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.theirs = 0
        self.rows: list[Any] = []
        self.graphs: list[Any] = []
        self.kernel, op = trl_utils._ChunkedLogProbFunction, functional.logprobs_of_rows
        kernel = self.kernel

        def apply(*arguments: Any) -> Any:
            self.theirs += 1
            return kernel.apply(*arguments)

        def logprobs_of_rows(rows: Rows, *arguments: Any) -> Any:
            self.rows.append(int((rows.targets != -100).sum()))
            self.graphs.append(torch.is_grad_enabled())
            return op(rows, *arguments)

        monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=apply, forward=kernel.forward))
        monkeypatch.setattr(functional, "logprobs_of_rows", logprobs_of_rows)

    def take(self) -> tuple[int, list[int]]:
        taken = self.theirs, self.rows
        self.theirs, self.rows, self.graphs = 0, [], []
        return taken


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    # Their own calls are not to be counted.
    ours._check_head(trl_utils.add_fused_lm_head, trl_utils.FusedCausalLMOutput)
    ours._check_kernel(trl_utils._ChunkedLogProbFunction)
    return Calls(monkeypatch)


def run(name: str, cls: type, folder: Path, **changes: Any) -> tuple[list[dict[str, float]], list[list[int]]]:
    """Everything a training run logs but times, and every completion it has generated."""
    changes["peft_config"] = changes.pop("peft", None)
    trainer, reward = make(name, cls, folder, **changes)
    trainer.train()
    timed = ("step_time", "runtime", "per_second")
    history = [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history]
    return history, reward.seen


def assert_equal_runs(found: list[dict[str, float]], expected: list[dict[str, float]], beta: float = 0.1) -> None:
    """Every metric of every step, to 1e-5 of the largest value it takes in the run.

    What is a difference of larger numbers is known to their rounding, and compared on their scale: a reward of DPO or
    KTO is beta times that of two log-probs, `logits/*` and `train_loss` are means of numbers of either sign.
    """
    assert [set(entry) for entry in found] == [set(entry) for entry in expected]
    assert len(expected) >= 3
    largest: dict[str, float] = {}
    for entry in expected:
        for key, value in entry.items():
            largest[key] = max(largest.get(key, 0.0), abs(value or 0.0))
    for step, (a, b) in enumerate(zip(found, expected)):
        for key, value in b.items():
            if value is None:  # no reward or clip ratio at all
                assert a[key] is None
                continue
            scale = largest[key]
            if "rewards/" in key and "logps/chosen" in largest:
                scale = max(scale, beta * largest["logps/chosen"])
            if key == "train_loss":
                scale = largest["loss"]
            if "logits/" in key:
                scale = max(scale, 1.0)  # a logit of these models is of a few units
            assert abs(a[key] - value) <= 1e-5 * scale, f"{key} of log entry {step}: {a[key]} against {value}"


def compare(name: str, folder: Path, calls: Calls, fused: type | None = None, **changes: Any) -> None:
    stock, ours_, _ = TRAINERS[name]
    expected, expected_completions = run(name, stock, folder, **changes)
    number, none = calls.take()
    assert number >= 3
    assert none == []
    found, completions = run(name, fused or ours_, folder, **changes)
    theirs, rows_ = calls.take()
    assert theirs == 0
    assert len(rows_) == number
    assert completions == expected_completions
    assert (name in ROLLOUTS) == bool(completions)
    assert_equal_runs(found, expected, changes.get("beta", 0.1))


@pytest.mark.slow
@pytest.mark.parametrize("config", trl_configs.DPO)
def test_dpo_equals_stock(config: str, folder: Path, calls: Calls) -> None:
    compare("DPO", folder, calls, **trl_configs.DPO[config])


@pytest.mark.slow
@pytest.mark.parametrize("config", trl_configs.GRPO)
def test_grpo_equals_stock(config: str, folder: Path, calls: Calls) -> None:
    compare("GRPO", folder, calls, **trl_configs.GRPO[config])


@pytest.mark.slow
@pytest.mark.parametrize("config", trl_configs.OTHERS)
def test_others_equal_stock(config: str, folder: Path, calls: Calls) -> None:
    changes = dict(trl_configs.OTHERS[config])
    compare(changes.pop("trainer"), folder, calls, **changes)


# ----------------------------------------------------------------------------------------------- what goes through the op

CALLS: dict[str, tuple[str, dict[str, Any], str]] = {
    # with (T) and without (-) gradients, in order
    "reference model": ("DPO", {}, "T-" * 3),
    "adapter off": ("DPO", {"peft": trl_configs.LORA}, "T-" * 3),
    "precomputed": ("DPO", {"precompute_ref_log_probs": True}, "---" + "T" * 3),
    "on-policy": ("GRPO", {}, "T" * 4),
    "old and reference": ("GRPO", {"beta": 0.1, **trl_configs.OFF_POLICY}, "--TT" * 2),
    "rloo": ("RLOO", {"beta": 0.1, **trl_configs.OFF_POLICY}, "--TT" * 2),
    "kto": ("KTO", {}, "-T--" * 3),  # the policy on mismatched pairs, the policy, the reference on both
    "sft": ("SFT", {}, "T" * 3),
}


@pytest.mark.parametrize("case", CALLS)
def test_every_log_prob_comes_from_the_op(case: str, folder: Path, calls: Calls) -> None:
    name, changes, expected = CALLS[case]
    run(name, TRAINERS[name][1], folder, **changes)
    assert "".join("T" if grad else "-" for grad in calls.graphs) == expected
    assert calls.theirs == 0


@pytest.mark.parametrize("name", ["DPO", "GRPO", "RLOO", "KTO", "SFT"])
def test_patched_stock_trainers_equal_stock(name: str, folder: Path, calls: Calls) -> None:
    changes: dict[str, dict[str, Any]] = {
        "DPO": {"use_weighting": True, "beta": 1.0},
        "GRPO": {"entropy_coef": 0.05, **trl_configs.OFF_POLICY},
        "RLOO": trl_configs.OFF_POLICY,
    }
    arguments = changes.get(name, {})
    expected, expected_completions = run(name, TRAINERS[name][0], folder, **arguments)
    number, _ = calls.take()
    trl_utils._ChunkedLogProbFunction = calls.kernel  # type: ignore[misc]
    with ours.patched_trl():
        found, completions = run(name, TRAINERS[name][0], folder, **arguments)
    assert trl_utils._ChunkedLogProbFunction is calls.kernel
    assert len(calls.rows) == number
    assert completions == expected_completions
    assert_equal_runs(found, expected, arguments.get("beta", 0.1))


# ---------------------------------------------------------------------------------------------------------- precision


class FP32Logits:
    """TRL's kernel in one dense product: operands as it rounds them, logits and everything after in fp64."""

    forward = staticmethod(trl_utils._ChunkedLogProbFunction.forward)

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, bias: None, targets: Tensor, temperature: float, *options: Any) -> tuple:
        rounded = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        with torch.autocast("cpu", enabled=False):
            found = dense(hidden.to(rounded).double(), weight.to(rounded).double(), targets, temperature=temperature)
        named = {"log_sum_sq_probs": found["sum_sq"].log(), "mean_logits": found["mean_logit"], **found}
        wanted = [named[name] if name in options[-1] else None for name in OUTPUTS]
        return tuple(x.float() if x is not None and x.is_floating_point() else x for x in (found["logprobs"], *wanted))


def errors(run_: list[dict[str, float]], truth: list[dict[str, float]], keys: set[str]) -> float:
    """Root of the sum of squares of every step's error in these metrics, each relative to its largest value."""
    total = 0.0
    for key in keys:
        scale = max(abs(entry.get(key, 0.0)) for entry in truth) or 1.0
        total += sum(((a[key] - b[key]) / scale) ** 2 for a, b in zip(run_, truth) if key in b)
    return total**0.5


@pytest.mark.parametrize(
    ("name", "changes"),
    [("DPO", {}), ("GRPO", {"beta": 0.1, **trl_configs.OFF_POLICY}), ("SFT", {})],
    ids=lambda x: str(x),
)
def test_bf16_autocast_over_fp32_weights(
    name: str, changes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL rounds logits to bf16, ours are fp32: both are held against the fp32 ones, and ours are closer.

    Only the head is trained here: a bf16 body turns a difference in the last bit into one in the first digits.
    """

    def frozen_body() -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32).requires_grad_(False)
        model.lm_head.requires_grad_(True)
        return model

    stock, fused, _ = TRAINERS[name]
    found, completions = run(name, fused, folder, model=frozen_body(), bf16=True, **changes)
    rounded, _ = run(name, stock, folder, model=frozen_body(), bf16=True, **changes)
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", FP32Logits)
    truth, expected_completions = run(name, stock, folder, model=frozen_body(), bf16=True, **changes)
    assert completions == expected_completions
    metrics = set().union(*truth) - {"train_loss", "total_flos", "grad_norm"}
    assert errors(found[:1], truth[:1], metrics & set(truth[0])) <= 1e-5
    assert errors(found, truth, metrics) < 0.3 * errors(rounded, truth, metrics)
    # The gradient of a bf16 logit is bf16 in both.
    assert errors(found, truth, {"grad_norm"}) <= 2 * errors(rounded, truth, {"grad_norm"}) + 1e-3


def test_bf16_first_step_of_the_whole_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run("DPO", ours.FusedDPOTrainer, folder, bf16=True)
    rounded, _ = run("DPO", trl.DPOTrainer, folder, bf16=True)
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", FP32Logits)
    truth, _ = run("DPO", trl.DPOTrainer, folder, bf16=True)
    forward = set(truth[0]) - {"grad_norm"}
    assert errors(found[:1], truth[:1], forward) <= 1e-5
    assert errors(rounded[:1], truth[:1], forward) >= 1e-4


# ---------------------------------------------------------------------------------------------- the kernel's contract


def kernel_arguments(data: dict[str, Any], softcap: float | None = 3.0, scale: float = 1.3, **names: Any) -> tuple:
    bias = data["bias"]
    return data["hidden"], data["weight"], bias, data["targets"], 0.7, 32, softcap, scale, names.get("outputs", OUTPUTS)


def test_kernel_equals_stock_in_values_and_gradients() -> None:
    data = inputs(23, 12, 101, torch.float32, bias=True)
    grads = []
    for kernel in (trl_utils._ChunkedLogProbFunction, ours.FusedLogProbs):
        leaves = {k: data[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
        logprobs, entropy, *rest = kernel.apply(*kernel_arguments({**data, **leaves}))
        assert not any(x.requires_grad for x in rest)
        upstream = torch.linspace(-1, 2, 23)
        (3.7 * (upstream * logprobs - upstream.square() * entropy).sum()).backward()
        grads.append([logprobs, entropy, *rest, *(leaf.grad for leaf in leaves.values())])
    for theirs, mine in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", ["logprobs", "entropy"])
def test_kernel_takes_a_gradient_for_either_output(used: str) -> None:
    """The entropy is mostly for logging; a bonus alone uses nothing else."""
    data = inputs(7, 8, 33)
    leaves = {k: data[k].requires_grad_() for k in ("hidden", "weight")}
    logprobs, entropy, *_ = ours.FusedLogProbs.apply(*kernel_arguments(data, None, 1.0))
    (logprobs if used == "logprobs" else entropy).sum().backward()
    found = [leaf.grad for leaf in leaves.values()]
    expected = dense(data["hidden"], data["weight"], data["targets"], temperature=0.7)[used].sum()
    for a, b in zip(found, torch.autograd.grad(expected, list(leaves.values()))):
        torch.testing.assert_close(a, b)


def test_kernel_without_rows_is_differentiable() -> None:
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
    results = ours.FusedLogProbs.apply(
        hidden, weight, None, torch.zeros(0, dtype=torch.int64), 1.0, 32, None, 1.0, OUTPUTS
    )
    assert [tuple(x.shape) for x in results] == [(0,)] * 5
    (results[0].sum() + results[1].sum()).backward()
    assert hidden.grad.shape == (0, 8)
    assert not weight.grad.any()


def test_kernel_skips_what_needs_no_gradient() -> None:
    data = inputs(7, 8, 33, torch.float32)
    hidden, weight = data["hidden"].requires_grad_(), data["weight"]
    ours.FusedLogProbs.apply(*kernel_arguments(data, None))[0].sum().backward()  # a frozen head
    assert hidden.grad is not None
    assert weight.grad is None
    weight.requires_grad_()
    with torch.no_grad():  # a reference model, whose head wants gradients
        assert not any(x.requires_grad for x in ours.FusedLogProbs.apply(*kernel_arguments(data, None)))


def test_kernel_counts_the_first_of_equal_logits_as_top1() -> None:
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    for kernel in (trl_utils._ChunkedLogProbFunction, ours.FusedLogProbs):
        *_, top = kernel.apply(torch.ones(4, 1), weight, None, torch.arange(4), 1.0, 2, None, 1.0, OUTPUTS)
        assert top.tolist() == [False, True, False, False]


def test_kernel_in_autocast_rounds_operands_alone() -> None:
    """fp32 master weights under autocast: the products take bf16 operands, as TRL's do; the logits stay fp32."""
    data = plausible_logits(64, 509, torch.float32)
    wide = {k: v.bfloat16().double() if v.is_floating_point() else v for k, v in data.items()}
    truth = dense(**wide)

    def worst_error(kernel: Any) -> tuple[float, float]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = kernel.apply(
                data["hidden"], data["weight"], None, data["targets"], 1.0, 128, None, 1.0, ("entropy",)
            )
        assert found[0].dtype == found[1].dtype == torch.float32
        return worst(found[0], truth["logprobs"]), worst(found[1], truth["entropy"])

    mine, theirs = worst_error(ours.FusedLogProbs), worst_error(trl_utils._ChunkedLogProbFunction)
    assert max(mine) <= 5e-5
    assert min(theirs) >= 1e-2


def test_kernel_in_fp16_with_a_loss_scale() -> None:
    data = inputs(29, 16, 101, torch.float16)
    leaves = [data[k].requires_grad_() for k in ("hidden", "weight")]
    scale, upstream = 2.0**12, torch.linspace(-1, 1, 29)
    logprobs = ours.FusedLogProbs.apply(*kernel_arguments(data, None, 1.0))[0]
    (scale * (upstream * logprobs).mean()).backward()
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = (upstream * dense(wide[0], wide[1], data["targets"], temperature=0.7)["logprobs"]).mean()
    for leaf, truth in zip(leaves, torch.autograd.grad(scale * expected, wide)):
        assert leaf.grad.isfinite().all()
        assert relative(leaf.grad, truth) <= 2e-3


def test_sharded_by_zero3_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that is empty but inside of a gathering, as DeepSpeed keeps it."""
    data = inputs(7, 8, 33, torch.float32, bias=True)
    full = {"weight": data["weight"], "bias": data["bias"]}
    sharded = {name: nn.Parameter(value.clone()) for name, value in full.items()}
    gathered = []

    @contextlib.contextmanager
    def gather(*parameters: nn.Parameter) -> Iterator[None]:
        empty = [(p, name) for p in parameters for name in full if p is sharded[name] and not p.numel()]
        for p, name in empty:
            gathered.append(name)
            p.data = full[name].clone()
        yield
        for p, _ in empty:
            p.data = torch.empty(0)

    monkeypatch.setattr(trl_utils, "maybe_gather_lm_head_ctx", gather)
    monkeypatch.setattr(ours, "is_deepspeed_zero3_enabled", lambda: True)
    for p in sharded.values():
        p.data = torch.empty(0)
    hidden = data["hidden"].requires_grad_()
    logprobs = ours.FusedLogProbs.apply(
        hidden, sharded["weight"], sharded["bias"], data["targets"], 0.7, 32, None, 1.0, OUTPUTS
    )[0]
    assert gathered == ["weight", "bias"]
    assert [p.numel() for p in sharded.values()] == [0, 0]
    found = torch.autograd.grad(logprobs.square().sum(), [hidden, *sharded.values()])
    assert gathered == ["weight", "bias"] * 2
    assert [p.numel() for p in sharded.values()] == [0, 0]

    leaves = {k: v.detach().clone().requires_grad_() for k, v in {"hidden": hidden, **full}.items()}
    truth = dense(**{**data, **leaves, "temperature": 0.7})["logprobs"].square().sum()
    for x, y in zip(found, torch.autograd.grad(truth, list(leaves.values()))):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- the model with our head

FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    # model type, changes to its config, whether TRL's reading of the config is right
    "llama": ("llama", {}, True),
    "gemma2": ("gemma2", {"head_dim": 16, "num_key_value_heads": 2, "final_logit_softcapping": 3.0}, True),
    "granite": ("granite", {"logits_scaling": 4.0}, True),
    "phi": ("phi", {}, True),  # a bias
    "bert": ("bert", {"is_decoder": True}, False),  # dense, gelu and a norm between body and head
    "xlstm": (
        "xlstm",
        {"hidden_size": 128, "num_hidden_layers": 1, "num_heads": 2, "chunk_size": 16, "output_logit_soft_cap": 2.0},
        False,
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"num_hidden_layers": 3, "lru_width": 32, "head_dim": 16, "logits_soft_cap": 2.0, "num_key_value_heads": 2},
        False,
    ),
}


def build(family: str) -> Any:
    model_type, changes, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, "max_position_embeddings": 32, **IDS, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0.0, 0.5)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and labels of three rows, the last one without a label."""
    ids = torch.randint(4, V, (3, 9), generator=torch.Generator().manual_seed(3))
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :2] = 0
    labels = ids.masked_fill(torch.rand(3, 9, generator=torch.Generator().manual_seed(4)) < 0.4, -100)
    labels[0, :3] = labels[2] = -100
    return ids, attention_mask, labels


@pytest.mark.parametrize("family", FAMILIES)
def test_the_transform_of_the_logits_is_the_models_own(family: str) -> None:
    ids, attention_mask, labels = batch()
    mask = labels[:, 1:] != -100
    model = build(family)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].masked_fill(~mask, 0.0)

    def error(add: Any) -> float:
        model = build(family)
        add(model, temperature=0.7, outputs=("log_probs", *OUTPUTS))
        with torch.no_grad():
            found = model(input_ids=ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
            assert torch.equal(model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1] / 0.7, logits)
        assert torch.equal(found.label_mask, mask)
        for name in ("log_probs", *OUTPUTS):
            assert not found[name][~mask].any()
        return worst(found.log_probs, expected)

    assert error(ours.add_fused_lm_head) <= 1e-5
    assert (error(trl_utils.add_fused_lm_head) <= 1e-5) == FAMILIES[family][2]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("shifted", [False, True])
def test_all_results_and_gradients_equal_stock(family: str, shifted: bool, folder: Path) -> None:
    ids, attention_mask, labels = batch()
    given = {"shift_labels": nn.functional.pad(labels[:, 1:], (0, 1), value=-100)} if shifted else {"labels": labels}
    results = []
    for add in (trl_utils.add_fused_lm_head, ours.add_fused_lm_head):
        model = AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32)
        add(model, temperature=0.7, outputs=("log_probs", *OUTPUTS))
        out = model(input_ids=ids, attention_mask=attention_mask, num_items_in_batch=5, fused_lm_head=True, **given)
        (out.loss - 0.3 * out.entropy.sum()).backward()
        results.append(({k: v.detach() for k, v in out.items()}, {k: p.grad for k, p in model.named_parameters()}))
    (theirs, their_grads), (mine, my_grads) = results
    assert set(mine) == set(theirs)
    assert ("aux_loss" in mine) == (family == "mixtral")
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(my_grads, their_grads, rtol=1e-4, atol=1e-5)


def test_a_vision_language_model_equals_stock() -> None:
    image, vision = 90, {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**SMALL, **IDS, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={
            **vision,
            "patch_size": 4,
            "temporal_patch_size": 1,
            "fullatt_block_indexes": [0],
            "window_size": 16,
        },
        image_token_id=image,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    ids = torch.tensor([[5, 6, 92, image, image, image, image, 93, 7, 8, 9, 10]])
    generator = torch.Generator().manual_seed(5)
    arguments = {
        "input_ids": ids,
        "labels": ids.masked_fill(torch.arange(12) < 8, -100),
        "mm_token_type_ids": (ids == image).long(),
        "pixel_values": torch.randn(16, 48, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    results = []
    for add in (trl_utils.add_fused_lm_head, ours.add_fused_lm_head):
        torch.manual_seed(0)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).float()
        add(model, outputs=("log_probs", "entropy"))
        out = model(**arguments, fused_lm_head=True)
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append([out.log_probs.detach(), out.entropy.detach(), grads])
    assert any("visual" in name for name in results[0][2])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", ["stock", "ours"])
def test_a_model_that_had_a_head_before(first: str) -> None:
    """The model of one trainer is handed to the next."""
    ids, attention_mask, labels = batch()
    adders = [trl_utils.add_fused_lm_head, ours.add_fused_lm_head]
    model, fresh = build("llama"), build("llama")
    for add in adders if first == "stock" else adders[::-1]:
        add(model, temperature=0.5 + (add is adders[1]) / 5)
    ours.add_fused_lm_head(fresh, temperature=0.7 if first == "stock" else 0.5)
    arguments = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels, "fused_lm_head": True}
    with torch.no_grad():
        torch.testing.assert_close(model(**arguments).log_probs, fresh(**arguments).log_probs, rtol=1e-5, atol=1e-5)


def test_a_batch_without_labels_is_a_differentiable_zero() -> None:
    ids, attention_mask, labels = batch()
    model = build("llama")
    ours.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    out = model(input_ids=ids, attention_mask=attention_mask, labels=torch.full_like(labels, -100), fused_lm_head=True)
    (out.loss + out.entropy.sum()).backward()
    assert out.loss == 0
    assert model.lm_head.weight.grad is not None
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_generation_and_the_models_own_loss_are_as_before() -> None:
    ids, attention_mask, labels = batch()
    model = build("llama")
    options = {"max_new_tokens": 4, "do_sample": False}
    before = model(input_ids=ids, labels=labels).loss, model.generate(ids, attention_mask=attention_mask, **options)
    signature = inspect.signature(model.forward)
    ours.add_fused_lm_head(model)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model(input_ids=ids, labels=labels).loss, before[0])
    assert torch.equal(model.generate(ids, attention_mask=attention_mask, **options), before[1])


@pytest.mark.parametrize("where", ["whole", "body"])
def test_compiled_models(where: str) -> None:
    ids, attention_mask, labels = batch()
    model = build("llama")
    ours.add_fused_lm_head(model)
    arguments = {"input_ids": ids, "attention_mask": attention_mask}
    with torch.no_grad():
        expected = model(**arguments, labels=labels, fused_lm_head=True).log_probs
        logits = model(**arguments).logits
        if where == "body":
            model.model.compile(backend="eager")
        compiled = torch.compile(model, backend="eager") if where == "whole" else model
        for _ in range(2):
            torch.testing.assert_close(compiled(**arguments, labels=labels, fused_lm_head=True).log_probs, expected)
            torch.testing.assert_close(compiled(**arguments).logits, logits)


def compare_sharded(heads: Sequence[bool]) -> None:
    """Gradients of processes that have two rows each, and those of one that has all rows; in every process."""
    from torch.distributed.fsdp import fully_shard

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ids = torch.randint(4, V, (2 * world, 9), generator=torch.Generator().manual_seed(1))
    for head in heads:
        grads = []
        for shard in (False, True):
            model = build("llama")
            ours.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
            if shard and head:  # in a group of its own it is a DTensor again after the forward
                fully_shard(model.lm_head)
            mine = ids[2 * rank : 2 * rank + 2] if shard else ids
            out = (fully_shard(model) if shard else model)(
                input_ids=mine, attention_mask=torch.ones_like(mine), labels=mine, fused_lm_head=True
            )
            ((out.log_probs.sum() - out.entropy.sum()) / (1 if shard else world)).backward()
            grads.append([p.grad.full_tensor() if shard else p.grad for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sharded_by_fsdp2() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        compare_sharded([False, True])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_by_fsdp2_over_two_processes(tmp_path: Path) -> None:
    code = "from tests import test_integrations_trl as t; import torch; torch.distributed.init_process_group('gloo')"
    launch.together(f"{code}; t.compare_sharded([False, True]); torch.distributed.destroy_process_group()", tmp_path)


# ------------------------------------------------------------------------------------------------------------ tool tokens


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions in which the environment has written some tokens, as a tool does."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    tokenizer = trainer.processing_class
    lengths = [3 + i % 4 for i in range(len(prompts))]
    return {
        "prompt_ids": tokenizer(prompts)["input_ids"],
        "completion_ids": [torch.randint(4, V, (n,), generator=generator).tolist() for n in lengths],
        "env_mask": [[0 if 1 <= t <= i % 3 else 1 for t in range(n)] for i, n in enumerate(lengths)],
        "logprobs": None,
    }


@pytest.mark.parametrize("changes", [{}, {"beta": 0.2}, {"pad_to_multiple_of": 4}, {"per_device_train_batch_size": 2}])
def test_tokens_of_tools_are_not_scored(changes: dict[str, Any], folder: Path, calls: Calls) -> None:
    arguments = {"rollout_func": rollout, "generation_batch_size": 4, **trl_configs.OFF_POLICY, **changes}
    expected, _ = run("GRPO", trl.GRPOTrainer, folder, **arguments)
    calls.take()
    found, _ = run("GRPO", ours.FusedGRPOTrainer, folder, **arguments)
    assert_equal_runs(found, expected)
    _, scored = calls.take()

    class ScoresAll(ours.FusedHeadMixin, trl.GRPOTrainer):
        pass

    again, _ = run("GRPO", ScoresAll, folder, **arguments)
    assert_equal_runs(again, expected)
    _, everything = calls.take()
    written = 3 + 3 + 3 + 6  # of lengths 3, 4, 5, 6 with 0, 1, 2, 0 tokens of the environment
    if changes.get("per_device_train_batch_size") == 2:
        assert sum(scored) * 18 == sum(everything) * written
    else:
        assert set(scored) == {written}
        assert set(everything) == {18}


# ------------------------------------------------------------------------------------------------------- LoRA on the head

ON_HEAD: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 8}


def add_dense_head(model: Any, temperature: float = 1.0, *_: Any, **__: Any) -> None:
    """The oracle: the model's own logits, adapters and all."""
    forward = model.forward

    def dense_forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return forward(*args, **kwargs)
        logits = forward(*args, **kwargs).logits[:, :-1] / temperature
        mask, targets = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
        log_p = logits.log_softmax(-1)
        named = {
            "log_probs": log_p.gather(-1, targets[..., None])[..., 0],
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
            "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1) == targets,
        }
        masked = {name: value.masked_fill(~mask, 0) for name, value in named.items()}
        return trl_utils.FusedCausalLMOutput(loss=None, label_mask=mask, **masked)

    model.forward = types.MethodType(functools.wraps(type(model).forward)(dense_forward), model)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DPO", {}),
        ("DPO", {"use_weighting": True, "beta": 1.0, "model": "tied"}),
        ("GRPO", {"beta": 0.2, "entropy_coef": 0.05, **trl_configs.OFF_POLICY}),
        ("RLOO", {"learning_rate": 1e-2, **trl_configs.OFF_POLICY}),
        ("KTO", {}),
        ("SFT", {"model": "cohere"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_lora_on_the_head_trains_as_in_the_dense_model(
    name: str, changes: dict[str, Any], folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, fused, _ = TRAINERS[name]
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        make(name, stock, folder, peft_config=ON_HEAD, **changes)

    trainer, _ = make(name, fused, folder, peft_config=ON_HEAD, **changes)
    before = {k: p.detach().clone() for k, p in trainer.model.named_parameters()}
    trainer.train()
    assert calls.theirs == 0
    assert calls.rows
    for key, p in trainer.model.named_parameters():
        assert torch.equal(p, before[key]) == ("lora_" not in key), key

    found, completions = run(name, fused, folder, peft=ON_HEAD, **changes)
    monkeypatch.setattr(ours, "add_fused_lm_head", add_dense_head)
    expected, expected_completions = run(name, fused, folder, peft=ON_HEAD, **changes)
    assert completions == expected_completions
    assert_equal_runs(found, expected, changes.get("beta", 0.1))


def test_lora_on_the_head_equals_the_merged_weight() -> None:
    ids, attention_mask, labels = batch()
    mask = labels[:, 1:] != -100
    base = build("llama").double()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).eval()
    head = base.lm_head
    a, b = head.lora_A["default"].weight, head.lora_B["default"].weight
    with torch.no_grad():
        b.normal_(0.0, 0.3)
    ours.add_fused_lm_head(base, temperature=0.7, outputs=("log_probs", "entropy"))
    arguments = {"input_ids": ids, "attention_mask": attention_mask}
    out = model(**arguments, labels=labels, fused_lm_head=True)
    found = torch.autograd.grad((out.log_probs.exp() - out.entropy).sum(), [a, b])

    hidden = base.model(**arguments).last_hidden_state[:, :-1]
    merged = head.base_layer.weight + 2.0 * b @ a
    truth = dense(hidden, merged, labels[:, 1:].clamp(min=0), temperature=0.7)
    torch.testing.assert_close(out.log_probs, truth["logprobs"].masked_fill(~mask, 0.0), rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(((truth["logprobs"].exp() - truth["entropy"]) * mask).sum(), [a, b])
    for x, y in zip(found, expected):
        assert relative(x, y) <= 1e-9
    with torch.no_grad(), model.disable_adapter():  # the reference policy
        off = model(**arguments, labels=labels, fused_lm_head=True).log_probs
    plain = dense(hidden, head.base_layer.weight, labels[:, 1:].clamp(min=0), temperature=0.7)["logprobs"]
    torch.testing.assert_close(off, plain.masked_fill(~mask, 0.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (peft.LoraConfig(**ON_HEAD, use_dora=True), {}, "plain LoRA"),
        (peft.LoraConfig(**ON_HEAD, lora_bias=True), {}, "plain LoRA"),
        (peft.LoHaConfig(target_modules=["lm_head"]), {}, "plain LoRA"),
        (peft.LoraConfig(**ON_HEAD, lora_dropout=0.1), {}, "lora_dropout must be 0"),
        (peft.LoraConfig(**ON_HEAD), {"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32 must be False"),
    ],
)
def test_adapters_that_cannot_be_computed_are_refused(
    config: Any, changes: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make("GRPO", ours.FusedGRPOTrainer, folder, peft_config=config, **changes)


# ----------------------------------------------------------------------------------------------------- nothing leaks


def seams() -> dict[Any, Any]:
    modules = {cls.__module__: sys.modules[cls.__module__] for base, _, _ in TRAINERS.values() for cls in base.__mro__}
    names = ("add_fused_lm_head", "BaseTunerLayer", "_ChunkedLogProbFunction")
    found = {(module, name): vars(m)[name] for module, m in modules.items() for name in names if name in vars(m)}
    return {**found, "kernel": trl_utils._ChunkedLogProbFunction, "head": trl_utils.add_fused_lm_head}


@pytest.mark.parametrize("name", TRAINERS)
def test_only_the_construction_sees_our_head(name: str, folder: Path) -> None:
    before = seams()
    assert sum(key[1] == "add_fused_lm_head" for key in before) >= 5
    make(name, TRAINERS[name][1], folder)
    assert seams() == before
    with pytest.raises(TypeError):
        TRAINERS[name][1](no_such_argument=1)
    assert seams() == before


def test_other_threads_keep_the_stock_head(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = sys.modules["trl.trainer.dpo_trainer"]
    given: list[str] = []
    stock = trl_utils.add_fused_lm_head
    monkeypatch.setattr(trl_utils, "add_fused_lm_head", lambda model: given.append("stock"))
    monkeypatch.setattr(ours, "add_fused_lm_head", lambda model: given.append("ours"))
    adapter = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["lm_head"])).get_output_embeddings()

    def construct() -> None:
        module.add_fused_lm_head(None)
        given.append(f"adapter {isinstance(adapter, module.BaseTunerLayer)}")

    with ours._our_head([module]) as models:
        construct()
        thread = threading.Thread(target=construct)
        thread.start()
        thread.join()
        assert models == [None]
    assert given == ["ours", "adapter False", "stock", "adapter True"]
    assert module.add_fused_lm_head is stock


def test_subclasses_and_bases(folder: Path, calls: Calls) -> None:
    class Mine(trl.DPOTrainer):
        def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super()._compute_loss(*args, **kwargs)

    class FusedMine(ours.FusedHeadMixin, Mine):
        pass

    class FurtherDerived(FusedMine):
        pass

    single, _ = run("DPO", trl.DPOTrainer, folder, max_steps=1)
    calls.take()
    for cls in (FusedMine, FurtherDerived):
        double, _ = run("DPO", cls, folder, max_steps=1)
        theirs, rows_ = calls.take()
        assert (theirs, len(rows_)) == (0, 2)
        assert double[0]["loss"] == pytest.approx(2 * single[0]["loss"])

    with pytest.raises(TypeError, match=r"must come before \['Mine', 'DPOTrainer'.* in the bases of Wrong"):

        class Wrong(Mine, ours.FusedHeadMixin):
            pass

    class NoFusedHead(ours.FusedHeadMixin, CPOTrainer):
        pass

    with pytest.raises(TypeError, match="no base of NoFusedHead is a TRL trainer with a fused LM head"):
        NoFusedHead()


def test_patching_is_idempotent_and_taken_back() -> None:
    stock = trl_utils._ChunkedLogProbFunction
    ours.unpatch_trl()
    assert trl_utils._ChunkedLogProbFunction is stock
    try:
        ours.patch_trl()
        ours.patch_trl()
        assert trl_utils._ChunkedLogProbFunction is ours.FusedLogProbs
        with ours.patched_trl():
            pass
        assert trl_utils._ChunkedLogProbFunction is ours.FusedLogProbs
    finally:
        ours.unpatch_trl()
    assert trl_utils._ChunkedLogProbFunction is stock
    ours.unpatch_trl()
    with contextlib.suppress(KeyError), ours.patched_trl():
        assert trl_utils._ChunkedLogProbFunction is ours.FusedLogProbs
        raise KeyError
    assert trl_utils._ChunkedLogProbFunction is stock


# ------------------------------------------------------------------------------------------------------ which TRL is taken


def altered_kernel(change: str) -> Any:
    stock = trl_utils._ChunkedLogProbFunction
    if change == "absent":
        return None
    if change == "arguments":
        other = staticmethod(lambda ctx, hidden, weight, targets: None)
        return type("Kernel", (), {"apply": stock.apply, "forward": other})

    def apply(*arguments: Any) -> Any:
        results = list(stock.apply(*arguments))
        if change == "order":
            results[2:4] = results[3:1:-1]
        if change == "meaning":
            results[0] = -results[0]
        return results[:4] if change == "number" else results

    return type("Kernel", (), {"apply": staticmethod(apply), "forward": stock.forward})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("absent", "does not exist"),
        ("arguments", r"forward takes \('ctx', 'hidden', 'weight', 'targets'\), expected"),
        ("order", "another log_sum_sq_probs than ours"),
        ("meaning", "another log_probs than ours"),
        ("number", "returns 4 results"),
    ],
)
def test_another_kernel_is_refused(change: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = altered_kernel(change)
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", kernel)
    with pytest.raises(ours.UnsupportedTRLError, match=rf"TRL {trl.__version__} is not supported.*{message}"):
        ours.patch_trl()
    assert trl_utils._ChunkedLogProbFunction is kernel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("absent", "does not exist"),
        ("arguments", r"add_fused_lm_head takes \('model', 'temperature', 'softcap'\), expected"),
        ("temperature", "another loss than ours"),
        ("results", "FusedCausalLMOutput has the fields"),
        ("not called", "the constructor of FusedDPOTrainer did not call add_fused_lm_head"),
    ],
)
def test_another_head_is_refused(change: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, module = trl_utils.add_fused_lm_head, sys.modules["trl.trainer.dpo_trainer"]
    heads: dict[str, Any] = {
        "absent": None,
        "arguments": lambda model, temperature, softcap: None,
        "temperature": functools.wraps(stock)(
            lambda model, temperature, **kwargs: stock(model, 1 / temperature, **kwargs)
        ),
    }
    if change in heads:
        for place in (trl_utils, module):
            monkeypatch.setattr(place, "add_fused_lm_head", heads[change])
    elif change == "results":
        output = dataclasses.make_dataclass("FusedCausalLMOutput", ["loss", "logps"])
        monkeypatch.setattr(trl_utils, "FusedCausalLMOutput", output)
    else:
        monkeypatch.setattr(trl.DPOTrainer, "__init__", lambda self, **_: None)
    with pytest.raises(ours.UnsupportedTRLError, match=rf"TRL {trl.__version__} is not supported.*{message}"):
        make("DPO", ours.FusedDPOTrainer, folder)


def test_the_self_test_is_not_disturbed_and_disturbs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RLHF_BACKEND", "triton")  # which cannot run on the CPU
    ours._check_kernel.cache_clear()
    ours._check_head.cache_clear()
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"), ours.patched_trl():
        ours._check_head(trl_utils.add_fused_lm_head, trl_utils.FusedCausalLMOutput)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_older_trl_is_refused() -> None:
    for version in ("1.15.0", "1.16.0", "1.20.0.dev0", "2.0.0"):
        ours._check_version(version)
    for version in ("0.29.1", "1.14.0"):
        with pytest.raises(ImportError, match=rf"needs TRL 1.15 or later.*TRL {version} is installed: pip install"):
            ours._check_version(version)


@pytest.mark.slow
def test_without_trl_the_error_says_what_to_install() -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name == "trl":
            raise ModuleNotFoundError("No module named 'trl'", name="trl")
sys.meta_path.insert(0, Absent())
import fused_rlhf.integrations.trl
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode != 0
    assert 'needs TRL 1.15 or later: pip install "trl>=1.15"' in found.stderr


# --------------------------------------------------------------------------------------------------------------- a script


@pytest.mark.slow
@needs_gsm8k
def test_a_script_on_gsm8k(tmp_path: Path) -> None:
    """What a user has today, with one import changed."""
    script = """
import sys
from datasets import load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig

from fused_rlhf.integrations.trl import FusedGRPOTrainer as GRPOTrainer

data, folder = sys.argv[1:]
problems = load_dataset("json", data_files=data, split="train[:64]").rename_column("question", "prompt")

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
tokenizer.train_from_iterator(problems["prompt"], trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<eos>"]))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
config = Qwen2Config(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None)
Qwen2ForCausalLM(config).save_pretrained(folder + "/model")

def digits(completions, answer, **kwargs):
    return [sum(c.isdigit() for c in text) + float(right.split("####")[-1].strip() in text)
            for text, right in zip(completions, answer)]

arguments = GRPOConfig(folder + "/run", num_generations=4, per_device_train_batch_size=8, max_completion_length=8,
                       max_steps=3, logging_steps=1, learning_rate=1e-3, beta=0.04, num_iterations=2, save_strategy="no",
                       use_cpu=True, bf16=False, report_to=[])
trainer = GRPOTrainer(folder + "/model", digits, args=arguments, train_dataset=problems, processing_class=tokenizer)
trainer.train()
trainer.save_model(folder + "/trained")
model = AutoModelForCausalLM.from_pretrained(folder + "/trained")
print("steps", trainer.state.global_step, "loss", [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    log = tmp_path / "log"
    process = forks.start([str(path), str(GSM8K / "train.jsonl"), str(tmp_path)], tmp_path, environment, log)
    assert process.wait() == 0, log.read_text()[-3000:]
    last = log.read_text().partition("steps 3 loss [")[2].partition("]")[0]
    assert last
    assert "nan" not in last
