"""What one run does, as data: which provider on which case, how often, and within what time and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cases import Case
from bench.provider import validate
from bench.registry import PROVIDERS
from bench.targets import Target


@dataclass(frozen=True)
class Row:
    """One line of a result: a provider on a case, sampled `rounds` times."""

    case: str  # the name of a case
    provider: str
    rounds: int = 1


@dataclass
class Plan:
    """One run. Raises ValueError for rows of unknown cases or providers, and for cases that no provider can have."""

    name: str
    cases: dict[str, Case]
    rows: list[Row]
    device: str = "cpu"
    threads: int = 2
    together: bool = False  # one process per case rather than per row and round
    repeats: int = 1  # samples of a row in each of its processes
    warmup: int = 1
    check: bool = True  # errors against fp64
    limit_s: float = math.inf  # for the whole run; a process that would pass it is stopped, its rounds are kept
    memory: float | None = None  # bytes a process on a CPU may take; None: what the machine has left
    predict: bool = True  # leave out what would not fit by its formula, rather than let it try
    out: Path | None = None
    command: str = ""
    commit: str | None = None
    targets: Sequence[Target] = ()

    def __post_init__(self) -> None:
        for case in self.cases.values():
            validate(case)
        for row in self.rows:
            if row.provider not in PROVIDERS:
                raise ValueError(f"provider must be one of {sorted(PROVIDERS)}, got {row.provider!r}")
            if row.case not in self.cases:
                raise ValueError(f"case must be one of {sorted(self.cases)}, got {row.case!r}")
