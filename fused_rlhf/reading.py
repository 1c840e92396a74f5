"""How a transformers model reads its tokens: forwards only or both ways, and where it counts positions from.

Nothing in a config or a signature tells either for certain, so that five rows of a few tokens are put through the model,
once for each model: a row padded on the right (the reference), the same with another last token, with another first one,
and the same padded on the left, with the model's padding token and with any other. What a causal model makes of the
tokens before the last must not depend on it, nor on where the padding is.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

_TOKENS = 6  # that are read in a row; as many are padding
_LENGTH = 2 * _TOKENS
# Relative differences that are rounding, as (least, in eps). Rows that end differently begin with the same products,
# but for experts, whose rows are grouped anew; padding on the left turns rotary positions and moves what is summed,
# alike whatever the padding is.
_SAME_END, _SAME_SIDE = (1e-5, 1.0), (1e-3, 8.0)


class Run(Protocol):
    """The input of the head, (B, T, H), and the coarsest dtype that was computed in, of a forward over these inputs."""

    def __call__(self, **model_inputs: Tensor) -> tuple[Tensor, torch.dtype]: ...


@dataclass(frozen=True)
class Reading:
    """How one model reads.

    causal is None where that cannot be told: the trial forward failed, or what is made of a token depends on no other, as
    in a model without its kernels. left_padding: "own" where the model's positions are right under it,
    "position_ids" where they are once it is given them, "wrong" where it has another memory of what is masked, and
    "unknown" where the trial failed; `why` then has the error.
    """

    causal: bool | None
    left_padding: Literal["own", "position_ids", "wrong", "unknown"]
    why: str = ""


_readings: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Reading]] = weakref.WeakKeyDictionary()
_of_alike: dict[Hashable, Reading] = {}  # of models of one class and config, such as a policy and its reference
_NO_STRUCTURE = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}


def is_encoder_decoder(base: Any) -> bool:
    """Whether the tokens that a model predicts are those of its decoder, and not its input_ids."""
    config = base.config
    return any(getattr(it, "is_encoder_decoder", False) for it in (config, config.get_text_config(decoder=True)))


def reading_of(base: Any, run: Run, state: Hashable = ()) -> Reading:
    """How `base` reads. Tried at the first call for a model of this class, config and `state`, and remembered.

    All ranks of a sharded model come here alike: whether it is tried depends on no data.
    """
    text = base.config.get_text_config(decoder=True)
    flags = tuple(getattr(text, name, None) for name in ("is_decoder", "is_causal", "_attn_implementation"))
    known = _readings.setdefault(base, {})
    key = (flags, state)
    if key in known:
        return known[key]
    config = {name: value for name, value in base.config.to_dict().items() if name not in _NO_STRUCTURE}
    alike = (type(base), json.dumps(config, sort_keys=True, default=str), key)
    if alike in _of_alike and "forward" not in vars(base):
        known[key] = _of_alike[alike]
    else:
        gpus = {p.device.index for p in base.parameters() if p.is_cuda}
        with torch.random.fork_rng(gpus), torch.no_grad(), _without_dropout(base):
            known[key] = _try(base, run)
        if known[key].causal is not None and known[key].left_padding != "unknown":
            _of_alike[alike] = known[key]
    return known[key]


def is_masked_lm(base: nn.Module) -> bool:
    """Whether transformers has the model's class for masked LMs, and for no causal LM or encoder-decoder."""
    from transformers.models.auto import modeling_auto as auto

    others = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    name = type(base).__name__
    return name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and not any(name in it.values() for it in others)


def positions(attention_mask: Tensor) -> Tensor:
    """(B, T) int64: positions counted from the first token of a row that is no padding; those before it have 0."""
    at = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    first = attention_mask.bool().int().argmax(1, keepdim=True)
    return (at - first).clamp(min=0)


def is_left_padded(attention_mask: Tensor) -> bool:
    """Whether a row has padding before its first token; a row of padding alone has none."""
    real = attention_mask.bool()
    return bool((real.any(1) & ~real[:, 0]).any())


