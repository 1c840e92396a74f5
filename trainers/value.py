"""Models that give a number instead of a token: the value of a state, the reward of a completion.

    V_t = w . h_t + b        h_t the body's last hidden state at token t
    R   = V at the last token

A sequence classifier of transformers with one label is one already: its head is called `score`. Any other model gets a
head, zero at first, so that values start at 0 and the first updates are as if there were none.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

import fused_rlhf as fr
from fused_rlhf.lm_head import HeadInputs
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.engine import Placed
from fused_rlhf.trainers.model import base_of, locate, prepare_body, tokenizer_of
from fused_rlhf.trainers.ppo_config import Config
from fused_rlhf.trainers.rollout import Completions

BIAS = "score.bias"


def scalars(head: nn.Linear, hidden: Tensor) -> Tensor:
    """(..., H) -> (...), in fp32 at least: a value in bf16 would have three digits."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.to(wide)
        return nn.functional.linear(hidden.to(wide), head.weight.to(wide), bias).squeeze(-1)


def new_head(model: PreTrainedModel) -> nn.Linear:
    """A zero head for the body of a transformers model, of its dtype and on its device."""
    embeddings = model.get_output_embeddings()
    width = model.config.get_text_config().hidden_size if embeddings is None else embeddings.weight.shape[1]
    head = nn.Linear(width, 1, device=model.device, dtype=model.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class ScalarModel(nn.Module):
    """The body of a transformers model and a linear head with one output.

    Raises ValueError where the head is not a linear layer with one output.
    """

    def __init__(self, model: PreTrainedModel, score: nn.Module) -> None:
        super().__init__()
        ours = isinstance(score, nn.Linear) and score.out_features == 1
        require(ours, "score", score, "a linear head with one output, the number")
        self.body = model.base_model
        self.score: Any = score

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **model_inputs: Any) -> Tensor:
        """(B, T) ids and mask -> (B, T) fp32: the number at each token."""
        output = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **model_inputs)
        return scalars(self.score, output.last_hidden_state)


class PolicyAndValue(nn.Module):
    """What PPO trains: a policy and its values, from a head on the policy's own body or from a model beside it."""

    def __init__(self, policy: PreTrainedModel, value: nn.Linear | ScalarModel) -> None:
        super().__init__()
        self.policy = policy
        self.value = value

    def forward(self, completions: Completions) -> tuple[HeadInputs, Tensor]:
        """-> what the policy's LM head works on, (B, T, H), and the values, (B, T - 1): [:, t] before token t + 1."""
        extras = completions.model_inputs()
        inputs = fr.lm_head.forward(self.policy, completions.input_ids, completions.attention_mask, **extras)
        if isinstance(self.value, ScalarModel):
            values = self.value(completions.input_ids, completions.attention_mask, **extras)
        else:
            values = scalars(self.value, inputs.hidden)
        return inputs, values[:, :-1]


