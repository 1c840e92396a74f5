"""Functions that hand logits to kernels of their own, told of deferred ones."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_rlhf.integrations import logits
from tests.test_deferred import Pair, gradients


def kernel(*args: Any) -> Tensor:
    """Stands for one in Triton, which asks for addresses."""
    assert args[0].data_ptr()
    return args[0] * 7


@pytest.fixture
def frameworks(monkeypatch: pytest.MonkeyPatch) -> dict[str, types.ModuleType]:
    """Modules with functions of the names and arguments that these frameworks have, in a second module too."""

    def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        return kernel(logits, labels)

    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        return kernel(logits, labels)

    found = {}
    for name, function in (("openrlhf", log_probs_from_logits), ("verl", logprobs_from_logits)):
        of = logits.FUNCTIONS[name]
        parts = of.module.split(".")
        for i in range(1, len(parts) + 1):
            key = ".".join(parts[:i])
            monkeypatch.setitem(sys.modules, key, types.ModuleType(key))
        user = types.ModuleType(f"{name}.user")
        monkeypatch.setitem(sys.modules, f"{name}.user", user)
        for module in (sys.modules[of.module], user):
            setattr(module, of.name, function)
        found[name] = user
    return found


@pytest.mark.parametrize("name", ["openrlhf", "verl"])
def test_deferred_logits_go_past_the_kernel(name: str, frameworks: dict[str, types.ModuleType]) -> None:
    pair, of = Pair(), logits.FUNCTIONS[name]
    with pytest.raises(NotImplementedError, match=r"data_ptr is not for deferred logits"):
        getattr(frameworks[name], of.name)(pair.deferred()[0], pair.y)
    logits.patch(name)
    logits.patch(name)
    function = getattr(frameworks[name], of.name)
    ours, truth = function(pair.deferred()[0], pair.y), pair.dense()[0].log_softmax(-1).gather(-1, pair.y[..., None])
    torch.testing.assert_close(ours, truth.squeeze(-1))
    for mine, theirs in zip(gradients(ours, pair.leaves), gradients(truth.squeeze(-1), pair.leaves)):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(function(torch.ones(3), pair.y), torch.full((3,), 7.0))  # an ordinary one goes the way it went


def test_openrlhf_divides_in_place_as_its_entropy_expects(frameworks: dict[str, types.ModuleType]) -> None:
    logits.patch("openrlhf")
    pair = Pair()
    ours, dense = pair.deferred()[0], pair.dense()[0] / 0.7
    frameworks["openrlhf"].log_probs_from_logits(ours, pair.y, temperature=0.7)
    torch.testing.assert_close(ours.logsumexp(-1), dense.logsumexp(-1))


def test_trl_does_not_take_its_kernel() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    own = utils._supports_trl_loss_kernel
    try:
        logits.patch("trl")
        pair = Pair(torch.float32)
        assert utils._supports_trl_loss_kernel(pair.deferred()[0], pair.y, row_mask=None) is False
        dense = pair.dense()[0]
        assert utils._supports_trl_loss_kernel(dense, pair.y) == own(dense, pair.y)
    finally:
        utils._supports_trl_loss_kernel = own


def test_other_arguments_and_names_are_refused(monkeypatch: pytest.MonkeyPatch, frameworks: Any) -> None:
    with pytest.raises(ValueError, match=r"framework must be one of \['openrlhf', 'trl', 'verl'\], got 'areal'"):
        logits.patch("areal")
    of = logits.FUNCTIONS["verl"]
    monkeypatch.setattr(sys.modules[of.module], of.name, lambda logits, labels: None)
    with pytest.raises(ImportError, match=r"takes \('logits', 'labels'\), expected \('logits', 'labels', 'inplace_b"):
        logits.patch("verl")
    monkeypatch.delattr(sys.modules[of.module], of.name)
    with pytest.raises(ImportError, match="takes None"):
        logits.patch("verl")
