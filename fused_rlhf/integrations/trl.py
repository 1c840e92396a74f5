"""TRL's trainers on our op: policy, reference and old log-probs without the logits, everything else TRL's own code.

TRL 1.15 and later wrap `model.forward` (`add_fused_lm_head`), so that `model(..., labels=labels, fused_lm_head=True)` gives
log-probs, entropies ... of the labels. That call is all its DPO, GRPO, RLOO, KTO and SFT trainers know of the LM head, and it
can be taken over in two places:

    head      the name `add_fused_lm_head` in a trainer's module, called by its constructor   -> `FusedHeadMixin`
    kernel    the name `_ChunkedLogProbFunction` in trl.trainer.utils, called by that forward -> `patch_trl`

`FusedHeadMixin` puts ours in place of the first while a trainer is constructed. The model's own forward then runs up to its
head (`fused_rlhf.lm_head.probe`), so the transform of the logits is what the model does and not what its config seems to say;
rows without a label cost nothing on any device; and an adapter on the head itself is trained. `patch_trl` swaps the second:
any script gains the op, and keeps what TRL's forward reads from the config, scores and refuses.

    from fused_rlhf.integrations.trl import FusedGRPOTrainer        # in place of trl.GRPOTrainer, same arguments

    class MyTrainer(FusedHeadMixin, TheirTrainer): ...              # any subclass of the five, yours or trl.experimental's
    class FusedGMPOTrainer(FusedGRPOTrainer, GMPOTrainer): ...      # of GRPO: tokens written by tools are left out as well

Both places are checked before use: a TRL whose names, arguments or numbers differ is refused.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fused_rlhf import lm_head, notices
from fused_rlhf.functional import LogProbs, linear_logprobs
from fused_rlhf.op.head import Head

try:
    import trl
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ModuleNotFoundError(
        'fused_rlhf.integrations.trl needs TRL 1.15 or later: pip install "trl>=1.15"', name="trl"
    ) from error


def _check_version(version: str) -> None:
    if tuple(int(part) for part in version.split(".")[:2]) < (1, 15):
        raise ImportError(
            f"fused_rlhf.integrations.trl needs TRL 1.15 or later, which brought the fused LM head that ours replaces; "
            f'TRL {version} is installed: pip install -U "trl>=1.15"'
        )


_check_version(trl.__version__)

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer  # noqa: E402
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled  # noqa: E402
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer  # noqa: E402

trl_utils: Any = importlib.import_module("trl.trainer.utils")

# TRL's names of the outputs, in the order its kernel returns them, and ours.
_OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_sq",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
_KERNEL_ARGUMENTS = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_HEAD_ARGUMENTS = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")
_HEAD_RESULTS = ("loss", "log_probs", *_OUTPUTS, "label_mask", "aux_loss")


class UnsupportedTRLError(RuntimeError):
    """The installed TRL is not one that this module knows how to take over."""

    def __init__(self, why: str) -> None:
        super().__init__(f"TRL {trl.__version__} is not supported by fused_rlhf.integrations.trl: {why}")


# ------------------------------------------------------------------------------------------------ the op, in TRL's terms


def _our_outputs(names: Sequence[str]) -> tuple[str, ...]:
    unknown = set(names) - {"log_probs", *_OUTPUTS}
    if unknown:
        raise UnsupportedTRLError(f"it asks for the outputs {sorted(unknown)}, known are {['log_probs', *_OUTPUTS]}")
    return tuple(ours for theirs, ours in _OUTPUTS.items() if theirs in names)


def _statistics(out: LogProbs, scored: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """The op's results as TRL's kernel returns them, the first two differentiable; `scored` marks the rows that hold any."""
    sum_sq, mean_logit = (None if value is None else value.detach() for value in (out.sum_sq, out.mean_logit))
    if sum_sq is not None:
        sum_sq = (sum_sq if scored is None else sum_sq.masked_fill(~scored, 1.0)).log()
    return out.logprobs, out.entropy, sum_sq, mean_logit, out.is_top1


@contextlib.contextmanager
def _gathered(*parameters: Tensor | None) -> Iterator[None]:
    """Parameters that DeepSpeed ZeRO-3 has sharded: whole in the block, and again when its backward asks for them."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    sharded = {id(p) for p in parameters if p is not None}

    def pack(tensor: Tensor) -> Tensor:
        return tensor if id(tensor) in sharded else tensor.detach()

    def unpack(saved: Tensor) -> Tensor:
        if id(saved) not in sharded:
            return saved
        with trl_utils.maybe_gather_lm_head_ctx(saved):
            return saved.data  # of the whole parameter: keeps its memory once `saved` is a shard again

    with (
        trl_utils.maybe_gather_lm_head_ctx(*parameters),
        torch.autograd.graph.saved_tensors_hooks(pack, unpack),
    ):
        yield


