"""The LM head of any transformers causal LM: hidden states, weight, bias, and the transform of the logits.

    z = curve(logit_scale (h W^T + b))        any curve of `kernels/transforms.py`, or none

Nothing here knows a model by name. The model's own forward runs with hooks on its output embeddings. One keeps the
head's input, which makes whatever happens before the head right by construction, and leaves the head no rows to
multiply. The other puts known values where the logits would be; what `.logits` then holds tells scale and curve, and
is compared with them value by value, so that a head of any other kind is refused instead of being trained wrongly.

A head in a group of its own under FSDP2 stays in its shards (`fsdp.py`), which are streamed while they are multiplied by. One
that shares a group with other modules, or cannot be streamed for another reason, is whole only while it runs. It is copied
then: the copy lives as long as it is needed, and FSDP2 frees, reduces and scatters as ever, since the head's input has gone
through its hooks.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_rlhf import model_inputs as model_inputs_of
from fused_rlhf import private, reading, tensor_parallel
from fused_rlhf.checks import dtensor
from fused_rlhf.deferred.paused import paused
from fused_rlhf.fsdp import Shards
from fused_rlhf.functional import LogProbs, linear_logprobs
from fused_rlhf.kernels.interface import Stream
from fused_rlhf.kernels.transforms import CURVES, Transform
from fused_rlhf.op.head import DTYPES, Head, LoRA
from fused_rlhf.tensor_parallel import TensorParallel

LMHead = Head  # its name before every function took one

# 2^-30 ... 2^30 in steps of sqrt 2, both signs, and 0: slope and saturation of any sane head lie inside.
_MAGNITUDES = 2.0 ** torch.arange(-30, 30.25, 0.5, dtype=torch.float64)
_GRID = torch.cat([_MAGNITUDES, -_MAGNITUDES, torch.zeros(1, dtype=torch.float64)])
_SMALLEST, _LARGEST = 0, len(_MAGNITUDES) - 1


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """What one forward of a model leaves for its head."""

    hidden: Tensor  # the head's own input, (B, T, H), with its graph
    # With the model's own parameters. Where FSDP2 has sharded the head by itself, it is streamed: `weight` is this rank's rows,
    # and `head.whole()` the head with all of them. Under a tp_plan `weight` is this rank's rows, with the group of the others.
    head: Head
    aux_loss: Tensor | None  # a mixture of experts' auxiliary loss, where asked for (`output_router_logits=True`)
    autocast_dtype: torch.dtype | None  # of the autocast the head would have run in; None outside of one

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The autocast of the model's own head, which accelerate, for one, keeps inside the model's forward."""
        dtype = self.autocast_dtype
        return torch.autocast(self.hidden.device.type, dtype=dtype, enabled=dtype is not None)


class Operands(NamedTuple):
    """What a head multiplies by."""

    weight: Tensor
    bias: Tensor | None
    lora: LoRA | None
    stream: Stream | None = None  # as in `Head`
    over: TensorParallel | None = None  # weight and bias are this rank's rows under a tp_plan

    def head(self) -> Head:
        """Without a transform of the logits."""
        group, vocabulary = self.over or (None, None)
        return Head(
            self.weight, self.bias, lora=self.lora, stream=self.stream, vocab_size=vocabulary, process_group=group
        )

    def copied(self) -> Operands:
        """The same, with memory of its own and the same graph."""
        lora = None if self.lora is None else LoRA(self.lora.a.clone(), self.lora.b.clone(), self.lora.scale)
        return Operands(self.weight.clone(), None if self.bias is None else self.bias.clone(), lora)

    def streamed(self, shards: Shards) -> Operands:
        """This rank's rows of the weight, the others whole; every rank must call."""
        lora = None
        if self.lora is not None:
            lora = LoRA(shards.whole(self.lora.a), shards.whole(self.lora.b), self.lora.scale)
        weight: Any = self.weight
        return Operands(weight.to_local(), shards.whole(self.bias), lora, shards.stream(weight))


