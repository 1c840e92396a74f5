"""What is not promised to us: which of our features ends where one of these changes."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import nn

from fused_rlhf.trainers import model as models
from fused_rlhf.trainers import private
from tests import tiny
from tests.test_activations import B, T, saved_bytes
from tests.tiny import pieces


def accelerator(precision="no"):
    return Accelerator(cpu=True, mixed_precision=precision)


def test_a_second_run_in_a_process_may_have_another_precision():
    private.forget_accelerators()
    assert accelerator("bf16").mixed_precision == "bf16"
    with pytest.raises(ValueError, match="already been initialized"):  # why it must forget
        accelerator("no")
    private.forget_accelerators()
    assert accelerator("no").mixed_precision == "no"


def test_an_update_of_several_micro_batches_steps_once():
    """A prepared optimiser that did not look there would step after every backward; one that looked elsewhere, never."""
    private.forget_accelerators()
    own, weight = accelerator(), nn.Parameter(torch.ones(1))
    optimizer = own.prepare_optimizer(torch.optim.SGD([weight], lr=0.5))
    for last in (False, True):
        private.sync_gradients(own, last)
        assert own.sync_gradients is last
        own.backward((2 * weight).sum())
        optimizer.step()
        optimizer.zero_grad()
        assert weight.item() == (1.0 if not last else 1.0 - 0.5 * (2 + 2))
    assert optimizer.gradient_state.sync_gradients


def test_every_tracker_that_is_installed_is_a_known_one():
    assert {"tensorboard", "wandb"} <= set(private.trackers())
    assert {str(name) for name in get_available_trackers()} <= set(private.trackers())


def test_the_blocks_of_a_model_are_found():
    """Without them a sharded model would be one group, whole on every process in its forward."""
    model, _ = models.build(32, 2)
    assert private.blocks_of(nn.ModuleList([model])) == {type(model.model.layers[0]).__name__} == {"Qwen3DecoderLayer"}
    assert private.blocks_of(nn.Linear(2, 2)) == set()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_inputs_of_checkpointed_blocks_are_kept_elsewhere(tmp_path, precision):
    """An outer hook sees what stays on the device: no block's input; the update is the same to the bit."""
    options = {"gradient_checkpointing": True, "mixed_precision": precision, "num_layers": 3}
    found: dict[bool, int] = {}
    results = []
    for offload in (False, True):
        own, _ = tiny.build(tmp_path, offload_activations=offload, **options)
        results.append(own.update(tiny.logprob_loss, pieces(6)))
        module: Any = own.module
        found[offload] = saved_bytes(module.train(), precision == "bf16")
    assert results[0] == results[1]
    block = B * T * 32 * 4
    assert found[False] - found[True] == 3 * block
