"""What every trainer does around its steps: the run's folder, its metrics and curves, its samples and checkpoints.

    <output>/config.yaml     the effective configuration; `--config` takes it back
    <output>/metrics.jsonl   one JSON object a line, written as it happens
    <output>/samples.jsonl   prompts, completions and rewards
    <output>/curves.png      the metrics by step
    <output>/model/          the latest checkpoint, model and tokenizer

A checkpoint replaces the one before it as a whole, so that there is a complete one whenever the process dies.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Run:
    """One run's folder and progress bar.

    Raises FileExistsError where `output` already holds a run and `overwrite` is not set.
    """

    def __init__(self, output: str | Path, config: Any, overwrite: bool = False) -> None:
        self.folder = Path(output).expanduser()
        self.model_path = self.folder / "model"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.samples_path = self.folder / "samples.jsonl"
        self.curves_path = self.folder / "curves.png"
        if self.metrics_path.exists() and not overwrite:
            raise FileExistsError(f"output: {str(self.folder)!r} already holds a run; choose another or --overwrite")
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.metrics_path, self.samples_path):
            path.write_text("")
        (self.folder / "config.yaml").write_text(to_yaml(config))
        self.metrics: list[dict[str, Any]] = []
        self.started = time.perf_counter()
        self._bar: tqdm[int] | None = None
        self._shown: dict[str, str] = {}

    def steps(self, count: int, description: str) -> Iterator[int]:
        """1 ... count with a progress bar, on which `log` shows what it is told to."""
        with tqdm(range(1, count + 1), desc=description, dynamic_ncols=True, mininterval=0.5) as self._bar:
            self._shown = {}
            yield from self._bar
        self._bar = None

    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.started

    def log(self, phase: str, step: int, metrics: dict[str, float], show: Sequence[str] = ()) -> None:
        """Append a line to metrics.jsonl (non-finite numbers as null) and show some of it on the progress bar."""
        row = {"phase": phase, "step": step, "seconds": round(self.seconds(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.metrics.append(row)
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._bar is not None and show:
            self._shown |= {name: f"{metrics[name]:.3g}" for name in show if name in metrics}
            self._bar.set_postfix(self._shown, refresh=False)

    def say(self, text: str) -> None:
        """Print without breaking the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def samples(self, step: int, samples: Iterable[dict[str, Any]], show: int = 4) -> None:
        """Append samples to samples.jsonl and print the first `show`."""
        with self.samples_path.open("a") as file:
            for i, sample in enumerate(samples):
                file.write(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n")
                if i < show:
                    self.say("    " + "  ".join(f"{name}={value!r}" for name, value in sample.items()))

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make model/ this model and tokenizer. Whenever the process dies, model/ or model.old/ is a complete one."""
        new, old = self.folder / "model.new", self.folder / "model.old"
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for path in new.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if self.model_path.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.model_path.rename(old)
        new.rename(self.model_path)
        shutil.rmtree(old, ignore_errors=True)

    def plot(self, names: Sequence[str]) -> None:
        """Draw curves.png: a panel for each of `names` that was logged, a line for each phase."""
        # Figure alone, without pyplot: no display, no global state.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        logged = [name for name in names if any(row.get(name) is not None for row in self.metrics)]
        if not logged:
            return
        rows = math.ceil(len(logged) / 3)
        figure = Figure(figsize=(12, 3 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for i, name in enumerate(logged):
            axes = figure.add_subplot(rows, 3, i + 1)
            for phase in dict.fromkeys(row["phase"] for row in self.metrics):
                points = [(r["step"], r[name]) for r in self.metrics if r["phase"] == phase and r.get(name) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), label=phase, marker="o" if len(points) < 20 else None)
            axes.set_title(name)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(self.curves_path, dpi=100)


def require(holds: bool, name: str, value: object, expectation: str) -> None:
    """Raises ValueError naming an option, its value and what was expected, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}: expected {expectation}; got {value!r}")


def require_choices(config: Any) -> None:
    """Raises ValueError where a field annotated with a Literal holds something else."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            require(getattr(config, name) in get_args(hint), name, getattr(config, name), f"one of {get_args(hint)}")


def to_yaml(config: Any) -> str:
    """A configuration dataclass as YAML."""
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False)


def read_yaml(path: Path, config_class: type) -> dict[str, Any]:
    """The mapping in a YAML file, every key of which is a field of `config_class`.

    Raises FileNotFoundError, or ValueError where it is no mapping or has other keys, listing those allowed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config: there is no file {str(path)!r}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} must hold a mapping of option: value, got a {type(values).__name__}")
    allowed = [field.name for field in dataclasses.fields(config_class)]
    unknown = [key for key in values if key not in allowed]
    if unknown:
        raise ValueError(f"config: {path} has unknown keys {unknown}; allowed are {allowed}")
    return values
