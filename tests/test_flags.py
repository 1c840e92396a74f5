import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from fused_rlhf import backends, objectives
from fused_rlhf.trainers import cli, demo, flags
from fused_rlhf.trainers.config import to_yaml
from fused_rlhf.trainers.grpo_config import Config


@pytest.mark.parametrize("command", cli.TRAINERS)
def test_every_field_is_a_flag_with_its_docstring_in_a_titled_group(command):
    config = flags.default(command)
    known = flags.entries(type(config))
    assert set(known) == {field.name for field in dataclasses.fields(config)}
    assert all(entry.group and entry.text for entry in known.values())
    text = flags.manual(command, "what it does")
    lines = text.splitlines()
    titles = [line for line in lines if line and line[0].isupper()]
    assert len(titles) <= 20
    assert {entry.group for entry in known.values()} <= set(titles)
    for name in known:
        assert any(line.startswith(f"  {flags.flag_of(name)}") for line in lines), name
    assert "The reference is the model with its adapters off." in " ".join(text.split())
    assert max(map(len, lines)) <= 120


def test_the_help_says_what_a_flag_takes_and_its_default():
    text = flags.manual("grpo", "x")
    for line in (
        "  --steps N ",
        "  --learning-rate X ",
        "  --rewards TEXT ...",
        "  --objective-options NAME NUMBER ...",
        "  --scale-rewards {group,batch,none}",
    ):
        assert f"\n{line}" in text, line
    assert "from its peak. [1e-06]" not in text
    assert "The small model wants about 3e-4. [1e-06]" in " ".join(text.split())


@pytest.mark.parametrize("field", ["objective", "kl"])
def test_the_help_names_every_registered_one(field):
    table = set(objectives.PRESETS) if field == "objective" else set(objectives.KL_ESTIMATORS)
    words = flags.entries(Config)[field].text.replace(",", " ").replace(".", " ").split()
    assert table <= set(words)


def test_levels_corrections_and_backends_are_those_there_are():
    hints = flags.field_hints(Config)
    assert hints["backend"].__args__ == ("auto", *backends.BACKENDS)
    assert hints["level"].__args__ == ("default", *objectives.LEVELS)
    assert hints["importance_sampling"].__args__ == ("auto", "none", *objectives.CORRECTIONS)


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\nsteps: 7\nrewards: [exact_match, numeric_answer]\nmask_truncated: true\n")
    config = flags.parse("grpo", ["--steps", "9", "--config", str(path)])
    assert config == Config(learning_rate=1e-4, steps=9, rewards=("exact_match", "numeric_answer"), mask_truncated=True)
    assert type(config) is Config
    assert flags.parse("demo", [f"--config={path}"]) == dataclasses.replace(
        demo.DEFAULTS, learning_rate=1e-4, steps=7, rewards=("exact_match", "numeric_answer"), mask_truncated=True
    )


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--steps=3"], {"steps": 3}),
        (["--steps", "3", "--steps", "4"], {"steps": 4}),
        (["--learning_rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--resume"], {"resume": True}),
        (["--resume", "--no-resume"], {}),
        (["--no-lora-language-only", "--lora-r", "2"], {"lora_language_only": False, "lora_r": 2}),
        (["--mask-truncated", "true", "--resume=False"], {"mask_truncated": True}),
        (["--delta", "3", "--delta", "None"], {}),
        (["--rewards", "exact_match", "length=-3"], {"rewards": ("exact_match", "length=-3")}),
        (["--rewards"], {}),
        (["--objective-options", "dual_clip", "3"], {"objective_options": {"dual_clip": 3.0}}),
    ],
)
def test_how_values_are_written(words, changes):
    assert flags.parse("grpo", words) == Config(**changes)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        demo.DEFAULTS,
        Config(reward_weights=(0.5,), rewards=("exact_match",)),
        Config(objective="cispo", objective_options={"ratio_max": 3.0}, delta=None, report_to=("tensorboard",)),
    ],
)
def test_a_saved_configuration_comes_back_as_it_was(tmp_path, config):
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = "demo" if isinstance(config, demo.Demo) else "grpo"
    assert flags.parse(command, ["--config", str(tmp_path / "config.yaml")]) == config


