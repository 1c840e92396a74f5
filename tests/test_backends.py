import importlib
import inspect

import pytest
import torch

from fused_rlhf import backends
from fused_rlhf.backends import chunked, reference
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


FUNCTIONS = [name for name, value in vars(interface.Backend).items() if inspect.isfunction(value) and name[0] != "_"]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", list(backends.BACKENDS))
def test_backends_have_the_functions_of_the_protocol(name, function):
    """The type checker holds them to it too; this is for what it is not run on."""
    expected = list(inspect.signature(getattr(interface.Backend, function)).parameters)[1:]  # self
    module = importlib.import_module(backends.BACKENDS[name])
    assert list(inspect.signature(getattr(module, function)).parameters) == expected


def test_the_protocol_is_what_the_op_and_the_benchmarks_need():
    needed = {"statistics", "gradients", "loss", "one_pass", "divergence", "divergence_gradients", "memory"}
    assert needed < set(FUNCTIONS)
