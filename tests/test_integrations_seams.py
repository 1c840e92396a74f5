"""The functions for Megatron-Core, NeMo-RL, SkyRL and prime-rl: their names, and one process. Several: parallel_cases.py."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fused_rlhf as fr
from fused_rlhf.integrations import megatron, nemo_rl, prime_rl, skyrl, torchtitan
from tests import launch

S, B, H, V = 5, 2, 8, 30

# What the frameworks call with, read from their sources: Megatron-Core main of 2026, NeMo-RL's and SkyRL's Megatron paths.
OF_MEGATRON = (
    *("hidden_states", "output_layer", "output_weight", "labels", "loss_mask", "input_ids", "position_ids"),
    *("attention_mask", "decoder_input", "inference_context", "packed_seq_params", "runtime_gather_output", "context"),
    *("compute_language_model_loss", "scale_logits", "config"),
)
OF_NEMO_RL = (
    *("tensor_parallel_hidden_states", "output_weight_layer", "runtime_gather_output", "target", "vocab_start_index"),
    *("vocab_end_index", "tp_group", "inference_only", "cp_group", "chunk_size"),
)
OF_SKYRL = (
    *("backend", "hidden", "weight", "target", "vocab_start_index", "vocab_end_index", "chunk_size", "tp_group"),
    "inference_only",
)
OF_TORCHTITAN = ("pred", "labels", "global_valid_tokens", "loss_inputs")
OF_PRIME_RL = ("hidden", "weight", "labels", "inv_temperature", "chunk_size")


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(S, B, H, generator=g), torch.randn(V, H, generator=g)
    ids = torch.randint(0, V, (B, S), generator=g)
    return hidden, weight, ids, torch.log_softmax(hidden @ weight.T, -1).transpose(0, 1)


def test_the_names_are_those_of_the_frameworks() -> None:
    inspect.signature(megatron.output_processor).bind(**dict.fromkeys(OF_MEGATRON))
    assert tuple(inspect.signature(nemo_rl.from_parallel_hidden_states_to_logprobs).parameters) == OF_NEMO_RL
    assert tuple(inspect.signature(skyrl.fused_lm_head_logprob_apply).parameters) == OF_SKYRL
    assert tuple(inspect.signature(torchtitan.FusedLoss().__call__).parameters) == OF_TORCHTITAN
    assert tuple(inspect.signature(prime_rl.SequenceLogProbEntropy.apply).parameters) == OF_PRIME_RL


def test_in_one_process(group: Any) -> None:
    hidden, weight, ids, log_p = inputs()
    layer = SimpleNamespace(weight=None, bias=None, sequence_parallel=True, tp_group=group)
    whole = log_p.gather(-1, ids[..., None])[..., 0]
    given = {**dict.fromkeys(OF_MEGATRON), "hidden_states": hidden, "output_layer": layer, "output_weight": weight}
    found = megatron.output_processor(**given | {"labels": ids})
    torch.testing.assert_close(found.logprobs, whole)
    theirs = nemo_rl.from_parallel_hidden_states_to_logprobs(hidden, weight, False, ids, 0, V, group)
    torch.testing.assert_close(theirs, log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0])
    of_sky = skyrl.fused_lm_head_logprob_apply("triton", hidden.transpose(0, 1), weight, ids, 0, V, 4, group, True)
    torch.testing.assert_close(of_sky, whole)


def test_prime_rl() -> None:
    """Temperatures a token; gradients of the entropy too."""
    hidden, weight, ids, _ = inputs()
    flat, labels = hidden.flatten(0, 1).requires_grad_(), ids.T.reshape(-1)
    inverse = torch.linspace(0.5, 2, S * B)
    log_p = torch.log_softmax(flat.double() @ weight.double().T * inverse[:, None], -1)
    truth = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    found = prime_rl.SequenceLogProbEntropy.apply(flat, weight, labels.int(), inverse, 4)
    for value, true in zip(found, truth):
        torch.testing.assert_close(value.double(), true, rtol=0, atol=5e-6)
        ours, theirs = (torch.autograd.grad(v.sum(), flat, retain_graph=True)[0] for v in (value, true))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_a_loss_in_the_place_of_log_probs(group: Any) -> None:
    hidden, weight, ids, log_p = inputs()
    layer = SimpleNamespace(weight=weight, bias=None, sequence_parallel=False, tp_group=group)

    def loss(states: torch.Tensor, head: fr.Head, targets: torch.Tensor, **shared: Any) -> torch.Tensor:
        return -fr.linear_logprobs(states, head, targets, **shared).logprobs.mean()

    context = megatron.Processing(then=loss)
    found = megatron.output_processor(hidden_states=hidden, output_layer=layer, labels=ids, context=context)
    torch.testing.assert_close(found, -log_p.gather(-1, ids[..., None]).mean())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"labels": None}, ValueError, "labels must be given"),
        ({"inference_context": object()}, ValueError, "inference_context must be None"),
        ({"context": {"temperature": 1.0}}, TypeError, "output_processor_context must be a Processing, got dict"),
        ({"scale_logits": torch.tanh}, ValueError, "scale_logits must multiply by a number"),
    ],
)
def test_what_it_cannot_serve_is_refused(group: Any, changes: dict[str, Any], error: Any, words: str) -> None:
    hidden, weight, ids, _ = inputs()
    layer = SimpleNamespace(weight=weight, bias=None, sequence_parallel=False, tp_group=group)
    arguments: dict[str, Any] = {"hidden_states": hidden, "output_layer": layer, "labels": ids}
    with pytest.raises(error, match=words):
        megatron.output_processor(**arguments | changes)


@pytest.mark.parametrize("sharded", [False, True])
def test_torchtitan(group: Any, sharded: bool) -> None:
    """Its loss and log-probs against dense ones, of a head that is whole and of one that FSDP2 holds; two backwards."""
    hidden, weight, ids, _ = inputs()
    flat, labels = hidden.flatten(0, 1).requires_grad_(), ids.T.reshape(-1).index_fill(0, torch.tensor([3]), -100)
    model = torch.nn.Linear(H, V)
    with torch.no_grad():
        model.weight.copy_(weight)
    plain = [model.weight.detach().clone().requires_grad_(), model.bias.detach().clone().requires_grad_()]
    if sharded:
        mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    loss_fn = torchtitan.FusedLoss()
    with pytest.raises(RuntimeError, match="set_lm_head must be called"):
        loss_fn(flat, labels)
    loss_fn.set_lm_head(model)
    count = torch.tensor(9.0)
    loss, metrics = loss_fn(pred=flat, labels=labels, global_valid_tokens=count)
    z = torch.nn.functional.linear(flat, *plain)
    expected = torch.nn.functional.cross_entropy(z, labels, reduction="sum", ignore_index=-100) / count
    assert metrics == {}
    torch.testing.assert_close(loss, expected)
    for _ in range(2):
        ours = torch.autograd.grad(3.7 * loss, [flat, model.weight, model.bias], retain_graph=True)
        theirs = torch.autograd.grad(3.7 * expected, [flat, *plain], retain_graph=True)
        for mine, true in zip(ours, theirs):
            whole = mine.full_tensor() if isinstance(mine, DTensor) else mine
            torch.testing.assert_close(whole, true, rtol=1e-5, atol=1e-6)
    found = torchtitan.compute_logprobs(flat, labels, model, return_entropy=True)
    log_p = z.log_softmax(-1)
    live = labels != -100
    torch.testing.assert_close(found[0][live], log_p.gather(1, labels.clamp(min=0)[:, None])[live, 0])
    torch.testing.assert_close(found[1][live], -(log_p.exp() * log_p).sum(-1)[live])
    assert not found[1].requires_grad
    with pytest.raises(TypeError, match=r"loss_inputs must be empty .* got .'advantages'."):
        loss_fn(flat, labels, advantages=count)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_torchtitans_sharded_heads(processes: int, tmp_path: Path) -> None:
    """Streamed, in a group with other modules, and tensor-parallel; what each rank checks is in titan_cases.py."""
    launch.together("from tests import titan_cases; titan_cases.main()", tmp_path, processes)


@pytest.mark.parametrize(
    ("names", "placements", "words"),
    [
        (("tp",), [Shard(1)], "by rows over one mesh dimension named 'tp', got .*dim=1"),
        (("dp",), [Shard(0)], "must be whole now"),
        (("dp", "tp"), [Shard(0), Shard(0)], r"got .* over \('dp', 'tp'\)"),
    ],
)
def test_torchtitans_heads_that_are_sharded_otherwise_are_refused(
    group: Any, names: tuple[str, ...], placements: list[Shard], words: str
) -> None:
    hidden, weight, ids, _ = inputs()
    mesh = dist.init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)
    layer: Any = SimpleNamespace(weight=distribute_tensor(weight, mesh, placements))
    with pytest.raises(ValueError, match=words):
        torchtitan.compute_logprobs(hidden.flatten(0, 1), ids.T.reshape(-1), layer)


def test_torchtitans_plain_shards_are_refused(group: Any) -> None:
    hidden, weight, ids, _ = inputs()
    layer = torch.nn.Linear(H, V, bias=False)
    layer.weight = torch.nn.Parameter(weight[: V // 2])
    with pytest.raises(ValueError, match="must have all 30 rows or be a DTensor, got a plain tensor of 15"):
        torchtitan.compute_logprobs(hidden.flatten(0, 1), ids.T.reshape(-1), layer)
