"""Which layouts a model supports, by trial: nothing in its config or class tells for certain.

A few short sequences, two prompts with several completions each, go through the model alone, one after the other, and then
together in the layout; the states before the completions' tokens must be the same, to the rounding that the model itself
shows where rows are merely put in one batch. The same row under a plain causal mask must give others, else nothing would
be proven. Weights are made fp32 for it a module at a time, and every window or chunk that config and modules name is made
shorter than the sequences meanwhile; where that changes nothing, a run is laid so only if its sequences fit the window.
"""

from __future__ import annotations

import contextlib
import functools
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fused_rlhf as fr
from fused_rlhf.trainers import attention, launcher
from fused_rlhf.trainers.adapters import base_of
from fused_rlhf.trainers.config import TrainConfig, require
from fused_rlhf.trainers.forwards import Batch, Rows
from fused_rlhf.trainers.layout import Layout, Name
from fused_rlhf.trainers.model import Loaded
from fused_rlhf.trainers.value import ScalarModel

States = Callable[..., Tensor]  # (input_ids, attention_mask=None, position_ids=None) -> (rows, length, H)

PROMPTS, COMPLETIONS = (13, 9), ((7, 5, 11), (6, 4))
SHORT = 6  # a window in the trial
# A tolerance is so many times what batching does, and at least so much; a wrong mask must do so many times more.
ROUNDING, LEAST, NOTICED = 10.0, 1e-5, 100.0
ORDER: tuple[Name, ...] = ("shared", "packed")  # the cheapest first


Model = tuple[nn.Module, States]


@torch.no_grad()
def choose(models: Sequence[Model], vocabulary: int, longest: int, names: Sequence[Name] = ORDER) -> Layout:
    """The first of the layouts that all models support for sequences of `longest` tokens at most; else padded rows.

    What reads tables may be put into the models' attention. Raises nothing: a model that fails in a layout does not support it.
    """
    trials = [_Trial(model, states, vocabulary) for model, states in models]
    why = ""
    for name in names:
        for table in (True, False) if name == "packed" else (True,):
            faults = [trial.fault(Layout(name, table), longest) for trial in trials]
            if not any(faults):
                return Layout(name, table, why=why)
            why = why or f"{name}: {next(filter(None, faults))}"
    masked = any(trial.fault(Layout(masked=False), longest) for trial in trials)
    return Layout(masked=masked, why=why)


def settled(config: TrainConfig, device: torch.device, loaded: Loaded, longest: int, others: Sequence[Any]) -> Loaded:
    """`loaded` with the layout of its run: what `config` asks for, proven for sequences of `longest` tokens on the loaded
    model and the others that read them: causal models and `ScalarModel`s; None among these is none.

    Raises ValueError where the one asked for cannot be had, with the difference found.
    """
    asked, why = config.layout, ""
    if loaded.processor is not None:
        why = "its rows may hold pictures"
    elif config.lora_dropout > 0:
        why = "lora_dropout draws otherwise for other rows"
    elif getattr(config, "router_aux_loss_coef", 0):
        why = "router_aux_loss_coef is of the tokens of padded rows"
    if why:
        require(asked in ("auto", "padded"), "layout", asked, f"'padded': {why}")
        return replace(loaded, layout=Layout(why=why))
    names: Sequence[Name] = ORDER if asked == "auto" else () if asked == "padded" else (asked,)
    there = [it for it in (loaded.model, *others) if it is not None]
    models = [of_values(it) if isinstance(it, ScalarModel) else of_policy(it) for it in there]
    if not (config.fsdp or launcher.shards()):  # else they are tried where they are
        for model, _ in models:
            model.to(device)
    vocabulary = base_of(loaded.model).get_input_embeddings().num_embeddings
    found = choose(models, vocabulary, longest, names)
    require(
        asked in ("auto", found.name), "layout", asked, f"'auto', which takes {found.name} rows here, for {found.why}"
    )
    return replace(loaded, layout=found)


def check_budget(config: TrainConfig, tokens: int, what: str) -> None:
    """Raises ValueError where micro_batch_tokens holds less than the `tokens` of the largest item."""
    budget = config.micro_batch_tokens
    require(budget == 0 or budget >= tokens, "micro_batch_tokens", budget, f"at least {tokens}, those of {what}, or 0")


def of_policy(model: Any) -> Model:
    """A causal model, and the states before its head."""

    def states(input_ids: Tensor, attention_mask: Any = None, **more: Any) -> Tensor:
        return fr.lm_head.forward(model, input_ids, attention_mask, **more).hidden

    return base_of(model), states


def of_values(model: ScalarModel) -> Model:
    """A value model's body, and its last states."""

    def states(input_ids: Tensor, attention_mask: Any = None, **more: Any) -> Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **more}
        return model.body(**given).last_hidden_state

    return model.body, states


