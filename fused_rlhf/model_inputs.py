"""What a model's forward is given, checked before it runs: masks that fit the ids, and names that something in it reads.

transformers' models take any keyword and hand it down to their attention, so that a mistyped one is lost without a word. A
name that nothing in the model has as a parameter may still be meant for an attention of one's own; refused are those that
differ from a parameter by a letter or two.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ALIKE = 0.93  # of the letters of two names, in difflib's measure: one of 13 too many, or one of 15 another


def check(chain: Iterable[nn.Module], inputs: Mapping[str, Any]) -> None:
    """Of a model, from its outermost wrapper in, and the keywords for it.

    Raises ValueError naming an `attention_mask` of another shape than the ids, or a name that is nearly one of the model's.
    """
    for prefix in ("", "decoder_"):
        _check_mask(prefix, inputs)
    own = {name for module in chain for name in _parameters(module)}
    strange = [name for name in inputs if name not in own]
    if strange:
        _check_names(strange, own | {name for module in chain for m in module.modules() for name in _parameters(m)})


def _check_mask(prefix: str, inputs: Mapping[str, Any]) -> None:
    ids = inputs.get(f"{prefix}input_ids", inputs.get(f"{prefix}inputs_embeds"))
    mask, cached = inputs.get(f"{prefix}attention_mask"), inputs.get("past_key_values") is not None
    if not isinstance(ids, Tensor) or ids.dim() < 2:
        return
    B, T = ids.shape[:2]
    named = mask.items() if isinstance(mask, Mapping) else [(None, mask)]
    for kind, one in named:
        if isinstance(one, Tensor) and not _fits(one, B, T, cached):
            name = f"{prefix}attention_mask" + ("" if kind is None else f"[{kind!r}]")
            raise ValueError(
                f"{name} must be (B, T) or ({B} or 1, heads or 1, T, T) for {prefix}input_ids of {(B, T)}, got "
                f"{tuple(one.shape)} {one.dtype}"
            )


def _fits(mask: Tensor, B: int, T: int, cached: bool) -> bool:
    """With a cache, keys may be more than T. What a 4-D mask of integers says is a matter of the attention that reads it."""
    if mask.dim() == 2:
        return mask.shape[0] == B and (mask.shape[1] == T or (cached and mask.shape[1] > T))
    if mask.dim() not in (3, 4) or mask.shape[0] not in (1, B):
        return False
    whole_numbers = not mask.is_floating_point() and mask.dtype != torch.bool
    if mask.dim() == 4 and whole_numbers:
        return True
    return mask.shape[-2] == T and (mask.shape[-1] == T or (cached and mask.shape[-1] > T))


def _check_names(strange: Iterable[str], known: set[str]) -> None:
    plain = {_letters(name): name for name in sorted(known | set(_of_transformers()))}
    for name in strange:
        if name in plain.values():
            continue
        if meant := difflib.get_close_matches(_letters(name), plain, 1, ALIKE):
            raise ValueError(
                f"{name} is no input of the model, which would ignore it (did you mean {plain[meant[0]]!r}?)"
            )


def _letters(name: str) -> str:
    """Without what is easily forgotten: underscores and plurals."""
    return "".join(word.removesuffix("s") for word in name.lower().split("_"))


def _parameters(module: nn.Module) -> list[str]:
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # a builtin's
        return []
    return [p.name for p in parameters if p.kind in named]


def _of_transformers() -> Iterable[str]:
    """What its models hand on to their attention, and what their decorators read."""
    from transformers.utils import TransformersKwargs

    return (*TransformersKwargs.__annotations__, "return_dict")
