"""Models and tokenizers: loading them, and building a small pair from nothing but this file.

The small model is a Qwen3 decoder over a character vocabulary, saved and loaded like any other; the demo and the
recipes start from it, so that they need no download.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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
    tokenizer: PreTrainedTokenizerBase, hidden_size: int = 128, num_layers: int = 4, max_positions: int = 256
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


def build(hidden_size: int, num_layers: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The small model and its character tokenizer."""
    tokenizer = char_tokenizer()
    return small_model(tokenizer, hidden_size, num_layers), tokenizer


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a local folder (nothing is downloaded) or a hub id such as `Qwen/Qwen3-0.6B`.

    Raises FileNotFoundError where `name` is neither a folder with a model nor a hub id that can be loaded.
    """
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model: the folder {str(folder)!r} has no config.json, so it holds no model")
    if not local and (name.count("/") != 1 or name[0] in "/.~" or folder.parent.is_dir()):
        raise FileNotFoundError(f"model: there is no folder {str(folder)!r} (a hub id is written owner/name)")
    source = str(folder) if local else name
    try:
        AutoConfig.from_pretrained(source, local_files_only=local)
    except OSError as error:
        raise FileNotFoundError(f"model: no folder {name!r} here, and the hub gave none: {error}") from error
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=local)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", local_files_only=local)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: the tokenizer of {name!r} has no EOS token, so a completion could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence `model` was made for, or None where its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
