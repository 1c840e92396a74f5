"""Log-probs of ids and of kept sets by the Triton backend, in its interpreter: `test_kept_triton.py` starts it.

Truth is the reference backend in fp64 on the same operands, or transformers' own warpers. Every comparison is
`error <= 2 x (torch's own error in the same dtype) + 1e-5`, relative to the largest true value; scratch comes poisoned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf.kernels import ops, truncation
from fused_rlhf.kernels.interface import Cut, Entries, EntryGrads, Needs, Projection, Rows, Stats, TokenGrads
from fused_rlhf.kernels.linear_logprobs import RowBlock
from tests.helpers import TRANSFORMS, leaf, projection
from tests.interpreter_cases import assert_close, poison  # noqa: F401
from tests.test_gathered import case as entry_case
from tests.test_truncation import RULES, cut_of, logits, mask_of, warped
from tests.waits import counting

N, H, V = 11, 24, 75
WANTED = ("entropy", "lse", "sum_sq", "full_logprobs")
EVERYTHING: dict[str, Any] = {"bias": True, "logit_scale": 0.7, "softcap": 5.0, "lora": True, "per_token": True}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and of columns, several parts of a row."""
    monkeypatch.setattr(ops, "ROWS", 8)
    monkeypatch.setattr(ops, "truncation_rows", lambda *_: 8)
    monkeypatch.setattr(ops, "gradient_columns", lambda *_: 32)
    monkeypatch.setattr(ops, "_columns", lambda device: 32)
    monkeypatch.setattr(truncation, "STEP", 64)


def operands(
    dtype: torch.dtype = torch.float32, *, bias: bool = False, lora: bool = False, per_token: bool = False, **head: Any
) -> dict[str, Any]:
    """Arguments of `linear_logprobs`; its leaves are those that require a gradient."""
    g = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    data: dict[str, Any] = {"hidden": leaf(randn(N, H).to(dtype)), "weight": leaf((randn(V, H) * 0.6).to(dtype))}
    data["targets"] = torch.randint(V, (N,), generator=g)
    if bias:
        data["bias"] = leaf(randn(V))
    if lora:
        data["lora"] = leaf(randn(3, H) / 3), leaf(randn(V, 3)), 0.5
    if per_token:
        data["temperature"] = 0.5 + torch.rand(N, generator=g)
    return data | head


def leaves(data: dict[str, Any]) -> list[Tensor]:
    *adapter, _ = data.get("lora", (None,))
    return [t for t in (data["hidden"], data["weight"], data.get("bias"), *adapter) if t is not None]


def in_fp64(data: dict[str, Any]) -> dict[str, Any]:
    def wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    return {name: wide(value) for name, value in data.items()}


def values_and_gradients(data: dict[str, Any], backend: str, **told: Any) -> list[Tensor]:
    """Every result that is asked for, then the gradients of their sum with weights."""
    found = fr.linear_logprobs(**data, backend=backend, **told)
    named = {name: value for name, value in found._asdict().items() if value is not None}
    total: Any = 0
    for i, name in enumerate(named):
        if name != "target_added":
            weights = torch.linspace(-1, 1, named[name].numel()).roll(3 * i).view_as(named[name])
            weights[5:7] = 0.0  # rows that nothing asks for
            total = total + (weights.to(named[name].dtype) * named[name]).sum()
    return [*(value.detach() for value in named.values()), *torch.autograd.grad(total, leaves(data))]


def check(data: dict[str, Any], slack: float = 1e-5, again: bool = False, **told: Any) -> list[Tensor]:
    found = values_and_gradients(data, "triton", **told)
    own = values_and_gradients(data, "reference", **told)
    true = values_and_gradients(in_fp64(data), "reference", **told)
    assert len(found) == len(true)
    for ours, torchs, exact in zip(found, own, true):
        assert_close(ours, torchs, exact, slack)
    if again:
        assert all(torch.equal(a, b) for a, b in zip(found, values_and_gradients(data, "triton", **told)))
    return found


