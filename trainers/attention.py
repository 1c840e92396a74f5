"""Attention over rows that hold several sequences, of which some begin alike.

    group       a prompt and the completions that share it, side by side; a sequence by itself is a prompt alone
    a token     sees those before it in its own part, and all of its prompt
    out         = sum_p exp(lse_p - lse) out_p over the pieces p that its keys are split into, lse = logsumexp_p lse_p

The model is told by its attention mask: (1, 1, 3, L) integers, the group, part and position of each token, which
transformers hands to every layer as it is. `adopt` puts the function that reads it in the place of the model's own; without
such a mask the model's own is called. On a CPU every piece is a call of torch's flash attention, and what is kept for the
backward is what one call would keep; on a GPU it is flex_attention over the blocks that are seen. Attention with more than
scale and window (a softcap, sinks, dropout, the model's eager function) goes part by part through the model's own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "by_part_of_"  # and the name of the implementation whose place is taken
NO_WINDOW = sys.maxsize
FUSED = ("sdpa", "flex_attention")  # implementations without features of their own


@dataclass(frozen=True)
class Group:
    """Tokens of a prompt, and of each of the completions that follow it."""

    prompt: int
    completions: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return self.prompt + sum(self.completions)


def table_of(groups: Sequence[Group], device: torch.device | str = "cpu") -> Tensor:
    """(1, 1, 3, L) int64: of each token the group, the part (0 is the prompt), and the position."""
    columns = []
    for number, group in enumerate(groups):
        for part, length in enumerate((group.prompt, *group.completions)):
            begin = group.prompt if part else 0
            position = torch.arange(begin, begin + length)
            columns.append(torch.stack([torch.full_like(position, number), torch.full_like(position, part), position]))
    return torch.cat(columns, dim=1)[None, None].to(device)


def is_table(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == 3 and mask.dtype == torch.int64


def seen(table: Tensor, window: int = NO_WINDOW) -> Tensor:
    """(L, L) bool: whether the token of a row sees that of a column."""
    group, part, position = table[0, 0]
    before = torch.arange(len(group), device=table.device)
    own = (before[:, None] >= before) & (group[:, None] == group)
    own &= (part == 0) | (part[:, None] == part)
    return own & (position[:, None] - position < window)


# -------------------------------------------------------------------------------------------------------------- pieces


@dataclass(frozen=True)
class Piece:
    """Queries and keys that meet."""

    queries: slice
    keys: slice
    causal: bool = False  # queries and keys are the same tokens
    mask: Tensor | None = None  # (queries, keys) bool: which keys are seen, where not all are
    more: bool = False  # these queries have met other keys before

    def rows(self, each: int) -> tuple[Any, Any, Callable[[Tensor], Tensor]]:
        """Where its queries are, and its keys; and what folds `each` heads that share keys into one with as many queries,
        where all queries see all keys: that is faster."""
        at, its = (..., self.queries, slice(None)), (..., self.keys, slice(None))
        if each == 1 or self.causal or self.mask is not None:
            return at, its, lambda x: x
        return at, its, lambda x: x.unflatten(1, (-1, each)).flatten(2, 3)


def pieces(groups: Sequence[Group], window: int = NO_WINDOW) -> list[Piece]:
    """Those of all queries; between them they hold what `seen` says."""
    found: list[Piece] = []
    start = 0
    for group in groups:
        end = start + group.prompt
        found += _own(start, end, window)
        begin = end
        for length in filter(None, group.completions):
            found += _own(begin, begin + length, window)
            begin += length
        if group.prompt + max(group.completions, default=0) <= window:
            found += [Piece(slice(end, begin), slice(start, end), more=True)] * (begin > end)
        else:
            found += _at_prompt(start, end, group.completions, window)
        start = begin
    return found


def _own(start: int, end: int, window: int) -> Iterator[Piece]:
    """A part's tokens among themselves: in one piece where the window holds them, else by bands of its width."""
    if end - start <= window:
        yield Piece(slice(start, end), slice(start, end), causal=True)
        return
    for first in range(start, end, window):
        last, earliest = min(first + window, end), max(first - window + 1, start)
        distance = torch.arange(first, last)[:, None] - torch.arange(earliest, last)
        yield Piece(slice(first, last), slice(earliest, last), mask=(distance >= 0) & (distance < window))


def _at_prompt(start: int, end: int, completions: Sequence[int], window: int) -> Iterator[Piece]:
    """What the completions' first tokens still see of a prompt through a window."""
    begin, earliest = end, max(end - window + 1, start)
    for length in completions:
        count = min(length, window - 1)
        if count:
            distance = torch.arange(end, end + count)[:, None] - torch.arange(earliest, end)
            mask = None if end + count - earliest <= window else distance < window
            yield Piece(slice(begin, begin + count), slice(earliest, end), mask=mask, more=True)
        begin += length


