"""What one run does, as data: which provider on which case, how often, and within what time and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.provider import validate
from fused_rlhf.bench.registry import PROVIDERS
from fused_rlhf.bench.targets import Target
from fused_rlhf.words import nearest


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
    groups: Sequence[Sequence[str]] = ()  # with `together`: cases that share a process, their rows all taking turns
    in_turn: bool = False  # with `together`: all rounds of a row, then the next row's, rather than round by round
    repeats: int = 1  # samples of a row in each of its processes
    warmup: int = 1
    check: bool = True  # errors against fp64
    limit_s: float = math.inf  # for the whole run; a process that would pass it is stopped, its rounds are kept
    count_imports: bool = False  # whether what processes take to start and to import counts there
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
                meant = nearest(row.provider, PROVIDERS)
                raise ValueError(f"provider must be one of {sorted(PROVIDERS)}, got {row.provider!r}{meant}")
            if row.case not in self.cases:
                raise ValueError(f"case must be one of {sorted(self.cases)}, got {row.case!r}")

    @property
    def processes(self) -> list[list[Row]]:
        """With `together`: the rows of each process."""
        of = {case: group for group in self.groups for case in group}
        groups = dict.fromkeys(tuple(of.get(row.case, (row.case,))) for row in self.rows)
        return [[row for row in self.rows if row.case in group] for group in groups]
