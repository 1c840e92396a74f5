"""What GRPO, PPO and DPO share: what a run is made of, its plan, and its course.

    warm-up -> evaluation -> steps, with evaluations and checkpoints between them -> evaluation

A trainer is a `Trainer` with what it learns from, and three verbs: `supervise`, `step`, `evaluate`
(which `describe` puts into words).
"""

from __future__ import annotations

import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

import fused_rlhf as fr
from fused_rlhf import notices
from fused_rlhf.objectives import PolicyLoss
from fused_rlhf.op.execute import serves_one_pass
from fused_rlhf.preferences import PreferenceLoss
from fused_rlhf.trainers import adapters, checkpoint, planning
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.checkpoint import CheckpointError
from fused_rlhf.trainers.config import TrainConfig, differs, require
from fused_rlhf.trainers.engine import Engine, NonFiniteLoss, Placed, copy_parameters
from fused_rlhf.trainers.pictures import PictureError
from fused_rlhf.trainers.planning import Workload
from fused_rlhf.trainers.rewards import RewardError
from fused_rlhf.trainers.rollout_config import CUTS, RolloutConfig
from fused_rlhf.trainers.run import Logged, Run
from fused_rlhf.trainers.sampler import SamplerError

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What a run leaves: the evaluations before and after its steps, where the model is, the rows of metrics.jsonl."""

    before: Logged
    after: Logged
    seconds: float
    model_path: Path
    metrics: list[dict[str, Any]]


class Controller(Protocol):
    """Something that changes during a run and belongs to its checkpoints, such as an adaptive KL coefficient: in a step,
    after its updates."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(kw_only=True)
class Trainer(ABC):
    """A model in training and its run."""

    config: TrainConfig
    loaded: models.Loaded
    engine: Engine  # of the loaded model, or of a module that holds it
    reference: Placed | None  # None where it is the model itself, as with LoRA, or is not needed
    own_reference: bool = True  # a kept reference is the model as the steps begin with, not another
    ends: Sequence[int] = ()  # tokens at which what the saved model generates ends, where they are not its own
    workload: Workload
    run: Run

    name: ClassVar[str]  # in words; in lower case, the phase in metrics.jsonl
    shown: ClassVar[Sequence[str]]  # metrics on the progress bar
    plotted: ClassVar[Sequence[str]]

    @abstractmethod
    def objective(self) -> PolicyLoss | PreferenceLoss:
        """What its updates minimise."""

    @property
    def exchanges(self) -> bool:
        """Whether processes deal each other's sequences anew, so that all have about as many tokens; pictures stay."""
        return self.config.micro_batch_tokens > 0 and self.engine.world > 1 and self.loaded.processor is None

    @abstractmethod
    def supervise(self) -> None:
        """The warm-up's own steps, where the configuration asks for some."""

    @abstractmethod
    def step(self, number: int) -> Logged:
        """Step `number`, from 1 on; -> its metrics. Nothing but the trainer's state and `number` decides what it takes."""

    @abstractmethod
    def evaluate(self) -> Logged:
        """Of the first `eval_samples` samples held out."""

    @abstractmethod
    def describe(self, metrics: Logged) -> str:
        """An evaluation in words."""

    def warm(self) -> bool:
        """What comes before the steps; -> whether there was anything. The reference begins where the warm-up ends."""
        if self.config.warmup_steps:
            self.supervise()
            if self.reference is not None and self.own_reference:
                copy_parameters(self.loaded.model, self.reference.module)
        return self.config.warmup_steps > 0

    def controllers(self) -> dict[str, Controller]:
        """By name; a reference that is the model as it was loaded is none."""
        moved = self.reference if self.config.warmup_steps and self.own_reference else None
        return {} if moved is None else {"reference": moved}

    def by_reference(self, function: Callable[..., T], *args: Any) -> T:
        """`function(model, *args)` of the reference; where none is kept, of the model itself, LoRA's adapters off."""
        if self.reference is not None:
            return self.reference(function, *args)
        with adapters.without_adapters(self.loaded.model) if self.config.lora_r else nullcontext():
            return self.engine(lambda module: function(self.loaded.model, *args))

    def save_model(self, metrics: Logged) -> None:
        """Into the run's folder, for `from_pretrained`."""
        self.run.save_model(partial(models.save, self.engine, self.loaded, ends=self.ends), metrics)

    def samples_due(self, number: int) -> bool:
        every = self.config.sample_steps
        return every > 0 and (number == 1 or number % every == 0)


