"""Deferred logits against the logits themselves: values, gradients, dtypes, sharing, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_rlhf as fr
from fused_rlhf.deferred import distribution
from fused_rlhf.deferred.model import logits_of_head
from fused_rlhf.deferred.tensor import Deferred
from tests.deferred_spellings import DECISIONS, REFUSED, SPELLINGS

transformers = pytest.importorskip("transformers")
from tests.test_lm_head import batch, build, one_thread  # noqa: E402, F401  # the fixture is used by being here

B, T, H, V = 3, 7, 16, 101


class Pair:
    """Two heads on two sets of hidden states, all of which take gradients."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def leaf(*shape: int, scale: float) -> Tensor:
            values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.to(dtype).requires_grad_()

        self.hidden, self.ref_hidden = (leaf(B, T, H, scale=2.0) for _ in range(2))
        self.weight, self.ref_weight = (leaf(V, H, scale=0.4) for _ in range(2))
        self.bias = leaf(V, scale=1.0)
        self.y = torch.randint(V - 3, (B, T), generator=generator)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight, self.bias, self.ref_hidden, self.ref_weight

    def dense(self) -> tuple[Tensor, Tensor]:
        return F.linear(self.hidden, self.weight, self.bias), F.linear(self.ref_hidden, self.ref_weight)

    def deferred(self) -> tuple[Tensor, Tensor]:
        return (
            logits_of(self.hidden, self.weight, self.bias),
            logits_of(self.ref_hidden, self.ref_weight, None),
        )


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As the head of a deferred model returns them."""
    output = F.linear(hidden[..., :0, :], weight, bias)
    return logits_of_head(hidden, fr.Head(weight, bias), output, output)


def gradients(value: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) * 3.7
    found = torch.autograd.grad(value, leaves, upstream, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    pair = Pair()
    ours = SPELLINGS[name](*_arguments(pair, pair.deferred()))
    truth = SPELLINGS[name](*_arguments(pair, pair.dense()))
    assert not isinstance(ours, Deferred)
    assert (ours.dtype, ours.shape) == (truth.dtype, truth.shape)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-11)
    for mine, theirs in zip(gradients(ours, pair.leaves), gradients(truth, pair.leaves)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def _arguments(pair: Pair, logits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return logits[0], pair.y, logits[1]


@pytest.mark.parametrize("name", DECISIONS)
def test_decisions(name: str) -> None:
    pair = Pair()
    assert torch.equal(DECISIONS[name](pair.deferred()[0], pair.y), DECISIONS[name](pair.dense()[0], pair.y))


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_need_them_all_is_refused_in_a_sentence(name: str) -> None:
    pair = Pair()
    with pytest.raises(NotImplementedError, match="not for deferred logits") as caught:
        REFUSED[name](pair.deferred()[0], pair.y)
    message = str(caught.value)
    assert "GB" in message
    assert "fused_rlhf.materialise(logits)" in message
    assert "\n" not in message


# ------------------------------------------------------------------------------------------------------------ one pass


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each pass over the vocabulary from now on."""
    rows: list[int] = []
    own = distribution.linear_logprobs

    def counted(hidden: Tensor, *args: Any, **kwargs: Any) -> fr.LogProbs:
        rows.append(len(hidden))
        return own(hidden, *args, **kwargs)

    monkeypatch.setattr(distribution, "linear_logprobs", counted)
    return rows


def both(logits: Tensor, y: Tensor) -> Tensor:
    """Log-prob and entropy by two functions that know nothing of each other."""
    scaled, again = logits[:, :-1] / 0.7, logits[:, :-1] / 0.7
    taken = scaled.log_softmax(-1).gather(-1, y[:, 1:, None]).squeeze(-1)
    return taken - SPELLINGS["entropy_by_logsumexp"](again, y, again)


