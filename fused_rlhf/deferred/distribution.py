"""The distribution of each row over the vocabulary, told by hidden states and head, and what was found of it so far.

    u = scale (h W^T + b)          z = u, or cap tanh(u)          both divided by a temperature of the row

One pass over the vocabulary gives log-sum-exp and entropy of all rows, and the log-probability of one token each where these
are known by then; it is kept, with its graph, for whoever asks next. Further tokens cost their rows of the head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_rlhf import notices, private
from fused_rlhf.functional import linear_kl, linear_logprobs
from fused_rlhf.lm_head import tied_to
from fused_rlhf.op.entries import entry_logits, largest
from fused_rlhf.op.head import Head, LoRA

NOTHING_IGNORED = -(2**62)  # an ignore_index that no id equals


@dataclass(frozen=True)
class Found:
    """Results of one pass, (n,) each by their name in `LogProbs`, with their graph."""

    values: dict[str, Tensor]
    hooks: Any  # on saved tensors, in force during the pass: a checkpoint must see the pass again when it recomputes
    keeps: tuple[Tensor, ...]  # whose ids are in the key: as long as they live no other tensor has these

    def detached(self) -> Found:
        return replace(self, values={name: value.detach() for name, value in self.values.items()})


@dataclass(frozen=True, eq=False)
class Source:
    """What one call of a head was given."""

    hidden: Tensor  # (N, H)
    head: Head
    autocast_dtype: torch.dtype | None  # of the autocast the head would have run in
    detached: bool
    # 0-d: what wrappers have hooked the model's output by. A backward from a result passes through it.
    anchor: Tensor | None = None
    found: dict[Hashable, Found] = field(default_factory=dict)  # by a distribution's key, and whether it has a graph
    versions: tuple[int, ...] = ()

    @staticmethod
    def of(hidden: Tensor, head: Head, autocast_dtype: torch.dtype | None, detached: bool) -> Source:
        source = Source(hidden, head, autocast_dtype, detached)
        return replace(source, versions=source.versions_now())

    def operands(self) -> tuple[Tensor, ...]:
        head = self.head
        lora = () if head.lora is None else head.lora[:2]
        return tuple(t for t in (self.hidden, head.weight, head.bias, *lora) if t is not None)

    def versions_now(self) -> tuple[int, ...]:
        return tuple(0 if t.is_inference() else t._version for t in self.operands())

    def check(self) -> None:
        """Raises RuntimeError where the operands are not those of the forward any more."""
        if any(t.untyped_storage().nbytes() == 0 and t.numel() for t in self.operands()):
            raise RuntimeError(
                "the head's weight was freed after the forward (FSDP2 with reshard_after_forward=True on the root): shard "
                "model.get_output_embeddings() by a fully_shard of its own, or the root with reshard_after_forward=False"
            )
        if self.versions_now() != self.versions:
            raise RuntimeError(
                "deferred logits must be used before the head or the hidden states change: an operand was modified in "
                "place since the forward (an optimizer's step?); ask for the results first"
            )

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        dtype = self.autocast_dtype
        return torch.autocast(self.hidden.device.type, dtype=dtype, enabled=dtype is not None)


@dataclass(frozen=True, eq=False)
class Parent:
    """Of which a distribution has some rows."""

    distribution: Distribution
    positions: Tensor  # (n,)
    covered: bool  # its parts will be asked for one after the other (split, chunk, iteration): a pass serves them all


@dataclass(frozen=True, eq=False)
class Distribution:
    """n rows of a source under a transform. Two are equal where everything about them is."""

    source: Source
    scale: float = 1.0
    cap: float | None = None  # None: no tanh
    temperature: Tensor | None = None  # (n,)
    bias: Tensor | None = None  # (V,), beside the head's own
    positions: Tensor | None = None  # (n,) rows of the source; None: all
    columns: int | None = None  # the first so many of the vocabulary; None: all
    parent: Parent | None = None
    row_key: tuple[Hashable, ...] = ()
    keeps: tuple[Tensor, ...] = ()

    @property
    def key(self) -> Hashable:
        of_bias = None if self.bias is None else _identity(self.bias)
        return self.scale, self.cap, of_bias, self.columns, self.row_key

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Distribution):
            return NotImplemented
        same = self.source.found is other.source.found and self.source.detached == other.source.detached
        return same and self.key == other.key

    def __hash__(self) -> int:
        return hash((id(self.source.found), self.key))

    # ------------------------------------------------------------------------------------------------ how it is made

    @property
    def count(self) -> int:
        return len(self.source.hidden) if self.positions is None else len(self.positions)

    @property
    def vocabulary(self) -> int:
        return len(self.source.head.weight) if self.columns is None else self.columns

    def _each(self, change: Any) -> Distribution:
        """The change in this one and in that which it is a part of."""
        parent = self.parent
        if parent is not None:
            parent = replace(parent, distribution=parent.distribution._each(change))
        return replace(change(self), parent=parent)

    def scaled(self, factor: float) -> Distribution:
        def change(one: Distribution) -> Distribution:
            if one.cap is None:
                return replace(one, scale=one.scale * factor)
            return replace(one, cap=one.cap * factor)

        return self._each(change)

    def divided(self, temperature: Tensor, given: Tensor, divides: bool) -> Distribution:
        """By a number per row, (n,); `given`, the caller's own tensor that divides or multiplies, is what it is known by."""
        t = temperature if self.temperature is None else self.temperature * temperature
        key = ("temperature", _identity(given), tuple(given.shape), divides)
        return replace(self, temperature=t, parent=None, row_key=(*self.row_key, key), keeps=(*self.keeps, given))

    def squashed(self) -> Distribution:
        """tanh z."""
        return self._each(lambda one: replace(one, cap=1.0))

    def biased(self, bias: Tensor) -> Distribution:
        def change(one: Distribution) -> Distribution:
            own = bias / one.scale if one.scale != 1 else bias
            total = own if one.bias is None else one.bias + own
            return replace(one, bias=total, keeps=(*one.keeps, total))

        return self._each(change)

    def cut(self, columns: int) -> Distribution:
        """The first so many columns of the vocabulary."""
        return self._each(lambda one: replace(one, columns=columns))

    def select(self, positions: Tensor, key: Hashable, keeps: tuple[Tensor, ...], covered: bool) -> Distribution:
        """These rows (n,) of it."""
        rows = positions if self.positions is None else self.positions[positions]
        t = None if self.temperature is None else self.temperature[positions]
        parent = Parent(self, positions, covered)
        keeps = (*self.keeps, *keeps)
        return replace(self, positions=rows, temperature=t, parent=parent, row_key=(*self.row_key, key), keeps=keeps)

    def detach(self) -> Distribution:
        return self.on(replace(self.source, detached=True))

    def on(self, source: Source) -> Distribution:
        return self._each(lambda one: replace(one, source=source))

    @staticmethod
    def joined(parts: Sequence[Distribution]) -> Distribution:
        """Rows one after the other, under one transform and head; a ValueError where these differ."""
        first = parts[0]
        for other in parts[1:]:
            head, own = other.source.head, first.source.head
            same = (other.scale, other.cap, other.columns) == (first.scale, first.cap, first.columns)
            if not (same and head.weight is own.weight and head.bias is own.bias and other.bias is first.bias):
                raise ValueError("deferred logits can be joined where head and transform are the same")
        hidden = torch.cat([part.hidden() for part in parts])
        lora, dtype = first.source.head, first.source.autocast_dtype
        source = Source.of(hidden, lora, dtype, all(part.source.detached for part in parts))
        t = None
        if any(part.temperature is not None for part in parts):
            t = torch.cat([hidden.new_ones(p.count) if p.temperature is None else p.temperature for p in parts])
        return Distribution(source, first.scale, first.cap, t, first.bias, columns=first.columns, row_key=("joined",))

    # --------------------------------------------------------------------------------------------- what it is computed of

    @property
    def requires_grad(self) -> bool:
        operands = (*self.source.operands(), *(() if self.bias is None else (self.bias,)))
        return not self.source.detached and any(t.requires_grad for t in operands)

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and self.requires_grad

    def hidden(self) -> Tensor:
        """(n, H), with its graph."""
        source = self.source
        hidden = source.hidden
        if source.detached:
            hidden = hidden.detach()
        elif source.anchor is not None and torch.is_grad_enabled():
            hidden = tied_to(hidden, source.anchor)
        return hidden if self.positions is None else hidden.index_select(0, self.positions)

    def head(self) -> Head:
        head = self.source.head
        weight, bias, lora = head.weight, head.bias, head.lora
        if self.columns is not None:
            weight, bias = weight[: self.columns], None if bias is None else bias[: self.columns]
            lora = None if lora is None else LoRA(lora[0], lora[1][: self.columns], lora[2])
        if self.bias is not None:
            bias = self.bias if bias is None else bias + self.bias
        if self.cap is None:
            return Head(weight, bias, self.scale, lora=lora)
        return Head(weight, bias, self.scale * self.cap, abs(self.cap), lora)

    def heat(self) -> float | Tensor:
        return 1.0 if self.temperature is None else self.temperature.detach()

    @contextlib.contextmanager
    def computing(self) -> Any:
        self.source.check()
        if self.temperature is not None and self.temperature.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "a temperature of deferred logits must not require a gradient: it takes none; detach it"
            )
        with torch.set_grad_enabled(self.needs_grad), self.source.autocast():
            hidden, never = self.source.hidden, "the logits themselves are never made"
            notices.runs("what is asked of deferred logits", hidden, self.source.head, "auto", never)
            yield

    # ------------------------------------------------------------------------------------------------- what is found of it

    def found(self) -> Found | None:
        """What is known already, of this or of what it is a part of; without a graph where none is wanted."""
        kept = [self._kept(False), self._kept(True)] if not self.needs_grad else [self._kept(True)]
        some = [one for one in kept if one is not None]
        if some:
            found = replace(some[0], values={name: value for one in some for name, value in one.values.items()})
            return found if self.needs_grad else found.detached()
        if self.parent is None:
            return None
        whole = self.parent.distribution.found()
        return None if whole is None else self._part_of(whole)

    def _kept(self, has_graph: bool) -> Found | None:
        kept = self.source.found.get((self.key, has_graph))
        return kept if kept is not None and kept.hooks == private.saved_tensor_hooks() else None

    def _part_of(self, whole: Found) -> Found:
        assert self.parent is not None
        at = self.parent.positions
        return replace(whole, values={name: value[at] for name, value in whole.values.items() if name != "logprobs"})

    def statistics(self, *names: str) -> dict[str, Tensor]:
        """lse, entropy and what else is named, (n,) each; differentiable."""
        found = self.found()
        if found is not None and all(name in found.values for name in names):
            return found.values
        if self.parent is not None and self.parent.covered:
            whole = self.parent.distribution
            whole.statistics(*names)
            known = whole.found()
            assert known is not None
            return self._part_of(known).values
        return self._pass(torch.zeros(self.count, dtype=torch.int64, device=self.source.hidden.device), names)

    def _pass(self, targets: Tensor, names: Sequence[str] = ()) -> dict[str, Tensor]:
        """One pass over the vocabulary, kept; targets (n,)."""
        outputs = tuple(dict.fromkeys(("lse", "entropy", *names)))
        with self.computing():
            out = linear_logprobs(
                self.hidden(),
                self.head(),
                targets,
                temperature=self.heat(),
                ignore_index=NOTHING_IGNORED,
                outputs=outputs,
            )
        values = {name: getattr(out, name) for name in outputs}
        kept = self._kept(self.needs_grad)
        known = values if kept is None else {**kept.values, **values}
        self.source.found[self.key, self.needs_grad] = Found(known, private.saved_tensor_hooks(), self.keeps)
        return {"logprobs": out.logprobs, **values}

    def at(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) log-probability and logit of one token in each row: by the first pass, where there was none yet."""
        if self.found() is None and not (self.parent is not None and self.parent.covered):
            found = self._pass(ids)
            return found["logprobs"], found["logprobs"] + found["lse"]
        z = self.logits(torch.arange(self.count, device=ids.device), ids)
        return z - self.statistics("lse")["lse"], z

    def of_labels(self, labels: Tensor, ignore_index: int, names: tuple[str, ...]) -> dict[str, Tensor]:
        """(n,) log-probs, and statistics by name, 0 at ignored labels: which cost nothing, and so the pass is not kept."""
        found = self.found()
        if found is not None and all(name in found.values for name in names):
            live = labels != ignore_index
            inside = torch.where(live, labels, 0)
            rows = torch.arange(self.count, device=labels.device)
            values = {"logprobs": self.logits(rows, inside) - found.values["lse"]}
            values |= {name: found.values[name] for name in names}
            return {name: torch.where(live, value, 0.0) for name, value in values.items()}
        with self.computing():
            out = linear_logprobs(
                self.hidden(),
                self.head(),
                labels,
                temperature=self.heat(),
                ignore_index=ignore_index,
                outputs=names,
            )
        return {name: getattr(out, name) for name in ("logprobs", *names)}

    def logits(self, rows: Tensor, ids: Tensor) -> Tensor:
        """(E,) of the tokens ids (E,) in rows (E,), in any order."""
        with self.computing():
            order = rows.argsort(stable=True)
            z = entry_logits(self.hidden(), self.head(), self.heat(), rows[order], ids[order])
            return torch.empty_like(z).index_copy(0, order, z)

    def largest(self, k: int) -> Tensor:
        """(n, k) ids of the largest logits."""
        if k == 1:
            with torch.no_grad():
                return self.statistics("argmax")["argmax"][:, None]
        with self.computing():
            return largest(self.hidden(), self.head(), self.heat(), k)

    def dense(self) -> Tensor:
        """(n, V) logits, by torch's own functions."""
        head = self.head()
        with self.computing():
            u = torch.nn.functional.linear(self.hidden(), head.weight, head.bias)
            if head.lora is not None:
                a, b, scale = head.lora
                u = u + scale * torch.nn.functional.linear(torch.nn.functional.linear(self.hidden(), a), b)
            z = head.logit_scale * u
            if head.softcap is not None:
                z = head.softcap * torch.tanh(z / head.softcap)
            return z if self.temperature is None else z / self.temperature[:, None]


def _identity(tensor: Tensor) -> tuple[int, int]:
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def divergence(p: Distribution, q: Distribution) -> Tensor:
    """(n,) KL(p || q) over the vocabulary, differentiable in whichever takes gradients."""
    same = p.temperature is q.temperature or p.row_key == q.row_key
    if (p.temperature is not None or q.temperature is not None) and not same:
        raise NotImplementedError(
            "a divergence of deferred logits needs the same temperatures per row in both: divide both by the same tensor"
        )

    def compared(one: Distribution, other: Distribution, kind: Any) -> Tensor:
        with other.computing():
            ref_hidden, ref_head = other.hidden(), other.head()
        with one.computing():
            return linear_kl(one.hidden(), one.head(), ref_hidden, ref_head, kind, temperature=one.heat())

    if not q.needs_grad:
        return compared(p, q, "reverse")
    by_q = compared(q, p, "forward")
    if not p.needs_grad:
        return by_q
    return compared(p, q, "reverse") + (by_q - by_q.detach())