def place(
    config: TrainConfig,
    accelerator: Accelerator,
    loaded: models.Loaded,
    workload: Workload,
    frozen: PreTrainedModel | None,
    module: nn.Module | None = None,
    own_rates: Sequence[tuple[nn.Module, float]] = (),
) -> tuple[Engine, Placed | None]:
    """The loaded model, or a module that holds it, in training, and the reference where there is one to keep.

    Raises ValueError for a backend that cannot run here, and for a warm-up that the processes cannot share.
    """
    size, processes = config.warmup_batch_size, accelerator.num_processes
    even = config.warmup_steps == 0 or size % processes == 0
    require(even, "warmup_batch_size", size, f"a multiple of {processes}, the processes")
    try:
        fr.backends.resolve(config.backend, next(loaded.model.parameters()).to(accelerator.device))
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    own = Engine(config, accelerator, module or loaded.model, config.steps * workload.updates, own_rates)
    return own, None if frozen is None else own.frozen(frozen)


def means(updates: Sequence[Logged]) -> Logged:
    """The metrics of a step's updates, averaged; the learning rate is the last one's."""
    result = {name: sum(metrics[name] for metrics in updates) / len(updates) for name in updates[0]}
    return result | {"learning_rate": updates[-1]["learning_rate"]}


def plan(trainer: Trainer) -> str:
    """What the run would do and need, for `--dry-run`."""
    return planning.describe(trainer.engine, trainer.loaded, trainer.workload, trainer.reference is not None)


def runs(trainer: Trainer) -> str:
    """How the losses are computed, in a line: where, over which head, in what layout, and what is passed over."""
    model: Any = trainer.loaded.model
    embeddings = model.get_output_embeddings()
    if trainer.loaded.processor is None:
        ids = torch.zeros(1, 2, dtype=torch.long, device=trainer.engine.device)
        with torch.no_grad():
            made = trainer.engine(lambda module: fr.lm_head.forward(model, ids))
        hidden, head = made.hidden, notices.in_words(made.head)
    else:  # a model that reads images may refuse a row without any
        hidden = embeddings.weight
        head = f"head {tuple(embeddings.weight.shape)}"
    trained = any(p.requires_grad for p in embeddings.parameters())
    cuts = cuts_of(trainer.config)
    mode = "two_phase" if cuts else mode_of(trainer.objective(), trained, hidden.dtype)
    backend = notices.where(hidden, trainer.config.backend)
    return f"{backend}; {head}; mode {mode}{cuts}; {trainer.loaded.layout.in_words()}"


def cuts_of(config: TrainConfig) -> str:
    """How the sampler's distribution is cut, in words; empty where it is not."""
    if not isinstance(config, RolloutConfig):
        return ""
    return "".join(f", {name} {getattr(config, name):g}" for name in CUTS if differs(config, name))


def mode_of(objective: PolicyLoss | PreferenceLoss, trained: bool, dtype: torch.dtype) -> str:
    """What "auto" means for an objective over a head that is trained or not."""
    tokenwise = isinstance(objective, PolicyLoss) and objective.tokenwise
    entropy_term = isinstance(objective, PolicyLoss) and objective.entropy_coef != 0
    once = serves_one_pass(tokenwise, entropy_term, trained) and dtype != torch.float16
    return "one_pass" if once else "two_phase"