class _ByPieces(torch.autograd.Function):
    """softmax(scale q k^T) v over pieces: (1, h, L, d) of q, and of k and v with as many heads or a divisor of them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, some: Sequence[Piece], scale: float | None) -> Tensor:
        batch, heads, length, width = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        # As the flash attention has them, and as the layers want the output: tokens before heads.
        out = torch.empty(batch, length, heads, width, dtype=q.dtype).transpose(1, 2)
        lse = torch.empty(batch, length, heads, dtype=wide).transpose(1, 2)
        for piece in some:
            at, its, fold = piece.rows(heads // k.shape[1])
            made, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(fold(q[at]), k[its], v[its], 0.0, piece.causal), attn_mask=_additive(piece, q.dtype), scale=scale
            )
            made, sums = made.reshape(q[at].shape), sums.reshape(q[at].shape[:-1])
            if piece.more:
                before = lse[..., piece.queries]
                both = torch.logaddexp(before, sums)
                old, new = ((x - both).exp().unsqueeze(-1) for x in (before, sums))
                made, sums = (out[at] * old + made * new).to(q.dtype), both
            out[at], lse[..., piece.queries] = made, sums
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces, ctx.scale = some, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # With the whole's out and lse, the backward of a piece is its share of the whole's.
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for piece in ctx.pieces:
            at, its, fold = piece.rows(q.shape[1] // k.shape[1])
            queries = (fold(upstream[at]), fold(q[at])), (fold(out[at]), fold(lse[..., piece.queries]))
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(*queries[0], k[its], v[its], *queries[1], 0.0, piece.causal),
                attn_mask=_additive(piece, q.dtype),
                scale=ctx.scale,
            )
            for whole, where, part in zip((dq, dk, dv), (at, its, its), found, strict=True):
                whole[where] += part.reshape(whole[where].shape)
        return dq, dk, dv, None, None


def _additive(piece: Piece, dtype: torch.dtype) -> Tensor | None:
    if piece.mask is None:
        return None
    return torch.zeros(piece.mask.shape, dtype=dtype).masked_fill(~piece.mask, -torch.inf)


# ----------------------------------------------------------------------------------------------------------- functions


def adopt(model: PreTrainedModel) -> bool:
    """Make a model read tables; -> whether it is one whose attention can be chosen. Called again, it changes nothing."""
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not all(module._can_set_attn_implementation() for module in inside):
        return False
    for config in {id(module.config): module.config for module in inside}.values():
        name = config._attn_implementation or "eager"
        if not name.startswith(PREFIX):
            AttentionInterface.register(PREFIX + name, functools.partial(attention, name))
            AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
            config._attn_implementation_internal = PREFIX + name
    return True


def attention(
    own: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """(B, h, L, d) and like it -> (B, L, h, d): as transformers calls the implementation `own`, of which it takes the place."""
    if not is_table(attention_mask):
        return _function(own, module)(module, query, key, value, attention_mask, **options)
    window = options.get("sliding_window") or NO_WINDOW
    plain = own in FUSED and not options.get("dropout") and query.shape[-1] == value.shape[-1]
    extras = ("softcap", "s_aux", "position_bias", "head_mask")
    plain = plain and all(options.get(name) is None for name in extras)
    if query.device.type == "cuda" and own in FUSED and not options.get("dropout"):
        return _by_blocks(module, query, key, value, attention_mask, window, options)
    if plain and query.device.type == "cpu":
        if torch.is_autocast_enabled("cpu"):  # as sdpa does it by itself
            query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        some = _kept(attention_mask, ("pieces", window), lambda: pieces(groups_of(attention_mask), window))
        return _ByPieces.apply(query, key, value, some, options.get("scaling")).transpose(1, 2), None
    return _by_parts(_function(own, module), module, query, key, value, attention_mask, window, options), None


def _function(own: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if own in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[own]
    return sys.modules[type(module).__module__].eager_attention_forward  # each file of transformers has its own


def groups_of(table: Tensor) -> list[Group]:
    """What a table was made of."""

    def found() -> list[Group]:
        parts, lengths = torch.unique_consecutive(table[0, 0, :2], dim=1, return_counts=True)
        sizes: dict[int, list[int]] = {}
        for number, length in zip(parts[0].tolist(), lengths.tolist(), strict=True):
            sizes.setdefault(number, []).append(length)
        return [Group(some[0], tuple(some[1:])) for some in sizes.values()]

    return _kept(table, "groups", found)


def _kept(table: Tensor, name: Any, make: Callable[[], Any]) -> Any:
    """What is made of a table once, however many layers ask for it."""
    kept = table.__dict__.setdefault("made_of_it", {})
    if name not in kept:
        kept[name] = make()
    return kept[name]


def _by_parts(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    window: int,
    options: dict[str, Any],
) -> Tensor:
    """Every part by the model's own function: a prompt's tokens, then each completion's, which see the prompt's too."""
    made, start = [], 0
    options = {name: value for name, value in options.items() if name != "position_ids"}  # of the whole row
    for group in groups_of(table):
        prompt = range(start, start + group.prompt)
        begin = prompt.stop
        for part, length in enumerate((group.prompt, *group.completions)):
            tokens = prompt if part == 0 else range(begin, begin + length)
            rows = torch.tensor([*prompt, *tokens] if part else prompt, device=q.device)
            some, keys, values = q[:, :, tokens.start : tokens.stop], k[:, :, rows], v[:, :, rows]
            mask = seen(table[..., rows], window)[len(rows) - len(tokens) :]
            additive = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
            if len(tokens):
                made.append(function(module, some, keys, values, additive[None, None], **options)[0])
            begin = begin + length if part else begin
        start = begin
    return torch.cat(made, dim=1)


def _by_blocks(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, table: Tensor, window: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.flex_attention import flex_attention_forward

    mask = _kept(table, ("blocks", window), lambda: block_mask(table, window))
    return flex_attention_forward(module, q, k, v, mask, **options)


def block_mask(table: Tensor, window: int = NO_WINDOW) -> Any:
    """`seen` as flex_attention takes it, in blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = table.shape[-1]
    return create_block_mask(visible(table, window), None, None, length, length, device=str(table.device))


def visible(table: Tensor, window: int = NO_WINDOW) -> Callable[..., Tensor]:
    """`seen`, of one query and one key."""
    group, part, position = table[0, 0]

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = (i >= j) & (group[i] == group[j]) & ((part[j] == 0) | (part[j] == part[i]))
        return own & (position[i] - position[j] < window)

    return sees
