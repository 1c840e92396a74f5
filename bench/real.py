"""Hidden states and the head of a real model, over GSM8K's test questions and their answers.

Each question with its answer is a sequence by itself, in the model's chat template where it has one; its rows are those
of every token but the first, one sequence after the other. What is measured on them does not depend on how well drawn
inputs imitate a model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fused_rlhf as fr
from fused_rlhf.bench.cases import Case
from fused_rlhf.trainers import conversation, sources
from fused_rlhf.trainers.data import read_jsonl


class Rows(NamedTuple):
    hidden: Tensor  # (N, H), of the model's dtype
    weight: Tensor  # (V, H), of the model's head
    targets: Tensor  # (N,) int64


def text_file(folder: str | Path) -> Path:
    """Raises ValueError where none was given, FileNotFoundError where it has no such file."""
    if not str(folder):
        raise ValueError("data: the inputs of a real model need --data DIR, a folder with GSM8K's test.jsonl; got none")
    file = Path(folder) / "test.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"data: expected a folder with GSM8K's test.jsonl, and {str(file)!r} is no file")
    return file


def prepared(case: Case) -> Case:
    """The case with H and V of its model. Raises ValueError, FileNotFoundError for a model or a text that is not there."""
    text_file(case.data)
    config = sources.locate("inputs", case.inputs).config.get_text_config()
    return replace(case, H=config.hidden_size, V=config.vocab_size)


def texts(tokenizer: Any, file: Path) -> list[str]:
    """Questions and answers as the model is used to them."""
    rows = read_jsonl(file, ("question", "answer"))
    if not tokenizer.chat_template:
        return [f"{row['question']}\n{row['answer']}\n" for row in rows]
    return [conversation.render(tokenizer, row["question"], row["answer"]) for row in rows]


@torch.no_grad()
def rows(name: str, folder: str | Path, count: int, dtype: torch.dtype, device: str = "cpu") -> Rows:
    """The first `count` rows of a model, a folder or a name that `--model` takes, computed in `dtype`.

    Raises ValueError for a head that is more than its weight, and for a text that has fewer rows.
    """
    source = sources.locate("inputs", name)
    model, _ = source.model(AutoModelForCausalLM, dtype)
    model.eval().to(device)
    tokenizer = source.tokenizer("inputs")
    head = fr.lm_head.find_head(model)
    if head.kwargs() != fr.Head(head.weight).kwargs():
        raise ValueError(f"inputs: expected a model whose logits are hidden @ W.T; those of {name!r} are transformed")
    hidden, targets, found = [], [], 0
    for text in texts(tokenizer, text_file(folder)):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=device)
        hidden.append(fr.lm_head.hidden_states(model, ids)[0, :-1])
        targets.append(ids[0, 1:])
        found += len(targets[-1])
        if found >= count:
            return Rows(torch.cat(hidden)[:count], head.weight.detach().clone(), torch.cat(targets)[:count])
    raise ValueError(f"data: expected a text of at least {count} tokens, got {found}")
