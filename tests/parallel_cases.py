"""What every rank of a vocabulary-parallel head must find: run in several processes by test_parallel.py.

Each rank computes the whole in one process, too, and compares.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf.backends import tiling
from fused_rlhf.integrations import megatron, nemo_rl, skyrl, verl
from fused_rlhf.kernels.statistics import STATISTICS
from fused_rlhf.op import sharded_sets
from tests.helpers import ALL_OUTPUTS, TRANSFORMS, inputs

N, H, V = 12, 16, 90
# Shards of any sizes, also of none; the last has six rows that pad the vocabulary.
EDGES = {2: [0, 31, V], 3: [0, 40, 40, V], 4: [0, 1, 50, 70, V]}
PADDING = 6
HEADER = 11 * 8  # bytes
BACKENDS = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ("chunked", "reference")


def here() -> slice:
    rank, edges = dist.get_rank(), EDGES[dist.get_world_size()]
    return slice(edges[rank], edges[rank + 1])


def case(transform: tuple = TRANSFORMS[1], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    bias, logit_scale, softcap, per_token = transform
    data = inputs(N, H, V, dtype, bias=bias, per_token=per_token)
    data["targets"][2] = -100
    return data | {"logit_scale": logit_scale, "softcap": softcap}


def shard(tensor: Tensor | None, padded: bool) -> Tensor | None:
    """This rank's rows, with those that pad the last shard, whose numbers nobody may see."""
    if tensor is None:
        return None
    part = tensor[here()]
    last = dist.get_rank() == dist.get_world_size() - 1
    return torch.cat([part, torch.full_like(tensor[:PADDING], 1e4)]) if padded and last else part


def outcome(call: Callable[..., Any], data: dict[str, Any], head: Callable[..., Any], **more: Any) -> list[Tensor]:
    """[values ...], d_hidden and the head's gradients, of `call(**arguments) -> (loss, values)`."""
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in data.items()
        if name in ("hidden", "weight", "bias") and value is not None
    }
    loss, values = call(
        **{**data, **leaves, **more, "weight": head(leaves)} | {"bias": None, "logit_scale": 1.0, "softcap": None}
    )
    loss.backward()
    return [*values, *(leaf.grad for leaf in leaves.values())]


def compare(call: Callable[..., Any], data: dict[str, Any], padded: bool = False, **more: Any) -> None:
    """This rank's share of `call` against all of it in one process; values have the same bits on every rank."""
    transform = {"logit_scale": data["logit_scale"], "softcap": data["softcap"]}
    whole = outcome(call, data, lambda leaves: fr.Head(leaves["weight"], leaves.get("bias"), **transform), **more)
    part = {**data, "weight": shard(data["weight"], padded), "bias": shard(data["bias"], padded)}
    place: dict[str, Any] = {"vocab_start": here().start, "vocab_size": V} if padded else {}
    more["process_group"] = dist.group.WORLD
    found = outcome(
        call, part, lambda leaves: fr.Head(leaves["weight"], leaves.get("bias"), **transform, **place), **more
    )
    of_head = 1 + (data["bias"] is not None)
    values = len(whole) - of_head - 1
    for number, (value, truth) in enumerate(zip(found, whole, strict=True)):
        if number > values:  # of the head: this rank's rows
            truth, rest = truth[here()], value[len(truth[here()]) :]
            assert not rest.any()
            value = value[: len(truth)]
        scale = max(truth.double().abs().max().item(), 1.0) if truth.numel() else 1.0
        assert value.shape == truth.shape
        assert not value.numel() or (value.double() - truth.double()).abs().max() <= 1e-6 * scale, number
    for value in found[: values + 1]:
        everyone = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, value.contiguous())
        assert all(torch.equal(other, value) for other in everyone)


