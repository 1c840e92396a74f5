"""A vocabulary-parallel head in several processes against one; what each rank checks is in parallel_cases.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fused_rlhf as fr
from tests import launch

RUN = "from tests import parallel_cases; parallel_cases.main()"


@pytest.mark.parametrize(
    "processes", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_ranks_of_a_vocabulary_parallel_head_equal_one_process(processes: int, tmp_path: Path) -> None:
    launch.together(RUN, tmp_path, processes)


def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    code = "from tests import parallel_cases as p; p.without_the_last()"
    last, first = launch.forked(["-c", code], tmp_path / "log", 2)[::-1]
    last.wait()
    assert first.wait() == 0, (tmp_path / "log").read_text()[-5000:]
    assert "ended with" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    names = ("statistics", "ids", "kept", "truncation", "losses", "one_pass", "divergence", "adapter", "filter")
    code = f"from tests import parallel_cases as p; p.main(*{names})"
    launch.in_the_interpreter(code, tmp_path)


def test_a_group_of_one(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        g = torch.Generator().manual_seed(0)
        hidden, weight = torch.randn(5, 4, generator=g), torch.randn(9, 4, generator=g)
        targets = torch.arange(5)
        found = fr.linear_logprobs(hidden, fr.Head(weight, vocab_size=7), targets, process_group=dist.group.WORLD)
        assert torch.equal(found.logprobs, fr.linear_logprobs(hidden, weight[:7], targets).logprobs)
        with pytest.raises(ValueError, match="hidden_grad must be one of"):
            fr.linear_logprobs(hidden, weight, targets, process_group=dist.group.WORLD, hidden_grad="mean")
    finally:
        dist.destroy_process_group()


def test_without_a_group() -> None:
    hidden, weight, targets = torch.randn(5, 4), torch.randn(9, 4), torch.arange(5)
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup, got str"):
        fr.linear_logprobs(hidden, weight, targets, process_group="tp")
    with pytest.raises(ValueError, match="vocab_size must be None without a process_group, got 9"):
        fr.linear_logprobs(hidden, fr.Head(weight, vocab_size=9), targets)
    with pytest.raises(ValueError, match="weight must be"):
        fr.linear_logprobs(hidden, weight[:0], targets)