@dataclass(frozen=True, eq=False)
class Probed:
    """What one forward of a model puts into its head, and what it does to the logits that come out."""

    hidden: Tensor  # the head's own input, (B, T, H), with its graph
    operands: Operands
    transform: Transform
    aux_loss: Tensor | None
    autocast_dtype: torch.dtype | None  # as in `HeadInputs`

    @property
    def head(self) -> Head:
        scale, name, parameter = self.transform.logit_scale, self.transform.curve, self.transform.parameter
        head = self.operands.head()
        if name in ("", "softcap"):
            return replace(head, logit_scale=scale, softcap=parameter if name else None)
        return replace(head, logit_scale=scale, curve=(name, parameter))


def logprobs(
    model: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    *,
    completion_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    outputs: Sequence[str] = (),
    backend: str = "auto",
    round_logits: bool = False,
    **model_inputs: Any,
) -> LogProbs:
    """Log-probabilities a causal LM gives to its own input, without the logits.

    Entry [b, t] of every result belongs to the token input_ids[b, t + 1], predicted from those up to t. Of an
    encoder-decoder it belongs to decoder_input_ids[b, t + 1]: these, `decoder_attention_mask` and `completion_mask` are
    then (B, T), and input_ids and attention_mask are the source's, of any length, or None where it is no text.

    Args:
        model: a transformers causal LM, bare or wrapped (PEFT, DDP, FSDP2, accelerate).
        input_ids: (B, T) int64.
        attention_mask: (B, T), 0 at padding on either side, where it takes no position of the model's: as `forward`.
            Padding, and a token whose predecessor is padding, is left out: 0 in the results, at no cost.
        completion_mask: (B, T) bool or 0 / 1, aligned with the tokens that are scored: those whose log-probability is wanted.
        temperature: positive; one number or (B, T - 1).
        outputs, backend, round_logits: as in `linear_logprobs`.
        model_inputs: anything else the model's forward takes (position_ids, pixel_values ...).

    Returns:
        `LogProbs`, (B, T - 1) each, fp32; differentiable in the model's parameters, the head's among them.

    Raises:
        ValueError, TypeError: as `forward` and `linear_logprobs`.
    """
    base = unwrap(model).base
    scored, real_mask, decoder = input_ids, attention_mask, ""
    if reading.is_encoder_decoder(base):
        scored, real_mask = (model_inputs.get(f"decoder_{name}") for name in ("input_ids", "attention_mask"))
        decoder = "decoder_"
    if not isinstance(scored, Tensor) or scored.dim() != 2 or scored.dtype != torch.int64:
        why = f" of {_name(base)}, an encoder-decoder: input_ids are its source," if decoder else ""
        raise ValueError(
            f"{decoder}input_ids must be (B, T) int64,{why and ' the tokens to score'}{why} got {_describe(scored)}"
        )
    for name, mask in ((f"{decoder}attention_mask", real_mask), ("completion_mask", completion_mask)):
        if mask is not None and mask.shape != scored.shape:
            raise ValueError(
                f"{name} must have the shape of {decoder}input_ids {tuple(scored.shape)}, got {_describe(mask)}"
            )
    if "logits_to_keep" in model_inputs:
        raise ValueError("logits_to_keep must not be given: use completion_mask to choose tokens")

    inputs = forward(model, input_ids, attention_mask, **model_inputs)
    if inputs.hidden.shape[:-1] != scored.shape:
        raise ValueError(
            f"the head of {_name(model)} must see the (B, T) positions of {decoder}input_ids, {tuple(scored.shape)}, "
            f"got hidden states {tuple(inputs.hidden.shape)}"
        )
    wanted = torch.ones_like(scored[:, 1:], dtype=torch.bool)
    if real_mask is not None:
        real = real_mask.bool()
        wanted = wanted & real[:, 1:] & real[:, :-1]
    if completion_mask is not None:
        wanted = wanted & completion_mask[:, 1:].bool()
    targets = torch.where(wanted, scored[:, 1:], -100)
    with inputs.autocast():
        return linear_logprobs(
            inputs.hidden[:, :-1],
            inputs.head,
            targets.to(inputs.hidden.device),
            temperature=temperature,
            outputs=outputs,
            backend=backend,
            round_logits=round_logits,
        )


