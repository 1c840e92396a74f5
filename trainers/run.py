"""A run's folder: its metrics and curves, its samples, models and checkpoints.

    <output>/config.yaml     the effective configuration; `--config` takes it back
    <output>/metrics.jsonl   one JSON object a line, written as it happens
    <output>/samples.jsonl   prompts, completions and rewards
    <output>/curves.png      the metrics by step
    <output>/report.html     all of it on one page
    <output>/report.html     how it went, on one page
    <output>/model/          the model and tokenizer of the last save, for `from_pretrained`
    <output>/value_model/    the value model of a PPO run, which `--value-model` takes too
    <output>/checkpoints/    what `--resume` goes on from
    <output>/...             what the trackers write

A checkpoint or model replaces the one before it as a whole, so that there is a complete one whenever the process dies.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from tqdm import tqdm

from fused_rlhf.trainers import adapters, checkpoint, curves, trackers
from fused_rlhf.trainers.card import chosen, model_card
from fused_rlhf.trainers.checkpoint import CheckpointError
from fused_rlhf.trainers.config import TrainConfig, require, to_dict, to_yaml
from fused_rlhf.trainers.engine import Engine
from fused_rlhf.trainers.report import Report, fields, first_and_last

# What a resumed run may be given anew: none of it changes the steps already taken.
FREE = {"resume", "overwrite", "output", "steps", "save_steps", "keep_checkpoints", "report_to", "threads"}

MODELS = ("model", "value_model")

# Options that may name a file or folder to read from.
SOURCES = {"model", "data", "ref_model", "reward_model", "value_model"}

# Columns of a sample that come first, whatever others the data has.
SAMPLED = ("prompt", "completion", "chosen", "rejected", "reward", "score")

LINE = 100  # characters of a sample that is printed in one line

Logged = dict[str, float]  # metrics as they are logged: of a step or an evaluation, merged


class Run:
    """One run's folder, trackers and progress bar. Process 0 writes; the others have the same numbers.

    Nothing is written before `open`. Raises FileExistsError where `output` already holds a run and neither `overwrite`
    nor `resume` is set, FileNotFoundError where there is no run to resume, ValueError for options or data at odds with
    those of the run to be resumed, NotADirectoryError or PermissionError where there can be no folder.
    """

    def __init__(self, engine: Engine, data: str = "") -> None:
        self.engine = engine
        self.data = data  # a fingerprint of what it learns from
        self.config: TrainConfig = engine.config
        self.folder = Path(self.config.output).expanduser()
        self.model_path = self.folder / "model"
        self.checkpoints = self.folder / "checkpoints"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.samples_path = self.folder / "samples.jsonl"
        self.curves_path = self.folder / "curves.png"
        self.report_path = self.folder / "report.html"
        self.config_path = self.folder / "config.yaml"
        self.metrics: list[dict[str, Any]] = []
        self.main = engine.rank == 0
        self._bar: tqdm[int] | None = None
        self._shown: dict[str, str] = {}
        self._warned: dict[str, int] = {}
        self._names = trackers.Names()
        self._started = time.perf_counter()
        error = None
        if self.main:  # alone, so that nobody sees what it writes next
            try:
                self._check()
            except (ValueError, OSError) as found:
                error = found
        engine.agree(error)

    def _check(self) -> None:
        config = self.config
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(f"output: {str(self.folder)!r} cannot be a folder, for {str(there)!r} is a file")
        if not os.access(there, os.W_OK):
            raise PermissionError(f"output: {str(self.folder)!r} cannot be written, for {str(there)!r} may not be")
        for name, value in to_dict(config).items():
            path = Path(value).expanduser().resolve() if name in SOURCES and value else self.folder
            for mine in (self.folder / model for model in MODELS):
                inside = mine.resolve() in (path, *path.parents)
                require(not inside, name, value, f"a path outside of {mine}, which the run replaces")
        if config.resume and not self.metrics_path.exists():
            raise FileNotFoundError(f"resume: {str(self.folder)!r} holds no run to go on from")
        if self.metrics_path.exists() and not (config.overwrite or config.resume):
            raise FileExistsError(
                f"output: {str(self.folder)!r} already holds a run; choose another, --resume it, or --overwrite it"
            )
        if config.resume and self.config_path.exists():
            saved = yaml.safe_load(self.config_path.read_text())
            for name, value in to_dict(config).items():
                if name not in FREE and name in saved:
                    require(value == saved[name], f"resume, {name}", value, f"{saved[name]!r} as in {self.config_path}")
        found = checkpoint.latest(self.checkpoints) if config.resume else None
        if found is not None:
            step, progress = checkpoint.peek(found)
            require(config.steps >= step, "resume, steps", config.steps, f"at least {step}, those taken by {found}")
            same = progress["data"] == self.data
            require(same, "resume, data", to_dict(config)["data"], f"the samples that {found} has learned from")

    def open(self) -> None:
        """Make the folder; empty it of the run that it holds unless that is to be resumed."""
        if self.main:
            with self._writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                if not self.config.resume:
                    shutil.rmtree(self.checkpoints, ignore_errors=True)
                    if self.metrics_path.exists():  # else a folder called model is not that of a run
                        for name in (f"{model}{end}" for model in MODELS for end in ("", ".old", ".new")):
                            shutil.rmtree(self.folder / name, ignore_errors=True)
                        for path in (self.curves_path, self.report_path):
                            path.unlink(missing_ok=True)
                for path in (self.metrics_path, self.samples_path):
                    path.touch() if self.config.resume else path.write_text("")
                self.config_path.write_text(to_yaml(dataclasses.replace(self.config, resume=False)))
        self.engine.accelerator.wait_for_everyone()
        if self.config.report_to:
            trackers.start(self.engine.accelerator, self.folder, to_dict(self.config))

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Raises CheckpointError where what is within cannot write."""
        try:
            yield
        except OSError as error:
            last = checkpoint.latest(self.checkpoints)
            left = f"; the last checkpoint is {last}" if last else ""
            raise CheckpointError(f"{path} cannot be written: {error}{left}") from error

    def steps(self, count: int, description: str, start: int = 0) -> Iterator[int]:
        """start + 1 ... count with a progress bar, on which `log` shows what it is told to."""
        numbers = range(start + 1, count + 1)
        with tqdm(
            numbers,
            desc=description,
            initial=start,
            total=count,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not self.main,
        ) as self._bar:
            self._shown = {}
            yield from self._bar
        self._bar = None

    def seconds(self) -> float:
        """Since the run began, breaks left out."""
        return time.perf_counter() - self._started

    def log(self, phase: str, step: int, metrics: Logged, show: Sequence[str] = ()) -> None:
        """Append a line to metrics.jsonl (non-finite numbers as null) and show some of it on the progress bar."""
        row = {"phase": phase, "step": step, "seconds": round(self.seconds(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.metrics.append(row)
        if self.main:
            with self._writing(self.metrics_path), self.metrics_path.open("a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        if self.config.report_to:
            # Trackers ignore steps that fall: those of the run go on from the warm-up's.
            warmed = (
                0 if phase == "warmup" else max((r["step"] for r in self.metrics if r["phase"] == "warmup"), default=0)
            )
            values = {self._names.of(f"{phase}/{name}"): value for name, value in metrics.items()}
            self.engine.accelerator.log(values, step=warmed + step)
        if self._bar is not None and show:
            self._shown |= {name: f"{metrics[name]:.3g}" for name in show if name in metrics}
            self._bar.set_postfix(self._shown, refresh=False)

    def say(self, text: str) -> None:
        """Print without breaking the progress bar."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, what: str, step: int, text: str) -> None:
        """Say the first time that something holds of a step; `remind` says how often it did."""
        self._warned[what] = self._warned.get(what, 0) + 1
        if self._warned[what] == 1:
            self.say(f"warning: step {step}: {what}; {text}")

    def remind(self) -> None:
        for what, count in self._warned.items():
            if count > 1:
                self.say(f"warning: in {count} steps {what}")

    def samples(self, step: int, samples: Iterable[dict[str, Any]], show: int = 4) -> None:
        """Append samples to samples.jsonl and print the first `show`."""
        if not self.main:
            return
        # Halves of characters, which UTF-8 has not, as JSON escapes them.
        text: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
        with self._writing(self.samples_path), self.samples_path.open("a", **text) as file:
            for i, sample in enumerate(samples):
                first = [name for name in SAMPLED if name in sample]
                # A column named step does not hide it.
                row = {"step": step} | {name: sample[name] for name in (*first, *sample) if name != "step"}
                file.write(json.dumps(row, ensure_ascii=False, default=repr) + "\n")
                if i < show:
                    self.say(printed(row))

    def save_model(
        self, export: Callable[[Path], None], result: Logged, name: str = "model", card: bool = True
    ) -> None:
        """Make model/, or another folder of that name, what `export(folder)` writes, which every process calls. model/ or
        model.old/ is always complete.

        Raises CheckpointError where it cannot be written; the model/ before it is intact then.
        """
        new, error = self.folder / f"{name}.new", None
        if self.main:
            shutil.rmtree(new, ignore_errors=True)
        try:
            export(new)
            if self.main:
                adapted = (new / adapters.FILE).is_file()
                if card:
                    (new / "README.md").write_text(model_card(self.config, result, adapted), encoding="utf-8")
                checkpoint.replace(new, self.folder / name)
        except (OSError, SafetensorError) as found:
            shutil.rmtree(new, ignore_errors=True)
            error = CheckpointError(f"the model cannot be written to {new}: {found}")
            error.__cause__ = found
        self.engine.agree(error)

    def plot(self, names: Sequence[str]) -> None:
        """Draw curves.png, of those of `names` that changed."""
        if self.main:
            with self._writing(self.curves_path):
                curves.png(self.metrics, names, self.curves_path)

    def report(
        self, name: str, state: str, names: Sequence[str], before: Logged, after: Logged, made_of: Sequence[str]
    ) -> None:
        """Write report.html: how the run of this name ended, the evaluations, curves of `names`."""
        if not self.main:
            return
        page = Report(
            name=name,
            folder=str(self.folder),
            state=state,
            seconds=self.seconds(),
            made_of=made_of,
            before=before,
            after=after,
            warnings=[what + (f" (in {count} steps)" if count > 1 else "") for what, count in self._warned.items()],
            curves=curves.svg(self.metrics, names),
            samples=first_and_last(self.samples_path),
            changed=chosen(self.config),
            options=to_yaml(dataclasses.replace(self.config, resume=False)),
        )
        with self._writing(self.report_path):
            self.report_path.write_text(page.html(), encoding="utf-8", errors="backslashreplace")

    def progress(self) -> dict[str, Any]:
        """For a checkpoint: how far the files of this folder reach now."""
        sizes = [path.stat().st_size if self.main else 0 for path in (self.metrics_path, self.samples_path)]
        return {"sizes": sizes, "seconds": self.seconds(), "data": self.data}

    def restore(self, progress: dict[str, Any] | None) -> None:
        """Cut the files to where they were then (None: at the start), and go on with the clock."""
        sizes, seconds = (progress["sizes"], progress["seconds"]) if progress else ([0, 0], 0.0)
        if self.main:
            for path, size in zip((self.metrics_path, self.samples_path), sizes, strict=True):
                with path.open("rb+") as file:
                    file.truncate(size)
        self.engine.accelerator.wait_for_everyone()
        self.metrics = [json.loads(line) for line in self.metrics_path.read_text().splitlines()]
        self._started = time.perf_counter() - seconds


def printed(sample: dict[str, Any]) -> str:
    """In one line where it is short, else a column each, without what would fill the screen."""
    line = "  ".join(f"{name}={value!r}" for name, value in sample.items() if name != "step")
    if len(line) <= LINE:
        return f"    {line}"
    columns = fields(sample)
    wide = max(len(name) for name, _ in columns)
    lines = [f"    {'-' * LINE}"]
    for name, text in columns:
        shown = text if len(text) <= 8 * LINE else f"{text[: 8 * LINE]} ..."
        lines.append(f"    {name:<{wide}}  " + shown.rstrip("\n").replace("\n", f"\n    {'':<{wide}}  "))
    return "\n".join(lines)