def test_options_of_the_objective_are_a_flag():
    config = flags.parse("grpo", ["--objective", "sapo", "--objective-options", "tau_pos", "2", "tau_neg", "2.5"])
    assert config.loss().options == {"tau_pos": 2.0, "tau_neg": 2.5}


@pytest.mark.parametrize("name", flags.RECIPES)
def test_recipes_are_valid(name):
    command = flags.command_of(name)
    assert isinstance(flags.parse(command, ["--config", name]), type(flags.default(command)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stepz", "3"], r"there is no flag '--stepz' \(did you mean '--steps'\?\)"),
        (["--no-steps"], "there is no flag '--no-steps'"),
        (["--xyzzy"], r"there is no flag '--xyzzy'$"),
        (["steps", "3"], "expected a flag, --name value, got 'steps'"),
        (["--steps", "many"], "--steps: expected int, got 'many'"),
        (["--steps"], "--steps: expected int, got nothing"),
        (["--steps", "3", "4"], "--steps: expected int, got '3 4'"),
        (["--resume", "maybe"], "--resume: expected no value, true or false, got 'maybe'"),
        (["--learning-rate", "1,5"], "--learning-rate: expected float, got '1,5'"),
        (["--delta", "x"], r"--delta: expected float \| None, got 'x'"),
        (["--reward-weights", "1", "b"], "--reward-weights: expected values of type float, got '1 b'"),
        (["--objective-options", "tau"], "--objective-options: expected a name and a float, as often"),
        (["--task", "gms8k"], r"--task: expected one of \[.*\] \(did you mean 'gsm8k'\?\), got 'gms8k'"),
        (["--objective", "gspoo"], r"--objective: expected one of \[.*\] \(did you mean 'gspo'\?\); got 'gspoo'"),
        (["--config"], "--config: expected the path"),
        (["--config", "gsm8kstep"], r"neither a recipe nor a file 'gsm8kstep' \(did you mean 'gsm8k_steps'\?\)"),
        (["--config", "gsm8k_dpo"], "the recipe 'gsm8k_dpo' is one of `fused-rlhf dpo`"),
        (["-steps", "3"], r"got '-steps' \(did you mean '--steps'\?\)"),
        (["--config", "gone.yaml"], "there is no file 'gone.yaml'"),
        (["--overwrite", "--resume"], "^--overwrite, --resume: expected at most one"),
    ],
)
def test_wrong_words_are_refused_with_what_may_have_been_meant(words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        flags.parse("grpo", words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3", r"unknown keys \['stepps'\] \(did you mean 'steps'\?\)$"),
        ("steps: many", r"run\.yaml: steps: expected int, got 'many'"),
        ("task: chess", r"run\.yaml: task: expected .*gsm8k-steps.*, got 'chess'"),
        ("num_generations: 1", r"run\.yaml: num_generations: expected at least 2"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        flags.parse("grpo", ["--config", str(path)])


def test_no_flag_needs_torch(tmp_path):
    """Help, recipes and refusals come at once."""
    (tmp_path / "wrong.yaml").write_text("steppes: 3\n")
    code = f"""
import sys
from fused_rlhf.trainers import cli
for words, status in (
    ("--help", 0), ("--version", 0), ("gppo", 2), ("grpo --help", 0), ("dpo --help", 0), ("ppo -h", 0), ("demo --help", 0),
    ("grpo --stpes 3", 2), ("grpo --steps x", 2), ("dpo --config nowhere", 2), ("ppo --num-generations 2", 2),
    ("grpo --config {tmp_path}/wrong.yaml", 2), ("grpo --num-generations 1", 2), ("grpo --task chess", 2),
    ("merge", 2), ("merge --help", 0), ("completion fish", 2), ("completion bash", 0),
):
    try:
        got = cli.main(words.split())
    except SystemExit as end:
        got = end.code
    assert got == status, words
    found = {{"torch", "transformers", "numpy"}} & set(sys.modules)
    assert not found, (words, found)
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stderr.splitlines()) == 10
    assert all(line.startswith("fused-rlhf: error: ") for line in done.stderr.splitlines())
