"""Runs in processes of their own, killed and resumed: equal to those that were left alone."""

import pytest

from tests.launch import killed, logged, rows, run, without_seconds
from tests.picture_runs import picture_run

# Slow enough a step to be killed within, quick enough to be run three times.
FLAGS = "grpo --hidden-size 32 --num-layers 2 --steps 12 --prompts-per-step 4 --num-generations 4 --max-new-tokens 4"
FLAGS += " --learning-rate 5e-3 --max-operand 30 --eval-samples 20 --eval-steps 4 --save-steps 1 --sample-steps 3"
FLAGS += " --warmup-steps 30 --warmup-batch-size 16 --beta 0.05 --num-minibatches 2 --num-iterations 2"
FLAGS += " --lr-schedule cosine --rewards regex=[0-9] length=2"


def saving(output):
    """A checkpoint beyond the third step is half written."""
    return any(path.name > "step-00000003" for path in (output / "checkpoints").glob("*.partial"))


@pytest.mark.slow
def test_a_run_killed_again_and_again_equals_the_uninterrupted_one(tmp_path):
    flags = FLAGS.split()
    want = run(flags, tmp_path / "whole")
    part = tmp_path / "part"
    # In the warm-up, after a step, while a checkpoint is written, and after some more steps.
    assert killed(flags, part, logged(10))
    assert killed([*flags, "--resume"], part, logged(33))
    assert killed([*flags, "--resume"], part, saving)
    assert killed([*flags, "--resume"], part, logged(39))
    got = run([*flags, "--resume"], part)
    assert without_seconds(got) == without_seconds(want)
    assert rows(part) == got
    for name in ("model/model.safetensors", "samples.jsonl"):
        assert (part / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((part / "checkpoints").glob("*.partial"))
    assert len(list((part / "checkpoints").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", ["dpo", "grpo"])
def test_a_run_with_pictures_killed_and_resumed_equals_the_uninterrupted_one(tmp_path, command):
    flags = [*picture_run(tmp_path, "gemma3", command), "--steps", "8", "--save-steps", "1"]
    want = run(flags, tmp_path / "whole")
    assert killed(flags, tmp_path / "part", logged(4))
    assert without_seconds(run([*flags, "--resume"], tmp_path / "part")) == without_seconds(want)
    for name in ("whole", "part"):
        assert (tmp_path / name / "model" / "model.safetensors").is_file()
    files = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert files[0] == files[1]
