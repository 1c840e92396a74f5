import dataclasses
from typing import Any

import pytest
import torch

from fused_rlhf.backends import chunked, tiling
from fused_rlhf.kernels.interface import Work
from fused_rlhf.trainers import attention, engine, planning
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.activations import trial
from fused_rlhf.trainers.attention import Group
from fused_rlhf.trainers.engine import Engine
from fused_rlhf.trainers.grpo_config import Config
from fused_rlhf.trainers.layout import Layout
from fused_rlhf.trainers.planning import Memory, Workload
from tests import tiny

WORK = Workload("rows", 4, train=9, test=3, note="made up", sequences=40, length=20, updates=2)


def work(sequences: int, length: int, updates: int = 1) -> Workload:
    return Workload("rows", 4, 9, 3, "made up", sequences, length, updates)


def test_memory_is_that_of_the_formula(tmp_path):
    own, loaded = tiny.build(tmp_path, micro_batch_size=10**9)
    P, V, H = loaded.model.num_parameters(), 99, 32
    assert loaded.model.config.vocab_size == V
    got = planning.memory(own, loaded, work(50, 20), reference=True)
    head = int(chunked.memory(Work("one_pass", 1000, H, V))) - 4 * V * H  # dW is among the gradients
    first = 4 * V * H
    assert got == Memory(2 * 4 * P, 4 * P, 8 * P, head, early=first, late=first, hidden=4 * 1000 * H)
    assert got.peak == 4 * 4 * P + max(4 * P, head + 4 * V * H)
    own.config = dataclasses.replace(own.config, micro_batch_size=10)
    several = planning.memory(own, loaded, work(50, 20), reference=True)
    assert several.early == several.late == 4 * P  # those of five micro-batches
    # The op's block of whole rows, whatever the number of tokens; what grows is the gradient of hidden.
    own.config = dataclasses.replace(own.config, micro_batch_size=10**9)
    loaded.model.config.vocab_size = 151936
    long, longer = (planning.memory(own, loaded, work(n, 10), False).head for n in (10**6, 2 * 10**6))
    assert longer - long == 4 * 10**7 * H
    block = tiling.row_block(151936, 4) * 151936 * 4
    assert block + 4 * 10**7 * H <= long <= 1.1 * block + 4 * 10**7 * H
    assert 4 * 1000 * H < head < 12 * 1000 * (V + H)  # fewer logits than the op's block: all of them
    for p in list(own.module.parameters())[1:]:
        p.requires_grad_(False)
    trained = next(iter(own.module.parameters())).numel()
    assert planning.memory(own, loaded, WORK, False).optimiser == 8 * trained


def test_the_peak_is_at_the_loss_in_the_backward_or_elsewhere():
    some = Memory(weights=100, gradients=50, optimiser=200, head=40, activations=30, kept=20, early=5, late=9, hidden=2)
    assert some.peak == 300 + 20 + 40 + 5
    assert dataclasses.replace(some, activations=60).peak == 300 + 60 + 2 + 9
    assert dataclasses.replace(some, activations=60, gathered=7).peak == 300 + 7 + 60 + 2 + 9
    assert dataclasses.replace(some, gradients=90).peak == 300 + 90
    assert dataclasses.replace(some, sampling=99).peak == 300 + 99
    assert list(some.parts()) == ["weights", "gradients", "optimiser", "activations", "head"]


def test_activations_come_from_a_trial_and_gradients_grow_with_the_backward(tmp_path):
    own, loaded = tiny.build(tmp_path, num_layers=3, gradient_checkpointing=True)
    need = planning.memory(own, loaded, WORK, False)
    found = planning.with_activations(need, own, [Group(20)] * 40)
    one = trial(loaded.model, own.config, own.device, [Group(20)] * 40)
    assert (found.activations, found.kept) == (one.peak, one.kept)
    assert need.late < found.late <= need.gradients