class _Trial:
    """One model's sequences, what it makes of each alone, and of all in a layout."""

    def __init__(self, model: nn.Module, states: States, vocabulary: int) -> None:
        self.model, self.states = model, states
        self.device = next(model.parameters()).device
        self.known = _known.setdefault(_kind(model), {})
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(vocabulary, (length,), generator=generator) for length in PROMPTS]
        self.texts, self.prompts = [], []
        for prompt, lengths in zip(prompts, COMPLETIONS, strict=True):
            for length in lengths:
                self.texts.append(torch.cat([prompt, torch.randint(vocabulary, (length,), generator=generator)]))
                self.prompts.append(len(prompt))
        self.lengths = [len(text) for text in self.texts]

    def fault(self, layout: Layout, longest: int = 0) -> str:
        """What is wrong with a layout for sequences of so many tokens at most; nothing where it is proven."""
        name = type(self.model).__name__
        if layout.table and layout.name != "padded" and not adopted(self.model):
            return f"{name} does not let its attention be chosen"
        if layout not in self.known:
            try:
                self.known[layout] = self.tried(layout)
            except Exception as error:  # a model may raise anything
                first = (str(error).splitlines() or [""])[0][:200]
                self.known[layout] = f"it raises {type(error).__name__}: {first}", None
        found, limit = self.known[layout]
        if not found and limit is not None and longest > limit:
            found = f"its window of {limit} tokens cannot be tried, and there are sequences of {longest}"
        return found and f"{name}: {found}"

    def tried(self, layout: Layout) -> tuple[str, int | None]:
        """What is wrong, and the longest sequence for which anything is proven, where there is a limit."""
        self.measure()
        with shortened(named_windows(self.model)):
            difference = self.relative(self.laid(layout))
            mixed = self.relative(self.laid(layout, mixed=True)) if layout.name != "padded" else torch.inf
        if not difference <= self.tolerance:
            return f"its states differ by {difference:.1g} of the largest from those of rows by themselves", None
        if not mixed > NOTICED * self.tolerance:
            return "it makes the same of sequences that see each other, and nothing can be proven by it", None
        return "", self.limit

    @functools.cache  # noqa: B019 - a trial lives as long as `choose`
    def measure(self) -> None:
        """The truth, and how it is rounded; whether shorter windows make another one."""
        whole = self.alone()
        windows = list(named_windows(self.model))
        with shortened(windows):
            self.truth = self.alone() if windows else whole
            rounding = self.relative(self.laid(Layout()))
        unseen = windows and self.relative(whole) <= LEAST
        self.limit = min(value for _, _, value in windows) if unseen else None
        self.tolerance = max(LEAST, ROUNDING * rounding)
        if rounding > 1e-3:
            raise ValueError(f"rows of one batch change each other by {rounding:.1g} of the largest state")

    def relative(self, got: Tensor) -> float:
        return ((got - self.truth).abs().max() / self.truth.abs().max()).item()

    def alone(self) -> Tensor:
        """(N, H), each sequence by itself."""
        found = []
        for text, prompt in zip(self.texts, self.prompts, strict=True):
            found.append(self.forward(text[None].to(self.device))[0, prompt - 1 : -1])
        return torch.cat(found)

    def laid(self, layout: Layout, mixed: bool = False) -> Tensor:
        """The same of all in one batch; `mixed`: where a token sees all those before it in the row."""
        ids = pad_sequence(self.texts, batch_first=True).to(self.device)
        at = torch.arange(ids.shape[1], device=self.device)
        sizes, prompts = (torch.tensor(x, device=self.device)[:, None] for x in (self.lengths, self.prompts))
        mask = at < sizes
        rows = Rows(ids, mask, [{}] * len(ids), self.prompts, None)

        def call(input_ids: Tensor, attention_mask: Tensor | None, **more: Tensor) -> Tensor:
            if mixed:
                length = input_ids.shape[1]
                attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.device).tril()
            return self.forward(input_ids, attention_mask, **more)

        return Batch(rows, mask & (at >= prompts), layout).states(call)

    def forward(self, *args: Any, **more: Any) -> Tensor:
        states: Any = self.states
        with torch.autocast(self.device.type, enabled=False), in_float32(self.model):
            return states(*args, **more).float()


_known: dict[
    Any, dict[Layout, tuple[str, int | None]]
] = {}  # of models of one kind, such as a policy and its reference


def _kind(model: nn.Module) -> Any:
    """What the support of a layout depends on: class, configuration and modules."""
    config: Any = getattr(model, "config", None)
    text = json.dumps(config.to_dict(), sort_keys=True, default=str) if hasattr(config, "to_dict") else ""
    implementation = str(getattr(config, "_attn_implementation", "")).removeprefix(attention.PREFIX)
    device = next(model.parameters()).device.type
    return type(model), text, implementation, device, tuple(type(module) for module in model.modules())


_adopted: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def adopted(model: Any) -> bool:
    """Whether a model reads tables, from now on."""
    if model not in _adopted:
        _adopted[model] = attention.adopt(model)
    return _adopted[model]


def named_windows(model: nn.Module) -> Iterator[tuple[Any, str, int]]:
    """(object, attribute, value) of every window or chunk that configs and modules name, longer than the trial's."""
    modules = list(model.modules())
    configs: dict[int, Any] = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    for config in list(configs.values()):
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        configs[id(text)] = text
    for it in (*configs.values(), *modules):
        for name, value in list(vars(it).items()):
            named = ("window" in name or "chunk" in name) and not name.endswith("layers")
            if named and type(value) is int and value > SHORT:
                yield it, name, value


@contextlib.contextmanager
def shortened(windows: Any) -> Iterator[None]:
    """With windows of `SHORT` tokens."""
    before = list(windows)
    try:
        for it, name, _ in before:
            setattr(it, name, SHORT)
        yield
    finally:
        for it, name, value in before:
            setattr(it, name, value)


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Every module computes in fp32: its weights are so while it runs, and no others."""
    kept: dict[nn.Module, list[tuple[dict[str, Any], str, Tensor]]] = {}

    def before(module: nn.Module, *_: Any) -> None:
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for places in held:
            for name, value in places.items():
                if value is not None and value.is_floating_point() and value.dtype != torch.float32:
                    kept.setdefault(module, []).append((places, name, value))
                    places[name] = value.detach().float()

    def after(module: nn.Module, *_: Any) -> None:
        for places, name, value in kept.pop(module, ()):
            places[name] = value

    hooks: list[Any] = []
    for module in model.modules():
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(kept):
            after(module)
