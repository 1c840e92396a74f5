"""The repository around the suite, where there is one: no wheel has its results, READMEs and tests."""

from __future__ import annotations

from pathlib import Path

import fused_rlhf

HOME = Path(fused_rlhf.__file__).parent.parent  # where child processes start, so that they import this very package


def found() -> Path | None:
    """Its root; None for an installed package, which may itself lie in somebody else's repository."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "bench" / "results").is_dir() else None


def needed(by: str) -> Path:
    """Its root. Raises ValueError where there is none."""
    root = found()
    if root is None:
        raise ValueError(f"{by} needs a checkout of the repository, whose bench/results no package has")
    return root
