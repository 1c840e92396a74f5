"""Checkpoints that a run can go on from as if it had never stopped.

    <output>/checkpoints/step-00000040/state.pt     weights in training, optimiser, schedule, random numbers, progress

A checkpoint is written under another name, flushed to the disk, and renamed when it is complete; one that is half written
has the other name and is never loaded. The last ones are kept.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch

from fused_rlhf.trainers.engine import Engine

PREFIX, PARTIAL = "step-", ".partial"


class CheckpointError(OSError):
    """A checkpoint, or another file of the run, could not be written; the checkpoints before are intact."""


def save(folder: Path, step: int, engine: Engine, progress: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step and remove all but the last `keep`; every process must call.

    `progress` holds what else the run goes on from: numbers, texts, tensors, lists and dicts of them.

    Raises CheckpointError on every process where it cannot be written.
    """
    state = engine.training_state()
    generators = engine.gather([random_state()])
    path = folder / f"{PREFIX}{step:08d}"
    error = None
    if engine.rank == 0:
        try:
            _write(path, {"step": step, "engine": state, "random": generators, "progress": progress})
            for old in complete(folder)[:-keep]:
                shutil.rmtree(old)
        except (OSError, RuntimeError) as found:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(path.with_name(path.name + PARTIAL), ignore_errors=True)
            last = latest(folder)
            rest = f"the last one that is complete is {last}" if last else "there is none before it"
            error = CheckpointError(f"the checkpoint {path} cannot be written: {str(found).splitlines()[0]}; {rest}")
            error.__cause__ = found
    engine.agree(error)
    return path


def load(path: Path, engine: Engine) -> tuple[int, dict[str, Any]]:
    """Put weights, optimiser, schedule and random numbers back; -> the step and `progress`. Every process must call."""
    saved = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    engine.load_training_state(saved["engine"])
    set_random_state(saved["random"][engine.rank % len(saved["random"])])
    return saved["step"], saved["progress"]


def peek(path: Path) -> tuple[int, dict[str, Any]]:
    """The step and `progress` of a checkpoint, whose weights stay on the disk."""
    saved = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    return saved["step"], saved["progress"]


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints, in the order of their steps."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if not path.suffix)


def latest(folder: Path) -> Path | None:
    return next(reversed(complete(folder)), None)


def _write(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with (partial / "state.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    replace(partial, path)


def replace(new: Path, path: Path) -> None:
    """Make the folder `new` the folder `path`, with all of its files on the disk before it has that name.

    Whenever the process dies, `path`, or where it was about to be replaced `path`.old, is a complete one.
    """
    for file in new.iterdir():
        _flush(file)
    _flush(new)
    old = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def random_state() -> dict[str, Any]:
    """Of every generator that a run may draw from, as plain lists and tensors."""
    generator: Any = numpy.random.get_state(legacy=True)
    name, keys, *rest = generator
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