def hidden_states(
    model: nn.Module, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **model_inputs: Any
) -> Tensor:
    """The input of the model's head, (B, T, H), after any norm, projection or scaling the model puts before it.

    Arguments and errors as `forward`, which gives the head too.
    """
    return forward(model, input_ids, attention_mask, **model_inputs).hidden


def find_head(model: nn.Module, **model_inputs: Any) -> Head:
    """Head weight, bias and logit transform of a causal LM, probed by a forward over two tokens.

    Keeps nothing between calls, so the weight is the one in use now and the transform the model's present one. Where a
    forward over real tokens follows anyway, `forward` gives the head at no further cost.

    Args:
        model: as in `forward`. In a sharded model every rank must call.
        model_inputs: what the model's forward needs, should two tokens of id 0 not do.

    Raises:
        ValueError, TypeError: as `forward`.
    """
    base = unwrap(model).base
    if not model_inputs:
        device = base.get_input_embeddings().weight.device
        model_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64, device=device)}
    gpus = {p.device.index for p in base.parameters() if p.is_cuda}
    with torch.random.fork_rng(gpus), torch.no_grad():  # dropout must not move the training's random numbers
        head = forward(model, **model_inputs).head
    operands = operands_now(base.get_output_embeddings())  # a parametrised weight wants its graph
    return replace(head, weight=operands.weight, bias=operands.bias, lora=operands.lora, stream=operands.stream)


def forward(
    model: nn.Module, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **model_inputs: Any
) -> HeadInputs:
    """Run a causal LM up to its head: hidden states, head and auxiliary loss of one forward, no (B, T, V) logits.

    The whole of `model` is called, so the hooks of DDP, FSDP2, PEFT and accelerate run, and gradients of what is
    computed from `hidden` and `head.weight` arrive as usual. Other threads may use the model meanwhile. Parts compiled
    together with the head (`torch.compile(model)`) run uncompiled here; compile the backbone alone to keep its speed.

    Args:
        model: a transformers causal LM, bare or wrapped.
        input_ids: (B, T) int64.
        attention_mask: as the model takes it. Where it is (B, T) with padding on the left, that padding takes no
            position: a model that counts it is given `position_ids`, unless the caller gives them.
        model_inputs: anything else the model's forward takes; `use_cache` defaults to False. With `logits_to_keep`,
            `hidden` holds the positions kept. `labels` are refused: the loss would be that of the probe.

    Returns:
        `HeadInputs`. Under prompt tuning the virtual tokens are left out of `hidden`.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: the head is not one that `Head` can say; the model is not causal, what it makes of a token depends on
            later ones; padding is on the left, and the model cannot be told to pass over it; `decoder_input_ids` for a
            model without a decoder of its own; PEFT's `adapter_names` where they concern the head; a mask of another shape
            than the ids (but 4-D ones of integers, which an attention of one's own may read); a keyword that the model would
            ignore and that is nearly one of its own (`positionids`). The message tells why.
    """
    if model_inputs.get("labels") is not None:
        raise ValueError("labels must not be given: the logits are never computed, and so no loss")
    found = unwrap(model)
    embeddings = found.base.get_output_embeddings()
    if embeddings is None:
        raise ValueError(f"{_name(found.base)} has no output embeddings: not a causal LM with a linear head")
    linear_of(embeddings)

    if input_ids is not None:
        model_inputs["input_ids"] = input_ids
    if attention_mask is not None:
        model_inputs["attention_mask"] = attention_mask
    model_inputs_of.check(found.chain, model_inputs)
    if _takes(found.base, "use_cache"):
        model_inputs.setdefault("use_cache", False)
    _check_adapter_names(embeddings, model_inputs.get("adapter_names"))
    model_inputs.update(_checked_reading(model, found, embeddings, model_inputs))
    with found.stance(embeddings):
        probed = probe(found.base, embeddings, lambda: model(**model_inputs), tied=any(map(is_fsdp2, found.chain)))
    hidden = probed.hidden
    if found.prompt_learning and input_ids is not None and "logits_to_keep" not in model_inputs:
        hidden = hidden[:, -input_ids.shape[1] :]
    return HeadInputs(hidden, probed.head, probed.aux_loss, probed.autocast_dtype)


