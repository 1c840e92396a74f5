"""A streamed head in several processes against a whole one in one; what each rank checks is in streamed_cases.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import launch

RUN = "from tests import streamed_cases; streamed_cases.main()"


@pytest.mark.parametrize(
    "processes", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_ranks_of_a_streamed_head_equal_one_process(processes: int, tmp_path: Path) -> None:
    launch.together(RUN, tmp_path, processes)


@pytest.mark.slow
def test_in_the_interpreter(tmp_path: Path) -> None:
    """Of Triton, which must be chosen before triton is imported: not in a fork."""
    pytest.importorskip("triton")
    code = "from tests import streamed_cases as s; s.main('statistics', 'losses', 'adapter')"
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": launch.free_port(), "WORLD_SIZE": "2", "TRITON_INTERPRET": "1"}
    ranks = [launch.environment(**shared, RANK=str(rank)) for rank in range(2)]
    with (tmp_path / "log").open("w") as log:
        started = [
            subprocess.Popen([sys.executable, "-c", code], cwd=launch.ROOT, env=env, stdout=log, stderr=log)
            for env in ranks
        ]
        codes = [process.wait() for process in started]
    assert codes == [0, 0], (tmp_path / "log").read_text()[-5000:]