def nodes_behind(value: Tensor) -> set[Any]:
    found: set[Any] = set()
    queue = [value.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in found:
            found.add(node)
            queue += [following for following, _ in node.next_functions]
    return found


def test_one_pass_and_one_backward_for_all_that_is_asked_of_the_same_rows(passes: list[int]) -> None:
    pair = Pair()
    value = both(pair.deferred()[0], pair.y)
    assert passes == [B * (T - 1)]
    assert sum("logprobs" in node.name() for node in nodes_behind(value)) == 1
    assert not any("Entry" in node.name() for node in nodes_behind(value))


@pytest.mark.parametrize(
    "name", ["entropy_in_chunks", "logsumexp_row_by_row", "log_softmax_row_by_row", "chunks_joined", "categorical_both"]
)
def test_parts_of_a_whole_share_its_pass(name: str, passes: list[int]) -> None:
    pair = Pair()
    SPELLINGS[name](pair.deferred()[0], pair.y, pair.deferred()[1])
    assert len(passes) == 1


def test_ignored_labels_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_rlhf.backends import chunked

    rows: list[int] = []
    own = chunked.statistics

    def counted(some: Any, *args: Any) -> Any:
        rows.append(some.count)
        return own(some, *args)

    monkeypatch.setattr(chunked, "statistics", counted)
    pair = Pair()
    labels = pair.y.clone()
    labels[:, :5] = -100
    F.cross_entropy(pair.deferred()[0].view(-1, V), labels.view(-1))
    assert rows == [B * 2]


def test_what_was_found_without_gradients_is_not_taken_where_they_are_wanted(passes: list[int]) -> None:
    pair = Pair()
    logits, dense = pair.deferred()[0], pair.dense()[0]
    with torch.no_grad():
        assert not SPELLINGS["entropy_entr"](logits, pair.y, logits).requires_grad
        inside = logits / 2.0
    ours, truth = (SPELLINGS["entropy_entr"](z, pair.y, z) for z in (logits, dense))
    for mine, theirs in zip(gradients(ours, pair.leaves), gradients(truth, pair.leaves)):
        torch.testing.assert_close(mine, theirs)
    assert len(passes) == 2
    with torch.no_grad():  # and the other way round
        assert not logits.logsumexp(-1).requires_grad
    assert len(passes) == 2
    for apart in (inside, logits.detach(), logits.detach() * 3.0):
        assert not apart.requires_grad
        assert not apart.logsumexp(-1).requires_grad


def test_a_checkpoint_sees_its_pass_again() -> None:
    from torch.utils.checkpoint import checkpoint

    pair = Pair()

    def run(logits: Tensor) -> Tensor:
        entropy = checkpoint(SPELLINGS["entropy_of_products"], logits, pair.y, logits, use_reentrant=False)
        taken = SPELLINGS["log_softmax_gather"](logits, pair.y, logits)
        return entropy + taken

    ours, truth = run(pair.deferred()[0]), run(pair.dense()[0])
    torch.testing.assert_close(ours, truth)
    for mine, theirs in zip(gradients(ours, pair.leaves), gradients(truth, pair.leaves)):
        torch.testing.assert_close(mine, theirs)
    again = checkpoint(SPELLINGS["entropy_of_products"], pair.deferred()[0], pair.y, None, use_reentrant=True)
    with pytest.raises(NotImplementedError, match="requires_grad"):
        again.sum().backward()


def test_backward_twice() -> None:
    pair = Pair()
    ours, truth = both(pair.deferred()[0], pair.y), both(pair.dense()[0], pair.y)
    for _ in range(2):
        (3.7 * ours).sum().backward(retain_graph=True)
    found = [leaf.grad for leaf in pair.leaves[:3]]
    expected = torch.autograd.grad(2 * 3.7 * truth.sum(), pair.leaves[:3])
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs)


# -------------------------------------------------------------------------------------------------------------- in place


def test_a_view_that_was_changed_in_place_leaves_no_stale_tensor_in_use() -> None:
    pair = Pair()
    logits = pair.deferred()[0]
    view, copied = logits[:, 1:], logits.clone()
    view /= 2.0
    torch.testing.assert_close(fr.materialise(view), pair.dense()[0][:, 1:] / 2.0)
    torch.testing.assert_close(fr.materialise(copied), pair.dense()[0])
    with pytest.raises(NotImplementedError, match="changed in place through another one"):
        logits.logsumexp(-1)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="without gradients"):
        view.div_(2.0)


def test_an_optimizers_step_between_forward_and_result_is_refused() -> None:
    pair = Pair()
    logits = pair.deferred()[0]
    with torch.no_grad():
        pair.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place since the forward"):
        logits.logsumexp(-1)


# ------------------------------------------------------------------------------------------------------ dtypes and values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", sorted({*SPELLINGS} - {"temperature_per_row"}))
def test_dtypes_are_those_of_torch_and_results_are_rounded_once(name: str, dtype: torch.dtype, autocast: bool) -> None:
    pair = Pair(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and dtype is not torch.float16):
        ours = SPELLINGS[name](*_arguments(pair, pair.deferred()))
        theirs = SPELLINGS[name](*_arguments(pair, pair.dense()))
    assert ours.dtype is theirs.dtype
    exact = copy.deepcopy(pair)
    for part in ("hidden", "ref_hidden", "weight", "ref_weight", "bias"):
        setattr(exact, part, getattr(pair, part).detach().double())
    with torch.no_grad():
        truth = SPELLINGS[name](*_arguments(exact, exact.dense()))
    error, torchs = ((value.double() - truth).abs().nan_to_num(torch.inf).max().item() for value in (ours, theirs))
    eps = torch.finfo(torch.bfloat16 if autocast else ours.dtype).eps  # autocast rounds the operands
    assert error <= 2 * torchs + 2 * eps * max(1.0, truth.abs().max().item()) + 1e-5


def test_results_of_bf16_logits_asked_for_in_fp32_keep_its_digits() -> None:
    pair = Pair(torch.bfloat16)
    truth = F.linear(pair.hidden.double(), pair.weight.double(), pair.bias.double()).log_softmax(-1)
    ours = pair.deferred()[0].float().log_softmax(-1).gather(-1, pair.y[..., None])
    assert ours.dtype is torch.float32
    assert (ours - truth.gather(-1, pair.y[..., None])).abs().max() < 5e-5