def _checked_reading(
    model: nn.Module, found: _Unwrapped, embeddings: nn.Module, model_inputs: dict[str, Any]
) -> dict[str, Tensor]:
    """The inputs that the model lacks; a ValueError where it cannot be trained on what it predicts."""
    base = found.base
    decoder = "decoder_" if reading.is_encoder_decoder(base) else ""
    if not decoder and model_inputs.get("decoder_input_ids") is not None:
        raise ValueError(
            f"decoder_input_ids must not be given: {_name(base)} is no encoder-decoder (config.is_encoder_decoder is "
            "False) and predicts its input_ids"
        )

    def run(**tried: Tensor) -> tuple[Tensor, torch.dtype]:
        if _takes(base, "use_cache"):
            tried["use_cache"] = False  # type: ignore[assignment]
        # What gathers parameters for a forward has to see its end; elsewhere nothing after the head is wanted.
        last = not torch.distributed.is_initialized()
        with _stubbed(embeddings, last, shards=shards_of(embeddings)) as stub:
            with contextlib.suppress(_HeadReached):
                model(**tried)
            if stub.calls != 1:
                raise ValueError(f"the output embeddings are called {stub.calls} times")
            dtypes = (stub.hidden.dtype, stub.autocast_dtype or stub.hidden.dtype)
            return stub.hidden, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    with found.stance(embeddings):
        how = reading.reading_of(base, run, (found.prompt_learning, len(found.chain)))
    if how.causal is False or (how.causal is None and reading.is_masked_lm(base)):
        flags = ", ".join(f"config.{n}={getattr(base.config, n, None)}" for n in ("is_decoder", "is_causal"))
        both = "whose hidden state at a token depends on later tokens"
        raise ValueError(
            f"model must be causal, got {_name(base)} ({flags}), {both if how.causal is False else 'a masked LM'}: the "
            "log-probability of a token would be that of one already seen; take a causal LM (for BERT and its like, "
            "is_decoder=True in the config)"
        )
    mask = model_inputs.get(f"{decoder}attention_mask")
    given = model_inputs.get("position_ids") is not None
    if how.left_padding == "own" or given or not isinstance(mask, Tensor) or mask.dim() != 2:
        return {}
    read = model_inputs.get(f"{decoder}input_ids", model_inputs.get(f"{decoder}inputs_embeds"))
    if not isinstance(read, Tensor) or read.shape[:2] != mask.shape:
        return {}  # with a cache, the caller knows the positions
    if how.left_padding == "position_ids":
        return {"position_ids": reading.positions(mask)}
    if reading.is_left_padded(mask):
        why = {"wrong": "reads a row otherwise when padding is on its left"}
        tell = why.get(how.left_padding, "could not be tried with padding on the left")
        raise ValueError(
            f"{decoder}attention_mask must not begin with 0: {_name(base)} {tell}{how.why and f' ({how.why})'}; pad on "
            f"the right{', or give position_ids' if not decoder and _takes(base, 'position_ids') else ''}"
        )
    return {}


def _check_adapter_names(embeddings: nn.Module, names: Any) -> None:
    """PEFT's adapters by row: right where they are in the body alone, since one head serves all rows."""
    peft = sys.modules.get("peft")
    if names is None or peft is None:
        return
    module: Any = embeddings
    own: set[str] = set()
    if isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper):
        own = set(getattr(module, "modules_to_save", ())) or set(module.active_adapters)
    elif isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
        own = set(module._all_available_adapter_names())
    concerned = own & {*names, *module.active_adapters} if own else set()
    if concerned:
        raise ValueError(
            f"adapter_names must not concern the head, got {list(names)} where the output embeddings have adapters "
            f"{sorted(concerned)}: one head serves all rows; call once for each adapter (model.set_adapter), with its rows"
        )


