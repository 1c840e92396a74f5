"""What every rank must find of a torchtitan-like model whose head is sharded: run in several processes by
test_integrations_seams.py, against the same model whole on the tokens of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fused_rlhf.integrations.torchtitan import FusedLoss, compute_logprobs
from tests.parallel_cases import counted as counted_groups
from tests.streamed_cases import counted

V, H, T = 31, 8, 6  # columns that no number of ranks divides; rows of each rank
STEPS = 2  # of gradient accumulation


class Decoder(nn.Module):
    """Which leaves its head to the loss."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(V, H)
        self.norm = nn.LayerNorm(H)
        self.lm_head = nn.Linear(H, V)
        if tied:
            self.lm_head.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.tok_embeddings(tokens))


def model(tied: bool = False) -> Decoder:
    torch.manual_seed(0)
    return Decoder(tied)


def batch(ranks: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels, (ranks, STEPS, T)."""
    g = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(V, (2, ranks, STEPS, T), generator=g)
    labels[..., 2] = -100
    return tokens, labels


def gradients(decoder: Any, tokens: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of tokens (STEPS, ...), each step's loss in two chunks; the loss of all, and what has come to each parameter."""
    loss_fn = FusedLoss()
    loss_fn.set_lm_head(decoder.lm_head)
    total = torch.zeros(())
    for rows, wanted in zip(tokens, labels):
        hidden = decoder(rows)
        halves = zip(hidden.chunk(2, -2), wanted.chunk(2, -1))
        loss = torch.stack([loss_fn(part, some, torch.tensor(7.0))[0] for part, some in halves]).sum()
        loss.backward()
        total += loss.detach()
    found = {}
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        parameter.grad = None
    return total, found


def check(decoder: Any, data: int, rank: int, averaged: bool = True) -> None:
    """`data`: the number of ranks with tokens of their own, of which this is one."""
    tokens, labels = batch(data)
    tied = decoder.lm_head.weight is decoder.tok_embeddings.weight
    for _ in range(2):  # what the first left behind
        truth, expected = gradients(model(tied), tokens.transpose(0, 1), labels.transpose(0, 1))
        loss, found = gradients(decoder, tokens[rank], labels[rank])
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / (dist.get_world_size() // data), truth)
        for name, value in found.items():
            whole = value * data if averaged else value
            difference = (whole - expected[name]).abs().max()
            assert difference <= 2e-6 * max(expected[name].abs().max().item(), 1.0), name
    with torch.no_grad():
        plain = model(tied)
        own, entropy = compute_logprobs(decoder(tokens[rank, 0]), labels[rank, 0], decoder.lm_head, return_entropy=True)
        log_p = plain.lm_head(plain(tokens[rank, 0])).log_softmax(-1)
    live = labels[rank, 0] != -100
    torch.testing.assert_close(own[live], log_p[live, labels[rank, 0][live]])
    torch.testing.assert_close(entropy[live], -(log_p.exp() * log_p).sum(-1)[live])


def streamed() -> None:
    """In a group of its own; as torchtitan does it, without FSDP2's division, too."""
    for averaged in (True, False):
        decoder: Any = model()
        fully_shard(decoder.lm_head)
        fully_shard(decoder)
        if not averaged:
            decoder.lm_head.set_gradient_divide_factor(1.0)
            decoder.set_gradient_divide_factor(1.0)
            decoder.set_force_sum_reduction_for_comms(True)  # of which gloo knows no other
        with counted() as (calls, _):
            check(decoder, dist.get_world_size(), dist.get_rank(), averaged)
        assert calls["all_gather"]
        assert isinstance(decoder.lm_head.weight, DTensor)


def in_a_group() -> None:
    """Of norm and head, as torchtitan's own is; of the root; and a head that is whole by a call of unshard."""
    for reshard, tied in ((True, False), (False, False), (False, True)):
        decoder: Any = model(tied)
        embedding = [decoder.tok_embeddings] if tied else []
        fully_shard([*embedding, decoder.norm, decoder.lm_head], reshard_after_forward=reshard)
        fully_shard(decoder)
        with counted() as (calls, _):
            check(decoder, dist.get_world_size(), dist.get_rank())
        assert not calls
        assert "forward" not in vars(decoder.lm_head)
    check(fully_shard(model()), dist.get_world_size(), dist.get_rank())
    decoder = fully_shard(model(), reshard_after_forward=True)
    tokens, labels = batch(1)
    with pytest.raises(ValueError, match="a head in the root's group must be whole now"):
        compute_logprobs(decoder(tokens[0, 0]), labels[0, 0], decoder.lm_head)
    decoder = model()
    fully_shard(decoder.lm_head, reshard_after_forward=False)
    fully_shard(decoder)
    decoder(tokens[0, 0])
    decoder.lm_head.unshard()
    check(decoder, dist.get_world_size(), dist.get_rank())


def tensor_parallel() -> None:
    """Alone, and of a head that FSDP2 shards over the other dimension of a mesh."""
    world = dist.get_world_size()
    decoder: Any = model()
    mesh = dist.init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    parallelize_module(decoder, mesh, {"lm_head": ColwiseParallel()})
    with counted_groups() as (calls, _):
        check(decoder, 1, 0)
        assert calls["all_gather"]
    for data in sorted({1, world // 2, world}):
        mesh = dist.init_device_mesh("cpu", (data, world // data), mesh_dim_names=("dp", "tp"))
        for together in (True, False):
            decoder = model()
            parallelize_module(decoder, mesh["tp"], {"lm_head": ColwiseParallel()})
            fully_shard([decoder.norm, decoder.lm_head] if together else decoder.lm_head, mesh=mesh["dp"])
            fully_shard(decoder, mesh=mesh["dp"])
            check(decoder, data, mesh.get_local_rank("dp"))


def mixed_precision() -> None:
    """In bf16, gradients reduced in fp32: against the same model with the head's own call."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    tokens, labels = (of_all[dist.get_rank(), 0] for of_all in batch(dist.get_world_size()))
    for together in (True, False):
        grads = []
        for fused in (True, False):
            decoder: Any = model()
            fully_shard([decoder.norm, decoder.lm_head] if together else decoder.lm_head, mp_policy=policy)
            fully_shard(decoder, mp_policy=policy)
            hidden = decoder(tokens)
            if fused:
                logprobs = compute_logprobs(hidden, labels, decoder.lm_head)
                assert isinstance(logprobs, Tensor)
                assert logprobs.dtype == torch.float32
                loss = -logprobs.sum()
            else:
                loss = nn.functional.cross_entropy(decoder.lm_head(hidden).float(), labels, reduction="sum")
            loss.backward()
            assert decoder.lm_head.weight.grad.dtype == torch.float32
            grads.append([parameter.grad.full_tensor() for parameter in decoder.parameters()])
        for own, theirs in zip(*grads):
            assert (own - theirs).abs().max() <= 2**-6 * theirs.abs().max()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in (streamed, in_a_group, tensor_parallel, mixed_precision):
        case()
    dist.barrier()
    dist.destroy_process_group()
