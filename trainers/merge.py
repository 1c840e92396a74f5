"""LoRA adapters, as a run writes them, merged into their base: a folder that `from_pretrained` loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fused_rlhf.trainers import adapters
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.sources import locate


def places(source: str, output: str) -> tuple[Path, Path]:
    """The folder of adapters in a run's folder, or the one given, and the folder to write.

    Raises FileNotFoundError where there are no adapters, ValueError where something would be written over.
    """
    run, target = Path(source).expanduser(), Path(output).expanduser()
    if not run.is_dir():
        raise FileNotFoundError(f"RUN: there is no folder {source!r}")
    found = [folder for folder in (run, run / "model") if adapters.held_in(folder)]
    if not found:
        whole = next((folder for folder in (run, run / "model") if (folder / "config.json").is_file()), None)
        words = f"{str(whole)!r} is a whole model already" if whole else f"no {adapters.FILE} in it or in its model/"
        raise FileNotFoundError(f"RUN: expected a folder with adapters, got {source!r}: {words}")
    free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    require(free, "--output", output, "a folder that is new or empty")
    return found[0], target


def merge(source: Path, output: Path, dtype: str | None = None) -> str:
    """Write the merged model with its tokenizer or processor; -> what was done. The sum is taken in fp32.

    Raises ValueError where the base cannot be loaded.
    """
    model, tokenizer = models.merged(source, torch.float32)
    model = model.to(getattr(torch, dtype) if dtype else base_dtype(source))  # type: ignore[arg-type]
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{source} merged into its base: {count:,} parameters ({model.dtype}) in {output}"


def base_dtype(folder: Path) -> torch.dtype:
    base = json.loads((folder / adapters.FILE).read_text())["base_model_name_or_path"]
    return locate("RUN", base).config.dtype or torch.float32
