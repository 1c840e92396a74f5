import pytest

from fused_rlhf.trainers import engine
from tests import tiny


def test_what_a_run_would_not_do_is_refused(tmp_path, monkeypatch):
    asked = {"ACCELERATE_USE_DEEPSPEED": ("true", "--use_deepspeed: expected no: fsdp shards weights, .*; got 'true'")}
    for variable, (value, message) in asked.items():
        monkeypatch.setenv(variable, value)
        with pytest.raises(ValueError, match=f"accelerate launch, {message}"):
            engine.start(tiny.config(tmp_path))
        monkeypatch.setenv(variable, "False")
        engine.start(tiny.config(tmp_path))
