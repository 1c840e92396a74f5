import copy
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

import fused_rlhf as fr
from fused_rlhf.objectives.reductions import Side
from fused_rlhf.trainers import engine
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.engine import Engine, NonFiniteLoss
from tests import launch, tiny
from tests.streamed_cases import counted
from tests.tiny import COUNT, IDS, pieces


def test_an_update_is_that_of_plain_torch(tmp_path):
    own, loaded = tiny.build(tmp_path, learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.1, dtype="float32")
    model = copy.deepcopy(loaded.model)
    vectors = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    logits = model(IDS).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    metrics = own.update(tiny.logprob_loss, pieces(6))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for mine, its in zip(own.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)  # Adam's first step is the gradient's sign


def test_micro_batches_add_up(tmp_path):
    whole, _ = tiny.build(tmp_path)
    parts, _ = tiny.build(tmp_path)
    one, three = whole.update(tiny.logprob_loss, pieces(6)), parts.update(tiny.logprob_loss, pieces(1, 3, 2))
    assert one["tokens"] == three["tokens"] == COUNT
    assert one["worst"] == pytest.approx(three["worst"], rel=1e-5)  # the least of all, not their sum
    assert one["loss"] == pytest.approx(three["loss"], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(three["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_metrics_come_with_a_loss_in_any_precision(tmp_path, precision):
    own, _ = tiny.build(tmp_path, mixed_precision=precision)
    loss, metrics = own.measure(tiny.logprob_loss, IDS, COUNT)
    want = own(lambda model: fr.lm_head.logprobs(model, IDS).logprobs)
    assert loss.item() == pytest.approx(-want.mean().item(), rel=1e-6)
    assert loss.dtype == torch.float32
    assert own.combine([metrics]) == {"tokens": COUNT, "worst": want.min().item()}
    assert own.combine([]) == {}


def test_values_are_merged_across_processes(tmp_path):
    own, _ = tiny.build(tmp_path)
    mine, its = torch.tensor([1.0, -2.0]), torch.tensor([3.0, -5.0])

    class Two:
        def gather(self, values):
            return torch.cat([values, its[None]])

    assert torch.equal(own.across(mine, "sum"), mine)  # one process alone
    own.world, own.accelerator = 2, Two()
    merged: dict[Side, list[float]] = {"sum": [4.0, -7.0], "min": [1.0, -5.0], "max": [3.0, -2.0]}
    for how, want in merged.items():
        assert own.across(mine, how).tolist() == want


def test_the_learning_rate_follows_its_schedule(tmp_path):
    own, _ = tiny.build(tmp_path, num_updates=4, learning_rate=1e-3, lr_schedule="linear", lr_warmup_updates=2)
    rates = [own.update(tiny.logprob_loss, pieces(6))["learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])


def test_a_loss_that_is_not_finite_is_named_and_not_used(tmp_path):
    own, _ = tiny.build(tmp_path)
    before = [p.clone() for p in own.module.parameters()]

    def broken(model, ids, count):
        loss, metrics = tiny.logprob_loss(model, ids, count)
        return (loss * math.nan if len(ids) == 3 else loss), metrics

    with pytest.raises(NonFiniteLoss, match="the loss is nan in micro-batch 2 of process 0"):
        own.update(broken, pieces(1, 3, 2))

    def steep(model, ids, count):
        loss, metrics = tiny.logprob_loss(model, ids, count)
        return loss + 0.0 * (model.lm_head.weight.sum() * 0.0).sqrt(), metrics  # 0, with a gradient of NaN

    with pytest.raises(NonFiniteLoss, match="the norm of the gradient is nan"):
        own.update(steep, pieces(6))
    assert all(torch.equal(a, b) for a, b in zip(before, own.module.parameters(), strict=True))
    assert own.updates == 0
    assert math.isfinite(own.update(tiny.logprob_loss, pieces(6))["grad_norm"])  # nothing of them is left


def test_gradient_checkpointing_changes_nothing_and_dropout_is_off(tmp_path):
    plain, _ = tiny.build(tmp_path)
    kept, _ = tiny.build(tmp_path, gradient_checkpointing=True)
    calls: list[int] = []
    module: Any = kept.module
    module.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    assert plain.update(tiny.logprob_loss, pieces(6)) == kept.update(tiny.logprob_loss, pieces(6))
    assert len(calls) == 2  # once more in the backward
    assert not kept.module.training


def test_a_second_optimiser_leaves_the_first_alone(tmp_path):
    own, _ = tiny.build(tmp_path)
    apart = own.apart(1e-2, lambda update: 0.5)
    assert apart.update(tiny.logprob_loss, pieces(6))["learning_rate"] == 5e-3
    assert not own.optimizer.optimizer.state
    assert own.updates == 0


def test_the_shares_of_processes_are_all_of_it(tmp_path):
    own, _ = tiny.build(tmp_path)
    rows = list(range(8))
    for world, sizes in ((1, [8]), (2, [4, 4]), (3, [3, 3, 2]), (9, [1] * 8 + [0])):
        own.world, shares = world, []
        for own.rank in range(world):
            shares.append(own.mine(rows))
        assert [len(share) for share in shares] == sizes
        assert [row for share in shares for row in share] == rows


def test_autocast_and_whole(tmp_path):
    own, loaded = tiny.build(tmp_path, mixed_precision="bf16")
    dtypes: list[torch.dtype] = []
    module: Any = own.module
    module.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, i, output: dtypes.append(output.dtype))
    own(lambda model: model(IDS))
    with own.whole() as model:
        assert model is loaded.model
        assert not model(IDS).logits.requires_grad
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    out = own(lambda model: fr.lm_head.logprobs(model, IDS).logprobs)
    assert out.dtype == torch.float32


def test_a_frozen_copy_takes_over_parameters(tmp_path):
    own, loaded = tiny.build(tmp_path, learning_rate=1e-2)
    reference = own.frozen(copy.deepcopy(loaded.model))
    own.update(tiny.logprob_loss, pieces(6))
    first = next(iter(own.module.parameters()))
    assert not torch.equal(first, next(iter(reference.module.parameters())))
    engine.copy_parameters(own.module, reference.module)
    assert torch.equal(first, next(iter(reference.module.parameters())))
    assert not any(p.requires_grad for p in reference.module.parameters())
    kept = copy.deepcopy(reference.state_dict())
    own.update(tiny.logprob_loss, pieces(6))
    engine.copy_parameters(own.module, reference.module)
    reference.load_state_dict(kept)
    assert not torch.equal(first, next(iter(reference.module.parameters())))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_whole_only_while_they_are_used(tmp_path, tied):
    folder = tiny.saved_model(tmp_path / "base", tied)
    own, loaded = tiny.build(tmp_path, fsdp=True, model=folder, hidden_size=128, num_layers=4)
    alone, _ = tiny.build(tmp_path, model=folder, hidden_size=128, num_layers=4)
    model: Any = loaded.model
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    assert [isinstance(table, FSDPModule) for table in tables] == [not tied] * 2

    def sharded(parameters):
        return all(isinstance(p, DTensor) for p in parameters)

    seen: list[bool] = []

    def loss(model, ids, count):
        found = tiny.logprob_loss(model, ids, count)
        seen.extend(sharded(table.parameters()) for table in tables)
        return found

    for _ in range(2):
        mine, its = own.update(loss, pieces(4, 2)), alone.update(tiny.logprob_loss, pieces(4, 2))
        assert mine == pytest.approx(its, rel=1e-5)
        assert sharded(model.parameters())
    assert set(seen) == {not tied}
    with torch.no_grad():
        own(loss, IDS, COUNT)
    assert sharded(model.parameters())
    with own.whole():
        assert not any(isinstance(p, DTensor) for p in model.parameters())
    assert sharded(model.parameters())


def gradients_of(way: str, folder: Path, model: str, **options: Any) -> tuple[list[torch.Tensor], Counter[str]]:
    """Of updates by two micro-batches of this process's rows, each update's in one vector; collectives of a streamed head.

    way: "replicated", by DDP in fp32; "whole" or "streamed", the head under FSDP2.
    """
    if way == "replicated":
        options.pop("mixed_precision", None)
    torch.manual_seed(0)
    own, _ = tiny.build(folder, fsdp=way != "replicated", model=model, learning_rate=1e-3, **options)
    found = tiny.gradients_of_updates(SimpleNamespace(engine=own))
    rows = IDS.tensor_split(own.world)[own.rank]
    with counted() as (calls, _), pytest.MonkeyPatch.context() as patch:
        if way == "whole":
            patch.setattr(fr.lm_head, "shards_of", lambda *_: None)
        for _ in range(3):
            own.update(tiny.logprob_loss, [(ids, COUNT) for ids in rows.split([1, 2])])
    whole = [[g.full_tensor() if isinstance(g, DTensor) else g for g in update] for update in found]
    return [torch.cat([g.flatten() for g in update]) for update in whole], calls


def compare_ways(folder: str, model: str, **options: Any) -> None:
    """A streamed head is no worse than one that FSDP2 makes whole."""
    truth, _ = gradients_of("replicated", Path(folder), model, **options)
    errors = {}
    for way in ("whole", "streamed"):
        found, calls = gradients_of(way, Path(folder), model, **options)
        errors[way] = [((g - t).norm() / t.norm()).item() for g, t in zip(found, truth, strict=True)]
        in_head = 2 if "lm_head" in options.get("lora_target_modules", ()) else 0  # A and B
        trained = 0 if "lora_r" in options else 1
        once = 3 * 2 * (way == "streamed")  # updates by micro-batches
        assert calls["reduce_scatter"] == once * (trained + in_head)
        assert calls["all_gather"] == once * (2 + in_head)  # forward and backward
    for streamed, whole in zip(errors["streamed"], errors["whole"], strict=True):
        assert streamed <= 2 * whole + 1e-5, errors
    assert max(errors["streamed"]) < (0.1 if "mixed_precision" in options else 1e-3), errors
    engine.leave()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixed_precision": "bf16"},
        {"lora_r": 2},
        {"lora_r": 2, "lora_target_modules": ("q_proj", "lm_head"), "mixed_precision": "bf16"},
    ],
)
def test_gradients_of_a_streamed_head_over_micro_batches(tmp_path, options):
    options = {"hidden_size": 128, "num_layers": 4} | options
    model = tiny.saved_model(tmp_path / "base", tied=False)
    code = f"from tests import test_engine as t; t.compare_ways({str(tmp_path)!r}, {model!r}, **{options!r})"
    launch.together(code, tmp_path)


@pytest.mark.usefixtures("group")
def test_a_model_that_is_split_already_is_refused(tmp_path):
    own, loaded = tiny.build(tmp_path, fsdp=True)
    with pytest.raises(ValueError, match=r"model: expected whole weights \(no tp_plan.*; got 'a DTensor, .*weight'"):
        own.frozen(loaded.model)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["bert", "mamba"])
def test_blocks_hold_blocks_and_embeddings(tmp_path, kind, tied):
    """BERT's embeddings are a block to transformers; Mamba's mixer is one within another."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": tied}
    more = (
        {"num_attention_heads": 4, "intermediate_size": 48, "is_decoder": True} if kind == "bert" else {"state_size": 8}
    )
    losses = []
    for fsdp in (False, True):
        config = tiny.config(tmp_path, fsdp=fsdp, learning_rate=1e-2)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).eval()
        own = Engine(config, engine.start(config), model, 2)
        losses.append([own.update(tiny.logprob_loss, pieces(4, 2))["loss"] for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_process_leaves_its_group():
    engine.leave()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    engine.leave()
    assert not torch.distributed.is_initialized()


def test_weights_too_coarse_for_a_step_are_counted(tmp_path):
    for dtype, least, most in (("float32", 0.0, 0.05), ("bfloat16", 0.9, 1.0)):
        own, _ = tiny.build(tmp_path, dtype=dtype, learning_rate=1e-6)
        assert least <= own.standing_still() <= most
    own, _ = tiny.build(tmp_path, dtype="bfloat16", learning_rate=1e-2)
    assert own.standing_still() < 0.5


def test_adams_numbers_and_the_rates_of_parts(tmp_path):
    changes = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "weight_decay": 0.1}
    config = tiny.config(tmp_path, **changes)
    accelerator = engine.start(config)
    module = models.load_for(config).model
    made = Engine(config, accelerator, module, 4, [(module.get_output_embeddings(), 0.5)])
    groups = {(group["lr"], group["weight_decay"]): group for group in made.optimizer.param_groups}
    assert set(groups) == {(1e-6, 0.1), (1e-6, 0.0), (0.5, 0.1)}
    assert groups[0.5, 0.1]["params"] == [module.get_output_embeddings().weight]
    assert {(group["betas"], group["eps"]) for group in groups.values()} == {((0.8, 0.95), 1e-5)}
    for name, value in (("adam_beta1", 1.0), ("adam_beta2", -0.1), ("adam_epsilon", 0.0)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            tiny.config(tmp_path, **{name: value})


def test_the_step_is_torchs_fused_one_where_it_has_one(tmp_path):
    own, _ = tiny.build(tmp_path)
    warming = own.apart(1e-3, lambda update: 1.0)
    for made in (own, warming):
        assert {group["fused"] for group in made.optimizer.param_groups} == {True}
    values = torch.randn(4, 6)
    assert engine.steps_in_one_kernel([nn.Parameter(values), nn.Parameter(values.bfloat16())])
    assert not engine.steps_in_one_kernel(
        [nn.Parameter(values), nn.Parameter(values.t())]
    )  # its strides are passed over
    assert not engine.steps_in_one_kernel([nn.Parameter(values, False), nn.Parameter(values.to("meta"))])
    assert not engine.steps_in_one_kernel([nn.Parameter(values.to(torch.complex64))])


def test_the_fused_step_goes_with_a_loss_scale(tmp_path):
    plain, _ = tiny.build(tmp_path, learning_rate=1e-2)
    config = tiny.config(tmp_path, learning_rate=1e-2, mixed_precision="fp16")
    accelerator = engine.start(config)
    accelerator.native_amp = True  # as on a GPU
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    own = Engine(config, accelerator, models.load_for(config).model, 10)
    for _ in range(2):
        want, got = plain.update(tiny.logprob_loss, pieces(4, 2)), own.update(tiny.logprob_loss, pieces(4, 2))
        assert got == pytest.approx(want, rel=2e-3)

    def steep(model, ids, count):
        loss, metrics = tiny.logprob_loss(model, ids, count)
        return loss + 0.0 * (model.lm_head.weight.sum() * 0.0).sqrt(), metrics  # 0, with a gradient of NaN

    before = [p.clone() for p in own.module.parameters()]
    own.update(steep, pieces(6))  # stepped over
    assert all(torch.equal(a, b) for a, b in zip(before, own.module.parameters(), strict=True))
    assert accelerator.scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_step_is_the_plain_one(dtype):
    """Gradients as autograd leaves them, of weights used as they lie, transposed and in part."""
    steps = []
    for fused in (False, True):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(5, 7).to(dtype)) for _ in range(3)]
        optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, fused=fused)
        for _ in range(4):
            a, b, c = weights
            (a.square() + b.t().reshape(5, 7).exp() + (c[:, ::2] @ torch.randn(4, 7).to(dtype))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        steps.append(weights)
    eps = torch.finfo(dtype).eps
    for plain, fused in zip(*steps, strict=True):
        torch.testing.assert_close(fused, plain, rtol=4 * eps, atol=4 * eps)
