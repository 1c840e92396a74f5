"""Models whose logits are deferred, bare and wrapped, against themselves with logits."""

from __future__ import annotations

import copy
import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rlhf as fr
from fused_rlhf import lm_head
from fused_rlhf.deferred.tensor import Deferred
from tests import launch

transformers = pytest.importorskip("transformers")
from tests.test_lm_head import (  # noqa: E402, F401  # the fixtures are used by being here
    FAMILIES,
    SHARDED,
    batch,
    build,
    dense_logprobs,
    hooks_of,
    lora,
    one_process_group,
    one_thread,
    sharded,
)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Plain code of a loop: log-probs of the tokens and an entropy bonus."""
    logp = (logits[:, :-1] / 0.7).log_softmax(-1)
    taken = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return -(taken.sin().sum() + 0.1 * -(logp.exp() * logp).sum(-1).sum())


def gradients(model: nn.Module, ids: Tensor, deferred: bool, **model_inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    if deferred:
        with fr.deferred_logits(model):
            logits = model(input_ids=ids, **model_inputs).logits
            assert isinstance(logits, Deferred)
    else:
        logits = model(input_ids=ids, **model_inputs).logits
    loss = loss_of(logits, ids)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_the_same(model: nn.Module, ids: Tensor | None = None, tolerance: float = 1e-8, **model_inputs: Any) -> None:
    ids = batch() if ids is None else ids
    loss, ours = gradients(model, ids, deferred=True, **model_inputs)
    truth, theirs = gradients(model, ids, deferred=False, **model_inputs)
    torch.testing.assert_close(loss, truth, rtol=tolerance, atol=tolerance)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=tolerance, atol=tolerance)


# Whose own code works on fp32 alone.
SINGLE = ("xlstm", "recurrent_gemma", "mamba", "falcon_h1")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = build(family)
    if family in SINGLE:
        assert_the_same(model, tolerance=2e-3)
    else:
        assert_the_same(model.double())


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "cohere", "granite", "phi"])
def test_labels_give_the_models_own_loss(family: str) -> None:
    model, ids = build(family), batch()
    labels = ids.clone()
    labels[:, :4] = -100
    expected = model(ids, labels=labels).loss
    truth = torch.autograd.grad(expected, model.get_output_embeddings().weight)[0]
    with fr.deferred_logits(model):
        out = model(ids, labels=labels)
        by_items = model(ids, labels=labels, num_items_in_batch=torch.tensor(11)).loss
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_items, expected * 15 / 11, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(out.loss, model.get_output_embeddings().weight)[0]
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


def test_logits_to_keep_and_a_cache() -> None:
    model, ids = build(), batch()
    dense = model(ids).logits
    with fr.deferred_logits(model):
        kept = model(ids, logits_to_keep=3).logits
        assert kept.shape == (3, 3, 257)
        torch.testing.assert_close(fr.materialise(kept), dense[:, -3:])
        assert torch.equal(model(ids, use_cache=True).logits[:, -1].argmax(-1), dense[:, -1].argmax(-1))
        as_tuple = model(ids, return_dict=False)[0]
        assert isinstance(as_tuple, Deferred)


def test_generation_goes_past_it() -> None:
    model, ids = build(), batch()
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    own = model.generate
    fr.defer(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert isinstance(model(ids).logits, Deferred)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    assert not torch.equal(other.generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert "generation_config" in inspect.signature(model.generate).parameters
    fr.undefer(model)
    assert model.generate == own
    assert "generate" not in vars(model)


def test_generation_through_an_adapter_goes_past_it() -> None:
    model, ids = lora(build(), target_modules=["q_proj"]).eval(), batch()
    expected = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    with fr.deferred_logits(model):
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False), expected)


def test_the_model_is_itself_again() -> None:
    model, ids = build(), batch()
    hooks, expected = hooks_of(model), model(ids).logits

    def fails() -> None:
        with fr.deferred_logits(model):
            model(ids)
            raise KeyError("in the block")

    with pytest.raises(KeyError):
        fails()
    assert hooks_of(model) == hooks
    assert torch.equal(model(ids).logits, expected)
    fr.defer(model)
    fr.defer(model)
    with fr.deferred_logits(model):
        assert isinstance(model(ids).logits, Deferred)
    assert isinstance(model(ids).logits, Deferred)  # by `defer`, still
    fr.undefer(model)
    fr.undefer(model)
    assert hooks_of(model) == hooks
    assert torch.equal(model(ids).logits, expected)


def test_a_forward_that_fails_leaves_nothing() -> None:
    model, ids = build(), batch()
    with fr.deferred_logits(model):
        own = model.lm_head.forward
        model.lm_head.forward = lambda x: own(x[..., :-1])
        with pytest.raises(RuntimeError):
            model(ids)
        del model.lm_head.forward
        assert isinstance(model(ids).logits, Deferred)


def test_the_head_adapter_works_on_a_deferred_model() -> None:
    model, ids = build("gemma2"), batch()
    with torch.no_grad():
        expected = lm_head.logprobs(model, ids).logprobs
        with fr.deferred_logits(model):
            assert torch.equal(lm_head.logprobs(model, ids).logprobs, expected)


def test_a_copy_of_a_deferred_model_has_its_own_head() -> None:
    model, ids = build(), batch()
    fr.defer(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
        theirs, mine = (fr.materialise(m(ids).logits) for m in (other, model))
        torch.testing.assert_close(theirs, 2 * mine)
    fr.undefer(model)
    assert not isinstance(model(ids).logits, Deferred)
    assert isinstance(other(ids).logits, Deferred)
    fr.undefer(other)
    assert hooks_of(other) == hooks_of(model)
    assert not isinstance(other(ids).logits, Deferred)
    assert "generate" not in vars(other)


def test_a_deferred_model_is_saved_whole(tmp_path: Path) -> None:
    model, ids = build(), batch()
    expected = model(ids).logits
    fr.defer(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(fr.materialise(loaded(ids).logits), expected)
    fr.undefer(loaded)
    assert torch.equal(loaded(ids).logits, expected)


def test_threads() -> None:
    model, ids = build(), batch()
    expected = loss_of(model(ids).logits, ids)
    found: list[Tensor] = []
    with fr.deferred_logits(model):
        threads = [threading.Thread(target=lambda: found.append(loss_of(model(ids).logits, ids))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    for loss in found:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_two_forwards_before_a_backward_and_a_frozen_reference() -> None:
    def dpo(model: nn.Module, ref: nn.Module, ids: Tensor) -> Tensor:
        def scores(m: nn.Module, some: Tensor) -> Tensor:
            return m(some).logits[:, :-1].log_softmax(-1).gather(-1, some[:, 1:, None]).squeeze(-1).sum(-1)

        with torch.no_grad():
            base = scores(ref, ids) - scores(ref, ids.flip(1))
        return -F.logsigmoid(0.1 * (scores(model, ids) - scores(model, ids.flip(1)) - base)).mean()

    model, ref, ids = build().double(), build(seed=1).double(), batch()
    expected = dpo(model, ref, ids)
    truth = torch.autograd.grad(expected, list(model.parameters()))
    with fr.deferred_logits(model), fr.deferred_logits(ref):
        loss = dpo(model, ref, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), truth):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("where", ["whole", "backbone"])
def test_a_model_compiled_later_leaves_its_head_out(where: str) -> None:
    model, ids = build("gemma2", num_hidden_layers=1).double(), batch()
    expected = loss_of(model(ids).logits, ids)
    truth = torch.autograd.grad(expected, model.lm_head.weight)[0]
    with fr.deferred_logits(model):
        compiled: Any = torch.compile(model, backend="eager") if where == "whole" else model
        if where == "backbone":
            model.model.compile(backend="eager")
        for _ in range(2):
            loss = loss_of(compiled(ids).logits, ids)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(torch.autograd.grad(loss, model.lm_head.weight)[0], truth)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = build("llama").double().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_the_same(model)


def test_autocast_inside_the_forward() -> None:
    model, ids = build(), batch()
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    with fr.deferred_logits(model):
        logits = model(ids).logits
    assert logits.dtype is torch.bfloat16
    with torch.no_grad():
        hidden = lm_head.hidden_states(model, ids)
        truth = F.linear(hidden.bfloat16().double(), model.lm_head.weight.bfloat16().double()).log_softmax(-1)
    ours = logits.float().log_softmax(-1).gather(-1, ids[..., None])
    assert (ours - truth.gather(-1, ids[..., None])).abs().max() <= 5e-5


def test_accelerate_casts_the_output() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = build(), batch()
    model.forward = accelerate.utils.convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward))
    with fr.deferred_logits(model):
        logits = model(ids).logits
    assert isinstance(logits, Deferred)
    assert logits.dtype is torch.float32
    loss_of(logits, ids).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("where", ["body", "saved", "head"])
def test_adapters(where: str) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj", *(["lm_head"] if where == "head" else [])]}
    if where == "saved":
        options["modules_to_save"] = ["lm_head"]
    model, ids = lora(build(), **options).double().eval(), batch()
    assert_the_same(model)
    with torch.no_grad(), model.disable_adapter():
        expected = model(ids).logits.log_softmax(-1)
        with fr.deferred_logits(model):
            found = fr.materialise(model(ids).logits.log_softmax(-1))
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
@pytest.mark.parametrize("casts", [False, True])
def test_distributed_data_parallel(options: dict[str, Any], casts: bool) -> None:
    model, ids = build().double(), batch()
    if casts:
        accelerate = pytest.importorskip("accelerate")
        model.forward = accelerate.utils.convert_outputs_to_fp32(model.forward)
    truth = gradients(model, ids, deferred=False)[1]
    model.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(model, **options)
    reduced: list[int] = []
    wrapped.register_comm_hook(reduced, _counting)
    for step in range(3):
        reduced.clear()
        _, found = gradients(wrapped, ids, deferred=True)
        assert reduced, step
        for name, gradient in truth.items():
            torch.testing.assert_close(found[f"module.{name}"], gradient, rtol=1e-8, atol=1e-8)


def _counting(reduced, bucket):  # type: ignore[no-untyped-def]  # torch reads the annotations
    reduced.append(bucket.index())
    future: Any = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_full_backward_hooks_on_the_head() -> None:
    model, ids = build().double(), batch()
    truth = gradients(model, ids, deferred=False)[1]
    model.lm_head.register_full_backward_hook(lambda module, into, out: None)
    found = gradients(model, ids, deferred=True)[1]
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("case", SHARDED)
def test_fully_sharded(case: str) -> None:
    pytest.importorskip("torch.distributed.fsdp")
    ids = batch()
    expected, truth = gradients(sharded(case, False), ids, deferred=False)
    model = sharded(case, True)
    for _ in range(2):
        loss, found = gradients(model, ids, deferred=True)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert found.keys() == truth.keys()
    for name, gradient in truth.items():
        whole: Any = found[name]
        torch.testing.assert_close(whole.full_tensor(), gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("one_process_group")
def test_a_head_in_one_group_with_the_last_norm() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    expected, truth = gradients(build(), batch(), deferred=False)
    model = build()
    fsdp.fully_shard([model.model.norm, model.lm_head])
    fsdp.fully_shard(model)
    loss, found = gradients(model, batch(), deferred=True)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in truth.items():
        whole: Any = found[name]
        torch.testing.assert_close(whole.full_tensor(), gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("one_process_group")
def test_a_head_that_its_group_frees_after_the_forward_is_refused() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = build()
    fsdp.fully_shard(model, reshard_after_forward=True)
    with fr.deferred_logits(model):
        logits = model(batch()).logits
        with pytest.raises(RuntimeError, match=r"freed after the forward|modified in place"):
            logits.logsumexp(-1)


def compare_sharded() -> None:
    """Gradients of two processes that have two batches each, and those of one that has all four; in both processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, ids = torch.distributed.get_rank(), batch(B=4)
    mine = ids[2 * rank : 2 * rank + 2]
    for case in SHARDED:
        alone, model = sharded(case, False), sharded(case, True)
        fr.defer(model)
        (loss_of(alone(input_ids=ids).logits, ids) / 2).backward()
        for part in mine.split(1):
            loss_of(model(input_ids=part).logits, part).backward()
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), (case, name)
            if q.grad is not None:
                error = (p.grad.full_tensor() - q.grad).abs().max() / q.grad.abs().max()
                assert error < 1e-4, (case, name, error)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_heads_sharded_over_two_processes_equal_whole_ones(tmp_path: Path) -> None:
    launch.together("from tests import test_deferred_models as t; t.compare_sharded()", tmp_path)