def _try(base: Any, run: Run) -> Reading:
    try:
        rows, mask = _rows(base)
        prefix = "decoder_" if is_encoder_decoder(base) else ""
        source = {"input_ids": rows[:1, :_TOKENS].expand(len(rows), -1).contiguous()} if prefix else {}

        def real(**more: Tensor) -> tuple[Tensor, float]:
            """(5, tokens, H), what was made of the tokens that are read, and the rounding of one value."""
            made, dtype = run(**source, **more)
            if made.dim() != 3 or len(made) != len(rows) or made.shape[1] < _LENGTH:
                raise ValueError(f"the head's input is {tuple(made.shape)} for ids {tuple(rows.shape)}")
            made = made[:, -_LENGTH:].double()
            halves = [made[:3, :_TOKENS], made[3:, _TOKENS:]]
            return torch.cat(halves), torch.finfo(dtype).eps

        def is_causal(made: Tensor, eps: float) -> bool | None:
            if not _differs(made[2, 1:], made[0, 1:], _SAME_END, eps):
                return None
            return not _differs(made[1, :-1], made[0, :-1], _SAME_END, eps)

        ids = {f"{prefix}input_ids": rows}
        try:
            own, eps = real(**ids, **{f"{prefix}attention_mask": mask})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            own, eps = real(**ids)  # tells what a row's end does to its beginning, all the same
            return Reading(is_causal(own, eps), "unknown", str(error))
        causal = is_causal(own, eps)
        if not _misread(own, own, eps):
            return Reading(causal, "own")
        if prefix:
            return Reading(causal, "wrong")
        try:
            told, eps = real(**ids, attention_mask=mask, position_ids=positions(mask))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return Reading(causal, "wrong", str(error))
        return Reading(causal, "wrong" if _misread(told, own, eps) else "position_ids")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Reading(None, "unknown", str(error))


def _misread(made: Tensor, own: Tensor, eps: float) -> bool:
    """Whether a row of `made` is not the reference, the first of `own`, or tells which tokens it was padded with."""
    return _differs(made[4], made[3], _SAME_END, eps) or any(
        _differs(made[row], own[0], _SAME_SIDE, eps) for row in (0, 3, 4)
    )


def _differs(a: Tensor, b: Tensor, same: tuple[float, float], eps: float) -> bool:
    """Whether more than one token's (H,) is another: a rounding may send one of them to another expert."""
    apart = (a - b).abs().sum(-1) / b.abs().sum(-1)
    return int((apart > same[0] + same[1] * eps).sum()) > 1


def _rows(base: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask, (5, T) each, of tokens that mean no image, sound, padding or end."""
    embedding = base.get_input_embeddings()
    special = set(_special_ids(base.config.to_dict()))
    vocabulary = getattr(embedding, "num_embeddings", len(embedding.weight))  # a sharded weight has no rows
    plain = [i for i in range(vocabulary // 4, vocabulary) if i not in special][: _TOKENS + 3]
    if len(plain) < _TOKENS + 3:
        raise ValueError(f"a vocabulary of {vocabulary} has too few tokens without a meaning of their own")
    *tokens, other, filler, no_pad = plain
    pad = getattr(base.config.get_text_config(decoder=True), "pad_token_id", None)
    pad = pad if isinstance(pad, int) and 0 <= pad < vocabulary else no_pad
    right, left = [1] * _TOKENS + [0] * _TOKENS, [0] * _TOKENS + [1] * _TOKENS
    rows = [
        [*tokens, *[pad] * _TOKENS],
        [*tokens[:-1], other, *[pad] * _TOKENS],
        [other, *tokens[1:], *[pad] * _TOKENS],
        [*[pad] * _TOKENS, *tokens],
        [*[filler] * _TOKENS, *tokens],
    ]
    device = embedding.weight.device
    return torch.tensor(rows, device=device), torch.tensor([right, right, right, left, left], device=device)


def _special_ids(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("_id", "_ids", "_index")):
            yield from (it for it in (value if isinstance(value, list) else [value]) if isinstance(it, int))


@contextlib.contextmanager
def _without_dropout(base: nn.Module) -> Iterator[None]:
    training: list[nn.Module] = [module for module in base.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