def logprobs_and_values(
    module: PolicyAndValue, some: Completions, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    """(B, T - 1) fp32 each: log-probs of the completions' tokens, 0 elsewhere, and the values before all tokens."""
    inputs, values = module(some)
    targets = some.input_ids[:, 1:].masked_fill(~some.completion_mask[:, 1:], -100)
    with inputs.autocast():
        out = fr.linear_logprobs(
            inputs.hidden[:, :-1],
            inputs.head,
            targets,
            temperature=temperature,
            backend=backend,
        )
    return out.logprobs, values


def value_of(config: Config, policy: Any) -> nn.Linear | ScalarModel:
    """The value head or model that `config.value_model` asks for.

    "shared": a head on the policy's body. "copy": a model that begins as the policy's body, its adapters included.
    Otherwise a folder or hub id; a head is put on where it has none.

    Raises FileNotFoundError where there is no such model, ValueError where its head has several outputs.
    """
    base = base_of(policy)
    if config.value_model == "shared":
        return new_head(base)
    if config.value_model == "copy":
        return ScalarModel(copy.deepcopy(base.base_model), new_head(base))
    model, head = load("value_model", config.value_model, getattr(torch, config.dtype))
    both: list[Any] = [model, base]
    rows = [m.get_input_embeddings().num_embeddings for m in both]
    require(rows[0] >= rows[1], "value_model", rows[0], f"a vocabulary of {rows[1]} tokens, as the model has")
    prepare_body(config, model)
    return ScalarModel(model, head or new_head(model))


def reward_of(
    config: Config, source: str | PreTrainedModel | ScalarModel, tokenizer: PreTrainedTokenizerBase
) -> ScalarModel:
    """A reward model that reads the policy's own tokens.

    `source`: a folder or hub id, a sequence classifier of transformers, or any body with its head put on.

    Raises FileNotFoundError where there is no such model, ValueError where it has no trained head with one output, or
    another vocabulary than the policy.
    """
    if isinstance(source, ScalarModel):
        return source
    if isinstance(source, str):
        model, head = load("reward_model", source, getattr(torch, config.dtype))
        require(head is not None, "reward_model", source, "a model with a trained head called `score`")
        its = tokenizer_of("reward_model", *locate("reward_model", source)).get_vocab()
        words = "the policy's own vocabulary (a model of another reads texts: rewards: model=FOLDER_OR_ID)"
        require(its == tokenizer.get_vocab(), "reward_model", source, words)
    else:
        model, head = source, getattr(source, "score", None)
        require(head is not None, "reward_model", type(model).__name__, "a model with a `score`, or a ScalarModel")
    return ScalarModel(model, head)


def load(argument: str, source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """The model of a folder or hub id, and its head, None where that is not of a trained `score`."""
    path, local = locate(argument, source)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, num_labels=1, local_files_only=local, output_loading_info=True
        )
    except RuntimeError as error:  # the word of transformers for a head of another size
        raise ValueError(f"{argument}: expected a head with one output; that of {source!r} has another size") from error
    fresh = any(name.startswith("score.") for name in info["missing_keys"])
    head = None if fresh else getattr(model, "score", None)
    if local and isinstance(head, nn.Linear) and BIAS in info["unexpected_keys"]:
        head.bias = nn.Parameter(bias_in(Path(path)).to(head.weight))
    return model, head


def bias_in(folder: Path) -> Tensor:
    """That of the head of a value model of ours; the classifiers of transformers have none and leave it out."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if BIAS in file.keys():  # noqa: SIM118 - not a dict
                return file.get_tensor(BIAS)
    raise ValueError(f"value_model: the folder {str(folder)!r} has lost the weight {BIAS!r}")


def save(placed: Placed, both: PolicyAndValue, scaling: float, folder: Path) -> None:
    """Write the values as a sequence classifier of transformers with one label; every process must call.

    Adapters, which multiply by `scaling`, are merged. The head's bias, of which such a classifier has none, lies beside as
    `score.bias`: `load` takes it, `from_pretrained` says that it does not.

    Raises ValueError where transformers has no classifier of the kind.
    """
    base = base_of(both.policy)
    body, head = (
        (both.value.body, both.value.score) if isinstance(both.value, ScalarModel) else (base.base_model, both.value)
    )
    made = classifier_of(body)
    weights, score = merged(placed.weights(body), body, scaling), placed.weights(head)
    if placed.rank == 0:
        names = {name for name, _ in made.named_parameters()} | {name for name, _ in made.named_buffers()}
        whole = {f"{made.base_model_prefix}.{name}": value for name, value in weights.items()}
        whole = {name: value for name, value in whole.items() if name in names}
        made.save_pretrained(folder, state_dict=whole | {f"score.{name}": value for name, value in score.items()})


def classifier_of(body: Any) -> Any:
    """A sequence classifier around such a body, without weights. Raises ValueError where transformers has none."""
    config = copy.deepcopy(body.config)
    config.num_labels = 1
    with torch.device("meta"):
        made = AutoModelForSequenceClassification.from_config(config, dtype=body.dtype)
    require(hasattr(made, "score"), "value_model", type(made).__name__, "a classifier whose head is called `score`")
    return made


def merged(weights: dict[str, Tensor], body: nn.Module, scaling: float) -> dict[str, Tensor]:
    """W + scaling B A under the names that W has without adapters."""
    found = {}
    for name, value in weights.items():
        stem, inside, rest = name.partition(".base_layer.")
        if inside and rest == "weight" and f"{stem}.lora_A.default.weight" in weights:
            a, b = (weights[f"{stem}.lora_{side}.default.weight"].float() for side in "AB")
            layer: Any = body.get_submodule(stem)
            delta = scaling * (b @ a)
            value = (value.float() + (delta.T if layer.fan_in_fan_out else delta)).to(value.dtype)
        if ".lora_" not in name:
            found[f"{stem}.{rest}" if inside else name] = value
    return found


@torch.no_grad()
def rewards_of(model: nn.Module, completions: Completions) -> Tensor:
    """(B,) fp32: a ScalarModel's number at the last token of each row."""
    numbers = model(completions.input_ids, completions.attention_mask, **completions.model_inputs())
    last = completions.attention_mask.sum(dim=1, keepdim=True) - 1
    return numbers.gather(1, last).squeeze(1)
