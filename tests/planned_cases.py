"""What every rank must find of a model that a transformers tp_plan has sharded: run in several processes by
test_tensor_parallel.py, against the same model whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers.distributed import DistributedConfig

import fused_rlhf as fr
from tests.parallel_cases import counted

B, T = 2, 7


def load(folder: str | Path, plan: Any = None) -> Any:
    config = None if plan is None else DistributedConfig(tp_plan=plan)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config)


def batch(model: Any) -> dict[str, Any]:
    ids = torch.randint(0, model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, dist.tensor.DTensor) else value


def compare(model: Any, planned: Any) -> None:
    """Gradients of all parameters, those of the head in their shards."""
    others = dict(planned.named_parameters())
    for name, parameter in model.named_parameters():
        truth, found = parameter.grad, others[name].grad
        assert (truth is None) == (found is None), name
        if truth is not None:
            limit = 2e-6 * max(truth.abs().max().item(), 1.0)
            assert (whole(found) - truth).abs().max() <= limit, name
        parameter.grad = others[name].grad = None


def check(folder: str) -> None:
    model, planned = load(folder), load(folder, "auto")
    data, outputs = batch(model), ("entropy", "lse")
    head = planned.get_output_embeddings()
    assert isinstance(head.weight, dist.tensor.DTensor)
    assert len(head.weight.to_local()) < model.config.vocab_size
    for temperature in (1.0, 0.7):
        truth = fr.lm_head.logprobs(model, **data, temperature=temperature, outputs=outputs)
        with counted() as (calls, _):
            found = fr.lm_head.logprobs(planned, **data, temperature=temperature, outputs=outputs)
            assert calls["all_gather"] == 2  # DTensors have collectives of their own
        for name in ("logprobs", *outputs):
            torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=0, atol=2e-6)
        for result in (truth, found):
            (result.logprobs.sum() + 0.5 * result.entropy.sum()).backward()
        compare(model, planned)
    with torch.no_grad():
        quiet = fr.lm_head.logprobs(planned, **data)
        torch.testing.assert_close(quiet.logprobs, fr.lm_head.logprobs(model, **data).logprobs, rtol=0, atol=2e-6)
    found_head = fr.lm_head.find_head(planned)
    assert found_head.process_group is not None
    assert found_head.vocab_size == model.config.vocab_size
    for one in (model, planned):
        inputs = fr.lm_head.forward(one, **data)
        loss, _ = fr.linear_policy_loss(
            inputs.hidden[:, :-1],
            inputs.head,
            data["input_ids"][:, 1:],
            completion_mask=data["attention_mask"][:, 1:],
            objective=fr.GRPO(beta=0.1),
            advantages=torch.tensor([1.0, -0.5]),
            ref_hidden=inputs.hidden[:, :-1].detach() + 0.01,
        )
        kl = fr.linear_kl(inputs.hidden, inputs.head, inputs.hidden.detach() + 0.1, inputs.head, "jsd")
        (loss + kl.sum()).backward()
    compare(model, planned)


def refusals(folder: str) -> None:
    otherwise = load(folder, {"lm_head": "rowwise_split_input"})
    with pytest.raises(ValueError, match="unsupported head: under a tp_plan its rows must be sharded"):
        fr.lm_head.forward(otherwise, **batch(otherwise))
    head = fr.lm_head.find_head(load(folder, "auto"))
    with pytest.raises(ValueError, match="process_group must be None to be told in keywords"):
        head.kwargs()
    hidden, targets = torch.randn(3, head.weight.shape[1]), torch.arange(3)
    other = dist.new_group(list(range(dist.get_world_size())))
    with pytest.raises(ValueError, match="process_group must be that of the Head given as weight"):
        fr.linear_logprobs(hidden, head, targets, process_group=other)
    fr.linear_logprobs(hidden, head, targets, process_group=head.process_group)


@contextlib.contextmanager
def group() -> Iterator[None]:
    dist.init_process_group("gloo")
    yield
    dist.barrier()
    dist.destroy_process_group()


def main(*folders: str) -> None:
    with group():
        for folder in folders:
            check(folder)
        refusals(folders[0])
