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

from fused_rlhf.lm_head import HeadInputs
from fused_rlhf.trainers.adapters import base_of
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.engine import Placed
from fused_rlhf.trainers.forwards import Batch
from fused_rlhf.trainers.model import Loaded, prepare_body, require_embeddings
from fused_rlhf.trainers.ppo_config import Config
from fused_rlhf.trainers.rollout import Completions, logprobs_of
from fused_rlhf.trainers.sources import locate

BIAS = "score.bias"


def scalars(head: nn.Module, hidden: Tensor) -> Tensor:
    """(..., H) -> (...), in fp32 at least: a value in bf16 would have three digits."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not isinstance(head, nn.Linear):
        return head(hidden).squeeze(-1).to(wide)
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
    """The body of a model and a head with one output: (..., H) -> (..., 1).

    The body is what the model's `base_model_prefix` names, as in transformers; where it names nothing, the model itself.

    Raises ValueError where a linear head has more outputs.
    """

    def __init__(self, model: nn.Module, score: nn.Module) -> None:
        super().__init__()
        outputs = score.out_features if isinstance(score, nn.Linear) else 1
        require(outputs == 1, "score", score, "a head with one output, the number")
        self.body: Any = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
        self.score: Any = score

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, **model_inputs: Any) -> Tensor:
        """(B, T) ids and mask -> (B, T) fp32: the number at each token."""
        output = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **model_inputs)
        return scalars(self.score, output.last_hidden_state)


class PolicyAndValue(nn.Module):
    """What PPO trains: a policy and its values, from a head on the policy's own body or from a model beside it."""

    def __init__(self, policy: PreTrainedModel, value: nn.Linear | ScalarModel) -> None:
        super().__init__()
        self.policy = policy
        self.value = value

    def forward(self, batch: Batch) -> tuple[HeadInputs, Tensor]:
        """-> what the policy's LM head works on, (N, H), and the values, (N,), before each of the completions' tokens."""
        inputs = batch.head_inputs(self.policy)
        if isinstance(self.value, ScalarModel):
            return inputs, batch.states(self.value)
        return inputs, scalars(self.value, inputs.hidden)


def logprobs_and_values(module: PolicyAndValue, some: Completions, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T - 1) fp32 each, 0 elsewhere: log-probs of the completions' tokens over what their sampler kept, the values before
    them, and where a KL to the reference is wanted the log-probs of the whole distribution, else the former again."""
    batch, cut = some.batch(), some.cut(config.truncation)
    inputs, values = module(batch)
    both = {"outputs": ("full_logprobs",)} if cut and config.kl_coef else {}
    found = logprobs_of(inputs, batch.targets, config.temperature, config.backend, **both, **cut)
    full = found.logprobs if found.full_logprobs is None else found.full_logprobs
    return batch.spread(found.logprobs), batch.spread(values), batch.spread(full)


def value_of(
    config: Config, loaded: Loaded, given: PreTrainedModel | ScalarModel | None = None
) -> nn.Linear | ScalarModel:
    """The value head or model that `config.value_model` asks for, or the one given as an object.

    "shared": a head on the policy's body. "copy": a model that begins as the policy's body, its adapters included.
    Otherwise a folder or hub id; a head is put on where a model has none.

    Raises FileNotFoundError where there is no such model, ValueError where its head has several outputs, it lacks tokens
    of the policy, or cannot be called.
    """
    base, asked = base_of(loaded.model), config.value_model
    require(given is None or asked == Config.value_model, "value_model", asked, "none beside one given as an object")
    if isinstance(given, ScalarModel):
        probe("value_model", given, loaded.tokenizer)
        return given
    if given is None and asked == "shared":
        return new_head(base)
    if given is None and asked == "copy":
        return ScalarModel(copy.deepcopy(base.base_model), new_head(base))
    if given is None:
        model, head = load("value_model", asked, getattr(torch, config.dtype))
    else:
        require(base_of(given) is not base, "value_model", type(given).__name__, "another model than the policy")
        model, head = given, getattr(given, "score", None)
    require_embeddings("value_model", model, base, exactly=False)
    prepare_body(config, model)
    made = ScalarModel(model, head or new_head(model))
    probe("value_model", made, loaded.tokenizer)
    return made


def reward_of(config: Config, source: str | nn.Module, loaded: Loaded) -> ScalarModel:
    """A reward model that reads the policy's own tokens.

    `source`: a folder or hub id, a sequence classifier of transformers or a module like one (its body under the name
    `base_model_prefix`, its head `score`), or any body with its head put on.

    Raises FileNotFoundError where there is no such model, ValueError where it has no trained head with one output, has
    another vocabulary than the policy, or cannot be called.
    """
    head: Any
    if isinstance(source, ScalarModel):
        made = source
    elif isinstance(source, str):
        model, head = load("reward_model", source, getattr(torch, config.dtype))
        require(head is not None, "reward_model", source, "a model with a trained head called `score`")
        its = locate("reward_model", source).tokenizer("reward_model").get_vocab()
        words = "the policy's own vocabulary (a model of another reads texts: rewards: model=FOLDER_OR_ID)"
        require(its == loaded.tokenizer.get_vocab(), "reward_model", source, words)
        made = ScalarModel(model, head)
    else:
        head = getattr(source, "score", None)
        named = isinstance(source, nn.Module) and isinstance(head, nn.Module)
        words = "a model with a head called `score`, or a ScalarModel"
        require(named, "reward_model", type(source).__name__, words)
        made = ScalarModel(source, head)
    probe("reward_model", made, loaded.tokenizer)
    return made


@torch.no_grad()
def probe(argument: str, model: ScalarModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError unless a model makes one number of each of two tokens."""
    device = next(model.parameters()).device
    ids = torch.full((1, 2), int(tokenizer.eos_token_id), device=device)
    words = "a model of input_ids and attention_mask whose head makes one number of each hidden state"
    try:
        shape = tuple(model(ids, torch.ones_like(ids)).shape)
    except Exception as error:  # a module of the user's may raise anything
        raise ValueError(f"{argument}: expected {words}; it raised {type(error).__name__}: {error}") from error
    require(shape == (1, 2), argument, f"numbers of shape {shape} for ids of shape (1, 2)", words)


def load(argument: str, source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """The model of a folder or hub id, and its head, None where that is not of a trained `score`."""
    found = locate(argument, source)
    found.config.num_labels = 1
    try:
        model, info = found.model(AutoModelForSequenceClassification, dtype)
    except RuntimeError as error:  # the word of transformers for a head of another size
        raise ValueError(f"{argument}: expected a head with one output; that of {source!r} has another size") from error
    fresh = any(name.startswith("score.") for name in info["missing_keys"])
    head = None if fresh else getattr(model, "score", None)
    if found.local and isinstance(head, nn.Linear) and BIAS in info["unexpected_keys"]:
        head.bias = nn.Parameter(bias_in(Path(found.path)).to(head.weight))
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
    require(isinstance(body, PreTrainedModel), "value_model", type(body).__name__, "a model of transformers")
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
    numbers = completions.rows().through(model)
    last = completions.attention_mask.sum(dim=1, keepdim=True) - 1
    return numbers.gather(1, last).squeeze(1)
