"""A model under accelerate: bare, replicated (DDP) or sharded (FSDP2), and one update of it.

    gradient of an update = sum over processes and micro-batches of the gradients of their shares of the loss

Everything that reads parameters runs as a function of the model inside the forward of one wrapper module, which is what
gets replicated or sharded. There the engine's own hooks have made the parameters whole, the LM head's among them, so
that a loss computed from hidden states and head is like any other output of a forward.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, get_scheduler

from fused_rlhf.objectives import reductions
from fused_rlhf.objectives.reductions import OF_SIDE, Metrics, Side
from fused_rlhf.trainers import launcher, private
from fused_rlhf.trainers.config import TrainConfig, require

T = TypeVar("T")
Loss = Callable[..., tuple[Tensor, Metrics]]

WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
TRAINED = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient is NaN or infinite. The optimiser has not used it."""


def start(config: TrainConfig) -> Accelerator:
    """Seed and threads, and the accelerator of this run. Call it before a model is built.

    Raises ValueError for a tracker that is unknown or not installed, and for what `accelerate launch` was told and a run
    would not do.
    """
    launcher.check(config)
    set_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    private.forget_accelerators()
    known, installed = private.trackers(), {str(name) for name in get_available_trackers()}
    for name in config.report_to:
        require(name in known, "report_to", name, f"one of {known}")
        require(name in installed, "report_to", name, f"a tracker whose package is installed (pip install {name})")
    with launcher.without_plugin():
        return Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several processes without a GPU would not find each other
            mixed_precision=config.mixed_precision,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.find_unused_parameters)],
            log_with=list(config.report_to) or None,
            project_dir=str(Path(config.output).expanduser()),
        )