def probe(
    base: nn.Module,
    embeddings: nn.Module,
    call: Callable[[], Any],
    operands: Callable[[], Operands] | None = None,
    tied: bool = False,
) -> Probed:
    """Run `call()`, a forward of the transformers model `base`, up to its output embeddings.

    Args:
        operands: what the head multiplies by, asked for where it is whole or can be streamed; None is
            `operands_of(embeddings)`.
        tied: a backward from `hidden` begins with what `call()` returned, where FSDP2 has hooked it. Without it nobody
            reduces the gradients of what is in the root's group alone.

    Raises:
        ValueError: the logits are made in a way that `Probed` cannot say; the message tells why.
    """
    given = operands or (lambda: parts_of(embeddings))
    shards = shards_of(embeddings, given)
    found = operands or (lambda: operands_of(embeddings))
    copies = is_fsdp2(embeddings) and shards is None
    # What shares a group with the head, as the last norm may, must be whole again in the backward.
    tied = tied or (copies and private.fsdp_group(embeddings) is None)
    with _stubbed(embeddings, operands=found if copies else None, shards=shards) as stub:
        try:
            result = call()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if stub.calls == 0:
                raise
            raise ValueError(f"unsupported head: {_name(base)} fails on the probe of its logits: {error}") from error
    logits = _logits(result, base, stub)
    transform = _fit(logits.detach(), stub)
    hidden = tied_to(stub.hidden, logits) if tied and logits.requires_grad else stub.hidden
    # Only now: FSDP2 and parametrisations put the weight that was used in place during the forward.
    used = stub.operands or (found() if shards is None else given().streamed(shards))
    return Probed(hidden, used, transform, getattr(result, "aux_loss", None), stub.autocast_dtype)


def tied_to(x: Tensor, other: Tensor) -> Tensor:
    """x, of which a backward gives zeros to `other` too."""
    return _Tied.apply(x, other)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.zeros = other.new_zeros(()).expand_as(other)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        return upstream, ctx.zeros