class FusedLogProbs:
    """Stands in for TRL's `_ChunkedLogProbFunction`: same arguments, same five results, `chunk_size` unused."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = tuple(_OUTPUTS),
        *,
        backend: str = "auto",
    ) -> tuple[Tensor | None, ...]:
        head = Head(weight, bias, logit_scale, final_logit_softcapping)
        with _gathered(weight, bias):
            out = linear_logprobs(
                hidden,
                head,
                targets,
                temperature=temperature,
                outputs=_our_outputs(outputs),
                backend=backend,
            )
            notices.runs("TRL's log-probs", hidden, head, backend, "as TRL reads its config")
        return _statistics(out)


def add_fused_lm_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: Sequence[str] = ("log_probs",),
    *,
    backend: str = "auto",
) -> None:
    """Ours for `trl.trainer.utils.add_fused_lm_head`; `model(..., labels=labels, fused_lm_head=True)` runs on our op.

    Args:
        model: a transformers causal LM, not wrapped by PEFT. Its `forward` is replaced; without `fused_lm_head=True` the
            call goes to the one it had.
        temperature: what the logits are divided by.
        cast_lm_head_to_fp32: the head's weight is fp32 and its product is to be, outside autocast.
        outputs: of "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"; the first is always computed.
        backend: as in `linear_logprobs`.

    Raises:
        ValueError: an adapter on the head other than one plain LoRA without dropout. In the calls: what `lm_head.probe`
            and `linear_logprobs` refuse.
    """
    wanted = _our_outputs(outputs)
    forward = model.forward
    if lm_head.adapter_of(model.get_output_embeddings()) is not None and cast_lm_head_to_fp32:
        raise ValueError("cast_lm_head_to_fp32 must be False with an adapter on the LM head, got True")

    @torch.compiler.disable  # hooks come and go on the head during the call
    def score(self: PreTrainedModel, labels: Tensor, shifted: bool, args: tuple, kwargs: dict) -> tuple[Any, ...]:
        embeddings = self.get_output_embeddings()

        def operands() -> lm_head.Operands:
            # With the cast, TRL has replaced the head's own forward, by the same product in fp32.
            linear: Any = embeddings if cast_lm_head_to_fp32 else lm_head.linear_of(embeddings)
            return lm_head.Operands(linear.weight, linear.bias, lm_head.adapter_of(embeddings))

        call = functools.partial(forward, *args, **{**kwargs, "use_cache": False})
        probed = lm_head.probe(self, embeddings, call, operands)
        weight, bias, lora, *_ = probed.operands
        hidden, targets = (probed.hidden, labels) if shifted else (probed.hidden[:, :-1], labels[:, 1:])
        hidden, targets = hidden.to(weight.device), targets.to(weight.device)
        precision: AbstractContextManager[Any] = contextlib.nullcontext()
        if cast_lm_head_to_fp32:
            hidden, precision = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        with precision, _gathered(weight, bias, *(lora or ())[:2]):
            out = linear_logprobs(
                hidden,
                probed.head,
                targets,
                temperature=temperature,
                outputs=wanted,
                backend=backend,
            )
            notices.runs("TRL's log-probs", hidden, probed.head, backend, "tokens without a label are skipped")
        scored = targets != -100
        return (*_statistics(out, scored), scored, probed.aux_loss)

    @functools.wraps(type(model).forward)  # `generate` and Trainer read the signature
    def fused_forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return forward(*args, **{name: value for name, value in given.items() if value is not None}, **kwargs)
        tokens, shifted = (labels, False) if shift_labels is None else (shift_labels, True)
        *statistics, label_mask, aux_loss = score(self, tokens, shifted, args, kwargs)
        named = dict(zip(("log_probs", *_OUTPUTS), statistics))
        count = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -named["log_probs"].sum() / count
        if aux_loss is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        return trl_utils.FusedCausalLMOutput(loss=loss, **named, label_mask=label_mask, aux_loss=aux_loss)

    model.forward = types.MethodType(fused_forward, model)


# ----------------------------------------------------------------------------------------------------------- the checks


def _check_arguments(name: str, function: Any, expected: tuple[str, ...]) -> None:
    found = tuple(inspect.signature(function).parameters)
    if found != expected:
        raise UnsupportedTRLError(f"{name} takes {found}, expected {expected}")


def _check_numbers(name: str, theirs: Sequence[Any], ours: Sequence[Any], results: Sequence[str]) -> None:
    if len(theirs) != len(ours):
        raise UnsupportedTRLError(f"{name} returns {len(theirs)} results, expected {list(results)}")
    for result, a, b in zip(results, theirs, ours):
        if isinstance(a, Tensor) != isinstance(b, Tensor) or (
            isinstance(a, Tensor) and (a.shape != b.shape or not torch.allclose(a.float(), b.float(), 1e-4, 1e-4))
        ):
            raise UnsupportedTRLError(f"on five tokens {name} gives another {result} than ours, {a} instead of {b}")


@contextlib.contextmanager
def _self_test() -> Iterator[None]:
    """TRL's own kernel, and plain CPU arithmetic, whatever the caller has set; its random numbers are left alone."""
    with (
        _unpatched(),
        notices.muted(),
        torch.random.fork_rng([]),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        torch.default_generator.manual_seed(0)
        yield


@functools.cache
def _check_kernel(kernel: Any) -> None:
    name = "trl.trainer.utils._ChunkedLogProbFunction"
    if kernel is None:
        raise UnsupportedTRLError(f"{name} does not exist")
    _check_arguments(f"{name}.forward", kernel.forward, _KERNEL_ARGUMENTS)
    with _self_test():
        hidden, weight, bias = (torch.randn(*shape, dtype=torch.float32) for shape in ((5, 8), (11, 8), (11,)))
        targets = torch.tensor([0, 10, 3, 7, 3])
        arguments = (hidden, weight, bias, targets, 0.7, 4, 3.0, 1.3, tuple(_OUTPUTS))
        results = ("log_probs", *_OUTPUTS)
        _check_numbers(name, kernel.apply(*arguments), FusedLogProbs.apply(*arguments, backend="reference"), results)


@functools.cache
def _check_head(stock: Any, output_type: Any) -> None:
    name = "trl.trainer.utils.add_fused_lm_head"
    if stock is None or output_type is None:
        raise UnsupportedTRLError(f"{name} or trl.trainer.utils.FusedCausalLMOutput does not exist")
    _check_arguments(name, stock, _HEAD_ARGUMENTS)
    fields = tuple(output_type.__dataclass_fields__)
    if fields != _HEAD_RESULTS:
        raise UnsupportedTRLError(f"FusedCausalLMOutput has the fields {fields}, expected {_HEAD_RESULTS}")
    if is_deepspeed_zero3_enabled():
        return  # TRL's head then takes parameters of DeepSpeed's alone
    with _self_test():
        sizes: dict[str, Any] = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        config = LlamaConfig(**sizes, num_attention_heads=1, initializer_range=0.5, max_position_embeddings=8)
        input_ids = torch.tensor([[1, 4, 2, 9, 0, 6]])
        labels = input_ids.masked_fill(torch.tensor([[True, False, False, True, False, False]]), -100)

        def results(add: Any) -> list[Any]:
            torch.default_generator.manual_seed(0)
            model: Any = LlamaForCausalLM(config).float()
            add(model, temperature=0.7, outputs=("log_probs", *_OUTPUTS))
            result = model(input_ids=input_ids, labels=labels, fused_lm_head=True)
            return [getattr(result, field) for field in fields]

        own = functools.partial(add_fused_lm_head, backend="reference")
        _check_numbers(name, results(stock), results(own), fields)


# -------------------------------------------------------------------------------------------------------- the kernel seam


def patch_trl() -> None:
    """Put our op in place of TRL's chunked log-prob kernel, in this process, for all trainers made or to be made.

    A second call does nothing. `unpatch_trl` takes it back. What TRL's forward does around its kernel stays: the transform
    of the logits is read from the config, an adapter on the LM head is refused; on devices without Triton every position
    is scored.

    Raises:
        UnsupportedTRLError: TRL's kernel has other arguments, or computes something else.
    """
    current = vars(trl_utils).get("_ChunkedLogProbFunction")
    if current is FusedLogProbs:
        return
    _check_kernel(current)
    _stock_kernel.append(current)
    trl_utils._ChunkedLogProbFunction = FusedLogProbs


def unpatch_trl() -> None:
    """Undo `patch_trl`; without it, do nothing."""
    if _stock_kernel:
        trl_utils._ChunkedLogProbFunction = _stock_kernel.pop()


# TRL's own, while ours is in its place: the patch is of the whole process, and so is what takes it back.
_stock_kernel: list[Any] = []


@contextlib.contextmanager
def patched_trl() -> Iterator[None]:
    """`patch_trl` for the block; where it was in force before, it stays so after.

    Raises:
        UnsupportedTRLError: as `patch_trl`.
    """
    before = bool(_stock_kernel)
    patch_trl()
    try:
        yield
    finally:
        if not before:
            unpatch_trl()


@contextlib.contextmanager
def _unpatched() -> Iterator[None]:
    patched = bool(_stock_kernel)
    unpatch_trl()
    try:
        yield
    finally:
        if patched:
            patch_trl()


# ---------------------------------------------------------------------------------------------------------- the head seam

_one_at_a_time = threading.RLock()  # so that no construction takes another's head for the stock one, and puts it back


@contextlib.contextmanager
def _our_head(modules: Sequence[ModuleType]) -> Iterator[list[Any]]:
    """In these modules and this thread, `add_fused_lm_head` is ours and an adapter on the head is no reason to stop.

    Yields the list of models that were given our head.
    """
    thread, models, stock = threading.get_ident(), [], trl_utils.add_fused_lm_head

    def add(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != thread:
            return stock(model, *args, **kwargs)
        add_fused_lm_head(model, *args, **kwargs)
        models.append(model)

    class NotTheHead(type):
        # The constructors ask whether the head is such a layer, to refuse it, and nothing else.
        def __instancecheck__(cls, instance: object) -> bool:
            from peft.tuners.tuners_utils import BaseTunerLayer

            return threading.get_ident() != thread and isinstance(instance, BaseTunerLayer)

    ours = {"add_fused_lm_head": add, "BaseTunerLayer": NotTheHead("BaseTunerLayer", (), {})}
    saved = [(vars(module), name, vars(module)[name]) for module in modules for name in ours if name in vars(module)]
    for namespace, name, _ in saved:
        namespace[name] = ours[name]
    try:
        yield models
    finally:
        for namespace, name, original in saved:
            namespace[name] = original


class FusedHeadMixin:
    """Before a TRL trainer among the bases: its log-probs come from our op. The arguments are the trainer's own.

    Works with every trainer whose module gives the model TRL's fused LM head: DPO, GRPO, RLOO, KTO, SFT and their
    subclasses. LoRA on the LM head, which TRL refuses, is trained.

    Raises:
        TypeError: no trainer among the bases has a fused LM head, or the mixin comes after it.
        UnsupportedTRLError: TRL's fused LM head has other arguments or results, or computes something else.
        ValueError: as `add_fused_lm_head`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(FusedHeadMixin)]
        theirs = [b.__name__ for b in before if issubclass(b, Trainer) and not issubclass(b, FusedHeadMixin)]
        if theirs:
            raise TypeError(f"FusedHeadMixin must come before {theirs} in the bases of {cls.__name__}")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        with _one_at_a_time:
            _check_head(*(vars(trl_utils).get(it) for it in ("add_fused_lm_head", "FusedCausalLMOutput")))
            modules = {base.__module__: sys.modules[base.__module__] for base in type(self).__mro__}
            fused = [m for m in modules.values() if m.__name__ != __name__ and "add_fused_lm_head" in vars(m)]
            if not fused:
                raise TypeError(f"no base of {name} is a TRL trainer with a fused LM head (DPO, GRPO, RLOO, KTO, SFT)")
            with _our_head(fused) as models:
                super().__init__(*args, **kwargs)
        if not models:
            raise UnsupportedTRLError(f"the constructor of {name} did not call add_fused_lm_head")


class FusedDPOTrainer(FusedHeadMixin, DPOTrainer):
    """`trl.DPOTrainer` on our op."""


class FusedRLOOTrainer(FusedHeadMixin, RLOOTrainer):
    """`trl.RLOOTrainer` on our op."""


class FusedKTOTrainer(FusedHeadMixin, KTOTrainer):
    """`trl.KTOTrainer` on our op."""


class FusedSFTTrainer(FusedHeadMixin, SFTTrainer):
    """`trl.SFTTrainer` on our op."""


class FusedGRPOTrainer(FusedHeadMixin, GRPOTrainer):
    """`trl.GRPOTrainer` on our op.

    Tokens that tools or the environment wrote are not scored, where stock TRL computes their log-probs and multiplies
    them by 0.
    """

    _tool_mask: Tensor | None = None  # (B, C) of the completions at hand, 0 where the model did not write the token

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        generated = super()._generate(*args, **kwargs)
        masks = generated[2]
        if masks is not None:
            rows = [torch.as_tensor(mask, device=self.accelerator.device) for mask in masks]
            self._tool_mask = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
        return generated

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._generate_and_score_completions(*args, **kwargs)
        finally:
            self._tool_mask = None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        self._tool_mask = inputs.get("tool_mask")
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._tool_mask = None

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        if self._tool_mask is not None:
            model = _WithoutToolTokens(model, self._tool_mask == 0, logits_to_keep)
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )


class _WithoutToolTokens:
    """A model called for one batch after the other of the same rows, with no label on the tokens that a tool wrote."""

    def __init__(self, model: Any, tool_tokens: Tensor, length: int) -> None:
        self.model, self.row, self.start = model, 0, -length
        self.tool_tokens = nn.functional.pad(tool_tokens, (0, length - tool_tokens.shape[1]))  # (B, length)

    def __call__(self, *, labels: Tensor, **inputs: Any) -> Any:
        rows = slice(self.row, self.row + len(labels))
        self.row = rows.stop
        completion = labels[:, self.start :].masked_fill(self.tool_tokens[rows], -100)
        return self.model(labels=torch.cat([labels[:, : self.start], completion], dim=1), **inputs)
