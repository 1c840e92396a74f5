from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from fused_rlhf.trainers import config as configs
from fused_rlhf.trainers.config import TrainConfig


@dataclass(frozen=True)
class Own(TrainConfig):
    names: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)


def test_a_configuration_is_yaml_and_comes_back():
    own = Own(names=("a", "b"), numbers={"tau": 1.5}, learning_rate=3e-5)
    values = yaml.safe_load(configs.to_yaml(own))
    assert values["names"] == ["a", "b"]
    assert values["numbers"] == {"tau": 1.5}
    back: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    assert Own(**back) == own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size: expected at least 1; got 0"),
        ({"save_steps": -1}, "save_steps: expected at least 0; got -1"),
        ({"learning_rate": float("nan")}, "learning_rate: expected more than 0; got nan"),
        ({"mixed_precision": "fp8"}, "mixed_precision: expected one of"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"model": "x/y", "lora_r": 4, "lora_dropout": 1.0}, "lora_dropout: expected at least 0 and below 1"),
        ({"overwrite": True, "resume": True}, "overwrite, resume: expected at most one"),
        ({"fsdp": True, "mixed_precision": "fp16"}, "mixed_precision: expected 'no' or 'bf16' with fsdp"),
        ({"model": "x/y", "hidden_size": 64}, "hidden_size, num_layers: expected left alone with model='x/y'"),
    ],
)
def test_contradictory_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_read_yaml_refuses_what_is_not_a_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    with pytest.raises(FileNotFoundError, match=r"no file .*run\.yaml"):
        configs.read_yaml(path, Own)
    path.write_text("learning_rte: 1\nsteps: 3\n")
    with pytest.raises(ValueError, match=r"unknown keys \['learning_rte'\] \(did you mean 'learning_rate'\?\)$"):
        configs.read_yaml(path, Own)
    path.write_text("xyzzy: 1\nlearning_rte: 1\nsteps: 3\n")
    with pytest.raises(ValueError, match=r"unknown keys \['xyzzy', .*; allowed are \['model', .*'learning_rate'"):
        configs.read_yaml(path, Own)
    path.write_text("- steps\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        configs.read_yaml(path, Own)
    path.write_text("steps: [1\n")
    with pytest.raises(ValueError, match="is not YAML"):
        configs.read_yaml(path, Own)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"run\.yaml is not YAML"):
        configs.read_yaml(path, Own)
    path.write_text("")
    assert configs.read_yaml(path, Own) == {}
