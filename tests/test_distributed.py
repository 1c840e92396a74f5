"""Two processes do what one does: replicated by DDP, sharded by FSDP2; on CPUs, over gloo."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import cuts, tiny
from tests.launch import MODULE, log_of, rows, run, together, worst
from tests.picture_runs import picture_run

SMALL = "--hidden-size 32 --num-layers 2 --learning-rate 5e-3 --save-steps 2 --micro-batch-size 3"
GRPO = f"grpo {SMALL} --steps 3 --prompts-per-step 8 --num-generations 4 --max-new-tokens 3 --max-operand 30"
GRPO += " --eval-samples 21 --warmup-steps 5 --warmup-batch-size 16 --beta 0.05 --num-minibatches 2 --num-iterations 2"
GRPO += " --rewards regex=[0-9] length=2 --scale-rewards batch --sample-steps 1"


# Says before every update what each process holds.
SHARES = """
import os
import sys

from fused_rlhf.trainers import cli, engine


def update(self, *args, own=engine.Engine.update):
    parameters = list(self.module.parameters())
    local, whole = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
    os.write(1, f"holds {local} of {whole}\\n".encode())  # as a whole, not among another process's words
    return own(self, *args)


engine.Engine.update = update
sys.exit(cli.main())
"""


def of_model(folder, tied=True):
    """GRPO's flags for a small model that is loaded, its vocabulary of 99 tokens."""
    return GRPO.replace("--hidden-size 32 --num-layers 2", f"--model {tiny.saved_model(folder, tied)}").split()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    flags = of_model(folder / "base", tied=False)
    return flags, run(flags, folder / "run"), folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "fsdp"])
def test_grpo_in_two_processes_equals_one(tmp_path, single, launcher):
    flags, want, folder = single
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    program = [str(script)] if launcher == "fsdp" else MODULE
    got = run(flags, tmp_path / "run", processes=2, launcher=launcher, program=program)
    log = log_of(tmp_path / "run").read_text()
    assert ("streamed from 2 shards" in log) == (launcher == "fsdp")
    held = re.findall(r"holds (\d+) of (\d+)", log)
    assert len(held) == (2 * (5 + 3 * 4) if launcher == "fsdp" else 0)
    assert all(0.45 < int(some) / int(whole) < 0.55 for some, whole in held)
    found = worst(got, want)
    assert found["loss"] < 1e-5
    assert max(found.values()) < 1e-3, found  # the norm of a small gradient, after Adam has taken signs, differs most
    assert {"loss", "kl", "reward", "grad_norm", "entropy", "accuracy"} <= set(found)
    shown = [
        [(row["step"], row["prompt"]) for row in map(json.loads, (path / "samples.jsonl").read_text().splitlines())]
        for path in (tmp_path / "run", folder)
    ]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 3 * 8 * 4
    mine, its = (load_file(path / "model" / "model.safetensors") for path in (tmp_path / "run", folder))
    assert mine.keys() == its.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], its[name], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_balanced_tokens_in_two_processes_equal_one_row_at_a_time(tmp_path, single, layout):
    """And dead sequences, which one process may have more of."""
    flags = " ".join(single[0]).replace("--beta 0.05 ", "").split()
    at = flags.index("--micro-batch-size")
    flags = flags[:at] + flags[at + 2 :]
    one = run([*flags, "--micro-batch-size", "1", "--layout", "padded"], tmp_path / "one")
    two = run([*flags, "--micro-batch-tokens", "40", "--layout", layout, "--fsdp"], tmp_path / "two", processes=2)
    found = worst(two, one)
    assert {"loss", "reward", "grad_norm", "live/entropy", "accuracy", "dead_sequences"} <= set(found)
    assert any(row.get("dead_sequences", 0) > 0 for row in one)
    assert found["loss"] < 1e-5
    assert max(found.values()) < 1e-3, found


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "adapters"), [(True, "--lora-r 2"), (False, "--lora-r 2"), (False, "")])
def test_a_sharded_run_is_resumed(tmp_path, tied, adapters):
    text = " ".join([*of_model(tmp_path / "base", tied), adapters])
    flags = text.replace("--warmup-steps 5 --warmup-batch-size 16", "--gradient-checkpointing").split()
    want = run(flags, tmp_path / "one")
    run([*flags, "--fsdp", "--steps", "2"], tmp_path / "two", processes=2)
    got = run([*flags, "--fsdp", "--resume"], tmp_path / "two", processes=2)
    losses = [[row["loss"] for row in found if "loss" in row] for found in (got, want)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 3
    assert log_of(tmp_path / "two").read_text().count("streamed from 2 shards") == (0 if tied else 2)
    file = "adapter_model.safetensors" if adapters else "model.safetensors"
    mine, its = (load_file(tmp_path / name / "model" / file) for name in ("two", "one"))
    assert mine.keys() == its.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], its[name], atol=1e-4, rtol=0)


