import pytest
import torch

from fused_rlhf.backends import chunked, tiling
from fused_rlhf.kernels.interface import Work
from fused_rlhf.trainers import planning
from fused_rlhf.trainers.planning import Workload
from tests import tiny

WORK = Workload("rows", 4, train=9, test=3, note="made up", sequences=40, length=20, updates=2)


def test_memory_is_that_of_the_formula(tmp_path):
    own, loaded = tiny.build(tmp_path)
    P, V, H = loaded.model.num_parameters(), 99, 32
    got = planning.memory(own, 1000, V, H, reference=True)
    assert got == {
        "weights": 2 * 4 * P,
        "gradients": 4 * P,
        "optimiser": 8 * P,
        "head": chunked.memory(Work("one_pass", 1000, H, V)) - 4 * V * H,  # dW is among the gradients
    }
    # The op's block of whole rows, whatever the number of tokens; what grows is the gradient of hidden.
    long, longer = (planning.memory(own, n, 151936, H, False)["head"] for n in (10**7, 2 * 10**7))
    assert longer - long == 4 * 10**7 * H
    block = tiling.row_block(151936, 4) * 151936 * 4
    assert block + 4 * 10**7 * H <= long <= 1.1 * block + 4 * 10**7 * H
    assert 4 * 1000 * H < got["head"] < 12 * 1000 * (V + H)  # fewer logits than the op's block: all of them
    for p in list(own.module.parameters())[1:]:
        p.requires_grad_(False)
    trained = next(iter(own.module.parameters())).numel()
    assert planning.memory(own, 1000, V, H, False)["optimiser"] == 8 * trained


def test_the_plan_counts_steps_tokens_and_what_dense_logits_would_take(tmp_path):
    own, loaded = tiny.build(tmp_path, steps=7, micro_batch_size=5)
    text = planning.describe(own, loaded, WORK, reference=False)
    assert "data            9 training and 3 test rows; made up" in text
    assert "steps           7, 2 updates each; 14 in all" in text
    assert "40 sequences of at most 20 tokens: 800 tokens" in text
    assert "5 sequences of one process: 100 tokens" in text
    assert f"dense logits would take {planning.size(3 * 4 * 100 * 99)}" in text
    assert "not known beforehand" in text
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
