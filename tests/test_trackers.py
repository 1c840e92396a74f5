import os
import posixpath
import re

import pytest
from accelerate.tracking import GeneralTracker

from fused_rlhf.trainers import trackers
from fused_rlhf.trainers.run import Run
from tests import launch, tiny

NAMES = [
    "grpo/reward",
    "grpo/rewards/length=2",
    "grpo/rewards/length_2",
    "grpo/rewards/length+2",
    "grpo/rewards/regex=1/",
    "grpo/rewards/regex=1//2/../3",
    "grpo/rewards/model=Qwen/Qwen3: 0.6B",
    "grpo/rewards/" + "x" * 300,
    "grpo/rewards/" + "x" * 301,
    "grpo/rewards/" + "x" * 236 + "/.y",
]


def test_names_are_those_that_mlflow_takes_and_stay_distinct():
    names = trackers.Names()
    given = [names.of(name) for name in NAMES]
    assert given[:3] == ["grpo/reward", "grpo/rewards/length_2", "grpo/rewards/length_2_2"]
    assert given[6] == "grpo/rewards/model_Qwen/Qwen3: 0.6B"
    assert len(set(given)) == len(NAMES)
    for name in given:  # mlflow.utils.validation
        assert re.fullmatch(r"[/\w.\- :]*", name)
        assert posixpath.normpath(name) == name
        assert len(name) <= 250
    assert [names.of(name) for name in reversed(NAMES)] == given[::-1]


class Notes(GeneralTracker):
    name = "notes"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.config: dict[str, str] = {}
        self.logged: list[tuple[dict[str, float], int]] = []

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.logged.append((values, step))


def test_a_tracker_has_the_options_and_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "options", lambda folder: {})
    own, _ = tiny.build(tmp_path)
    run, notes = Run(own), Notes()
    run.config = tiny.config(tmp_path, report_to=("tensorboard",), data="d" * 7000)
    own.accelerator.log_with = [notes]
    run.open()
    assert notes.config["learning_rate"] == "1e-06"
    assert notes.config["data"] == "d" * 6000
    run.log("grpo", 1, {"rewards/length=2": 0.5})
    assert notes.logged == [({"grpo/rewards/length_2": 0.5}, 1)]
    assert run.metrics[0]["rewards/length=2"] == 0.5


def test_trackers_write_into_the_runs_folder_unless_the_environment_says_where(tmp_path, monkeypatch):
    variables = ("WANDB_DIR", "SWANLAB_LOG_DIR", "MLFLOW_TRACKING_URI", "COMET_OFFLINE_DIRECTORY")
    for variable in variables:
        monkeypatch.setenv(variable, "")  # to be restored
        monkeypatch.delenv(variable)
    for name in ("one", "two"):  # of one process
        folder = tmp_path / name
        found = trackers.options(folder)
        assert found["wandb"] == {"dir": str(folder)}
        assert found["swanlab"] == {"logdir": str(folder / "swanlog")}
        assert found["mlflow"] == {"logging_dir": f"file://{folder}/mlartifacts"}
        assert found["dvclive"] == {"dir": f"{folder}/dvclive", "dvcyaml": f"{folder}/dvclive/dvc.yaml"}
        assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{folder}/mlflow.db"
        assert os.environ["COMET_OFFLINE_DIRECTORY"] == str(folder)
    for variable in variables:
        monkeypatch.setenv(variable, "http://mine")
    assert set(trackers.options(tmp_path)) == {"dvclive"}
    assert {os.environ[variable] for variable in variables} == {"http://mine"}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["mlflow", "tensorboard", "wandb"])
def test_a_run_with_the_real_tracker_leaves_nothing_where_it_was_started(tmp_path, tracker):
    pytest.importorskip(tracker)
    flags = "grpo --hidden-size 32 --num-layers 1 --steps 1 --prompts-per-step 2 --num-generations 2 --max-new-tokens 2"
    flags += f" --max-operand 20 --eval-samples 2 --rewards length=2 regex=1/ --report-to {tracker}"
    (tmp_path / "cwd").mkdir()
    output = tmp_path / "cwd" / "run"
    launch.run(flags.split(), output, WANDB_MODE="offline")
    assert {path.name for path in output.parent.iterdir()} == {"run", "run.log"}
    left = {"mlflow": "mlflow.db", "tensorboard": "run/events.*", "wandb": "wandb/offline-run-*/run-*.wandb"}
    assert list(output.glob(left[tracker]))