# ---- sets that a sampler kept


def completions_of(prompts: list[list[int]]) -> list[list[int]]:
    """Four to a prompt, by prompt and place alone."""
    found = []
    for i, ids in enumerate(prompts):
        generator = torch.Generator().manual_seed(7 * sum(ids) + i % 4)
        length = int(torch.randint(1, 6, (), generator=generator))
        found.append(torch.randint(5, 90, (length,), generator=generator).tolist())
    return found


def share_of_digits(completions: list[str], **columns: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def replay(output: str, silent: str = "", **changes: Any) -> None:
    """A run whose sampler reports what it kept, but for the processes named in `silent`."""
    from fused_rlhf.trainers import engine, grpo
    from fused_rlhf.trainers import run as runs

    runs.curves.figure = lambda rows, names: None  # type: ignore[assignment]

    def sampler(prompts: list[list[int]]) -> Any:
        completions = completions_of(prompts)
        reports = os.environ.get("RANK", "0") not in silent
        return completions, None, cuts.random_sets(completions) if reports else None

    options: dict[str, Any] = {"hidden_size": 32, "num_layers": 1, "steps": 2, "prompts_per_step": 8}
    options |= {"num_generations": 4, "num_minibatches": 2, "num_iterations": 2, "max_new_tokens": 6, "beta": 0.05}
    options |= {"learning_rate": 1e-3, "eval_steps": 0, "eval_samples": 20, "sample_steps": 0, "save_steps": 0}
    config = grpo.Config(output=output, **(options | changes))
    grpo.train(config, reward_functions=[share_of_digits], sampler=sampler)
    engine.leave()


def replayed(output: Path, processes: int, **arguments: Any) -> list[dict[str, Any]]:
    code = f"from tests import test_distributed as t; t.replay({str(output)!r}, **{arguments!r})"
    together(code, output.parent, processes)
    return rows(output)


@pytest.mark.slow
def test_reported_sets_go_with_their_tokens_to_other_processes(tmp_path):
    one = replayed(tmp_path / "one", 1, micro_batch_size=1, layout="padded")
    two = replayed(tmp_path / "two", 2, micro_batch_tokens=40)
    found = worst(two, one)
    assert {"loss", "kl", "entropy", "untruncated/ratio_mean"} <= set(found)
    assert found["loss"] < 1e-5
    assert max(found.values()) < 1e-3, found


@pytest.mark.slow
def test_where_one_process_has_no_sets_all_are_computed(tmp_path):
    one = replayed(tmp_path / "one", 1, silent="0", top_k=5)
    two = replayed(tmp_path / "two", 2, silent="1", top_k=5)
    found = worst(two, one)
    assert one[1]["targets_added"] > 0
    assert found["targets_added"] == 0
    assert max(found.values()) < 1e-3, found


# ---- pictures on one process only


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "command", "more"),
    [
        ("gemma3", "dpo", []),
        ("gemma3", "dpo", ["--fsdp"]),
        ("gemma3", "grpo", ["--fsdp"]),
        ("idefics3", "grpo", []),
        ("paligemma", "ppo", ["--fsdp"]),
        ("mllama", "dpo", []),
    ],
)
def test_pictures_on_one_process_alone(tmp_path, family, command, more):
    flags = picture_run(tmp_path, family, command)
    want = run(flags, tmp_path / "one")
    got = run([*flags, *more], tmp_path / "two", processes=2)
    found = worst(got, want)
    assert found["loss" if command != "ppo" else "loss/policy_avg"] < 1e-4
    assert max(found.values()) < 2e-3, found
    mine, its = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("two", "one"))
    assert mine.keys() == its.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], its[name], atol=1e-3, rtol=0)


def test_a_family_whose_rows_share_no_forward_is_not_sharded(tmp_path):
    flags = picture_run(tmp_path, "mllama", "dpo")
    with pytest.raises(AssertionError, match="fsdp: expected false for MllamaForConditionalGeneration with pictures"):
        run([*flags, "--fsdp"], tmp_path / "two", processes=2)
