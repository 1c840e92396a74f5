"""What every rank of a streamed head must find: run in several processes by test_streamed.py.

Each rank has rows of its own, and computes those of all in one process, too. Blocks are small: there are several.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fused_rlhf as fr
from fused_rlhf import private
from fused_rlhf.backends import tiling
from fused_rlhf.fsdp import Shards
from fused_rlhf.kernels.statistics import STATISTICS
from fused_rlhf.op import streams
from tests.helpers import ALL_OUTPUTS, TRANSFORMS, inputs

H = 16
SIZES = (90, 5)  # columns; of five, the last of four ranks has none
COUNTS = (7, 0, 12, 3)  # rows of each rank
BACKENDS = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ("chunked", "reference")


def counts() -> tuple[int, ...]:
    return COUNTS[: dist.get_world_size()]


def mine(tensor: Tensor) -> Tensor:
    """This rank's rows of those of all."""
    return tensor.split(counts())[dist.get_rank()]


def case(V: int = SIZES[0], transform: tuple = TRANSFORMS[1], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Rows of all ranks, and a whole head."""
    bias, logit_scale, softcap, per_token = transform
    data = inputs(sum(counts()), H, V, dtype, bias=bias, per_token=per_token)
    data["targets"][2] = -100
    return data | {"logit_scale": logit_scale, "softcap": softcap}


class Linear(nn.Linear):
    """A head under FSDP2, which holds these numbers."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], len(weight), bias is not None, dtype=weight.dtype)
        with torch.no_grad():
            self.weight.copy_(weight)
            if bias is not None:
                self.bias.copy_(bias)


def sharded(weight: Tensor, bias: Tensor | None = None, **policy: Any) -> Any:
    return fully_shard(Linear(weight, bias), mp_policy=MixedPrecisionPolicy(**policy))


def streamed(linear: Any, **more: Any) -> fr.Head:
    shards = Shards.of(linear, linear.weight)
    assert shards is not None
    return fr.Head(linear.weight.to_local(), shards.whole(linear.bias), stream=shards.stream(linear.weight), **more)


def same(found: Tensor, truth: Tensor, limit: float = 1e-6) -> None:
    assert found.shape == truth.shape
    scale = max(truth.double().abs().max().item(), 1.0) if truth.numel() else 1.0
    worst = (found.double() - truth.double()).abs().amax().item() / scale if found.numel() else 0.0
    assert worst <= limit, worst


Call = Callable[..., tuple[Tensor, list[Tensor]]]


def compare(call: Call, data: dict[str, Any], **more: Any) -> None:
    """`call(hidden, head, rows=..., **arguments)` -> (loss, values by row) of this rank's rows against that of all."""
    transform = {"logit_scale": data["logit_scale"], "softcap": data["softcap"]}
    by_row = {name: data[name] for name in ("targets", "temperature") if isinstance(data[name], Tensor)}
    fixed = {"temperature": data["temperature"]} | more
    weight, bias = (v if v is None else v.clone().requires_grad_() for v in (data["weight"], data["bias"]))
    hidden = data["hidden"].clone().requires_grad_()
    loss, values = call(hidden, fr.Head(weight, bias, **transform), rows=lambda x: x, **{**fixed, **by_row})
    loss.backward()

    linear: Any = sharded(data["weight"], data["bias"])
    own = mine(data["hidden"]).clone().requires_grad_()
    arguments = {**fixed, **{name: mine(value) for name, value in by_row.items()}}
    part, found = call(own, streamed(linear, **transform), rows=mine, **arguments)
    part.backward()
    total = part.detach().clone()
    dist.all_reduce(total)
    same(
        total, loss.detach(), 1e-6 * max(len(values), 1)
    )  # a sum over the values, each of which is as near as they must be
    for value, truth in zip(found, values, strict=True):
        same(value, mine(truth))
    same(own.grad, mine(hidden.grad))
    for parameter, truth in ((linear.weight, weight), (linear.bias, bias)):
        if truth is not None:  # engines average over ranks
            same(parameter.grad.full_tensor() * dist.get_world_size(), truth.grad, 2e-6)


def log_probs(
    hidden: Tensor,
    head: fr.Head,
    *,
    rows: Callable[[Tensor], Tensor],
    outputs: tuple[str, ...] = ALL_OUTPUTS,
    **more: Any,
) -> tuple[Tensor, list[Tensor]]:
    found = fr.linear_logprobs(hidden, head, outputs=outputs, **more)
    names = ["logprobs", *(name for name in outputs if STATISTICS[name].differentiable)]
    u = torch.linspace(-1, 1, len(names) * sum(counts()), dtype=found.logprobs.dtype).view(-1, len(names))
    u[5] = 0
    loss = sum((getattr(found, name) * some).sum() for name, some in zip(names, rows(u).unbind(1)))
    return loss, [found.logprobs.detach(), *(getattr(found, name).detach().float() for name in outputs)]


def case_statistics() -> None:
    for backend in BACKENDS:
        for transform in TRANSFORMS:
            compare(log_probs, case(transform=transform), backend=backend)
        compare(log_probs, case(SIZES[1]), backend=backend)
    if "triton" not in BACKENDS:
        compare(log_probs, case(dtype=torch.float64))


def case_equal_columns() -> None:
    """Of columns that are equal the first one is the largest, whichever block comes first."""
    data = case(transform=TRANSFORMS[0])
    data["hidden"], data["weight"][:] = data["hidden"].round(), data["weight"][0].round()  # whose products are exact
    data["targets"] = torch.zeros_like(data["targets"])
    found = fr.linear_logprobs(
        mine(data["hidden"]), streamed(sharded(data["weight"])), mine(data["targets"]), outputs=("is_top1",)
    )
    assert found.is_top1.all()


def case_losses() -> None:
    """Policies and preferences; a reference of the same call, streamed too."""
    data = case(transform=TRANSFORMS[5])
    N, world = sum(counts()), dist.get_world_size()
    g = torch.Generator().manual_seed(3)
    old, ref, advantages = (-torch.rand(N, generator=g) * 3 for _ in range(3))
    edges = torch.tensor([0, *counts()]).cumsum(0)  # a sequence of each rank

    def policy(hidden: Tensor, head: fr.Head, *, rows: Any, objective: Any, mode: Any, **more: Any) -> Any:
        given: dict[str, Any] = {"ref_logprobs": rows(ref)} if objective.beta else {}
        cu = edges if len(hidden) == N else torch.tensor([0, len(hidden)])
        loss, _ = fr.linear_policy_loss(
            hidden, head, **more, **given, objective=objective, advantages=rows(advantages), old_logprobs=rows(old),
            mode=mode, cu_seqlens=cu, num_sequences=world, num_tokens=N, backend=BACKENDS[0],
        )  # fmt: skip
        return loss, []

    for objective, mode in (
        (fr.GRPO(beta=0.04), "auto"),
        (fr.PPO(entropy_coef=0.01), "two_phase"),
        (fr.GSPO(), "auto"),
    ):
        compare(policy, data, objective=objective, mode=mode)

    def with_reference(hidden: Tensor, head: fr.Head, *, rows: Any, **more: Any) -> Any:
        other = data["weight"].flip(0).contiguous()
        ref_head = other if head.stream is None else streamed(sharded(other), logit_scale=1.5)
        if head.stream is None:
            ref_head = fr.Head(other, logit_scale=1.5)
        loss, _ = fr.linear_policy_loss(
            hidden, head, **more, objective=fr.GRPO(beta=0.1), advantages=rows(advantages), ref_hidden=hidden.detach(),
            ref_weight=ref_head, num_sequences=world, num_tokens=N,
            cu_seqlens=edges if len(hidden) == N else torch.tensor([0, len(hidden)]),
        )  # fmt: skip
        return loss, []

    compare(with_reference, data)

    def preferred(hidden: Tensor, head: fr.Head, *, rows: Any, objective: Any, **more: Any) -> Any:
        """Each rank has two pairs of one token, or none."""
        given: dict[str, Any] = {"ref_logprobs": rows(ref)} if objective.needs_reference else {}
        some = [slice(start, start + 4) for start, count in zip(edges.tolist(), counts()) if count >= 4]
        if len(hidden) < N:
            some = [slice(0, 4)] if len(hidden) >= 4 else [slice(0, 0)]
        loss = hidden.sum() * 0
        for chosen in some:
            arguments = more | given
            arguments |= {name: value[chosen] for name, value in arguments.items() if isinstance(value, Tensor)}
            cu = torch.arange(len(hidden[chosen]) + 1)
            part, _ = fr.linear_preference_loss(
                hidden[chosen], head, **arguments, objective=objective, cu_seqlens=cu, num_pairs=2, num_tokens=N
            )
            loss = loss + part
        return loss, []

    for preference in (fr.DPO(), fr.SimPO(), fr.ORPO()):
        compare(preferred, data, objective=preference)


def case_what_is_gathered() -> None:
    """What is not computed block by block: of ids, kept sets, with a filter, and the JSD."""
    data = case(transform=TRANSFORMS[0])

    def of_ids(hidden: Tensor, head: fr.Head, *, rows: Any, **more: Any) -> Any:
        ids = torch.arange(sum(counts()) * 3).view(-1, 3) % SIZES[0]
        found = fr.linear_logprobs(hidden, head, ids=rows(ids), **more)
        return (found.id_logprobs.sum() + found.logprobs.sum()), [found.id_logprobs.detach()]

    def truncated(hidden: Tensor, head: fr.Head, *, rows: Any, **more: Any) -> Any:
        found = fr.linear_logprobs(hidden, head, truncation=fr.Truncation(top_k=20), **more)
        return found.logprobs.sum(), [found.logprobs.detach()]

    def filtered(hidden: Tensor, head: fr.Head, *, rows: Any, **more: Any) -> Any:
        found = fr.linear_logprobs(hidden, head, grad_filter=1e-9, **more)
        return found.logprobs.sum(), [found.logprobs.detach()]

    def divergence(hidden: Tensor, head: fr.Head, *, rows: Any, targets: Tensor, **more: Any) -> Any:
        value = fr.linear_kl(hidden, head, rows(data["hidden"]) + 0.5, head, "jsd", mask=targets != -100, **more)
        return value.sum(), [value.detach()]

    for call in (of_ids, truncated, filtered, divergence):
        compare(call, data)


def case_divergence() -> None:
    """Of two heads in shards, or one; near the reference and far from it."""
    data = case(transform=TRANSFORMS[1])
    other = {"weight": data["weight"] + 0.1, "bias": data["bias"].flip(0)}

    def against(
        hidden: Tensor, head: fr.Head, *, rows: Any, kind: Any, far: float, both: bool, targets: Tensor, **more: Any
    ) -> Any:
        ref = fr.Head(**other) if head.stream is None or not both else streamed(sharded(**other))
        value = fr.linear_kl(hidden, head, rows(data["hidden"]) + far, ref, kind, mask=targets != -100, **more)
        return (value * rows(torch.linspace(1, 2, sum(counts())))).sum(), [value.detach()]

    for kind in ("forward", "reverse"):
        for both in (True, False):
            compare(against, data, kind=kind, far=0.5, both=both, backend=BACKENDS[0])
    if "triton" not in BACKENDS:
        compare(against, data, kind="forward", far=0.5, both=True, backend="reference")

    def of_the_reference_alone(hidden: Tensor, head: fr.Head, *, rows: Any, targets: Tensor, **more: Any) -> Any:
        ref = fr.Head(**other) if head.stream is None else streamed(sharded(**other))
        own = fr.Head(*(leaf.clone() for leaf in (data["weight"], data["bias"])))
        value = fr.linear_kl(hidden, own, rows(data["hidden"]) + 0.5, ref, "reverse", mask=targets != -100, **more)
        return value.sum() + head.weight.sum() * 0 + head.bias.sum() * 0, [value.detach()]

    compare(of_the_reference_alone, data)
    head = streamed(sharded(data["weight"]))
    with counted() as (calls, _), torch.no_grad():
        zero = fr.linear_kl(mine(data["hidden"]), head, mine(data["hidden"]), head, "reverse")
    assert not zero.any()
    assert calls["all_gather"] == 2 * -(-head.stream.rows // streams.rows_of_block(head.stream, H))


def case_adapter() -> None:
    """A frozen head with a LoRA: no gradient of the weight goes home, those of A and B do."""
    data = case()
    g = torch.Generator().manual_seed(4)
    a, b = torch.randn(3, H, generator=g), torch.randn(SIZES[0], 3, generator=g)
    whole = [leaf.clone().requires_grad_() for leaf in (a, b)]
    lora = (whole[0], whole[1], 0.5)
    u = torch.linspace(1, 2, sum(counts()))
    truth = fr.linear_logprobs(data["hidden"], fr.Head(data["weight"], lora=lora), data["targets"]).logprobs
    (truth * u).sum().backward()

    class Adapted(Linear):
        def __init__(self) -> None:
            super().__init__(data["weight"], None)
            self.weight.requires_grad_(False)
            self.a, self.b = (nn.Parameter(leaf.clone()) for leaf in (a, b))

    linear: Any = fully_shard(Adapted())
    shards = Shards.of(linear, linear.weight)
    assert shards is not None
    head = replace(streamed(linear), lora=(shards.whole(linear.a), shards.whole(linear.b), 0.5))
    with counted() as (calls, _):
        found = fr.linear_logprobs(mine(data["hidden"]), head, mine(data["targets"])).logprobs
        (found * mine(u)).sum().backward()
    assert calls["reduce_scatter"] == 2  # of A and of B
    same(found.detach(), mine(truth.detach()))
    assert linear.weight.grad is None
    for parameter, leaf in ((linear.a, whole[0]), (linear.b, whole[1])):
        same(parameter.grad.full_tensor() * dist.get_world_size(), leaf.grad)


def case_half_precision() -> None:
    """A master weight in fp32 that travels in bf16, its gradient in fp32: as under FSDP2 itself."""
    data = case(transform=TRANSFORMS[0])
    weight = data["weight"].bfloat16().requires_grad_()
    hidden = data["hidden"].bfloat16().requires_grad_()
    fr.linear_logprobs(hidden, weight, data["targets"]).logprobs.sum().backward()
    linear: Any = sharded(data["weight"], param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    own = mine(hidden.detach()).clone().requires_grad_()
    with counted() as (_, size):
        head = streamed(linear)
        fr.linear_logprobs(own, head, mine(data["targets"])).logprobs.sum().backward()
    rows, world = -(-SIZES[0] // dist.get_world_size()), dist.get_world_size()
    assert size["all_gather"] == 2 * 2 * rows * H
    assert size["reduce_scatter"] == 4 * world * rows * H
    same(own.grad, mine(hidden.grad), 2**-7)
    assert linear.weight.grad.dtype == torch.float32
    same(linear.weight.grad.full_tensor() * world, weight.grad, 2**-7)


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Collectives, and the bytes that each takes from here."""
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()

    def watched(name: str) -> Any:
        original = getattr(private, name)

        def call(into: Tensor, own: Tensor, group: Any) -> Any:
            calls[name] += 1
            size[name] += own.nbytes
            return original(into, own, group)

        return mock.patch.object(private, name, call)

    with watched("all_gather"), watched("reduce_scatter"):
        yield calls, size


def case_what_is_sent() -> None:
    """Every block once forward and once backward, its gradient once; on a rank without a live row, too."""
    data = case(transform=TRANSFORMS[0])
    linear: Any = sharded(data["weight"])
    head = streamed(linear)
    rows = head.stream.rows
    blocks = -(-rows // streams.rows_of_block(head.stream, H))
    assert blocks > 2
    for weight in (1.0, 0.0):
        own = mine(data["hidden"]).clone().requires_grad_()
        with counted() as (calls, size):
            found = fr.linear_logprobs(own, head, mine(data["targets"]))
            assert dict(calls) == {"all_gather": blocks}
            assert size["all_gather"] == 4 * rows * H
            (found.logprobs.sum() * (weight if dist.get_rank() else 0.0)).backward(retain_graph=True)
        assert dict(calls) == {"all_gather": 2 * blocks, "reduce_scatter": blocks}
        assert size["reduce_scatter"] == 4 * dist.get_world_size() * rows * H
        with counted() as (calls, _), torch.no_grad():
            fr.linear_logprobs(own, head, mine(data["targets"]))
        assert dict(calls) == {"all_gather": blocks}


def case_never_whole() -> None:
    """No tensor that is made or seen is larger than a shard; forward and backward."""
    V = 10240
    hidden = torch.randn(3, H, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()
    linear: Any = sharded(torch.randn(V, H, generator=torch.Generator().manual_seed(9)))
    block = dist.get_world_size() * streams.rows_of_block(streamed(linear).stream, H) * H
    tile = len(hidden) * tiling.TILE
    assert block < tile < V * H / 8
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for value in found if isinstance(found, tuple | list) else [found]:
                if type(value) is Tensor:  # a DTensor tells the size of the whole
                    seen.append(value.untyped_storage().nbytes() // value.element_size())
            return found

    head = streamed(linear)
    with Watch():
        found = fr.linear_logprobs(hidden, head, torch.arange(3))
        found.logprobs.sum().backward()
    assert max(seen) == head.stream.rows * H


def case_refusals() -> None:
    """An error at one rank's door is raised on all, before anything is fetched."""
    data = case(transform=TRANSFORMS[0])
    head, first = streamed(sharded(data["weight"])), dist.get_rank() == 0
    arguments: dict[str, Any] = {"hidden": mine(data["hidden"]), "weight": head, "targets": mine(data["targets"])}

    def refused(error: type[Exception], words: str, call: Any = fr.linear_logprobs, **changes: Any) -> None:
        with counted() as (calls, _), pytest.raises(error, match=words):
            call(**(arguments | changes))
        assert not calls

    wrong = (ValueError, "temperature") if first else (RuntimeError, "refused on rank 0")
    refused(*wrong, temperature=-1.0 if first else 1.0)
    refused(ValueError, "the same options", outputs=("entropy",) if first else ())
    refused(ValueError, "process_group must be None with a head that FSDP2 shards", process_group=dist.group.WORLD)
    grpo: dict[str, Any] = {"objective": fr.GRPO(), "advantages": torch.ones(1), "mode": "one_pass"}
    refused(ValueError, "must not be used with a head that FSDP2 shards", fr.linear_policy_loss, **grpo)
    with pytest.raises(ValueError, match="stream must be None to be told in keywords"):
        head.kwargs()


def case_replicas() -> None:
    """Shards over two of four ranks, each held twice (HSDP)."""
    if dist.get_world_size() != 4:
        return
    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    data = case(transform=TRANSFORMS[0])
    weight = data["weight"].clone().requires_grad_()
    fr.linear_logprobs(data["hidden"], weight, data["targets"]).logprobs.sum().backward()
    linear: Any = fully_shard(Linear(data["weight"], None), mesh=mesh)
    fr.linear_logprobs(mine(data["hidden"]), streamed(linear), mine(data["targets"])).logprobs.sum().backward()
    same(linear.weight.grad.full_tensor() * 4, weight.grad)


def case_divisor() -> None:
    """Of gradients, as FSDP2 is told."""
    data = case(transform=TRANSFORMS[0])
    grads = []
    for divisor in (None, 1.0):
        linear: Any = sharded(data["weight"])
        if divisor is not None:
            linear.set_gradient_divide_factor(divisor)
        fr.linear_logprobs(mine(data["hidden"]), streamed(linear), mine(data["targets"])).logprobs.sum().backward()
        grads.append(linear.weight.grad.full_tensor())
    same(grads[1], grads[0] * dist.get_world_size())


def case_accumulation() -> None:
    """Two backwards add up as those of FSDP2's own head do, whether it is told to reduce after the first or not."""
    data = case(transform=TRANSFORMS[1])
    targets = mine(data["targets"])

    def its_own(linear: Any, hidden: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(linear(hidden), targets, reduction="none")

    def ours(linear: Any, hidden: Tensor) -> Tensor:
        return fr.linear_logprobs(hidden, streamed(linear), targets).logprobs

    def twice(of: Callable[[Any, Tensor], Tensor], sync: bool) -> list[Tensor]:
        linear: Any = sharded(data["weight"], data["bias"])
        for scale, now in ((1.0, sync), (-0.5, True)):
            linear.set_requires_gradient_sync(now)
            of(linear, mine(data["hidden"]) * scale).sum().backward()
        return [parameter.grad.full_tensor() for parameter in (linear.weight, linear.bias)]

    truth = twice(its_own, True)
    for sync in (True, False):
        for of in (its_own, ours):
            for found, want in zip(twice(of, sync), truth, strict=True):
                same(found, want, 2e-6)


CASES = {name.removeprefix("case_"): function for name, function in globals().items() if name.startswith("case_")}


def main(*names: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    streams.BYTES = dist.get_world_size() * H * 4 * 11  # eleven rows of each shard
    for name in names or CASES:
        CASES[name]()
    dist.destroy_process_group()
