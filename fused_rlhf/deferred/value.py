"""What a deferred tensor holds at row n and token v: a sum of terms, each a number per row times a product of the row's own.

    c       c z       c log p       c p       c p z       c p log p       c p p       c p log q, q of another head

All that is linear in these stays such a sum; its value at one token, and its sum over the vocabulary, are known from the
statistics of the distributions it names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rlhf.deferred.distribution import Distribution, divergence

Coefficient = float | Tensor  # (n,) where a tensor


class Term(NamedTuple):
    """(probability of `p`, or 1) x (1 of "one", z, log-probability or probability of `of`)."""

    p: Distribution | None
    kind: str  # "one", "z", "logp", "p"
    of: Distribution | None = None


ONE = Term(None, "one")
Terms = dict[Term, Coefficient]


def logits_of(of: Distribution) -> Terms:
    return {Term(None, "z", of): 1.0}


def logprobs_of(of: Distribution) -> Terms:
    return {Term(None, "logp", of): 1.0}


def probs_of(of: Distribution) -> Terms:
    return {Term(of, "one"): 1.0}


def distributions(terms: Terms) -> list[Distribution]:
    return [one for term in terms for one in (term.p, term.of) if one is not None]


def added(first: Terms, second: Terms) -> Terms:
    total = dict(first)
    for term, coefficient in second.items():
        total[term] = total[term] + coefficient if term in total else coefficient
    return {term: c for term, c in total.items() if not (isinstance(c, float) and c == 0) or len(total) == 1}


def scaled(terms: Terms, factor: Coefficient) -> Terms:
    return {term: c * factor for term, c in terms.items()}


def product(first: Terms, second: Terms) -> Terms | None:
    """None: it is no such sum."""
    total: Terms = {}
    for one, c in first.items():
        for other, d in second.items():
            term = _product(one, other)
            if term is None:
                return None
            total = added(total, {term: c * d})
    return total


def _product(one: Term, other: Term) -> Term | None:
    if one == ONE:
        return other
    if other == ONE:
        return one
    if one.p is None:
        one, other = other, one
    if one.p is None or one.kind != "one":
        return None
    if other.p is None:
        return Term(one.p, other.kind, other.of)
    return Term(one.p, "p", other.p) if other.kind == "one" else None


def changed(terms: Terms, change: Callable[[Distribution], Distribution], of_row: Callable[[Tensor], Tensor]) -> Terms:
    """With every distribution and every coefficient that is a tensor replaced."""
    made: dict[Distribution, Distribution] = {}

    def new(one: Distribution | None) -> Distribution | None:
        if one is None:
            return None
        if one not in made:
            made[one] = change(one)
        return made[one]

    return {
        Term(new(term.p), term.kind, new(term.of)): of_row(c) if isinstance(c, Tensor) else c
        for term, c in terms.items()
    }


def joined(parts: Sequence[Terms], counts: Sequence[int]) -> Terms | None:
    """Rows one after the other; None where they are not of one form."""
    forms = [[(t.p is not None, t.kind, t.of is not None) for t in terms] for terms in parts]
    if any(form != forms[0] for form in forms):
        return None
    made: dict[tuple[Distribution, ...], Distribution] = {}

    def new(several: Sequence[Distribution | None]) -> Distribution | None:
        some = tuple(one for one in several if one is not None)
        if not some:
            return None
        if some not in made:
            made[some] = Distribution.joined(some)
        return made[some]

    total: Terms = {}
    for at in zip(*(terms.items() for terms in parts)):
        terms, coefficients = zip(*at)
        c = coefficients[0]
        if any(isinstance(x, Tensor) or x != c for x in coefficients):
            like = new([t.p or t.of for t in terms])
            device = coefficients[0].device if like is None else like.source.hidden.device
            c = torch.cat([torch.as_tensor(x, device=device).expand(n) for x, n in zip(coefficients, counts)])
        total[Term(new([t.p for t in terms]), terms[0].kind, new([t.of for t in terms]))] = c
    return total


# -------------------------------------------------------------------------------------------------------- what it comes to


def at_tokens(terms: Terms, ids: Tensor) -> Tensor:
    """(n,) values at one token in each row."""
    found: dict[Distribution, tuple[Tensor, Tensor]] = {}

    def at(one: Distribution) -> tuple[Tensor, Tensor]:
        if one not in found:
            found[one] = one.at(ids)
        return found[one]

    return _at(terms, lambda one: at(one)[0], lambda one: at(one)[1], lambda c: c)


def at_entries(terms: Terms, rows: Tensor, ids: Tensor) -> Tensor:
    """(E,) values at the tokens ids (E,) of rows (E,)."""
    found: dict[Distribution, Tensor] = {}

    def z(one: Distribution) -> Tensor:
        if one not in found:
            found[one] = one.logits(rows, ids)
        return found[one]

    return _at(terms, lambda one: z(one) - one.statistics("lse")["lse"][rows], z, lambda c: c[rows])


def _at(
    terms: Terms,
    logp: Callable[[Distribution], Tensor],
    z: Callable[[Distribution], Tensor],
    of_row: Callable[[Tensor], Tensor],
) -> Tensor:
    total: Tensor | None = None
    for term, c in terms.items():
        value: Coefficient = of_row(c) if isinstance(c, Tensor) else c
        if term.of is not None:
            value = value * {"z": z, "logp": logp, "p": lambda one: logp(one).exp()}[term.kind](term.of)
        if term.p is not None:
            value = value * logp(term.p).exp()
        total = value if total is None else total + value  # type: ignore[assignment]
    assert isinstance(total, Tensor)
    return total


def summed(terms: Terms, vocabulary: int) -> Coefficient:
    """(n,) sums over the vocabulary; a number where they are all the same. NotImplementedError where unknown."""
    total: Coefficient = 0.0
    entropies: Terms = {}  # of p log p, which may cancel
    for term, c in terms.items():
        if term.p is not None and term.kind == "logp":
            assert term.of is not None
            own = Term(term.p, "logp", term.p)
            entropies = added(entropies, {own: c})
            if term.of != term.p:
                total = total - c * divergence(term.p, term.of)
        else:
            total = total + c * _sum_of(term, vocabulary)
    for term, c in entropies.items():
        assert term.p is not None
        if isinstance(c, Tensor) or c != 0:
            total = total - c * term.p.statistics("entropy")["entropy"]
    return total


def _sum_of(term: Term, vocabulary: int) -> Coefficient:
    if term.p is None:
        if term.of is None:
            return float(vocabulary)
        if term.kind == "p":
            return 1.0
        names = ("mean_logit",) if term.kind == "z" else ("mean_logit", "lse")
        found = term.of.statistics(*names)
        mean = found["mean_logit"] - (found["lse"] if term.kind == "logp" else 0.0)
        return vocabulary * mean
    if term.of is None:
        return 1.0
    if term.of != term.p:
        raise NotImplementedError(
            "of products of two deferred heads only p log q is summed over the vocabulary; for any other take "
            "fused_rlhf.materialise(logits)"
        )
    if term.kind == "p":
        return term.p.statistics("sum_sq")["sum_sq"]
    found = term.p.statistics("lse", "entropy")
    return found["lse"] - found["entropy"]
