"""verl's function by its signature, against dense torch in fp64."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_rlhf.integrations.verl import (
    FusedLinearForPPO,
    linear_cross_entropy,
    patch_verl,
    patched_verl,
    sum_pi_squared,
    unpatch_verl,
)
from tests.helpers import dense, inputs, relative, worst

N, H, V = 37, 24, 1003


def test_signature() -> None:
    parameters = inspect.signature(linear_cross_entropy).parameters
    assert list(parameters) == ["hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"]
    assert [p.default for p in parameters.values()][3:] == [1.0, "none", None]


def reduced(logprobs: Tensor, reduction: str | None) -> Tensor:
    return {"sum": logprobs.sum(), "mean": logprobs.mean()}.get(str(reduction).lower(), logprobs)


@pytest.mark.parametrize("reduction", ["none", None, "sum", "mean", "SUM"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, None])
def test_values_and_gradients(reduction: str | None, temperature: float | None) -> None:
    data = inputs(N, H, V)
    leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]

    def gradients(logprobs: Tensor, entropy: Tensor) -> list[Tensor]:
        weights = torch.linspace(-1, 2, N, dtype=torch.float64)
        loss = (weights[: logprobs.numel()] * logprobs).sum() + (weights.square() * entropy).sum()
        (3.7 * loss).backward(retain_graph=True)
        loss.backward()
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return found  # type: ignore[return-value]

    logprobs, entropy = linear_cross_entropy(leaves[0], leaves[1], data["targets"], temperature, reduction)
    truth = dense(leaves[0], leaves[1], data["targets"], temperature=temperature or 1.0)
    expected = reduced(truth["logprobs"], reduction)
    assert logprobs.shape == expected.shape
    assert entropy.shape == (N,)
    torch.testing.assert_close(logprobs, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entropy, truth["entropy"], rtol=1e-10, atol=1e-10)
    for found, true in zip(gradients(logprobs, entropy), gradients(expected, truth["entropy"])):
        assert relative(found, true) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_fp32_of_unrounded_logits(dtype: torch.dtype) -> None:
    data = inputs(N, H, V, dtype)
    logprobs, entropy = linear_cross_entropy(data["hidden"], data["weight"], data["targets"], 0.7)
    assert logprobs.dtype == entropy.dtype == torch.float32
    truth = dense(data["hidden"].double(), data["weight"].double(), data["targets"], temperature=0.7)
    assert worst(logprobs, truth["logprobs"]) <= 2e-5
    assert worst(entropy, truth["entropy"]) <= 2e-5
    assert (logprobs <= 0).all()


def test_batched_input_gives_flat_results() -> None:
    data = inputs(12, H, V, torch.float32)
    hidden, labels = data["hidden"].view(3, 4, H), data["targets"].view(3, 4)
    logprobs, entropy = linear_cross_entropy(hidden.requires_grad_(), data["weight"], labels)
    flat = linear_cross_entropy(data["hidden"], data["weight"], data["targets"])
    assert torch.equal(logprobs, flat[0])
    assert torch.equal(entropy, flat[1])
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (3, 4, H)
    # The strides of a transposed input, as of (T, B) labels, are no matter.
    turned, _ = linear_cross_entropy(hidden.transpose(0, 1), data["weight"], labels.transpose(0, 1))
    torch.testing.assert_close(turned.view(4, 3).T.reshape(-1), logprobs)


def test_left_out_tokens_and_frozen_head() -> None:
    data = inputs(N, H, V)
    hidden, labels = data["hidden"].requires_grad_(), data["targets"].clone()
    labels[::3] = -100
    logprobs, entropy = linear_cross_entropy(hidden, data["weight"], labels, reduction="mean")
    kept = labels != -100
    truth = dense(hidden[kept], data["weight"], labels[kept])
    torch.testing.assert_close(logprobs, truth["logprobs"].mean())
    torch.testing.assert_close(entropy[kept], truth["entropy"])
    assert not entropy[~kept].any()
    logprobs.backward()
    assert data["weight"].grad is None
    assert hidden.grad is not None
    assert not hidden.grad[~kept].any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"reduction": "batchmean"},
            ValueError,
            r"reduction must be one of \['none', 'sum', 'mean'\], got 'batchmean'",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and positive, got 0.0"),
        ({"labels": torch.zeros(N + 1, dtype=torch.int64)}, ValueError, r"labels must have shape \(37,\)"),
        ({"labels": torch.full((N,), V)}, ValueError, r"targets must lie in \[0, 1003\)"),
        ({"weight": torch.zeros(V, H + 1)}, ValueError, "weight must be"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    data = inputs(N, H, V, torch.float32)
    arguments = {"hidden": data["hidden"], "weight": data["weight"], "labels": data["targets"], **changes}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


def test_a_group_of_one() -> None:
    """Of several: parallel_cases.py."""
    data = inputs(N, H, V, torch.float32)
    arguments = (data["hidden"], data["weight"], data["targets"], 1.0, "none")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        assert torch.equal(linear_cross_entropy(*arguments, group)[0], linear_cross_entropy(*arguments)[0])
    finally:
        torch.distributed.destroy_process_group()


def test_megatrons_layout() -> None:
    """Hidden states (s, 1, H) beside labels (1, s): one packed sequence, whose tokens are in one order in both."""
    data = inputs(N, H, V)
    flat = linear_cross_entropy(data["hidden"], data["weight"], data["targets"])
    found = linear_cross_entropy(data["hidden"][:, None], data["weight"], data["targets"][None])
    assert all(map(torch.equal, found, flat))
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 3\), as hidden, or \(1, s\).*got \(3, 2\)"):
        linear_cross_entropy(torch.ones(2, 3, 4), torch.ones(5, 4), torch.zeros(3, 2, dtype=torch.int64))


# As verl calls it, read from its source of 2026.
OF_MODULE = ("hidden_states", "vocab_weights", "input_ids", "temperature")


class Theirs(torch.nn.Module):
    """Stands in for verl's FusedLinearForPPO."""

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):  # type: ignore[no-untyped-def]
        raise AssertionError("verl's own")


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    unpatch_verl()