def test_a_prompt_that_sequences_share_is_counted_once(tmp_path):
    mine = dataclasses.replace(WORK, sharing=8, prompt=15)
    assert mine.groups(20, Layout("shared")) == [Group(15, (5,) * 8), Group(15, (5,) * 8), Group(15, (5,) * 4)]
    assert mine.groups(2, Layout("packed")) == WORK.groups(2, Layout("shared")) == [Group(20)] * 2
    own, loaded = tiny.build(tmp_path, micro_batch_size=20)
    assert attention.adopt(loaded.model)
    loaded = dataclasses.replace(loaded, layout=Layout("shared"))
    text = planning.describe(own, loaded, mine, reference=False)
    assert "20 sequences of one process, shared: 400 tokens at most, of which 145 go through the body" in text
    once, each = (
        planning.with_activations(Memory(1, 1, 1, 1), own, it.groups(20, loaded.layout), loaded.layout).kept
        for it in (mine, WORK)
    )
    assert once < 0.5 * each


def test_replicas_hold_their_buckets_and_shards_what_is_whole_for_a_while(tmp_path):
    own, loaded = tiny.build(tmp_path, num_layers=3, hidden_size=64)
    alone = planning.memory(own, loaded, WORK, False)
    own.world = 2
    assert planning.memory(own, loaded, WORK, False).gradients == 2 * alone.gradients


def test_whole_weights_under_fsdp_are_counted(tmp_path, group):
    folder = tiny.saved_model(tmp_path / "base", tied=False)
    own, loaded = tiny.build(tmp_path, fsdp=True, model=folder, hidden_size=128, num_layers=4)
    model: Any = loaded.model
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.model.layers]
    table = model.lm_head.weight.numel()
    rest = model.model.norm.weight.numel()  # neither in a block nor a table
    pairs = sum(sorted([*blocks, table])[-2:])  # one of the tables is the head, which is streamed
    need = planning.memory(own, loaded, WORK, False)
    assert need.gathered == 4 * (rest + pairs)
    of_block = Work("two_phase", 20 * 20, 32, 99)  # of all columns; and d_hidden beside its gradient
    assert need.head == chunked.memory(of_block) + 4 * (table + 400 * 32)


def test_what_is_sampled_together_is_counted(tmp_path):
    config = Config(output=str(tmp_path / "run"), hidden_size=32, num_layers=2)
    accelerator = engine.start(config)
    loaded = models.load_for(config)
    own = Engine(config, accelerator, loaded.model, 1)
    one = 2 * 2 * 1 * 32 * 20 * 4 + 2 * 4 * 99  # 2 layers of one head 32 wide; logits
    assert planning.memory(own, loaded, WORK, False).sampling == 40 * one
    own.config = dataclasses.replace(config, rollout_batch_size=7)
    assert planning.memory(own, loaded, WORK, False).sampling == 7 * one


def test_the_plan_counts_steps_tokens_and_what_dense_logits_would_take(tmp_path):
    own, loaded = tiny.build(tmp_path, steps=7, micro_batch_size=5)
    text = planning.describe(own, loaded, WORK, reference=False)
    assert "data            9 training and 3 test rows; made up" in text
    assert "steps           7, 2 updates each; 14 in all" in text
    assert "40 sequences of at most 20 tokens: 800 tokens" in text
    assert "5 sequences of one process, padded: 100 tokens at most" in text
    assert f"dense logits would take {planning.size(3 * 4 * 100 * 99)}" in text
    assert "activations" in text
    assert "at least" not in text
    assert planning.parameters(own, loaded) == f"{loaded.model.num_parameters():,} parameters"


def test_a_step_is_told_by_what_it_takes():
    assert WORK.of_step(1) == "rows 0 to 3 of the shuffled training set"
    assert WORK.of_step(3) == "rows 8 to 11 of the shuffled training set"


def test_what_is_trained_besides_the_model_is_counted_apart(tmp_path):
    own, loaded = tiny.build(tmp_path)
    own.module = torch.nn.ModuleDict({"policy": loaded.model, "value": torch.nn.Linear(1199, 1)})
    assert planning.parameters(own, loaded) == f"{loaded.model.num_parameters():,} parameters and 1,200 of the values"


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1.5e3, "1.5 kB"), (320 << 20, "336 MB"), (2e13, "20 TB")])
def test_sizes_are_read_easily(count, text):
    assert planning.size(count) == text
