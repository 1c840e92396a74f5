import inspect

import pytest
import torch

from fused_rlhf import backends, chunked, reference
from fused_rlhf.kernels import interface


def test_auto_on_a_cpu_is_chunked():
    assert backends.resolve("auto", torch.ones(1)) is chunked
    assert backends.resolve("reference", torch.ones(1)) is reference


def test_the_variable_overrides_auto_and_nothing_else(monkeypatch):
    monkeypatch.setenv("FUSED_RLHF_BACKEND", "reference")
    assert backends.resolve("auto", torch.ones(1)) is reference
    assert backends.resolve("chunked", torch.ones(1)) is chunked


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', 'triton', .*, got 'x'"):
        backends.resolve("x", torch.ones(1))


@pytest.mark.parametrize("function", ["forward", "backward", "one_pass"])
def test_backends_take_the_same_arguments(function):
    expected = {
        "forward": ["hidden", "head", "targets", "temperature", "outputs"],
        "backward": ["hidden", "head", "targets", "temperature", "stats", "grads", "needs"],
        "one_pass": ["hidden", "head", "targets", "temperature", "outputs", "objective", "needs"],
    }[function]
    assert f"{function}({', '.join(expected)})" in interface.__doc__
    for module in (chunked, reference):
        assert list(inspect.signature(getattr(module, function)).parameters) == expected
