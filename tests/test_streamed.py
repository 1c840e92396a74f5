"""A streamed head in several processes against a whole one in one; what each rank checks is in streamed_cases.py."""

from __future__ import annotations

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
    pytest.importorskip("triton")
    code = "from tests import streamed_cases as s; s.main('statistics', 'losses', 'adapter')"
    launch.in_the_interpreter(code, tmp_path)
