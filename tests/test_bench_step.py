import json

import pytest
import torch

from fused_rlhf.bench import step

TINY = ("--tokens", "48", "--vocabulary", "300", "--hidden", "16", "--layers", "1", "--threads", "1")


def test_both_sides_compute_the_same_loss_and_gradients():
    shape = step.Shape(tokens=48, vocabulary=300, hidden=16, layers=1, threads=1)
    found = {}
    for side, loss_of in (("dense", step.dense_loss), ("ours", step.our_loss)):
        model, _, batch = step.build(shape)
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        found[side] = [loss.detach(), *(p.grad for p in model.parameters())]
    for dense, ours in zip(found["dense"], found["ours"]):
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_writes_both_sides(tmp_path):
    assert step.main([*TINY, "--out", str(tmp_path / "step.json")]) == 0
    result = json.loads((tmp_path / "step.json").read_text())
    dense, ours = result["sides"]
    assert (dense["side"], ours["side"]) == ("dense", "ours")
    assert ours["loss"] == pytest.approx(dense["loss"], rel=1e-5)
    assert result["shape"]["tokens"] == 48
