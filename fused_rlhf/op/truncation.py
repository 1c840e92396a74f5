"""How a sampler cut its distribution, told by its rules (`Truncation`) or by the sets it kept, and the checks of both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from fused_rlhf.checks import check_tensor, shape
from fused_rlhf.door import Door
from fused_rlhf.kernels.interface import Cut

Order = Literal["transformers", "vllm"]
ORDERS: tuple[Order, ...] = get_args(Order)
RULES = ("top_k", "top_p", "min_p")
WITHIN = ("entropy", "lse", "sum_sq", "full_logprobs")  # what can be said of a kept set

ANY = 2**31  # stands for the size of a vocabulary-parallel head, which its group alone knows; above any

Kept = tuple[Tensor, Tensor]  # ids and offsets


def end_of(vocabulary: int) -> str:
    """For a message."""
    return "..." if vocabulary == ANY else str(vocabulary)


@dataclass(frozen=True, eq=False)
class Truncation:
    """A sampler's truncation: of the distribution at its temperature, after every transform of the logits, it keeps

        top_k   the tokens whose logit is at least the k-th largest: ties with it stay
        top_p   in the order of the larger probability those before which less than top_p of the mass lies; of equal ones the
                later token comes first
        min_p   the tokens with at least min_p times the largest probability

    one rule after the other, each on what the one before left, renormalised; the likeliest token always stays. These are
    the rules and ties of transformers' `TopKLogitsWarper`, `TopPLogitsWarper` and `MinPLogitsWarper`.

    Args:
        top_k: an int >= 0, or int64 of the shape of the targets; 0 keeps all.
        top_p: in (0, 1], or a floating tensor of the shape of the targets; 1 keeps all.
        min_p: in [0, 1], likewise; 0 keeps all.
        order: "transformers": top_k, top_p, min_p. "vllm": min_p first, so that top_p is a share of what min_p left.

    Raises:
        ValueError, TypeError: a number out of range or of another type; tensors are checked by the function that takes them.
    """

    top_k: int | Tensor = 0
    top_p: float | Tensor = 1.0
    min_p: float | Tensor = 0.0
    order: Order = "transformers"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {list(ORDERS)}, got {self.order!r}")
        for name in RULES:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if value.dtype.is_floating_point == (name == "top_k") or value.dtype == torch.bool:
                    raise TypeError(f"{name} must be {_TYPES[name]} or a tensor of such, got {value.dtype}")
                continue
            if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else (int, float)):
                raise TypeError(f"{name} must be {_TYPES[name]} or a tensor of such, got {type(value).__name__}")
            if not _within(name, value):
                raise ValueError(f"{name} must be {_RANGES[name]}, got {value}")

    @property
    def keeps_all(self) -> bool:
        """Whether numbers alone say that nothing is cut."""
        off = {"top_k": 0, "top_p": 1, "min_p": 0}
        return all(not isinstance(getattr(self, name), Tensor) and getattr(self, name) == off[name] for name in RULES)


_TYPES = {"top_k": "an int", "top_p": "a float", "min_p": "a float"}
_RANGES = {"top_k": "at least 0", "top_p": "above 0 and at most 1", "min_p": "at least 0 and at most 1"}


def _within(name: str, value: float) -> bool:
    if name == "top_k":
        return value >= 0
    return math.isfinite(value) and value <= 1 and (value > 0 if name == "top_p" else value >= 0)


@dataclass(frozen=True)
class Given:
    """The sets that a sampler kept, as it reported them."""

    ids: Tensor  # (E,) int64
    offsets: Tensor  # (N + 1,) int64
    vocabulary: int

    def pick(self, index: Tensor | None) -> Entered:
        """Of the rows `index`, None: of all; each token once. Waits for the device."""
        lengths = self.offsets.diff()
        count, E = len(lengths), len(self.ids)
        row = torch.repeat_interleave(torch.arange(count, device=self.ids.device), lengths, output_size=E)
        ids = self.ids
        if index is not None:
            number = torch.full_like(lengths, -1)
            number[index] = torch.arange(len(index), device=index.device)
            row = number[row]
            inside = (row >= 0).nonzero().squeeze(1)
            row, ids = row[inside], ids[inside]
        keys = (row * self.vocabulary + ids).unique()
        return Entered(keys // self.vocabulary, keys % self.vocabulary)


@dataclass(frozen=True)
class Entered:
    """The tokens of some rows' kept sets."""

    rows: Tensor  # (E,) int64, ascending
    ids: Tensor  # (E,) int64, ascending in each row


Sets = Entered | Cut