def leave() -> None:
    """Leave the group of processes, if there is one: the last thing a process does that ends well."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        # Gloo's threads let go of a collective's tensors after it has returned, and abort the process if Python is shutting
        # down by then. They end with the group, but DDP never lets go of that.
        time.sleep(0.2)


class _Wrapper(nn.Module):
    """The module whose forward is whatever is asked of `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., T], *args: Any) -> T:
        return function(self.module, *args)


def _shard(wrapper: nn.Module, mixed_precision: str) -> None:
    """FSDP2 on any device: a group for each transformer block, one each for embedding and head, and one for the rest.

    A weight that has a second place, as where it is both embedding and head, is among the rest.
    """
    half = mixed_precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    places = Counter(p for _, p in wrapper.named_parameters(remove_duplicate=False))
    names, tables = private.blocks_of(wrapper), _tables(wrapper)
    blocks = [child for child in wrapper.modules() if type(child).__name__ in names]
    blocks, tables = ([m for m in some if all(places[p] == 1 for p in m.parameters())] for some in (blocks, tables))
    for table in tables:
        # The backward of neither reads it: an embedding's by its nature, the head's since the op has a copy.
        fully_shard(table, mp_policy=policy).set_unshard_in_backward(False)
    for block in reversed(blocks):  # those within others first
        fully_shard(block, mp_policy=policy)
    root: Any = fully_shard(wrapper, mp_policy=policy)
    with torch.no_grad():  # the groups find their root in its first forward, which must not be one of their own
        root(lambda module: None)
    root.reshard()


def _tables(module: nn.Module) -> list[nn.Module]:
    """Embeddings and heads."""
    both = [
        table for m in transformers_models(module) for table in (m.get_input_embeddings(), m.get_output_embeddings())
    ]
    return [table for table in both if table is not None]


def transformers_models(module: nn.Module) -> list[PreTrainedModel]:
    """The transformers models below that are no part of another."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in transformers_models(child)]


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Between modules of one architecture, placed alike."""
    for its, mine in zip(source.parameters(), target.parameters(), strict=True):
        mine.copy_(its)


def shared(rows: Sequence[T], rank: int, world: int) -> Sequence[T]:
    """A process's contiguous part; the first ones may hold one more."""
    share, rest = divmod(len(rows), world)
    begin = rank * share + min(rank, rest)
    return rows[begin : begin + share + (rank < rest)]


def steps_in_one_kernel(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether torch's fused AdamW takes them all: tried with a step of one number for each device and dtype."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    if not all(p.is_contiguous() for p in local):  # the kernel for CPUs passes over strides
        return False
    for device, dtype in {(p.device, p.dtype) for p in local}:
        number = torch.zeros(1, device=device, dtype=dtype, requires_grad=True)
        number.grad = torch.zeros_like(number)
        try:
            torch.optim.AdamW([number], fused=True).step()
        except (RuntimeError, NotImplementedError):
            return False
    return True


class Placed:
    """A module where the engine wants it; `placed(function, *args)` is `function(module, *args)` inside its forward.

    Under FSDP2 every process must make the same calls.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, fsdp: bool) -> None:
        self.accelerator = accelerator
        self.module = module
        self.device = accelerator.device
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        for name, parameter in module.named_parameters():
            split = isinstance(parameter, DTensor)
            require(
                not split, "model", f"a DTensor, {name}", "whole weights (no tp_plan, no fully_shard): fsdp shards them"
            )
        self.sharded = fsdp or launcher.shards()
        self.wrapped: nn.Module = _Wrapper(module.to(self.device))
        if self.sharded:
            _shard(self.wrapped, accelerator.mixed_precision)

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        with self.accelerator.autocast():
            result = self.wrapped(function, *args)
        if isinstance(self.wrapped, FSDPModule) and not torch.is_grad_enabled():
            self.wrapped.reshard()  # a backward would have done it
        return result

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The module with all of its parameters on every process, without gradients, for calls at one's own pace."""
        groups = [m for m in self.wrapped.modules() if isinstance(m, FSDPModule)]
        for group in groups:
            group.set_reshard_after_forward(False, recurse=False)
            group.unshard()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield self.module
        finally:
            for group in groups:
                group.set_reshard_after_forward(group is not self.wrapped, recurse=False)
                group.reshard()

    def weights(self, module: nn.Module | None = None) -> dict[str, Any]:
        """All parameters of `module` (default: the whole) on the CPU of process 0; every process must call.

        On a CPU they may be the parameters themselves, not copies.
        """
        return dcp.get_model_state_dict(module or self.module, options=WHOLE)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, as a controller: a reference that is not the model as it was loaded."""
        return self.weights()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        dcp.set_model_state_dict(self.module, state, options=dcp.StateDictOptions(full_state_dict=True))

    def measure(self, function: Loss, *args: Any) -> tuple[Tensor, Metrics]:
        """`function(module, *args)`, a loss and its metrics, as of a call."""
        found: list[Metrics] = []

        def loss_of(module: nn.Module, *args: Any) -> Tensor:
            loss, metrics = function(module, *args)
            found.append(metrics)
            return loss

        # accelerate rebuilds the containers that a forward returns, out of their tensors alone: metrics go past it.
        return self(loss_of, *args), found[0]

    def across(self, values: Tensor, how: Side) -> Tensor:
        """The elementwise sum, minimum or maximum over all processes: the same bits on each of them."""
        return values if self.world == 1 else OF_SIDE[how](self.accelerator.gather(values.unsqueeze(0)), dim=0)

    def combine(self, parts: Sequence[Metrics]) -> dict[str, float]:
        """The metrics of all parts and processes, as numbers."""
        found = reductions.combine(parts, self.across)
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return tensor if self.world == 1 else self.accelerator.reduce(tensor, "sum")

    def gather(self, objects: Sequence[T]) -> list[T]:
        """The objects of all processes, in the order of their ranks."""
        return gather_object(list(objects))

    def mine(self, rows: Sequence[T]) -> Sequence[T]:
        """This process's share of rows that all of them have: a contiguous part; the first ones may hold one more."""
        return shared(rows, self.rank, self.world)

    def agree(self, error: Exception | None) -> None:
        """Raise `error` if there is one; where another process has one, raise its message, so that none waits."""
        found = next((e for e in self.gather([error]) if e is not None), None) if self.world > 1 else error
        if error is not None or found is not None:
            raise error or found  # type: ignore[misc]


class Engine(Placed):
    """A module in training: placed, with its optimiser (AdamW) and schedule."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        module: nn.Module,
        num_updates: int,
        own_rates: Sequence[tuple[nn.Module, float]] = (),  # parts of `module` with learning rates of their own
    ) -> None:
        super().__init__(accelerator, module, config.fsdp)
        self.config = config
        self.updates = 0
        self.stepping = False  # the weights are being changed
        self.zero_gradients = False  # a weight without a gradient has one of 0, which AdamW's means of it go on with
        if not self.sharded:
            self.wrapped = accelerator.prepare_model(self.wrapped)
        optimizer = self._adamw(config.learning_rate, config.weight_decay, own_rates)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        inner = self.optimizer.optimizer
        self.scheduler = get_scheduler(config.lr_schedule, inner, config.lr_warmup_updates, max(num_updates, 1))

    def _adamw(
        self, learning_rate: float, weight_decay: float, own_rates: Sequence[tuple[nn.Module, float]] = ()
    ) -> torch.optim.Optimizer:
        """Norms and biases, which are vectors, do not decay."""
        config, rates = self.config, {p: rate for part, rate in own_rates for p in part.parameters()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for p in self.module.parameters():
            if p.requires_grad:
                alike = rates.get(p, learning_rate), weight_decay if p.dim() > 1 else 0.0
                groups.setdefault(alike, []).append(p)
        made = [{"params": some, "lr": rate, "weight_decay": decay} for (rate, decay), some in groups.items()]
        betas, eps = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
        fused = steps_in_one_kernel([p for some in groups.values() for p in some])
        return torch.optim.AdamW(made, lr=learning_rate, betas=betas, eps=eps, fused=fused)

    def apart(self, learning_rate: float, shape: Callable[[int], float]) -> Engine:
        """The same placed module with an optimiser of its own, its learning rate `shape(update)` times the given."""
        other = copy.copy(self)
        optimizer = self._adamw(learning_rate, 0.0)
        other.optimizer = self.accelerator.prepare_optimizer(optimizer)
        other.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        return other

    @torch.no_grad()
    def standing_still(self) -> float:
        """Share of this process's weights in training that a step of AdamW at the peak learning rate, which is about
        that large, would round to what they are; of a thousand of each tensor."""
        still, count = 0, 0
        for p in self.module.parameters():
            if p.requires_grad:
                values = (p.to_local() if isinstance(p, DTensor) else p).flatten()
                values = values[:: max(len(values) // 1000, 1)]
                still += int((values - self.config.learning_rate == values).sum())
                count += len(values)
        return still / max(count, 1)

    def frozen(self, module: nn.Module) -> Placed:
        """A module that is only evaluated (a reference, a reward model), placed like the trained one."""
        return Placed(self.accelerator, module.requires_grad_(False), self.config.fsdp)

    def update(self, function: Loss, pieces: Sequence[tuple[Any, ...]]) -> dict[str, float]:
        """One optimiser update.

        Args:
            function: `function(module, *piece) -> (loss, metrics)`. The loss is a share of the whole: losses are added
                up over pieces and processes, so they must be divided by global counts.
            pieces: the arguments of each micro-batch, the same number on every process.

        Returns:
            The metrics of the whole batch, with loss, grad_norm and learning_rate.

        Raises:
            NonFiniteLoss: before the optimiser steps, on every process.
        """
        parts: list[Metrics] = []
        # Else the modules stay in evaluation mode: a token's log-prob must not differ from call to call.
        self.module.train(self.config.gradient_checkpointing or self.config.lora_dropout > 0)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        for piece in pieces:
            last = len(parts) == len(pieces) - 1
            with nullcontext() if last else self._without_sync():
                loss, metrics = self.measure(function, *piece)
                parts.append(Metrics(metrics.parts | {"loss": reductions.total(loss.detach())}))
                # Engines average gradients over processes.
                self.accelerator.backward(loss * self.world)
        self.module.eval()
        combined = self.combine(parts)
        self._check(combined["loss"], "loss", parts)
        if self.zero_gradients:
            for p in self.module.parameters():
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
        grad_norm = self._clip()
        if self.accelerator.scaler is None:  # a loss scale steps over infinities by itself
            self._check(grad_norm, "norm of the gradient", parts)
        self.stepping = True
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self.stepping = False
        return combined | {"grad_norm": grad_norm, "learning_rate": learning_rate}

    def unmoved(self) -> dict[str, float]:
        """What an update that is not made has to say: nothing had a gradient."""
        return {"loss": 0.0, "grad_norm": 0.0, "learning_rate": self.optimizer.param_groups[0]["lr"]}

    @contextmanager
    def _without_sync(self) -> Iterator[None]:
        """Gradients stay on this process, but for shards: before they are reduced they are whole on each."""
        private.sync_gradients(self.accelerator, False)
        try:
            with nullcontext() if self.sharded else self.accelerator.no_sync(self.wrapped):
                yield
        finally:
            private.sync_gradients(self.accelerator, True)

    def _check(self, value: float, what: str, parts: Sequence[Metrics]) -> None:
        if math.isfinite(value):
            return
        bad = [f"micro-batch {i} of process {self.rank}" for i, p in enumerate(parts, 1) if not p["loss"].isfinite()]
        where = f" in {', '.join(places)}" if (places := self.gather(bad)) else ""
        self.optimizer.zero_grad()
        raise NonFiniteLoss(f"the {what} is {value}{where}")

    def _clip(self) -> float:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def training_state(self) -> dict[str, Any]:
        """Weights in training, optimiser, schedule and loss scale, whole, on process 0; every process must call."""
        scaler = self.accelerator.scaler
        # Tied weights have two names, of which torch leaves out the first only.
        frozen = {name for name, p in self.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        weights = dcp.get_model_state_dict(self.module, options=TRAINED)
        return {
            "module": {name: value for name, value in weights.items() if name not in frozen},
            "optimizer": dcp.get_optimizer_state_dict(self.module, self.optimizer.optimizer, options=WHOLE),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "updates": self.updates,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over what `training_state` gave, read on every process."""
        options = dcp.StateDictOptions(full_state_dict=True, strict=False)
        dcp.set_model_state_dict(self.module, state["module"], options=options)
        optimizer = self.optimizer.optimizer
        saved, fused = state["optimizer"], optimizer.defaults["fused"]  # a matter of this machine, not of the run
        saved = saved | {"param_groups": [group | {"fused": fused} for group in saved["param_groups"]]}
        dcp.set_optimizer_state_dict(self.module, optimizer, saved, options=options)
        self.scheduler.load_state_dict(state["scheduler"])
        # What the next update takes, by the schedule of this run, which may be longer than that of the saved one.
        rates = [
            base * f(self.scheduler.last_epoch) for base, f in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.updates = state["updates"]
