"""What accelerate's trackers are given: names and values that each of them takes, and the run's folder.

TensorBoard and Aim have the folder from accelerate, Trackio and ClearML keep what is theirs in the user's home. The others
would write where the run was started. A place that the environment names is left as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

# MLflow's, the narrowest.
LONGEST_NAME, LONGEST_VALUE = 250, 6000
OTHER = re.compile(r"[^\w .:/-]")

_told: dict[str, str] = {}  # variables that an earlier run of this process has set


def start(accelerator: Accelerator, folder: Path, values: Mapping[str, Any]) -> None:
    """Start the accelerator's trackers for a run in `folder` with these options."""
    short = {name: str(value)[:LONGEST_VALUE] for name, value in values.items()}
    accelerator.init_trackers(folder.name, config=short, init_kwargs=options(folder.absolute()))


def options(folder: Path) -> dict[str, dict[str, Any]]:
    """By tracker, what it is to be made with; MLflow and Comet are told by the environment alone."""
    live = folder / "dvclive"
    made: dict[str, dict[str, Any]] = {"dvclive": {"dir": str(live), "dvcyaml": str(live / "dvc.yaml")}}
    if "WANDB_DIR" not in os.environ:
        made["wandb"] = {"dir": str(folder)}
    if "SWANLAB_LOG_DIR" not in os.environ:
        made["swanlab"] = {"logdir": str(folder / "swanlog")}
    if _tell("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}"):
        made["mlflow"] = {"logging_dir": (folder / "mlartifacts").as_uri()}
    _tell("COMET_OFFLINE_DIRECTORY", str(folder))
    return made


def _tell(variable: str, value: str) -> bool:
    """Set a variable of the environment that is not the user's; -> whether it was."""
    ours = os.environ.get(variable) in (None, _told.get(variable))
    if ours:
        os.environ[variable] = _told[variable] = value
    return ours


class Names:
    """Metrics' names as all trackers take them: other signs become "_", and distinct names stay distinct."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def of(self, name: str) -> str:
        if name not in self._names:
            # A path with one way to write it: no part of it is empty, or a step up.
            parts = [re.sub(r"^(\.{0,2})$", "_", part) for part in OTHER.sub("_", name).split("/")]
            stem, taken = "/".join(parts)[:LONGEST_NAME], set(self._names.values())
            ends = ("", *(f"_{i}" for i in range(2, len(taken) + 3)))
            found = (stem[: LONGEST_NAME - len(end)].rstrip("/.") + end for end in ends)
            self._names[name] = next(it for it in found if it not in taken)
        return self._names[name]