def check_sampling(kept: Kept | None, truncation: Truncation | None, targets: Tensor, grad_filter: float) -> None:
    """What can be refused of them without reading a value."""
    named = [name for name, value in (("kept", kept), ("truncation", truncation)) if value is not None]
    if len(named) == 2:
        raise ValueError("truncation must be None beside kept: the sets are given, or they are computed; got both")
    if not named:
        return
    name = named[0]
    if grad_filter > 0:
        raise ValueError(f"grad_filter must be 0 with {name}, whose gradient is exact; got {grad_filter}")
    if kept is not None:
        _check_csr(kept, targets)
        return
    if not isinstance(truncation, Truncation):
        raise TypeError(f"truncation must be a Truncation, got {type(truncation).__name__}")
    for rule in RULES:
        value = getattr(truncation, rule)
        if isinstance(value, Tensor):
            check_tensor(f"truncation.{rule}", value, targets.device)
            if value.shape != targets.shape:
                raise ValueError(
                    f"truncation.{rule} must have the shape of targets {shape(targets)}, got {shape(value)}"
                )


def _check_csr(kept: Kept, targets: Tensor) -> None:
    if not isinstance(kept, (tuple, list)) or len(kept) != 2:
        raise TypeError(f"kept must be (ids, offsets), got {type(kept).__name__}")
    for name, value in zip(("ids", "offsets"), kept):
        check_tensor(f"kept {name}", value, targets.device)
        if value.dim() != 1 or value.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"kept {name} must be 1-d, int32 or int64, got {shape(value)} {value.dtype}")
    rows = targets.numel()
    if len(kept[1]) != rows + 1:
        raise ValueError(
            f"kept offsets must hold {rows + 1} numbers, one more than there are targets, got {len(kept[1])}"
        )


def sets_of(
    door: Door, kept: Kept | None, truncation: Truncation | None, targets: Tensor, live: Tensor, like: Tensor, V: int
) -> Given | Cut | None:
    """Of (N,) targets, for the door to let in; None where nothing is cut. like: (N,), in the dtype of logits; V columns
    or ANY."""
    if kept is not None:
        given = Given(kept[0].detach().long(), kept[1].detach().long(), V)
        _check_given(door, given, targets, live)
        return given
    if truncation is None or truncation.keeps_all:
        return None
    rules: list[Tensor | None] = []
    for name in RULES:
        value = getattr(truncation, name)
        dtype = torch.int64 if name == "top_k" else like.dtype
        if isinstance(value, Tensor):
            value = value.detach().reshape(-1).to(dtype)
            _check_rule(door, name, value, live)
            rules.append(value)
        else:
            off = value == (1 if name == "top_p" else 0)
            rules.append(None if off else torch.full_like(like, value, dtype=dtype))
    top_k, top_p, min_p = rules
    return Cut(top_k, top_p, min_p, truncation.order == "vllm")


def _check_rule(door: Door, name: str, value: Tensor, live: Tensor) -> None:
    if name == "top_k":
        right = value >= 0
    else:
        right = (value <= 1) & (value > 0 if name == "top_p" else value >= 0)

    def error(at: int) -> ValueError:
        return ValueError(f"truncation.{name} must be {_RANGES[name]}, got {value[at].item():g} at flat position {at}")

    door.refuse(live & ~right, error)


def _check_given(door: Door, given: Given, targets: Tensor, live: Tensor) -> None:
    ids, offsets, V = given.ids, given.offsets, given.vocabulary
    E, N = len(ids), len(targets)
    lengths = offsets.diff()
    edges = torch.cat([offsets[:1] != 0, lengths < 0, offsets[-1:] != E])
    door.refuse(edges, lambda _: ValueError(f"kept offsets must rise from 0 to len(ids) = {E}, got {_shown(offsets)}"))
    door.refuse(
        live & (lengths == 0),
        lambda at: ValueError(f"kept must hold a token of every row, got none at flat position {at}"),
    )
    if E == 0 or N == 0:
        return
    # The offsets may be wrong still: nothing here may depend on them beyond their values.
    row = torch.searchsorted(offsets[1:].contiguous(), torch.arange(E, device=ids.device), right=True).clamp(max=N - 1)
    counts = live[row]

    def out_of_range(at: int) -> ValueError:
        end = end_of(V)
        return ValueError(f"kept ids must lie in [0, {end}), got {int(ids[at])} for flat position {int(row[at])}")

    door.refuse(counts & (ids != ids.clamp(0, V - 1)), out_of_range)
    hits = torch.zeros(N, dtype=torch.int32, device=ids.device)
    hits = hits.scatter_reduce(0, row, (ids == targets[row]).int(), "amax")

    def without_target(at: int) -> ValueError:
        return ValueError(
            f"kept must hold the target of every row, got none of {int(targets[at])} at flat position {at}"
        )

    door.refuse(live & (hits == 0), without_target)


def _shown(offsets: Tensor) -> str:
    values = offsets.tolist()
    return str(values) if len(values) <= 12 else f"{str(values[:6])[:-1]}, ..., {str(values[-3:])[1:]}"


def picked(sets: Given | Cut | None, index: Tensor | None) -> Sets | None:
    """Those of some rows."""
    return None if sets is None else cast(Sets, sets.pick(index))