FORMS: dict[str, Any] = {
    "logits": lambda z: z,
    "scaled": lambda z: 3.0 * torch.tanh(z / 2.0) / 0.7,
    "rows": lambda z: z[:, 1::2].flatten(0, 1)[[3, 0, 3]],
    "transposed": lambda z: z.transpose(0, 1).transpose(1, 2),
    "log_probs": lambda z: z.log_softmax(-1) - 1.0,
    "probabilities": lambda z: 2.0 * z.softmax(-1),
    "product": lambda z: -z.softmax(-1) * z.log_softmax(-1),
    "shifted": lambda z: z - z.logsumexp(-1, keepdim=True),
    "exponentials": lambda z: z.exp(),
    "cut": lambda z: z[..., :50] / torch.full((B, T, 1), 2.0, dtype=z.dtype),
}


@pytest.mark.parametrize("name", FORMS)
def test_all_of_it_for_who_asks_by_name(name: str) -> None:
    pair = Pair()
    ours, truth = fr.materialise(FORMS[name](pair.deferred()[0])), FORMS[name](pair.dense()[0])
    assert type(ours) is Tensor
    torch.testing.assert_close(ours, truth)
    for mine, theirs in zip(gradients(ours, pair.leaves), gradients(truth, pair.leaves)):
        torch.testing.assert_close(mine, theirs)


def test_materialise_takes_what_is_there() -> None:
    dense = torch.zeros(2, 3)
    assert fr.materialise(dense) is dense
    with pytest.raises(TypeError, match="logits must be a tensor, got str"):
        fr.materialise("logits")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- without numbers


def test_what_is_known_without_numbers_computes_nothing(passes: list[int]) -> None:
    pair = Pair(torch.float32)
    logits = pair.deferred()[0]
    assert (
        repr(logits) == str(logits) == f"{logits}" == "Deferred((3, 7, 101), torch.float32, never computed as a whole)"
    )
    assert (logits.shape, logits.size(-1), logits.ndim, logits.numel(), len(logits)) == ((B, T, V), V, 3, B * T * V, B)
    assert (logits.dtype, logits.device, logits.is_cuda) == (torch.float32, torch.device("cpu"), False)
    assert logits.requires_grad
    assert logits.grad_fn is not None
    assert logits.is_contiguous()
    assert logits.float() is logits
    assert logits.to("cpu") is logits
    assert logits.contiguous() is logits
    assert logits.half().dtype is torch.float16
    assert logits.new_zeros(2).dtype is torch.float32
    assert torch.is_tensor(logits)
    assert torch.is_floating_point(logits)
    assert [row.shape for row in logits] == [(T, V)] * B
    assert passes == []


@pytest.mark.parametrize("how", [pickle.dumps, copy.deepcopy, np.asarray])
def test_copies_of_what_is_not_there_are_refused(how: Any) -> None:
    with pytest.raises(NotImplementedError, match="not for deferred logits"):
        how(Pair().deferred()[0])


def test_a_compiled_function_leaves_them_out_of_its_graph() -> None:
    """Right, whatever it compiles; results that are ordinary tensors are in graphs again."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (SPELLINGS["log_softmax_gather"](z, y, z) * 2).sin().sum() + SPELLINGS["entropy_entr"](z, y, z).mean()

    pair = Pair()
    compiled = torch.compile(loss, backend="eager")
    for _ in range(2):
        ours, truth = compiled(pair.deferred()[0], pair.y), loss(pair.dense()[0], pair.y)
        torch.testing.assert_close(ours, truth)
        for mine, theirs in zip(gradients(ours, pair.leaves), gradients(truth, pair.leaves)):
            torch.testing.assert_close(mine, theirs)
    with pytest.raises(Exception, match="not for deferred logits"):
        torch.compile(lambda z: z.relu(), backend="eager")(pair.deferred()[0])


def test_no_rows() -> None:
    pair = Pair()
    none, dense = pair.deferred()[0][:, :0], pair.dense()[0][:, :0]
    for name in ("log_softmax_gather", "entropy_of_products", "entropy_by_logsumexp"):
        assert SPELLINGS[name](none, pair.y[:, :0], none).shape == SPELLINGS[name](dense, pair.y[:, :0], dense).shape


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda z, y: z.log_softmax(-1).gather(-1, y), "index must be int64 of 3 dimensions"),
        (
            lambda z, y: z.log_softmax(-1).gather(-1, y[..., None] + V),
            r"ids must lie in \[0, 101\)|targets must lie in",
        ),
        (lambda z, y: F.cross_entropy(z.flatten(0, 1), y), "target must be"),
        (lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="max"), "reduction must be"),
        (lambda z, y: (z / torch.zeros(B, T, 1, dtype=z.dtype)).logsumexp(-1), "temperature must be positive"),
    ],
)
def test_bad_arguments(call: Any, why: str) -> None:
    pair = Pair()
    with pytest.raises(ValueError, match=why):
        call(pair.deferred()[0], pair.y)


def test_a_learned_temperature_is_refused() -> None:
    pair = Pair()
    temperature = torch.ones(B, T, 1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="temperature of deferred logits must not require a gradient"):
        (pair.deferred()[0] / temperature).logsumexp(-1)
