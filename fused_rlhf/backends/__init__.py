"""Which implementation runs: a module with the functions of `Backend`, by name or by the tensor's device."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, cast

from torch import Tensor

from fused_rlhf.kernels.interface import Backend

if TYPE_CHECKING:  # where the type checker holds every backend against the protocol
    from fused_rlhf.backends import chunked, reference
    from fused_rlhf.kernels import ops

    _complete: tuple[Backend, ...] = (chunked, reference, ops)

BACKENDS = {
    "triton": "fused_rlhf.kernels.ops",
    "chunked": "fused_rlhf.backends.chunked",
    "reference": "fused_rlhf.backends.reference",
}
VARIABLE = "FUSED_RLHF_BACKEND"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose(name: str, tensor: Tensor) -> str:
    """The backend that `name` means: "auto" takes `FUSED_RLHF_BACKEND`, else triton for a GPU tensor, else chunked.

    Raises:
        ValueError: the name is not one of "auto", "triton", "chunked", "reference".
        RuntimeError: triton was asked for by name and is not installed, or the tensor is not on a GPU.
    """
    source = "backend"
    if name == "auto" and os.environ.get(VARIABLE, "auto") != "auto":
        name, source = os.environ[VARIABLE], VARIABLE
    if name == "auto":
        return "triton" if tensor.is_cuda and _HAS_TRITON else "chunked"
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {['auto', *BACKENDS]}, got {name!r}")
    if name == "triton":
        if not _HAS_TRITON:
            raise RuntimeError(
                "backend=\"triton\" needs the package triton, which is missing; pip install 'fused-rlhf[gpu]', or use "
                'backend="chunked"'
            )
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
            raise RuntimeError(
                f'backend="triton" needs tensors on a GPU, got hidden on {tensor.device}; use backend="chunked"'
            )
    return name


def resolve(name: str, tensor: Tensor) -> Backend:
    """The backend that `name` means for this tensor; errors as `choose`."""
    return load(choose(name, tensor))


def load(name: str) -> Backend:
    """The backend of this name, a key of `BACKENDS`, whether or not it can run here."""
    return cast(Backend, importlib.import_module(BACKENDS[name]))