@pytest.mark.usefixtures("one_process_group")
def test_tensor_parallel_heads_are_refused_by_their_name() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = build("llama")
    parallelize_module(model, torch.distributed.init_device_mesh("cpu", (1,)), {"lm_head": ColwiseParallel()})
    with fr.deferred_logits(model), pytest.raises(ValueError, match=r"a DTensor, .* over 1 processes"):
        model(batch())


def load_split(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    with fr.deferred_logits(model), pytest.raises(ValueError, match=r"unsupported head: .*(a DTensor|tp_plan)"):
        model(batch())
    assert model(batch()).logits.shape == (3, 9, 257)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_model_loaded_with_a_tp_plan_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    launch.together(f"from tests import test_deferred_models as t; t.load_split({str(tmp_path / 'model')!r})", tmp_path)


def test_models_that_cannot_be_deferred() -> None:
    with pytest.raises(TypeError, match="transformers causal LM"):
        fr.defer(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no output embeddings"):
        fr.defer(build().model)
    compiled: Any = torch.compile(build(), backend="eager")
    with pytest.raises(ValueError, match="must not be compiled together with its head"):
        fr.defer(compiled)
    model = build()
    model.lm_head = nn.Sequential(nn.Linear(32, 257))
    with pytest.raises(ValueError, match="got Sequential"):
        fr.defer(model)


def test_a_model_that_does_more_to_its_logits_says_so() -> None:
    model = build()
    model.lm_head.register_forward_hook(lambda module, args, z: z.clamp(-30, 30))
    with fr.deferred_logits(model), pytest.raises(NotImplementedError, match="clamp is not for deferred logits"):
        model(batch())