class Interrupts:
    """Ctrl-C, put off for as long as `busy` says that there is no state to go on from; a second one is not."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        self.busy = busy
        self.asked = 0
        self.closing = False  # what is left to be saved is being saved: nothing more interrupts it
        self.ours = False

    def install(self) -> None:
        main = threading.current_thread() is threading.main_thread()
        self.ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.ours:
            signal.signal(signal.SIGINT, self._handle)

    def remove(self) -> None:
        if self.ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, *_: object) -> None:
        if self.closing:
            return
        self.asked += 1
        if self.asked > 1 or not self.busy():
            raise KeyboardInterrupt
        print("the run stops after this step; Ctrl-C again to lose it", file=sys.stderr)

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


def fit(trainer: Trainer) -> Result:
    """The run itself: warm-up, evaluation, the steps, evaluation; or what is left of them after `--resume`.

    Raises RewardError, SamplerError, PictureError, NonFiniteLoss or KeyboardInterrupt where a step does, with a checkpoint
    left behind; CheckpointError where the disk is full. Ctrl-C while a step changes the weights waits for the step's end.
    """
    config, engine, run, workload = trainer.config, trainer.engine, trainer.run, trainer.workload
    controllers, phase = trainer.controllers(), trainer.name.lower()
    done, updates = 0, -1  # updates before the step in progress, or of the last one where none is
    drawn = checkpoint.random_state()  # then
    before: Logged = {}
    after: Logged = {}  # once the steps are done
    latest: Logged = {}

    def save(step: int) -> None:
        progress = run.progress() | {"before": before, "after": after}
        progress["controllers"] = {name: controller.state_dict() for name, controller in controllers.items()}
        checkpoint.save(run.checkpoints, step, engine, progress, config.keep_checkpoints)

    def untouched() -> bool:
        """Whether all is as step `done` left it, but for random numbers."""
        return engine.updates == updates and not engine.stepping

    def save_done() -> None:
        checkpoint.set_random_state(drawn)
        save(done)

    def save_model() -> None:
        trainer.save_model(latest)
        run.plot(trainer.plotted)

    def report(state: str) -> None:
        run.report(trainer.name, state, trainer.plotted, before, {} if latest is before else latest, made_of)

    made_of = [f"{planning.parameters(engine, trainer.loaded)}; {workload.samples}", runs(trainer)]
    made_of += [adapters.in_words(trainer.loaded.model)] if config.lora_r else []
    made_of += [workload.note] if workload.note else []
    for line in made_of:
        run.say(line)
    if (still := engine.standing_still()) > 0.5:
        run.say(
            f"warning: {100 * still:.0f} % of the weights in training, of {config.dtype}, are too coarse for a step of "
            f"learning_rate={config.learning_rate:g} and will not change; keep dtype float32 (with mixed_precision bf16)"
        )
    run.open()
    found = checkpoint.latest(run.checkpoints)
    interrupts = Interrupts(lambda: updates >= 0 and not untouched())
    try:
        if engine.world == 1:
            interrupts.install()
        if found:
            done, progress = checkpoint.load(found, engine)
            before, after = progress["before"], progress["after"]
            for name, controller in controllers.items():
                controller.load_state_dict(progress["controllers"][name])
            run.restore(progress)
            run.say(f"resumed from {found}, after step {done}")
        else:
            run.restore(None)
            warmed = trainer.warm()
            before = trainer.evaluate()
            run.log(phase, 0, before)
            if warmed and config.save_steps:
                save(0)
        latest = after or before
        run.say(f"before {trainer.name}: {trainer.describe(before)}")
        for step in run.steps(config.steps, trainer.name, start=done):
            updates, after, drawn = engine.updates, {}, checkpoint.random_state()
            metrics = trainer.step(step)
            if config.eval_steps and step % config.eval_steps == 0 and step < config.steps:
                latest = trainer.evaluate()
                metrics = metrics | latest
            run.log(phase, step, metrics, show=trainer.shown)
            done, updates, drawn = step, engine.updates, checkpoint.random_state()
            interrupts.check()
            if config.save_steps and step % config.save_steps == 0 and step < config.steps:
                save(step)
                save_model()
        if not after:
            latest = after = trainer.evaluate()
            run.log(phase, config.steps, after)
            save(config.steps)
            save_model()
        report(f"{config.steps} steps done")
    except KeyboardInterrupt:
        interrupts.closing = True
        if engine.world == 1:  # the others would wait for what this process is in the middle of
            if untouched():
                save_done()
            save_model()
            run.say(f"interrupted; the model as it is now lies in {run.model_path}")
            if last := checkpoint.latest(run.checkpoints):
                run.say(f"--resume goes on from {last}")
        report(f"interrupted after step {done} of {config.steps}")
        raise
    except (RewardError, SamplerError, PictureError, NonFiniteLoss) as error:
        if not isinstance(error, NonFiniteLoss) and untouched():
            save_done()
        last = checkpoint.latest(run.checkpoints)
        left = f"; the last checkpoint is {last}" if last else ""
        with suppress(CheckpointError):
            report(f"stopped in step {done + 1} of {config.steps}: {error}")
        raise type(error)(f"step {done + 1} ({workload.of_step(done + 1)}): {error}{left}") from error
    finally:
        interrupts.remove()
    run.remind()
    run.say(f"after {trainer.name}: {trainer.describe(after)}; {run.seconds():.0f} s in all")
    for tracker in engine.accelerator.trackers:
        tracker.finish()
    return Result(before, after, run.seconds(), run.model_path, run.metrics)