def given(data: dict[str, Any], sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Sets of these sizes, with a row's target in each."""
    g = torch.Generator().manual_seed(1)
    ids = []
    for target, size in zip(data["targets"], sizes):
        order = torch.randperm(V, generator=g)
        ids.append(torch.cat([target[None], order[order != target][: size - 1]]))
    return torch.cat(ids), torch.tensor([0, *sizes]).cumsum(0)


@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_given_sets(options: dict[str, Any]) -> None:
    """Of one token, of more than are read at a time, of all."""
    data = operands(**options)
    check(data, kept=given(data, [1, 2, 3, 30, 9, 5, 5, 8, V, 17, 4]), again=True, outputs=("entropy", "lse", "sum_sq"))


@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_ids(options: dict[str, Any]) -> None:
    data = operands(**options)
    ids = torch.randint(V, (N, 5), generator=torch.Generator().manual_seed(2))
    ids[:, 1] = 40  # one token of every row: a long segment
    ids[2, 3], data["targets"][4] = -100, -100
    check(data, again=True, ids=ids, outputs=("entropy",))


@pytest.mark.parametrize("lora_dtype", [torch.float16, torch.float32])
def test_half_precision(lora_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an adapter that half precision holds in parts; upstream gradients are scaled beside dense rows."""
    monkeypatch.setattr(truncation, "NARROW", 12)
    data = operands(torch.float16, **EVERYTHING)
    a, b, scale = data["lora"]
    data["lora"] = leaf(a.detach().to(lora_dtype)), leaf(b.detach().to(lora_dtype)), scale
    slack = 1e-5 + torch.finfo(torch.float16).eps
    check(data, slack, ids=torch.arange(N * 3).view(N, 3), outputs=("entropy",))
    check(data, slack, truncation=fr.Truncation(top_p=0.9), outputs=("full_logprobs",))


@pytest.mark.parametrize("named", [512, 12])
@pytest.mark.parametrize(
    "rules", [{"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 60, "top_p": 0.95, "min_p": 0.01}]
)
@pytest.mark.parametrize("order", ["transformers", "vllm"])
def test_sets_that_are_found(
    order: str, rules: dict[str, Any], named: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Named one by one, and told by their borders; with the whole vocabulary's log-probs in the same call."""
    if order == "vllm" and len(rules) == 1:
        return
    monkeypatch.setattr(truncation, "NARROW", named)
    cut = fr.Truncation(**rules, order=order)  # type: ignore[arg-type]
    check(operands(**EVERYTHING), again=len(rules) > 1, truncation=cut, outputs=WANTED)


def test_rules_of_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off in some rows, which then keep everything."""
    monkeypatch.setattr(truncation, "NARROW", 12)
    top_k = torch.tensor([0, 5, 30, 0, 0, 7, 0, 300, 1, 0, 12])
    top_p = torch.tensor([0.5, 1, 1, 0.9, 1, 0.3, 1, 1, 1, 0.1, 0.7])
    min_p = torch.tensor([0, 0, 0, 0, 0.8, 0, 0, 0, 0, 0.9, 0])
    for order in ("transformers", "vllm"):
        cut = fr.Truncation(top_k, top_p, min_p, order)  # type: ignore[arg-type]
        found = check(operands(), truncation=cut, outputs=WANTED)
        whole = torch.tensor([6, 7])  # nothing is cut off: to the bit what the whole vocabulary gives
        assert torch.equal(found[0][whole], found[4][whole])


def found_in(z: Tensor, targets: Tensor, cut: Cut) -> tuple[truncation.Sets, Tensor]:
    """Sets of logits (n, V), and these as the kernels have them."""
    computed = z.clone()
    top_p, min_p = (None if v is None else v.float() for v in (cut.top_p, cut.min_p))
    cut = Cut(cut.top_k, top_p, min_p, cut.min_p_first)
    head = projection(torch.zeros(z.shape[1], 1))
    return truncation.launch_borders(block_of(targets), head, cut, computed), computed


def block_of(targets: Tensor) -> RowBlock:
    return RowBlock(torch.zeros(len(targets), 1), targets, torch.ones(len(targets)))


def kept_of(found: truncation.Sets, z: Tensor, targets: Tensor) -> Tensor:
    """(n, V) bool, from named tokens and borders."""
    rows, ids = truncation.launch_names(block_of(targets), found, z)
    wide = (~found.narrow).nonzero()[:, 0]
    told: Any = SimpleNamespace(rows=rows, ids=ids, wide=wide, border=found.border(wide))
    assert ((rows * z.shape[1] + ids).diff() > 0).all()
    assert torch.equal(torch.bincount(rows, minlength=len(z))[found.narrow], found.sizes[found.narrow])
    return mask_of(told, z, targets)


@pytest.mark.parametrize("kind", ["peaked", "flat", "tied", "constant", "padded", "far"])
def test_sets_are_those_of_the_warpers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few tokens and of many, with ties at the border."""
    monkeypatch.setattr(truncation, "STEP", 128)
    z = logits(kind, 3).float()[:, :297]  # of 300 equal ones a top_p may end at one, and then hangs on its own rounding
    targets = torch.arange(3) * 77 % z.shape[1]
    at = torch.arange(3)
    rules: Any
    for rules in RULES:
        if rules == {"top_p": 0.999999}:  # what it leaves is another number in fp32
            rules = {"top_p": torch.tensor(0.999999).item()}
        for order in ("transformers", "vllm") if len(rules) > 1 else ("transformers",):
            truth = warped(z.double(), rules, order)
            found, computed = found_in(z, targets, cut_of(rules, order, 3))
            assert torch.equal(found.added, ~truth[at, targets] | (z[at, targets] == -torch.inf)), rules
            truth[at, targets] = True
            expected = truth & (z > -torch.inf) | (torch.arange(z.shape[1]) == targets[:, None])
            assert torch.equal(found.sizes, expected.sum(1))
            for named in (512, 16):
                monkeypatch.setattr(truncation, "NARROW", named)
                assert torch.equal(kept_of(found, computed, targets), expected), (rules, order)
            inside = computed.masked_fill(~expected, -torch.inf).double()
            p = inside.softmax(1)
            share = inside.logsumexp(1) - computed.double().logsumexp(1)
            truths = -torch.special.xlogy(p, p).sum(1), p.square().sum(1), share
            for value, true in zip((found.entropy, found.sum_sq, found.log_share), truths):
                torch.testing.assert_close(value.double(), true, rtol=2e-6, atol=2e-6)


def test_a_border_between_two_logits_bears_their_rounding() -> None:
    z = logits("flat", 2).float()
    targets = z.argmax(1)
    found, computed = found_in(z, targets, Cut(None, torch.full((2,), 0.6), None))
    mask = kept_of(found, computed, targets)
    assert (found.floor < computed.masked_fill(~mask, torch.inf).amin(1)).all()
    assert (found.floor > computed.masked_fill(mask, -torch.inf).amax(1)).all()
    assert not found.first.any()


def test_equal_zeros_are_equal() -> None:
    z, target = torch.tensor([[-0.0, 0.0, -0.0, 1.0, -1.0]]), torch.tensor([3])
    found, computed = found_in(z, target, Cut(torch.tensor([2]), None, None))
    assert kept_of(found, computed, target)[0].tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("named", [512, 12])
def test_columns_without_probability(named: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a padded vocabulary: they are in no set, and have no gradient."""
    monkeypatch.setattr(truncation, "NARROW", named)
    data = operands(bias=True)
    with torch.no_grad():
        data["bias"][50:] = -torch.inf
    data["targets"] = data["targets"] % 50
    narrow = {name: t.detach() if isinstance(t, Tensor) else t for name, t in data.items()}
    narrow |= {"weight": narrow["weight"][:50], "bias": narrow["bias"][:50]}
    narrow = {name: leaf(t) if name in ("hidden", "weight", "bias") else t for name, t in narrow.items()}
    told: dict[str, Any] = {"truncation": fr.Truncation(top_k=40, top_p=0.98), "outputs": ("entropy", "sum_sq")}
    *values, d_hidden, d_weight, d_bias = values_and_gradients(data, "triton", **told)
    own = values_and_gradients(narrow, "reference", **told)
    true = values_and_gradients(in_fp64(narrow), "reference", **told)
    assert not d_weight[50:].any()
    assert not d_bias[50:].any()
    for ours, torchs, exact in zip([*values, d_hidden, d_weight[:50], d_bias[:50]], own, true):
        assert_close(ours, torchs, exact)


@pytest.mark.parametrize("named", [512, 12])
def test_nan_stays_in_its_row(named: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "NARROW", named)
    data = operands()
    told: dict[str, Any] = {"truncation": fr.Truncation(top_p=0.9), "outputs": WANTED, "backend": "triton"}
    clean = fr.linear_logprobs(**data, **told)
    with torch.no_grad():
        data["hidden"][4, 3] = torch.nan
    found = fr.linear_logprobs(**data, **told)
    others = torch.arange(N) != 4
    for name in ("logprobs", *WANTED):
        assert getattr(found, name)[4].isnan()
        assert torch.equal(getattr(found, name)[others], getattr(clean, name)[others])


@pytest.mark.parametrize("rank", [0, 3])
def test_an_entry_has_the_same_bits_in_any_company(rank: int) -> None:
    _, head, entries = entry_case(torch.float32, TRANSFORMS[5], rank)
    z = ops.gathered(entries, head)
    upstream = torch.linspace(-1, 1, entries.count)
    d_hidden = ops.gathered_hidden(EntryGrads(entries, z, upstream), head)
    some = slice(12, 18)  # those of row 2
    alone = Entries(entries.hidden[2:3], entries.temperature[2:3], entries.rows[some] - 2, entries.ids[some])
    assert torch.equal(ops.gathered(alone, head), z[some])
    assert torch.equal(ops.gathered_hidden(EntryGrads(alone, z[some], upstream[some]), head), d_hidden[2:3])


def test_a_row_of_the_head_has_the_same_gradient_in_any_company() -> None:
    """Beside the entries of other tokens, in whichever block of columns."""
    _, head, entries = entry_case(torch.float32, TRANSFORMS[1])
    grads = EntryGrads(entries, ops.gathered(entries, head), torch.linspace(-1, 1, entries.count))
    of_5 = (entries.ids == 5).nonzero()[:, 0]
    alone = Entries(entries.hidden, entries.temperature, entries.rows[of_5], entries.ids[of_5])
    some = EntryGrads(alone, grads.logits[of_5], grads.upstream[of_5])
    assert len(of_5) > 8
    found = [of_entries(head, g) for g in (grads, some)]
    assert torch.equal(found[0].weight[5], found[1].weight[5])
    assert torch.equal(found[0].bias[5], found[1].bias[5])


def of_entries(head: Projection, grads: EntryGrads | None) -> Any:
    """Gradients of the head where there are no rows."""
    none = torch.empty(0)
    rows = Rows(torch.empty(0, head.weight.shape[1]), none.long(), none)
    return ops.gradients(rows, head, Stats(none, none), TokenGrads(none), Needs(True, True, True), entries=grads)


def test_entries_alone_take_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a product")

    monkeypatch.setattr(ops, "matmul", refused)
    _, head, entries = entry_case(torch.float32, TRANSFORMS[5])
    grads = EntryGrads(entries, ops.gathered(entries, head), torch.ones(entries.count))
    found = of_entries(head, grads)
    x = entries.hidden[entries.rows]
    expected = torch.zeros_like(head.weight).index_add_(0, entries.ids, x * grads.products(head)[:, None])
    torch.testing.assert_close(found.weight, expected)
    assert found.hidden.shape == (0, head.weight.shape[1])
    nothing = of_entries(head, None)
    assert not nothing.weight.any()
    assert not nothing.bias.any()


def test_no_entries() -> None:
    _, head, entries = entry_case(torch.float32, TRANSFORMS[1])
    none = replace(entries, rows=entries.rows[:0], ids=entries.ids[:0])
    z = ops.gathered(none, head)
    assert z.shape == (0,)
    assert not ops.gathered_hidden(EntryGrads(none, z, z), head).any()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_operands(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "NARROW", 12)
    data = operands(bias=True)
    told: dict[str, Any] = {"truncation": fr.Truncation(top_p=0.9), "backend": "triton"}
    names = ("hidden", "weight", "bias")
    whole = torch.autograd.grad(fr.linear_logprobs(**data, **told).logprobs.sum(), [data[n] for n in names])
    data[frozen].requires_grad_(False)
    trained = [name for name in names if name != frozen]
    found = torch.autograd.grad(fr.linear_logprobs(**data, **told).logprobs.sum(), [data[n] for n in trained])
    for name, value in zip(trained, found):
        assert torch.equal(value, whole[names.index(name)])


def reads_of(call: Callable[[], Any]) -> int:
    with counting() as waits:
        call()
    return len(waits.reads)


def test_waits() -> None:
    """Sets: for the names of each block of rows, and for which rows are wide. The head's gradients: for where blocks of
    columns begin among the entries."""
    data = operands()
    rows, head = Rows(data["hidden"].detach(), data["targets"], torch.ones(N)), projection(data["weight"].detach())
    cut = Cut(None, torch.full((N,), 0.9), None)
    assert reads_of(lambda: ops.truncated(rows, head, cut, (), False)) == 2 + 1
    _, head, entries = entry_case(torch.float32, TRANSFORMS[0])
    grads = EntryGrads(entries, torch.zeros(entries.count), torch.ones(entries.count))
    assert reads_of(lambda: ops.gathered(entries, head)) == 0
    assert reads_of(lambda: ops.gathered_hidden(grads, head)) == 0
    assert reads_of(lambda: of_entries(head, grads)) == 1


def test_wide_rows_have_the_accuracy_of_the_plain_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """What multiplies cuts off cancels in the share: here every product is made 1e-4 too small, in its logit."""
    monkeypatch.setattr(truncation, "NARROW", 0)
    data = operands()
    true = fr.linear_logprobs(**in_fp64(data), truncation=fr.Truncation(top_k=30), backend="reference").logprobs
    matmul = ops.matmul

    def shifted(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        matmul(a, b, out, accumulate)
        out -= 1e-4

    monkeypatch.setattr(ops, "matmul", shifted)
    found = fr.linear_logprobs(**data, truncation=fr.Truncation(top_k=30), backend="triton").logprobs
    assert (found - true).abs().max() < 1e-5
