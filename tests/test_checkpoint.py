import random

import numpy
import pytest
import torch

from fused_rlhf.trainers import checkpoint
from fused_rlhf.trainers.checkpoint import CheckpointError
from tests import forks, tiny
from tests.launch import environment
from tests.tiny import pieces


def train(own, updates):
    return [own.update(tiny.logprob_loss, pieces(6)) for _ in range(updates)]


def draws():
    return random.random(), numpy.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize("options", [{}, {"lr_schedule": "cosine", "dtype": "bfloat16"}])
def test_what_is_loaded_goes_on_to_the_bit(tmp_path, options):
    own, _ = tiny.build(tmp_path, learning_rate=1e-2, **options)
    train(own, 3)
    path = checkpoint.save(tmp_path / "c", 3, own, {"kl": 0.25, "nested": {"list": [1, "two"]}}, keep=2)
    want, numbers = train(own, 3), draws()

    torch.manual_seed(7)
    other, _ = tiny.build(tmp_path, learning_rate=1e-2, seed=5, **options)
    step, progress = checkpoint.load(path, other)
    assert (step, progress) == (3, {"kl": 0.25, "nested": {"list": [1, "two"]}})
    assert train(other, 3) == want
    assert draws() == numbers
    assert other.updates == 6
    for mine, its in zip(other.module.parameters(), own.module.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_one_of_an_optimiser_without_the_fused_step_is_loaded_into_one_with_it(tmp_path):
    own, _ = tiny.build(tmp_path, learning_rate=1e-2)
    for group in own.optimizer.optimizer.param_groups:
        group["fused"] = None
    train(own, 3)
    path = checkpoint.save(tmp_path / "c", 3, own, {}, keep=1)
    other, _ = tiny.build(tmp_path, learning_rate=1e-2)
    checkpoint.load(path, other)
    assert {group["fused"] for group in other.optimizer.optimizer.param_groups} == {True}
    for mine, its in zip(other.module.parameters(), own.module.parameters(), strict=True):
        ours, theirs = other.optimizer.optimizer.state[mine], own.optimizer.optimizer.state[its]
        assert all(torch.equal(ours[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert train(other, 2)[-1]["loss"] == pytest.approx(train(own, 2)[-1]["loss"], rel=1e-6)


def test_the_last_ones_are_kept_and_a_half_written_one_is_never_found(tmp_path):
    own, _ = tiny.build(tmp_path)
    folder = tmp_path / "c"
    for step in (2, 10, 100):
        checkpoint.save(folder, step, own, {}, keep=2)
    (folder / "step-00000200.partial").mkdir()
    (folder / "step-00000200.partial" / "state.pt").write_bytes(b"half")
    assert [path.name for path in checkpoint.complete(folder)] == ["step-00000010", "step-00000100"]
    assert checkpoint.latest(folder) == folder / "step-00000100"
    checkpoint.save(folder, 200, own, {}, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000200"]
    assert checkpoint.latest(tmp_path / "none") is None


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    new, path = tmp_path / "new", tmp_path / "path"
    for text in ("first", "second"):
        new.mkdir()
        (new / text).write_text(text)
        checkpoint.replace(new, path)
    assert [p.name for p in path.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["path"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from tests import tiny
from fused_rlhf.trainers import checkpoint
folder = Path(sys.argv[1])
own, _ = tiny.build(folder)
checkpoint.save(folder / "c", 1, own, {}, keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # what a write meets then is what it meets on a full disk
try:
    checkpoint.save(folder / "c", 2, own, {}, keep=1)
except checkpoint.CheckpointError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    log = tmp_path / "log"
    process = forks.start(["-c", FULL_DISK, str(tmp_path)], tmp_path, environment(), log)
    assert process.wait() == 0, log.read_text()
    assert "step-00000002 cannot be written" in log.read_text()
    assert f"the last one that is complete is {tmp_path / 'c' / 'step-00000001'}" in log.read_text()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000001"]
    own, _ = tiny.build(tmp_path)
    assert checkpoint.load(tmp_path / "c" / "step-00000001", own)[0] == 1


def test_an_error_names_the_file_and_the_reason(tmp_path, monkeypatch):
    own, _ = tiny.build(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"step-00000001 cannot be written: .*No space left.*there is none before"
    ):
        checkpoint.save(tmp_path / "c", 1, own, {}, keep=1)
    assert not list((tmp_path / "c").iterdir())