def log_probs(outputs: tuple[str, ...] = ALL_OUTPUTS, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    found = fr.linear_logprobs(**arguments, outputs=outputs)
    names = ["logprobs", *(name for name in outputs if STATISTICS[name].differentiable)]
    u = torch.linspace(-1, 1, len(names) * N, dtype=found.logprobs.dtype).view(-1, N)
    u[:, 5] = 0
    loss = torch.stack([(getattr(found, name) * some).sum() for name, some in zip(names, u)]).sum()
    return loss, [found.logprobs.detach(), *(getattr(found, name).detach().float() for name in outputs)]


def largest(**arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """A gradient in the largest logits alone, whose columns are on some of the ranks."""
    found = fr.linear_logprobs(**arguments, outputs=("max_logit",)).max_logit
    return (found * torch.linspace(-1, 1, N)).sum(), [found.detach()]


def case_statistics() -> None:
    for backend in BACKENDS:
        for number, transform in enumerate(TRANSFORMS):
            compare(log_probs, case(transform), padded=number % 2 == 0, backend=backend)
        compare(largest, case(transform), backend=backend)
    if "triton" not in BACKENDS:
        compare(log_probs, case(dtype=torch.float64))


def some_ids(targets: Tensor) -> Tensor:
    """(N, 5): one to ignore, the target, and three that lie anywhere, one of them twice."""
    g = torch.Generator().manual_seed(5)
    some = torch.randint(3, V, (len(targets), 2), generator=g)
    return torch.cat([torch.full_like(some[:, :1], -100), targets[:, None].clamp(min=3), some, some[:, :1]], 1)


def some_sets(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sets of two to eight tokens; that of row 1 lies in one place, so that some ranks have none of it."""
    g = torch.Generator().manual_seed(8)
    sets = []
    for row, target in enumerate(targets.tolist()):
        others = torch.randint(0, V, (1 + row % 7,), generator=g) if row != 1 else torch.tensor([target])
        sets.append(torch.cat([others, torch.tensor([max(target, 0)])]).unique())
    return torch.cat(sets), torch.tensor([0, *(len(found) for found in sets)]).cumsum(0)


def case_ids() -> None:
    """Each rank has the logits of some: at upstreams that are zero in one place or the other, and of rows and ids alone."""

    def of_ids(by_rows: float, by_ids: float, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
        found = fr.linear_logprobs(**arguments, ids=some_ids(arguments["targets"]), outputs=("entropy",))
        u = torch.linspace(-1, 2, found.id_logprobs.numel(), dtype=found.logprobs.dtype).view_as(found.id_logprobs)
        u = u.index_fill(0, torch.tensor([4, 7]), 0.0)
        loss = by_rows * (found.logprobs * u[:, 0] + found.entropy).sum() + by_ids * (found.id_logprobs * u).sum()
        return loss, [found.logprobs.detach(), found.id_logprobs.detach()]

    for backend in BACKENDS:
        for number, transform in enumerate(TRANSFORMS):
            for weights in ((1.0, 1.0), (0.0, 1.0)) if number else ((1.0, 0.0), (0.0, 0.0)):
                compare(partial(of_ids, *weights), case(transform), padded=number % 2 == 0, backend=backend)


def case_kept() -> None:
    def of_sets(outputs: tuple[str, ...], **arguments: Any) -> tuple[Tensor, list[Tensor]]:
        found = fr.linear_logprobs(**arguments, kept=some_sets(arguments["targets"]), outputs=outputs)
        u = torch.linspace(-1, 1, 4 * N, dtype=found.logprobs.dtype).view(4, N)
        u[:, 5] = 0
        grads = [name for name in ("entropy", "lse", "full_logprobs") if name in outputs]
        loss = (found.logprobs * u[0]).sum() + sum((getattr(found, name) * u[1]).sum() for name in grads)
        return loss, [found.logprobs.detach(), *(getattr(found, name).detach() for name in outputs)]

    everything = ("entropy", "lse", "sum_sq", "full_logprobs")
    for backend in BACKENDS:
        for number, transform in enumerate(TRANSFORMS):
            outputs = everything if number % 2 else everything[:number]
            compare(partial(of_sets, outputs), case(transform), padded=number % 3 == 0, backend=backend)

    def policy(**arguments: Any) -> tuple[Tensor, list[Tensor]]:
        loss, metrics = fr.linear_policy_loss(
            **arguments, objective=fr.GRPO(beta=0.1), advantages=torch.tensor([1.0]), outputs=("full_logprobs",),
            kept=some_sets(arguments["targets"]), ref_logprobs=torch.full((N,), -2.0),
        )  # fmt: skip
        return loss, [loss.detach(), *(metrics[name] for name in sorted(metrics))]

    compare(policy, case(TRANSFORMS[5]))


def case_truncation() -> None:
    """Sets that are named and, where NARROW is small, told by their borders; ties over several ranks."""
    curved, exact = case(TRANSFORMS[5]), case(TRANSFORMS[1])
    for name in ("hidden", "weight", "bias"):  # whose sums are exact, so that equals are such on any rank
        exact[name] = (2 * exact[name]).round() / 2
    for row in (5, 35, 36, 60, 88):
        exact["weight"][row], exact["bias"][row] = exact["weight"][3], exact["bias"][3]
    ks, ps = torch.arange(N) % 7 * 4, torch.linspace(0.3, 1, N)
    cuts = [
        fr.Truncation(top_k=5),
        fr.Truncation(top_p=0.8),
        fr.Truncation(min_p=0.05),
        fr.Truncation(top_k=40, top_p=0.9, min_p=0.02),
        fr.Truncation(top_k=ks, top_p=ps, min_p=0.01, order="vllm"),
        fr.Truncation(),
    ]
    everything = ("entropy", "lse", "sum_sq", "full_logprobs")

    def of_cut(cut: fr.Truncation, outputs: tuple[str, ...], **arguments: Any) -> tuple[Tensor, list[Tensor]]:
        found = fr.linear_logprobs(**arguments, truncation=cut, outputs=outputs)
        u = torch.linspace(-1, 1, 4 * N, dtype=found.logprobs.dtype).view(4, N)
        u[:, 5] = 0
        grads = [name for name in ("entropy", "lse", "full_logprobs") if name in outputs]
        loss = (found.logprobs * u[0]).sum() + sum((getattr(found, name) * u[1]).sum() for name in grads)
        added = [] if cut.keeps_all else [found.target_added.float()]
        return loss, [found.logprobs.detach(), *(getattr(found, name).detach() for name in outputs), *added]

    for backend in BACKENDS:
        for narrow in (512, 3):
            with mock.patch.object(sharded_sets, "NARROW", narrow):
                for number, cut in enumerate(cuts):
                    if backend == "triton" and number < 3:  # of which the next two are all; an interpreter is slow
                        continue
                    outputs = everything if number % 2 else everything[: number % 4]
                    for data in (curved, exact):
                        with blocks():
                            compare(partial(of_cut, cut, outputs), data, padded=number % 2 == 0, backend=backend)
    if "triton" not in BACKENDS:
        compare(partial(of_cut, cuts[4], everything), case(dtype=torch.float64))

    def policy(**arguments: Any) -> tuple[Tensor, list[Tensor]]:
        loss, metrics = fr.linear_policy_loss(
            **arguments, objective=fr.GRPO(beta=0.1), advantages=torch.tensor([1.0]), outputs=("entropy",),
            truncation=cuts[3], ref_logprobs=torch.full((N,), -2.0),
        )  # fmt: skip
        return loss, [loss.detach(), *(metrics[name] for name in sorted(metrics))]

    with blocks():
        compare(policy, curved)


def case_losses() -> None:
    """Policies and preferences, with references given, and computed from a head that is sharded likewise."""
    data = case(TRANSFORMS[5])
    g = torch.Generator().manual_seed(3)
    old, ref = (-torch.rand(N, generator=g) * 3 for _ in range(2))
    cu = torch.tensor([0, 4, 7, 12])
    for objective, mode in (
        (fr.GRPO(beta=0.04), "auto"),
        (fr.PPO(entropy_coef=0.01), "two_phase"),
        (fr.GSPO(), "auto"),
        (fr.DAPO(top_entropy_quantile=0.5), "auto"),
    ):

        def policy(objective=objective, mode=mode, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
            given: dict[str, Any] = {"ref_logprobs": ref} if objective.beta else {}
            loss, metrics = fr.linear_policy_loss(
                **arguments, **given, objective=objective, old_logprobs=old, mode=mode, cu_seqlens=cu, backend=BACKENDS[0],
                advantages=torch.tensor([1.0, 0.0, -0.5]), outputs=("entropy",),
            )  # fmt: skip
            return loss, [loss.detach(), *(metrics[name] for name in sorted(metrics))]

        compare(policy, data)
    pairs = torch.tensor([0, 3, 6, 8, 12])
    for preference in (fr.DPO(), fr.SimPO(), fr.ORPO(), fr.DPO(use_weighting=True)):

        def preferred(objective=preference, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
            given: dict[str, Any] = {"ref_logprobs": ref} if objective.needs_reference else {}
            loss, metrics = fr.linear_preference_loss(
                **arguments,
                **given,
                objective=objective,
                cu_seqlens=pairs,
                outputs=("entropy", "mean_logit", "is_top1"),
            )
            return loss, [loss.detach(), *(metrics[name] for name in sorted(metrics))]

        compare(preferred, data)

    def with_reference(**arguments: Any) -> tuple[Tensor, list[Tensor]]:
        hidden = data["hidden"] + 0.01
        loss, metrics = fr.linear_policy_loss(
            **arguments, objective=fr.GRPO(beta=0.1), advantages=torch.ones(1), ref_hidden=hidden
        )
        return loss, [loss.detach(), metrics["kl"]]

    compare(with_reference, data, padded=True)


@contextmanager
def blocks() -> Iterator[int]:
    """Rows of a block: as few as the rank has that takes the fewest."""
    own = 5 + dist.get_rank()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(tiling, "row_block", return_value=own))
        if "triton" in BACKENDS:
            ops: Any = import_module("fused_rlhf.kernels.ops")
            for name in ("one_pass_rows", "divergence_rows", "truncation_rows"):
                stack.enter_context(mock.patch.object(ops, name, return_value=own))
        yield 5


def case_one_pass() -> None:
    """In one block of rows and in several, of ranks that would choose different ones; trained, and frozen."""
    g = torch.Generator().manual_seed(3)
    old = -torch.rand(N, generator=g) * 3

    def policy(objective: Any, mode: Any, frozen: bool, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
        if frozen:
            head = arguments["weight"]
            arguments["weight"] = replace(head, weight=head.weight.detach(), bias=None)
        loss, metrics = fr.linear_policy_loss(
            **arguments, objective=objective, old_logprobs=old, mode=mode, cu_seqlens=torch.tensor([0, 4, 7, 12]),
            advantages=torch.tensor([1.0, 0.0, -0.5]), outputs=("entropy",),
        )  # fmt: skip
        if frozen:  # `outcome` asks for the gradients of these, too
            loss = loss + 0 * head.weight.sum()
        return loss, [loss.detach(), *(metrics[name] for name in sorted(metrics))]

    for backend in BACKENDS:
        for number, transform in enumerate(TRANSFORMS):
            frozen = number in (0, 2)
            for objective in (fr.DAPO(), fr.GRPO()) if backend == "triton" else (fr.DAPO(), fr.PPO(entropy_coef=0.01)):
                if frozen and objective.entropy_coef:
                    objective = fr.GSPO()
                call = partial(policy, objective, "one_pass", frozen)
                compare(call, case(transform), padded=number % 2 == 0, backend=backend)
                with blocks():
                    compare(call, case(transform), padded=number % 2 == 0, backend=backend)
    with blocks() as rows:
        for mode, forward in (
            ("auto", 1 + -(-(N - 1) // rows)),
            ("one_pass", 1 + -(-(N - 1) // rows)),
            ("two_phase", 2),
        ):
            data = case(TRANSFORMS[0])
            leaves = [data["hidden"].clone().requires_grad_(), data["weight"][here()].clone().requires_grad_()]
            with counted() as (calls, size):
                arguments: dict[str, Any] = {"mode": mode, "process_group": dist.group.WORLD, "backend": BACKENDS[0]}
                hidden, weight = leaves
                loss, _ = fr.linear_policy_loss(
                    hidden, weight, data["targets"], objective=fr.DAPO(), advantages=torch.ones(1), **arguments
                )
                assert dict(calls) == {"all_gather": forward}
                numbers = 4 if BACKENDS[0] == "triton" else 3
                assert size["all_gather"] == HEADER + 4 * (N - 1) * numbers
                loss.backward(retain_graph=True)
                loss.backward()
                assert calls["all_reduce"] == 2
                assert size["all_reduce"] == 2 * 4 * (N - 1) * H


def divergences(far: float, kind: Any, dtype: torch.dtype, backend: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(values, d_hidden, this rank's dW) of one process, and of the group with a padded vocabulary."""
    data = case(TRANSFORMS[0], dtype)
    noise = torch.randn(N, H, generator=torch.Generator().manual_seed(9), dtype=dtype)
    mask = torch.ones(N, dtype=torch.bool).index_fill(0, torch.tensor([1]), False)
    own, results = shard(data["weight"], padded=True), []
    assert own is not None
    tells: list[tuple[Tensor, dict[str, Any]]] = [(data["weight"], {}), (own, {"process_group": dist.group.WORLD})]
    for rows, more in tells:
        hidden, weight = data["hidden"].clone().requires_grad_(), rows.clone().requires_grad_()
        head = fr.Head(weight, vocab_size=V if more else None)
        ref_hidden = data["hidden"] + far * noise
        value = fr.linear_kl(hidden, head, ref_hidden, rows, kind, mask=mask, backend=backend, **more)
        (value * torch.linspace(1, 2, N, dtype=dtype)).sum().backward()
        grad = weight.grad[: here().stop - here().start] if more else weight.grad[here()]
        results.append((value.detach(), hidden.grad, grad))
    return results


def case_divergence() -> None:
    """In both directions, near and far from the reference, and exactly 0 where there is no difference."""
    fp64 = "triton" not in BACKENDS
    for backend in BACKENDS:
        for far in (1e-3, 1.0) if fp64 else (1.0,):
            for kind in ("forward", "reverse", "jsd"):
                with blocks():
                    whole, found = divergences(far, kind, torch.float64 if fp64 else torch.float32, backend)
                for value, truth in zip(found, whole, strict=True):
                    limit = (1e-9 if fp64 else 5e-6) * truth.abs().amax().item() if truth.numel() else 0.0
                    if backend == "reference":  # its terms are the definition's, which cancel
                        limit += 1e-14
                    torch.testing.assert_close(value, truth, rtol=0, atol=limit)
    for kind in ("reverse", "jsd"):
        assert not divergences(0.0, kind, torch.float32, BACKENDS[0])[1][0].any()


def case_what_a_divergence_sends() -> None:
    """Of the JSD twice: what the probabilities need, block by block, and then the terms."""
    data, live = case(TRANSFORMS[0]), N
    weight = data["weight"][here()]
    cases: tuple[tuple[Any, int, int], ...] = (("forward", 1, 4), ("jsd", 3 + 1, 4 + 2))
    for kind, calls_of, numbers in cases:
        hidden = data["hidden"].clone().requires_grad_()
        with blocks(), counted() as (calls, size):
            value = fr.linear_kl(hidden, weight, data["hidden"], weight, kind, process_group=dist.group.WORLD)
            assert dict(calls) == {"all_gather": 1 + calls_of}
            assert size["all_gather"] == HEADER + 4 * live * numbers
            value.sum().backward()
            assert calls["all_reduce"] == 1
            assert size["all_reduce"] == 4 * live * H


def case_adapter() -> None:
    """A whole A and this rank's rows of B; dA is whole on every rank."""
    data = case()
    g = torch.Generator().manual_seed(4)
    a, b = torch.randn(3, H, generator=g), torch.randn(V, 3, generator=g)

    def gradients(rows: slice, **more: Any) -> list[Tensor]:
        leaves = [a.clone().requires_grad_(), b[rows].clone().requires_grad_()]
        arguments: dict[str, Any] = {"weight": data["weight"][rows], "bias": data["bias"][rows], "lora": (*leaves, 0.5)}
        loss, _ = log_probs((), hidden=data["hidden"], targets=data["targets"], **arguments, **more)
        loss.backward()
        return [leaf.grad for leaf in leaves]

    whole, found = gradients(slice(None)), gradients(here(), process_group=dist.group.WORLD)
    for value, truth in ((found[0], whole[0]), (found[1], whole[1][here()])):
        torch.testing.assert_close(value, truth, rtol=0, atol=1e-6 * whole[0].abs().max().item())


def case_filter() -> None:
    """Within the bound of grad_filter, of all ranks together."""
    data, limit = case(TRANSFORMS[0]), 0.05
    for share in (0.0, limit):
        hidden = data["hidden"].clone().requires_grad_()
        found = fr.linear_logprobs(
            hidden, data["weight"][here()], data["targets"], grad_filter=share, process_group=dist.group.WORLD
        )
        found.logprobs.sum().backward()
        if not share:
            exact = hidden.grad
    bound = limit * data["weight"].norm(dim=1).max()
    assert ((hidden.grad - exact).norm(dim=1) <= bound).all()


def case_local_gradient() -> None:
    """Parts of d_hidden that add up to the whole."""
    data = case(TRANSFORMS[0])
    parts = []
    for how in ("sum", "local"):
        hidden = data["hidden"].clone().requires_grad_()
        arguments: dict[str, Any] = {"process_group": dist.group.WORLD, "hidden_grad": how}
        fr.linear_logprobs(hidden, data["weight"][here()], data["targets"], **arguments).logprobs.sum().backward()
        parts.append(hidden.grad.clone())
    dist.all_reduce(parts[1])
    torch.testing.assert_close(parts[1], parts[0], rtol=0, atol=2e-6)


def case_verl() -> None:
    """Its function on a tensor-parallel head, as Megatron's workers call it: d_hidden is each rank's own part."""
    data = case(TRANSFORMS[0])
    whole, hidden = (data["hidden"].clone().requires_grad_() for _ in range(2))
    truth, entropy = verl.linear_cross_entropy(whole, data["weight"], data["targets"], 0.7)
    found, its = verl.linear_cross_entropy(
        hidden.view(N, 1, H), data["weight"][here()], data["targets"][None], 0.7, "none", dist.group.WORLD
    )
    torch.testing.assert_close(found, truth, rtol=0, atol=2e-6)
    torch.testing.assert_close(its, entropy, rtol=0, atol=2e-6)
    (truth - entropy).sum().backward()
    (found - its).sum().backward()
    dist.all_reduce(hidden.grad)
    torch.testing.assert_close(hidden.grad, whole.grad, rtol=0, atol=2e-6 * whole.grad.abs().max().item())


def whole_sequence(b: int = 2) -> dict[str, Tensor]:
    """(s, b, H) hidden states, (b, s) ids, and the log-probs of the ids, differentiable in hidden and weight."""
    g = torch.Generator().manual_seed(6)
    s = 4 * dist.get_world_size()
    hidden, weight = torch.randn(s, b, H, generator=g).requires_grad_(), torch.randn(V, H, generator=g).requires_grad_()
    ids = torch.randint(0, V, (b, s), generator=g)
    log_p = torch.log_softmax(hidden.double() @ weight.double().T, -1).transpose(0, 1)
    return {"hidden": hidden, "weight": weight, "ids": ids, "log_p": log_p}


def own_part(hidden: Tensor) -> Tensor:
    """This rank's share of the sequence, a leaf."""
    return hidden.detach().chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()


def same(found: Tensor, truth: Tensor) -> None:
    size = truth.abs().amax().item() if truth.numel() else 0.0
    torch.testing.assert_close(found.double(), truth.double(), rtol=0, atol=2e-6 * max(size, 1.0))


def case_megatron() -> None:
    """As GPTModel calls it: with the sequence in parts, and with all of it on every rank."""
    data = whole_sequence()
    keep = torch.ones_like(data["ids"]).index_fill(1, torch.tensor([1]), 0)
    scaled = torch.log_softmax(1.5 * data["hidden"].double() @ data["weight"].double().T / 0.7, -1).transpose(0, 1)
    truth = scaled.gather(-1, data["ids"][..., None])[..., 0] * keep
    truth.sum().backward()
    for in_parts in (True, False):
        hidden = own_part(data["hidden"]) if in_parts else data["hidden"].detach().clone().requires_grad_()
        weight = data["weight"].detach()[here()].clone().requires_grad_()
        layer = SimpleNamespace(weight=weight, bias=None, sequence_parallel=in_parts, tp_group=dist.group.WORLD)
        arguments = dict.fromkeys(("input_ids", "position_ids", "attention_mask", "decoder_input", "packed_seq_params"))
        found = megatron.output_processor(
            hidden_states=hidden, output_layer=layer, output_weight=None, labels=data["ids"], loss_mask=keep,
            inference_context=None, runtime_gather_output=False, compute_language_model_loss=None, config=None,
            context=megatron.Processing(temperature=0.7, outputs=("entropy",)), scale_logits=lambda z: 1.5 * z, **arguments,
        )  # fmt: skip
        same(found.logprobs.detach(), truth.detach())
        assert found.entropy.shape == truth.shape
        found.logprobs.sum().backward()
        rank, world = dist.get_rank(), dist.get_world_size()
        same(hidden.grad, data["hidden"].grad.chunk(world)[rank] if in_parts else data["hidden"].grad)
        same(weight.grad, data["weight"].grad[here()])


def case_nemo_rl() -> None:
    data = whole_sequence()
    truth = data["log_p"][:, :-1].gather(-1, data["ids"][:, 1:, None])[..., 0]
    truth.sum().backward()
    hidden, weight = own_part(data["hidden"]), data["weight"].detach()[here()].clone().requires_grad_()
    edges, group = (here().start, here().stop), dist.group.WORLD
    found = nemo_rl.from_parallel_hidden_states_to_logprobs(hidden, weight, False, data["ids"], *edges, group)
    same(found.detach(), truth.detach())
    found.sum().backward()
    same(hidden.grad, data["hidden"].grad.chunk(dist.get_world_size())[dist.get_rank()])
    same(weight.grad, data["weight"].grad[here()])
    quiet = nemo_rl.from_parallel_hidden_states_to_logprobs(hidden, weight, False, data["ids"], *edges, group, True)
    assert torch.equal(quiet, found)
    assert not quiet.requires_grad
    with pytest.raises(ValueError, match="cp_group must have one rank"):
        nemo_rl.from_parallel_hidden_states_to_logprobs(hidden, weight, False, data["ids"], *edges, group, False, group)


def case_skyrl() -> None:
    data = whole_sequence()
    truth = data["log_p"].gather(-1, data["ids"][..., None])[..., 0]
    truth.sum().backward()
    hidden = data["hidden"].detach().transpose(0, 1).clone().requires_grad_()
    weight = data["weight"].detach()[here()].clone().requires_grad_()
    edges = here().start, here().stop
    found = skyrl.fused_lm_head_logprob_apply(
        "torch", hidden, weight, data["ids"], *edges, 1024, dist.group.WORLD, False
    )
    same(found.detach(), truth.detach())
    found.sum().backward()
    dist.all_reduce(hidden.grad)
    same(hidden.grad.transpose(0, 1), data["hidden"].grad)
    same(weight.grad, data["weight"].grad[here()])


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Collectives, and the bytes that each sends from here."""
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()

    def watched(name: str, sent: Callable[..., Tensor]) -> Any:
        original = getattr(dist, name)

        def call(*arguments: Any, **more: Any) -> Any:
            calls[name] += 1
            size[name] += sent(*arguments).nbytes
            return original(*arguments, **more)

        return mock.patch.object(dist, name, call)

    with watched("all_gather", lambda out, mine: mine), watched("all_reduce", lambda mine: mine):
        yield calls, size


def case_what_is_sent() -> None:
    """A header and statistics forward, d_hidden backward, and nothing else; nothing at all back where no row is live."""
    data = case(TRANSFORMS[0])
    live, ids = N - 1, some_ids(data["targets"])
    cases: tuple[tuple[dict[str, Any], int, int], ...] = (
        ({}, 3, live),
        ({"outputs": ALL_OUTPUTS}, 9, live),
        ({"ids": ids}, 3 + ids.shape[1], live),
        ({"kept": some_sets(data["targets"]), "outputs": ("entropy",)}, 4, live),
        ({"kept": some_sets(data["targets"]), "outputs": ("sum_sq", "full_logprobs")}, 4 + 3, live),
    )
    for arguments, numbers, rows in cases:
        hidden = data["hidden"].clone().requires_grad_()
        with counted() as (calls, size):
            found = fr.linear_logprobs(
                hidden, data["weight"][here()], data["targets"], **arguments, process_group=dist.group.WORLD
            )
            assert dict(calls) == {"all_gather": 2}
            assert size["all_gather"] == HEADER + 4 * live * numbers
            (found.logprobs.sum() * 1.0).backward(retain_graph=True)
            assert dict(calls) == {"all_gather": 2, "all_reduce": 1}
            assert size["all_reduce"] == 4 * rows * H
            (found.logprobs.sum() * 0.0).backward()
            assert calls["all_reduce"] == 1
    hidden = data["hidden"].clone().requires_grad_()
    with counted() as (calls, size):
        found = fr.linear_logprobs(
            hidden, data["weight"][here()], data["targets"], ids=ids, process_group=dist.group.WORLD
        )
        (found.logprobs.sum() + found.id_logprobs.sum()).backward()
        assert dict(calls) == {"all_gather": 2, "all_reduce": 1}
        assert size["all_reduce"] == 4 * live * H


def case_what_a_search_sends() -> None:
    """For each block of rows of top_k and top_p, and then the statistics of sets that are named."""
    data, live = case(TRANSFORMS[0]), N - 1
    hidden = data["hidden"].clone().requires_grad_()
    with blocks() as rows, counted() as (calls, size):
        found = fr.linear_logprobs(
            hidden, data["weight"][here()], data["targets"], truncation=fr.Truncation(top_k=5, top_p=0.9),
            process_group=dist.group.WORLD,
        )  # fmt: skip
        count = -(-live // rows)
        assert dict(calls) == {"all_gather": 1 + 4 * count + 1, "all_reduce": 13 * count}
        assert size["all_gather"] == HEADER + (28 + 16 + 12) * live
        assert size["all_reduce"] == (2 * 3072 + 8) * live
        found.logprobs.sum().backward()
        assert calls["all_reduce"] == 13 * count + 1


def refused(error: type[Exception], words: str, **changes: Any) -> None:
    data = case(TRANSFORMS[0])
    arguments: dict[str, Any] = {
        "hidden": data["hidden"],
        "weight": data["weight"][here()],
        "targets": data["targets"],
    } | changes
    with counted() as (calls, _), pytest.raises(error, match=words):
        fr.linear_logprobs(**arguments, process_group=dist.group.WORLD)
    assert dict(calls) == {"all_gather": 1}  # the header, and no tensor after it


def case_refusals() -> None:
    """An error at one rank's door, and calls that do not fit together, are raised on all."""
    data = case(TRANSFORMS[0])
    first = dist.get_rank() == 0
    bad = data["targets"].clone()
    bad[0] = -7
    refused(
        *((ValueError, "got -7") if first else (RuntimeError, "refused on rank 0")),
        targets=bad if first else data["targets"],
    )
    for name, value in (("temperature", -1.0), ("hidden_grad", "mean")):
        wrong: dict[str, Any] = {name: value} if first else {}
        refused(*((ValueError, name) if first else (RuntimeError, "refused on rank 0")), **wrong)
    refused(
        ValueError,
        r"as many rows to compute, got \[4, 11",
        **({"hidden": data["hidden"][:5], "targets": data["targets"][:5]} if first else {}),
    )
    refused(ValueError, "the same options", **({"outputs": ("entropy",)} if first else {}))
    refused(
        ValueError,
        "the same options",
        **({"hidden": data["hidden"].bfloat16(), "weight": data["weight"][here()].bfloat16()} if first else {}),
    )
    other = data["targets"].clone()
    other[0] = (other[0] + 1) % V
    refused(ValueError, "the same targets", targets=other if first else data["targets"])
    beyond = data["targets"].clone()
    beyond[0] = V
    refused(ValueError, rf"targets must lie in \[0, {V}\), the vocabulary of all ranks, got {V}", targets=beyond)
    refused(
        ValueError,
        "vocab_start must be where the rank before ends",
        weight=fr.Head(data["weight"][here()], vocab_start=here().start + (0 if first else 2)),
    )
    refused(ValueError, "vocab_size must lie in", weight=fr.Head(data["weight"][here()], vocab_size=V + 1))
    refused(ValueError, "the same options", truncation=fr.Truncation(top_k=2 if first else 3))
    ids = some_ids(data["targets"])[:, 1:]
    refused(ValueError, "the same ids or kept sets", ids=ids + 1 if first else ids)
    refused(ValueError, rf"ids must lie in \[0, {V}\), the vocabulary of all ranks, got 1\d\d", ids=ids + V)
    below = ids - V if first else ids
    refused(*((ValueError, "ids must lie in") if first else (RuntimeError, "refused on rank 0")), ids=below)
    kept, offsets = some_sets(data["targets"])
    refused(ValueError, "the same options", **({"kept": (kept, offsets)} if first else {}))
    more = torch.cat([kept, torch.arange(V)]), torch.cat([offsets[:-1], offsets[-1:] + V])
    refused(ValueError, "the same ids or kept sets", kept=more if first else (kept, offsets))
    refused(ValueError, "ids must be None with kept", ids=ids, kept=(kept, offsets))
    with pytest.raises(ValueError, match="the same options"):
        fr.linear_policy_loss(
            data["hidden"], data["weight"][here()], data["targets"], objective=fr.DAPO(), advantages=torch.ones(1),
            mode="one_pass" if first else "auto", process_group=dist.group.WORLD,
        )  # fmt: skip


def case_no_rows() -> None:
    data = case(TRANSFORMS[0])
    hidden = data["hidden"].clone().requires_grad_()
    nothing = torch.full_like(data["targets"], -100)
    found = fr.linear_logprobs(hidden, data["weight"][here()], nothing, process_group=dist.group.WORLD)
    assert not found.logprobs.any()
    found.logprobs.sum().backward()
    assert not hidden.grad.any()


def without_the_last() -> None:
    """The last rank is gone before the call of the others, which raise."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    dist.barrier()
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(1)
    data = case(TRANSFORMS[0])
    with pytest.raises(RuntimeError) as error:
        fr.linear_logprobs(data["hidden"], data["weight"][here()], data["targets"], process_group=dist.group.WORLD)
    print("ended with", error.value)


def main(*names: str) -> None:
    """The cases of these names, all without any."""
    dist.init_process_group("gloo")
    for name, function in list(globals().items()):
        if name.startswith("case_") and (not names or name.removeprefix("case_") in names):
            function()
    dist.barrier()
    dist.destroy_process_group()
