import importlib.util
from importlib import metadata

import pytest
import torch

import fused_rlhf
from fused_rlhf import backends
from fused_rlhf.trainers import cli, info


def test_it_says_what_is_here_and_what_is_missing(monkeypatch, capsys):
    real = metadata.version

    def version(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(info.metadata, "version", version)
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"fused-rlhf {fused_rlhf.__version__}, Python 3.")
    assert any(line.split()[:2] == ["torch", torch.__version__] for line in lines)
    assert any(line.split() == f"peft missing LoRA; merge: {info.PACKAGES['peft'][1]}".split() for line in lines)
    assert any(line.startswith("  CPU: ") for line in lines)
    assert cli.main(["info", "more"]) == 2
    assert capsys.readouterr().err == "fused-rlhf: error: unrecognized arguments: more\n"


def test_it_says_which_backend_runs_and_why(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name, why = info.backend()
    assert name == "chunked"
    assert "GPU" in why or "built for the CPU alone" in why
    monkeypatch.setenv(backends.VARIABLE, "reference")
    assert info.backend() == ("reference", "FUSED_RLHF_BACKEND says so")
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    assert "known are ['triton'" in info.backend()[1]


@pytest.mark.parametrize("has_triton", [True, False])
def test_a_gpu_runs_the_kernels_where_there_is_triton(monkeypatch, has_triton):
    real = importlib.util.find_spec
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: (has_triton or None) and real(name))
    monkeypatch.setattr(backends, "_HAS_TRITON", has_triton)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: type("OnGPU", (), {"is_cuda": True})())
    name, why = info.backend()
    assert name == ("triton" if has_triton else "chunked")
    assert ("fused-rlhf[gpu]" in why) is not has_triton