@dataclass
class _Unwrapped:
    base: Any  # the transformers model
    chain: list[nn.Module]  # from the outermost wrapper to the base
    prompt_learning: bool = False

    def compiled(self, embeddings: nn.Module) -> bool:
        """Whether hooks on the head would be traced into, or left out of, a compiled graph."""
        modules = [*self.chain, *embeddings.modules()]
        return any(private.is_compiled(module) for module in modules)

    def stance(self, embeddings: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """In which hooks on the head run."""
        return torch.compiler.set_stance("force_eager") if self.compiled(embeddings) else contextlib.nullcontext()


def unwrap(model: nn.Module) -> _Unwrapped:
    """Down through torch.compile, DDP, FSDP, DeepSpeed and PEFT to the transformers model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers causal LM, got {type(model).__name__}")
    chain, prompt_learning = [model], False
    while not hasattr(type(chain[-1]), "get_output_embeddings"):
        outer: Any = chain[-1]
        if hasattr(type(outer), "get_base_model"):  # PEFT
            prompt_learning |= outer.active_peft_config.is_prompt_learning
            inner = outer.get_base_model()
        else:
            children = dict(outer.named_children())
            inner = children.get("_orig_mod", children.get("module"))
        if inner is None or inner is outer:
            raise TypeError(f"model must be a transformers causal LM, bare or wrapped; {_name(outer)} is neither")
        chain.append(inner)
    return _Unwrapped(chain[-1], chain, prompt_learning)


class _HeadReached(BaseException):
    """Ends a forward of which only the head's input is wanted."""


class _Stub:
    """The hooks that stand in for the head during one forward, in the thread that runs it.

    last: which ends there. operands: of a head that is whole now alone. shards: of one that is not made whole. rows: that it
    multiplies; of none, DTensors make no logits.
    """

    def __init__(self, last: bool, operands: Callable[[], Operands] | None, shards: Shards | None, rows: int) -> None:
        self.last = last
        self.shards = shards
        self.rows = rows
        self.operands_now = operands
        self.operands: Operands | None = None
        self.thread = threading.get_ident()
        self.calls = 0
        self.autocast_dtype: torch.dtype | None = None
        self.hidden: Tensor
        self.probe: Tensor

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != self.thread:
            return None
        self.calls += 1
        if args and isinstance(args[0], Tensor) and (what := dtensor(args[0])):
            raise ValueError(f"the output embeddings are called with {what}")
        if not args or not isinstance(args[0], Tensor) or args[0].dim() < 2:
            raise ValueError(f"the output embeddings are called with {[_describe(a) for a in args]}, not (B, T, H)")
        self.hidden = args[0] if self.shards is None else self.shards.cast(args[0])
        kind = self.hidden.device.type
        self.autocast_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if self.last:
            raise _HeadReached
        if self.rows:
            return (self.hidden[(slice(self.rows),) * (self.hidden.dim() - 1)], *args[1:])
        return (self.hidden[..., :0, :], *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if threading.get_ident() != self.thread:
            return None
        V = output.shape[-1]
        # At least two rows and all V columns: a slice of either, or a column treated apart, shows.
        rows = max(2, math.ceil(len(_GRID) / V))
        values = _GRID.repeat(math.ceil(rows * V / len(_GRID)))[: rows * V]
        self.probe = values.view(*(1 for _ in output.shape[:-2]), rows, V)
        if self.operands_now is not None:
            self.operands = self.operands_now().copied()
            alone = private.fsdp_group(module) is not None
            if self.hidden.requires_grad and alone:  # else a backward from the output would gather the head for nothing
                output = output.detach()
        wide = torch.float32 if output.device.type == "mps" else torch.float64
        # The empty product ties the model's output to all its parameters: DDP looks there for unused ones.
        return self.probe.to(output.device, wide) + output[..., :0, :].sum().to(wide)

    def tie(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After FSDP2's own hook, ties the output to the rest of the model again."""
        if threading.get_ident() != self.thread or self.operands_now is None:
            return None
        return output + self.hidden[..., :0, :].sum().to(output)


@contextlib.contextmanager
def _stubbed(
    embeddings: nn.Module,
    last: bool = False,
    operands: Callable[[], Operands] | None = None,
    shards: Shards | None = None,
) -> Iterator[_Stub]:
    planned = isinstance(embeddings, nn.Linear) and tensor_parallel.is_sharded(embeddings)
    stub = _Stub(last, operands, shards, rows=int(planned))
    # Hooks that were there first run before `before` and after `after`: they are part of what is probed.
    handles = [
        embeddings.register_forward_pre_hook(stub.before),
        embeddings.register_forward_hook(stub.after, prepend=True),
        embeddings.register_forward_hook(stub.tie),
    ]
    try:
        asleep = contextlib.nullcontext() if shards is None else shards.asleep()
        with asleep, paused():  # a deferred model\'s head is an ordinary one here
            yield stub
    finally:
        for handle in handles:
            handle.remove()


def _logits(result: Any, base: nn.Module, stub: _Stub) -> Tensor:
    """The probe as the model returns it, with its graph, once it is known to be that."""
    name = _name(base)
    if stub.calls != 1:
        raise ValueError(f"unsupported head: {name} calls its output embeddings {stub.calls} times a forward, not once")
    logits = result[0] if isinstance(result, tuple) else getattr(result, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"unsupported head: {name} returns no logits, but {_describe(logits)}")
    if logits.shape != stub.probe.shape:
        raise ValueError(
            f"unsupported head: {name} makes logits of shape {tuple(logits.shape)} from a head output of shape "
            f"{tuple(stub.probe.shape)}; they must be equal (no padded or cut vocabulary, no positions dropped)"
        )
    return logits


def _fit(logits: Tensor, stub: _Stub) -> Transform:
    """The transform that turns the probe into `logits`, every value of it; or a ValueError."""
    eps = torch.finfo(logits.dtype).eps if logits.is_floating_point() else 1.0
    if eps > 1e-6:
        raise ValueError(
            f"unsupported head: the model rounds its logits to {logits.dtype}, too coarse to tell a transform"
        )
    x, z = stub.probe.flatten(), logits.to("cpu", torch.float64).flatten()

    def neat(value: float) -> float:  # 1.0 rather than 0.9999999999999999
        short = float(f"{value:.6g}")
        return short if abs(short - value) <= 4 * eps * abs(value) else value

    logit_scale = neat(float(z[_SMALLEST] / x[_SMALLEST]))
    largest = float(z[_LARGEST])
    candidates = [Transform(logit_scale)]
    if abs(largest - logit_scale * float(x[_LARGEST])) > 64 * eps * abs(largest):
        of_value = {name: curve.of_saturation for name, curve in CURVES.items()}
        candidates = [Transform(logit_scale, name, neat(of(largest))) for name, of in of_value.items() if of]
    wrong = torch.tensor(_LARGEST)
    for transform in candidates:
        if logit_scale == 0 or not all(math.isfinite(v) for v in (logit_scale, transform.parameter)):
            continue
        if transform.curve and transform.parameter == 0:
            continue
        expected = transform.apply(logit_scale * x[:, None], torch.ones_like(x))[:, 0]
        # `not <=` so that NaN counts as a misfit
        misfits = ~((z - expected).abs() <= 64 * eps * expected.abs())
        if not misfits.any():
            return transform
        wrong = misfits.int().argmax()
    raise ValueError(_misfit(x, z, wrong))


def _misfit(x: Tensor, z: Tensor, where: Tensor) -> str:
    return (
        "unsupported head: the model's logits are not softcap tanh(logit_scale (h W^T + b) / softcap), the same for "
        f"all tokens and columns; for one, a head output of {float(x[where]):.6g} became {float(z[where]):.6g}"
    )


def adapter_of(embeddings: nn.Module) -> LoRA | None:
    """The active low-rank adapter of a head that PEFT has wrapped; None where there is none, or it is off or merged.

    Raises:
        ValueError: an adapter that is no plain LoRA: several at once, DoRA, a bias, another method, dropout at work.
    """
    peft = sys.modules.get("peft")
    module: Any = embeddings
    if peft is None or not isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
        return None
    if module.disable_adapters or module.merged:
        return None
    plain = _class_of(module) is peft.tuners.lora.Linear
    active = [name for name in module.active_adapters if plain and name in module.lora_A]
    if plain and not active:
        return None
    name = active[0] if len(active) == 1 else None
    if name is None or name in module.lora_variant or module.lora_bias[name] or module.fan_in_fan_out:
        raise ValueError(
            f"unsupported head: of adapters on the head itself, one plain LoRA can be computed, got {_name(module)} with "
            f"{list(module.active_adapters)} active (DoRA, a bias or another method?); merge the adapter, or list the "
            "head in modules_to_save"
        )
    dropout = module.lora_dropout[name]
    if dropout.training and not isinstance(dropout, nn.Identity) and dropout.p > 0:
        raise ValueError(
            f"unsupported head: lora_dropout must be 0 for an adapter on the head in training mode, got {dropout.p}"
        )
    return LoRA(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]))


def linear_of(embeddings: nn.Module) -> nn.Linear:
    """The nn.Linear that does the head's work; refuses what multiplies in any other way."""
    module: Any = embeddings
    peft = sys.modules.get("peft")  # whoever has wrapped a head with it has imported it
    if peft is not None:
        if isinstance(module, peft.utils.other.ModulesToSaveWrapper):
            active = [name for name in module.active_adapters if name in module.modules_to_save]
            on = active and not module.disable_adapters
            module = module.modules_to_save[active[0]] if on else module.original_module
        if isinstance(module, peft.utils.other.TrainableTokensWrapper):
            raise ValueError(
                "unsupported head: PEFT trains rows of it (trainable_token_indices), since the head is tied to the input "
                f"embeddings, got {_name(module)}; untie the head (tie_word_embeddings=False), or merge the adapter and "
                "unload PEFT (merge_and_unload)"
            )
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            adapter_of(module)  # refuses what is no plain LoRA
            module = module.get_base_layer()
    # accelerate's device hooks replace the instance's forward and call the class's.
    replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    if isinstance(module, nn.Linear) and tensor_parallel.is_sharded(module):
        if module is not embeddings:
            raise ValueError(f"unsupported head: PEFT must not wrap a head under a tp_plan, got {_name(embeddings)}")
        replaced = False
    elif replaced and isinstance(module, nn.Linear) and (what := dtensor(module.weight)):
        raise ValueError(f"unsupported head: its weight is {what}")
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or replaced:
        raise ValueError(
            f"unsupported head: the output embeddings must compute h W^T + b as nn.Linear does, got {_name(module)}"
            " (quantised or custom)"
        )
    weight = module.weight
    if weight.dtype not in DTYPES or not (dtensor(weight) or type(weight) in (Tensor, nn.Parameter)):
        raise ValueError(
            f"unsupported head: the head's weight must be a plain tensor of one of {[str(d) for d in DTYPES]}, "
            f"got {_name(weight)} of {weight.dtype} (quantised?)"
        )
    return module


def parts_of(embeddings: nn.Module) -> Operands:
    """What the output embeddings multiply by, whole or in shards. Raises as `linear_of`."""
    linear = linear_of(embeddings)
    if tensor_parallel.is_sharded(linear):
        weight, bias, over = tensor_parallel.shard_of(linear)
        return Operands(weight, bias, None, over=over)
    return Operands(linear.weight, linear.bias, adapter_of(embeddings))


def shards_of(embeddings: nn.Module, operands: Callable[[], Operands] | None = None) -> Shards | None:
    """Of a head that can be streamed; None of any other."""
    if not is_fsdp2(embeddings):
        return None
    return Shards.of(embeddings, (parts_of(embeddings) if operands is None else operands()).weight)


def operands_now(embeddings: nn.Module) -> Operands:
    """As `operands_of`, or in shards that can be streamed: then every rank must call."""
    shards = shards_of(embeddings)
    return operands_of(embeddings) if shards is None else parts_of(embeddings).streamed(shards)


def operands_of(embeddings: nn.Module) -> Operands:
    """What the output embeddings multiply by, where that is whole, or sharded by a tp_plan.

    Raises:
        ValueError: they are no head that `Head` can say, or are sharded otherwise.
    """
    parts = parts_of(embeddings)
    weight = parts.weight
    if what := dtensor(weight):
        raise ValueError(
            f"unsupported head: its weight is {what}. FSDP2 gathers it for a forward alone, and none is in one: not for "
            "find_head of a head that shares its group, nor where fully_shard is called for a part of "
            "model.get_output_embeddings()"
        )
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"unsupported head: its weight is sharded ({_name(weight)}, {tuple(weight.shape)})")
    if weight.is_meta:
        raise ValueError("unsupported head: its weight is on the meta device (offloaded?); keep the head in memory")
    return parts


def is_fsdp2(module: nn.Module) -> bool:
    """Whether `fully_shard` was called for the module itself."""
    return _of_fsdp2(type(module))


def _class_of(module: nn.Module) -> type:
    """Without the one that FSDP2 puts before it."""
    return next(cls for cls in type(module).__mro__ if not _of_fsdp2(cls))


def _of_fsdp2(cls: type) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and issubclass(cls, fsdp.FSDPModule)


def _takes(base: nn.Module, name: str) -> bool:
    parameters = inspect.signature(base.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _name(thing: object) -> str:
    return type(thing).__name__


def _describe(thing: object) -> str:
    return f"{tuple(thing.shape)} {thing.dtype}" if isinstance(thing, Tensor) else _name(thing)
