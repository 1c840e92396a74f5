import os

import pytest
from accelerate import Accelerator, DistributedType

from fused_rlhf.trainers import engine, launcher
from tests import tiny

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": ("true", "--use_deepspeed: expected no: fsdp shards weights, .*; got 'true'"),
    "ACCELERATE_USE_MEGATRON_LM": ("true", "--use_megatron_lm: expected no"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("true", "--use_parallelism_config: expected no"),
    "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "--dynamo_backend: expected no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4", "--gradient_accumulation_steps: expected 1: micro_batch_size"),
    "ACCELERATE_MIXED_PRECISION": ("bf16", "--mixed_precision: expected no, or as the run's mixed_precision, 'no'"),
}
REFUSED_WITH_FSDP = {
    "FSDP_VERSION": ("1", "--fsdp_version: expected 2; got '1'"),
    "FSDP_SHARDING_STRATEGY": ("HYBRID_SHARD", "--fsdp_sharding_strategy: expected FULL_SHARD"),
    "FSDP_RESHARD_AFTER_FORWARD": ("false", "--fsdp_reshard_after_forward: expected true"),
    "FSDP_OFFLOAD_PARAMS": ("true", "--fsdp_offload_params: expected false"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "true",
        "--fsdp_activation_checkpointing: expected false: gradient_checkpointing",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("true", "--fsdp_activation_checkpointing_offload: expected false"),
    "FSDP_IGNORED_MODULES": (".*norm", "--fsdp_ignored_modules: expected none"),
}
# What the launcher of accelerate 1.15 says for --use_fsdp --fsdp_version 2 and nothing else.
DEFAULTS = {
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_MIXED_PRECISION": "no",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}


@pytest.fixture
def defaults(monkeypatch):
    for variable, value in DEFAULTS.items():
        monkeypatch.setenv(variable, value)
    return monkeypatch


@pytest.mark.parametrize("variable", [*REFUSED, *REFUSED_WITH_FSDP])
def test_what_a_run_would_not_do_is_refused(tmp_path, defaults, variable):
    value, message = (REFUSED | REFUSED_WITH_FSDP)[variable]
    defaults.setenv(variable, value)
    if variable in REFUSED_WITH_FSDP:
        launcher.check(tiny.config(tmp_path))  # without FSDP it asks for nothing
        defaults.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=f"accelerate launch, {message}"):
        engine.start(tiny.config(tmp_path))


def test_the_launchers_defaults_are_taken(tmp_path, defaults):
    assert not launcher.shards()
    launcher.check(tiny.config(tmp_path))
    defaults.setenv("ACCELERATE_USE_FSDP", "true")
    defaults.setenv("RANK", "0")
    assert launcher.shards()
    launcher.check(tiny.config(tmp_path))
    defaults.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launcher.check(tiny.config(tmp_path, mixed_precision="bf16"))
    defaults.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ValueError, match="mixed_precision: expected 'no' or 'bf16' with fsdp"):
        launcher.check(tiny.config(tmp_path, mixed_precision="fp16"))


def test_accelerates_own_sharding_is_never_engaged(defaults):
    """It would take an optimiser only together with its model, on an accelerator; on a CPU it would do nothing."""
    defaults.setenv("ACCELERATE_USE_FSDP", "true")
    with launcher.without_plugin():
        made = Accelerator(cpu=True)
    assert made.distributed_type is DistributedType.NO
    assert launcher.shards()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_sharding_needs_several_processes(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"fsdp: expected false in one process \(torchrun and"):
        engine.start(tiny.config(tmp_path, fsdp=True))
    monkeypatch.setenv("RANK", "0")
    launcher.check(tiny.config(tmp_path, fsdp=True))
