"""Which tokens a cut keeps: the torch backends against transformers' own warpers, and the borders of wide sets."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from fused_rlhf.backends import chunked, reference, truncation
from fused_rlhf.kernels.interface import Border, Cut, KeptSets, Projection, Rows
from fused_rlhf.op.truncation import Truncation

process = importlib.import_module("transformers.generation.logits_process")

V = 300
RULES: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 299},
    {"top_k": 5000},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"top_p": 0.999999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"min_p": 1e-6},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.05},
    {"top_k": 250, "top_p": 0.9},
    {"top_p": 0.9, "min_p": 0.3},
]


def logits(kind: str, rows: int = 24) -> Tensor:
    g = torch.Generator().manual_seed(len(kind))
    z = torch.randn(rows, V, generator=g, dtype=torch.float64)
    if kind == "peaked":
        return 6 * z
    if kind == "flat":
        return 0.1 * z
    if kind == "tied":  # many equal logits, at every border
        return (2 * z).round()
    if kind == "constant":
        return torch.zeros_like(z)
    if kind == "padded":
        z[:, 250:] = -torch.inf
        return z
    z[:, :3] = -1e5  # columns far below all others
    z[::2, 7] = 40.0  # and now and then one far above
    return z


def stable(scores: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return torch.sort(scores, stable=True, **options)


def warped(z: Tensor, rules: dict[str, float], order: str) -> Tensor:
    """(n, V) bool: what transformers' warpers leave. Their sorts leave open which of equal logits comes first: here the
    earlier column does, as in a stable sort."""
    classes = {
        "top_k": process.TopKLogitsWarper,
        "top_p": process.TopPLogitsWarper,
        "min_p": process.MinPLogitsWarper,
    }
    names = ["min_p", "top_k", "top_p"] if order == "vllm" else ["top_k", "top_p", "min_p"]
    scores = z.clone()
    for name in names:
        if name in rules:
            sort = SimpleNamespace(**vars(torch) | {"sort": stable})
            with mock.patch.object(process, "torch", sort):
                scores = classes[name](rules[name])(torch.zeros(len(z), 1), scores)
    return scores > -torch.inf


def cut_of(rules: dict[str, float], order: str, count: int) -> Cut:
    def vector(name: str, dtype: torch.dtype) -> Tensor | None:
        return torch.full((count,), rules[name], dtype=dtype) if name in rules else None

    vectors = vector("top_k", torch.int64), vector("top_p", torch.float64), vector("min_p", torch.float64)
    return Cut(*vectors, order == "vllm")


def mask_of(found: truncation.Sets | KeptSets, z: Tensor, targets: Tensor) -> Tensor:
    """(n, V) bool, from named tokens and borders."""
    kept = torch.zeros_like(z, dtype=torch.bool)
    kept[found.rows, found.ids] = True
    some = z[found.wide]
    inside = ~truncation.outside(some, slice(0, z.shape[1]), targets[found.wide], found.border)
    kept[found.wide] = inside & ((some > -torch.inf) | (torch.arange(z.shape[1]) == targets[found.wide, None]))
    return kept


@pytest.mark.parametrize("named", [512, 16])
@pytest.mark.parametrize("order", ["transformers", "vllm"])
@pytest.mark.parametrize("kind", ["peaked", "flat", "tied", "constant", "padded", "far"])
def test_sets_are_those_of_the_warpers(monkeypatch: pytest.MonkeyPatch, kind: str, order: str, named: int) -> None:
    """Of few tokens and of many, with ties at the border."""
    monkeypatch.setattr(truncation, "NARROW", named)
    z = logits(kind)
    targets = torch.arange(len(z)) * 11 % V
    at = torch.arange(len(z))
    total = (z - z.amax(1, keepdim=True)).exp().sum(1)
    wide = 0
    for rules in RULES:
        truth = warped(z, rules, order)
        found = truncation.find(z, total, targets, cut_of(rules, order, len(z)))
        assert torch.equal(found.added, ~truth[at, targets]), rules
        truth[at, targets] = True
        mask = mask_of(found, z, targets)
        assert torch.equal(mask, truth & (z > -torch.inf) | (torch.arange(V) == targets[:, None])), rules
        assert not torch.isin(found.rows, found.wide).any()
        wide += len(found.wide)
    assert (wide > 0) == (named < V)


@pytest.mark.parametrize("kind", ["peaked", "flat", "tied", "far"])
def test_the_reference_agrees_with_the_warpers(kind: str) -> None:
    z = logits(kind)
    for order in ("transformers", "vllm"):
        for rules in RULES:
            kept = reference.kept_columns(z, cut_of(rules, order, len(z)))
            assert torch.equal(kept, warped(z, rules, order)), (order, rules)


def test_rules_of_each_token() -> None:
    """Vectors that differ from row to row, off in some, equal one rule a row."""
    z, count = logits("flat", 12), 12
    top_k = torch.tensor([0, 5, 100, 0, 0, 7, 0, 300, 1, 0, 12, 0])
    top_p = torch.tensor([0.5, 1, 1, 0.9, 1, 0.3, 1, 1, 1, 0.1, 0.7, 1], dtype=torch.float64)
    min_p = torch.tensor([0, 0, 0, 0, 0.8, 0, 0, 0, 0, 0.9, 0, 0], dtype=torch.float64)
    targets = torch.zeros(count, dtype=torch.int64)
    total = (z - z.amax(1, keepdim=True)).exp().sum(1)
    found = mask_of(truncation.find(z, total, targets, Cut(top_k, top_p, min_p)), z, targets)
    for row in range(count):
        values = {"top_k": int(top_k[row]), "top_p": float(top_p[row]), "min_p": float(min_p[row])}
        rules = {name: value for name, value in values.items() if value != (1 if name == "top_p" else 0)}
        truth = warped(z[row : row + 1], rules, "transformers")[0]
        truth[0] = True
        assert torch.equal(found[row], truth), row


def test_a_border_between_two_logits_bears_their_rounding() -> None:
    """The floor of a wide set lies apart from both its lowest and the highest left out, where these differ."""
    z = logits("flat", 8)
    top = z.amax(1)
    border = truncation._mass_border(z, top, None, torch.full_like(top, 0.6))
    ordered = z.sort(dim=1, descending=True).values
    mass = (ordered - top[:, None]).exp()
    count = (mass.cumsum(1) - mass < 0.6 * mass.sum(1, keepdim=True)).sum(1, keepdim=True)
    lowest, dropped = ordered.gather(1, count - 1)[:, 0], ordered.gather(1, count)[:, 0]
    assert (border.floor < lowest).all()
    assert (border.floor > dropped).all()


@pytest.mark.parametrize("backend", [chunked, reference])
def test_a_row_of_nan_stays_one(backend) -> None:
    hidden = torch.randn(4, 6, dtype=torch.float64)
    hidden[2] = torch.nan
    rows = Rows(hidden, torch.arange(4), torch.ones(4, dtype=torch.float64))
    head = Projection(torch.randn(50, 6, dtype=torch.float64), compute_dtype=torch.float64)
    cut = cut_of({"top_p": 0.9}, "transformers", 4)
    found = backend.truncated(rows, head, cut, (), whole=True)
    assert found.whole is not None
    assert torch.equal(found.whole.logprobs.isnan(), torch.tensor([False, False, True, False]))


def test_outside_keeps_the_target() -> None:
    z = torch.tensor([[0.0, 1.0, 1.0, 2.0]])
    border = Border(torch.tensor([1.0]), torch.tensor([2]))
    assert truncation.outside(z, slice(0, 4), torch.tensor([0]), border).tolist() == [[False, True, False, False]]
    assert truncation.outside(z[:, 1:3], slice(1, 3), torch.tensor([3]), border).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_p": float("nan")}, ValueError, "top_p must be above 0"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0, got -1"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int or a tensor of such, got float"),
        ({"top_k": True}, TypeError, "top_k must be an int"),
        ({"min_p": -0.1}, ValueError, "min_p must be at least 0 and at most 1, got -0.1"),
        ({"min_p": "0.1"}, TypeError, "min_p must be a float"),
        ({"top_k": torch.ones(3)}, TypeError, "top_k must be an int or a tensor of such, got torch.float32"),
        ({"top_p": torch.ones(3, dtype=torch.int64)}, TypeError, "top_p must be a float"),
        ({"order": "sglang"}, ValueError, "order must be one of"),
    ],
)
def test_bad_rules_are_refused_by_name(rules, error, words) -> None:
    with pytest.raises(error, match=words):
        Truncation(**rules)
