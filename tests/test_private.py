"""What we use of torch without its promise: each test says what breaks when it changes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fused_rlhf import private


class Asks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x * 2

    @staticmethod
    def backward(ctx, upstream):
        ctx.seen.append(private.keeps_graph())
        return upstream * 2, None


def test_keeps_graph_tells_a_backward_that_another_may_follow():
    """Else one-pass losses hold two copies of their gradients, or refuse the second backward of `retain_graph`."""
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = Asks.apply(x, seen).sum()
    y.backward(retain_graph=True)
    torch.autograd.grad(y, x, retain_graph=True)
    y.backward()
    assert seen == [True, True, False]


def test_has_native_bf16_answers():
    """Else bf16 on a CPU runs in the slower of the two ways."""
    found = private.has_native_bf16()
    assert isinstance(found, bool)
    flags = torch.backends.cpu.get_cpu_capability()
    if flags == "DEFAULT":
        assert not found


def test_is_compiled_knows_both_ways():
    """Else hooks on a compiled model's head are traced into the graph or left out of it, and no head is found."""
    model = nn.Linear(2, 2)
    assert not private.is_compiled(model)
    compiled: Any = torch.compile(model)
    assert private.is_compiled(compiled)
    model.compile()
    assert private.is_compiled(model)


def test_compiled_graphs_counts_them():
    """Else the benchmark's column of recompiles is always 0."""
    before = private.compiled_graphs()
    double = torch.compile(lambda x: 2 * x, backend="eager")
    double(torch.ones(3))
    assert private.compiled_graphs() == before + 1
    double(torch.ones(3))
    assert private.compiled_graphs() == before + 1


def test_is_fake_knows_a_tensor_without_numbers():
    """Else a tracer's tensors are refused as those of a foreign subclass."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert private.is_fake(torch.ones(2))
    assert not private.is_fake(torch.ones(2))


def test_what_is_asked_of_fsdp2():
    """Else a head under FSDP2 is made whole by its own hooks, or its gradients differ from those of the other groups."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
        model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 5), nn.Linear(5, 5))
        fully_shard([model[0], model[2]])
        head = fully_shard(model[1], mp_policy=policy)
        head.set_gradient_divide_factor(3.0)
        fully_shard(model)
        found = private.fsdp_group(head)
        ranks = head.weight.device_mesh.get_group(0).group_name
        assert found == (torch.bfloat16, torch.float32, 3.0, True, torch.device("cpu"), ranks)
        assert private.fsdp_group(model[0]) is None
        seen: list[bool] = []
        head.register_forward_pre_hook(lambda module, *_: seen.append(isinstance(module.weight, DTensor)))
        before = [*head._forward_pre_hooks.values()], [*head._forward_hooks.values()]
        head.forward = lambda x: x
        with private.fsdp_asleep(head):
            head(torch.ones(2, 3))
        assert ([*head._forward_pre_hooks.values()], [*head._forward_hooks.values()]) == before
        del head.forward
        model(torch.ones(2, 3))
        assert seen == [True, False]
        last = model[2]  # whose hooks are a group's
        last.register_forward_hook(lambda *_: seen.append(False))
        last.forward = lambda x: x.new_tensor(isinstance(last.weight, DTensor))
        with private.fsdp_alone(last):
            assert not last(torch.ones(2, 5))
        assert seen == [True, False]
    finally:
        dist.destroy_process_group()
