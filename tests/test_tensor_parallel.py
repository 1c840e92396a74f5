"""Heads under a transformers tp_plan, in several processes; what each rank checks is in planned_cases.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import launch

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,  # of which no number of ranks has equal parts
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


def saved(folder: Path, kind: str, tied: bool) -> str:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config)
    path = folder / f"{kind}{tied}"
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_planned_model_is_the_model(processes: int, tmp_path: Path) -> None:
    """With a head of its own, and with one that is tied to the embeddings."""
    folders = [saved(tmp_path, "llama", tied=False), saved(tmp_path, "qwen2", tied=True)]
    launch.together(f"from tests import planned_cases as p; p.main(*{folders!r})", tmp_path, processes)
