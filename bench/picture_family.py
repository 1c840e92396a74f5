"""A tiny family that reads images, and what it makes of a chat by itself: the truth of bench/pictures.md.

Tokens are those of the family's own `processor.apply_chat_template`; log-probs are the fp64 log-softmax of the logits that
the model's own forward gives of each row alone, what belongs to a completion's tokens written out by name.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.bench.picture_rows import Chat, placed
from fused_rlhf.trainers import collation
from fused_rlhf.trainers import model as models


def apart(got: Any, want: Any) -> float:
    """The largest difference, relative to the largest number."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (got, want))
    return float((a - b).abs().max() / b.abs().max())


class Family:
    """A model with its processor, and what they make of a chat and a completion by themselves."""

    def __init__(self, name: str) -> None:
        from tests.vision_families import FAMILIES

        self.name = name
        self.model, self.processor = FAMILIES[name]()
        self.tokenizer: Any = self.processor.tokenizer  # type: ignore[attr-defined]
        models.complete_tokenizer(self.tokenizer, name)
        self.collator = collation.learned(self.model, self.tokenizer, self.processor, True)
        self.loaded = models.Loaded(self.model, self.tokenizer, self.processor, self.collator)
        self.held = tempfile.TemporaryDirectory()  # until the family is not needed
        self.folder = Path(self.held.name)

    def given(self) -> dict[str, Any]:
        """What a trainer is given: the model in a copy of its own."""
        return {"model": copy.deepcopy(self.model), "tokenizer": self.processor}

    def other(self) -> Any:
        """A reference that differs from the model."""
        made = copy.deepcopy(self.model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in made.parameters():
                p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
        return made

    def own(self, chat: Chat) -> tuple[list[int], dict[str, Tensor]]:
        """Ids and all else that the processor makes of a prompt."""
        how: dict[str, Any] = {"add_generation_prompt": True}
        if self.name == "paligemma" and not placed(chat)[1]:  # of which its processor makes nothing
            ids = self.tokenizer(self.processor.apply_chat_template(chat, **how))["input_ids"]
            return ids, {"token_type_ids": torch.zeros(1, len(ids), dtype=torch.int64)}
        how |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        made: dict[str, Any] = dict(self.processor.apply_chat_template(chat, **how))  # type: ignore[arg-type]
        ids = made.pop("input_ids")[0].tolist()
        return ids, {name: x for name, x in made.items() if name not in ("attention_mask", "labels")}

    def inputs(self, chat: Chat, completion: Sequence[int], cut: int | None = None) -> dict[str, Tensor]:
        """Of a whole row; `cut`: tokens of the prompt that stay."""
        ids, extras = self.own(chat)
        P, n = len(ids[:cut]), len(completion)
        if "cross_attention_mask" in extras:  # Mllama's tokens go on looking at what the last one looked at
            x = extras["cross_attention_mask"][:, :P]
            extras["cross_attention_mask"] = torch.cat([x, x[:, -1:].expand(-1, n, -1, -1)], dim=1)
        for name in {"token_type_ids", "mm_token_type_ids"} & set(extras):  # 1 is a picture, or what PaliGemma writes
            text = torch.full((1, n), int(self.name == "paligemma"))
            extras[name] = torch.cat([extras[name][:, :P], text], dim=1)
        whole = torch.tensor([[*ids[:P], *completion]])
        return {"input_ids": whole, "attention_mask": torch.ones_like(whole), **extras}

    def alone(self, model: Any, chat: Chat, completion: Sequence[int], cut: int | None = None) -> tuple[Tensor, Tensor]:
        """(n,) fp64 log-probs of a completion's n tokens, and (T, H) what the head got, of one row alone."""
        caught: list[Tensor] = []
        hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: caught.append(given[0]))
        logits = model(**self.inputs(chat, completion, cut), use_cache=False).logits[0].double()
        hook.remove()
        n = len(completion)
        return logits[-n - 1 : -1].log_softmax(-1)[range(n), list(completion)], caught[0][0]
