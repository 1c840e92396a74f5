import pytest

from fused_rlhf.backends import chunked
from fused_rlhf.trainers import planning
from tests import tiny


def test_memory_is_that_of_the_formula(tmp_path):
    own, loaded = tiny.build(tmp_path)
    P, V, H = loaded.model.num_parameters(), 99, 32
    got = planning.memory(own, 1000, V, H, reference=True)
    assert got == {
        "weights": 2 * 4 * P,
        "gradients": 4 * P,
        "optimiser": 8 * P,
        "head": 4 * 1000 * V + 4 * 1000 * H,  # fewer logits than the op's block: all of them
    }
    assert planning.memory(own, 10**7, 151936, H, False)["head"] == chunked.ONE_PASS_BYTES + 4 * 10**7 * H
    for p in list(own.module.parameters())[1:]:
        p.requires_grad_(False)
    trained = next(iter(own.module.parameters())).numel()
    assert planning.memory(own, 1000, V, H, False)["optimiser"] == 8 * trained


def test_the_plan_counts_steps_tokens_and_what_dense_logits_would_take(tmp_path):
    own, loaded = tiny.build(tmp_path, steps=7, micro_batch_size=5)
    text = planning.describe(own, loaded, reference=False, sequences=40, length=20, updates_per_step=2, data="no data")
    assert "steps           7, 2 updates each; 14 in all" in text
    assert "40 sequences of at most 20 tokens: 800 tokens" in text
    assert "5 sequences of one process: 100 tokens" in text
    assert f"dense logits would take {planning.size(3 * 4 * 100 * 99)}" in text
    assert "not known beforehand" in text


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1.5e3, "1.5 kB"), (320 << 20, "336 MB"), (2e13, "20 TB")])
def test_sizes_are_read_easily(count, text):
    assert planning.size(count) == text