def test_the_module_of_the_torch_backend() -> None:
    assert tuple(inspect.signature(FusedLinearForPPO().forward).parameters) == OF_MODULE
    data = inputs(12, H, V)
    leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
    found = FusedLinearForPPO(chunk_size=5)(
        leaves[0].view(3, 4, H), leaves[1], data["targets"].view(3, 4).int(), temperature=0.7
    )
    truth = dense(leaves[0], leaves[1], data["targets"], temperature=0.7)
    upstream = torch.linspace(-1, 2, 12, dtype=torch.float64)
    for value, name in zip(found, ("logprobs", "entropy")):
        torch.testing.assert_close(value, truth[name].view(3, 4))
        ours, theirs = (
            torch.autograd.grad(v.reshape(-1), leaves, upstream, retain_graph=True) for v in (value, truth[name])
        )
        assert all(relative(a, b) < 1e-10 for a, b in zip(ours, theirs))


def test_sum_of_squared_probabilities() -> None:
    """By verl's own formula of the logits."""
    data = inputs(12, H, V)
    hidden = data["hidden"].requires_grad_()
    z = (hidden @ data["weight"].T / 0.7).view(3, 4, V)
    truth = torch.exp(torch.logsumexp(2 * z, -1) - 2 * torch.logsumexp(z, -1))
    found = sum_pi_squared(hidden.view(3, 4, H), data["weight"], 0.7)
    torch.testing.assert_close(found, truth)
    ours, theirs = (torch.autograd.grad((v * v).sum(), hidden, retain_graph=True)[0] for v in (found, truth))
    assert relative(ours, theirs) < 1e-10


def modules(forward: Any) -> dict[str, ModuleType]:
    """verl as far as it is looked at: where the function is, a module that imported it by name, and one that did not."""

    class LinearCrossEntropy(torch.autograd.Function):
        pass

    LinearCrossEntropy.forward = staticmethod(forward)  # type: ignore[method-assign]
    names = [
        "verl",
        "verl.utils",
        "verl.utils.kernel",
        "verl.utils.kernel.linear_cross_entropy",
        "verl.utils.experimental",
        "verl.utils.experimental.torch_functional",
        "verl.models.fused",
        "verl.x",
    ]
    made = {name: ModuleType(name) for name in names}
    home: Any = made["verl.utils.kernel.linear_cross_entropy"]
    home.LinearCrossEntropy = LinearCrossEntropy
    home.linear_cross_entropy = LinearCrossEntropy.apply
    made["verl.utils.experimental.torch_functional"].FusedLinearForPPO = Theirs  # type: ignore[attr-defined]
    made["verl.models.fused"].fused = Theirs  # type: ignore[attr-defined]
    made["verl.models.fused"].linear_cross_entropy = home.linear_cross_entropy  # type: ignore[attr-defined]
    made["verl.x"].linear_cross_entropy = "its own"  # type: ignore[attr-defined]
    return made


def test_patch_verl_reaches_modules_that_hold_the_function_already(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):  # type: ignore[no-untyped-def]
        raise AssertionError("verl's own")

    made = modules(forward)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    patch_verl()
    patch_verl()
    holders = ("verl.utils.kernel.linear_cross_entropy", "verl.models.fused")
    for name in holders:
        assert made[name].linear_cross_entropy is linear_cross_entropy
    assert made["verl.models.fused"].fused is FusedLinearForPPO
    assert made["verl.x"].linear_cross_entropy == "its own"
    # A module that is imported after the patch holds ours, and is to have verl's own again as well.
    late: Any = ModuleType("verl.late")
    monkeypatch.setitem(sys.modules, "verl.late", late)
    late.linear_cross_entropy = made["verl.models.fused"].linear_cross_entropy
    own = vars(made["verl.utils.kernel.linear_cross_entropy"])["LinearCrossEntropy"].apply
    for _ in range(2):
        unpatch_verl()
        assert all(made[name].linear_cross_entropy == own for name in holders)
        assert late.linear_cross_entropy == own
        assert made["verl.models.fused"].fused is Theirs
    with patched_verl():
        assert late.linear_cross_entropy is linear_cross_entropy
    assert late.linear_cross_entropy == own


def test_nothing_is_replaced_where_one_of_the_two_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):  # type: ignore[no-untyped-def]
        raise AssertionError("verl's own")

    made = modules(forward)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    del made["verl.utils.experimental.torch_functional"].FusedLinearForPPO
    with pytest.raises(ImportError, match="FusedLinearForPPO takes None, expected"):
        patch_verl()
    assert made["verl.models.fused"].linear_cross_entropy is not linear_cross_entropy


def test_a_verl_with_other_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(ctx, hidden, weight, labels, reduction="none"):  # type: ignore[no-untyped-def]
        raise AssertionError("verl's own")

    for name, module in modules(forward).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ImportError, match=r"linear_cross_entropy takes .*'reduction'.*, expected"):
        patch_verl()
