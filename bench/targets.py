"""What a run must reach: figures of its rows, and limits on them. Times are compared where their rows took turns, not else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One number of a result: a field of a row, spreads by their median."""

    case: str
    provider: str
    field: str = "both_s"

    def of(self, result: dict[str, Any]) -> tuple[float | None, str]:
        """-> (value, "") or (None, why there is none)."""
        for row in result["rows"]:
            if (row["case"], row["provider"]) == (self.case, self.provider):
                break
        else:
            return None, f"{self.provider} on {self.case} is not in the run"
        if row["error"]:
            return None, f"{self.provider} on {self.case}: {row['error']}"
        value = row.get(self.field, row["errors"].get(self.field))
        if isinstance(value, dict):
            value = value["median"]
        return (value, "") if value is not None else (None, f"{self.field} of {self.provider} was not measured")

    @property
    def timed(self) -> bool:
        return self.field.endswith("_s") or self.field == "us_per_token"

    def run(self, result: dict[str, Any]) -> str | None:
        """Which rows it took turns with; None in results of earlier versions, whose rows all did."""
        return next(r.get("run") for r in result["rows"] if (r["case"], r["provider"]) == (self.case, self.provider))

    def wrong(self, result: dict[str, Any]) -> bool:
        return any(r["wrong"] for r in result["rows"] if (r["case"], r["provider"]) == (self.case, self.provider))


@dataclass(frozen=True)
class Target:
    """`figure`, or `figure` / `base`, or (`figure` - `base`) / `unit`, must be at most `limit`."""

    what: str
    limit: float
    figure: Figure
    base: Figure | None = None
    unit: float | None = None

    @property
    def reads(self) -> set[tuple[str, str]]:
        """(case, provider) of the rows it needs."""
        return {(f.case, f.provider) for f in (self.figure, self.base) if f is not None}

    def judge(self, result: dict[str, Any]) -> dict[str, Any]:
        """-> value and holds; holds is None when not measured. A wrong result cannot hold, however fast."""
        value, why = self.figure.of(result)
        if self.base is not None and value is not None:
            below, why = self.base.of(result)
            if below is None:
                value = None
            elif self.figure.timed and self.figure.run(result) != self.base.run(result):
                value, why = (
                    None,
                    f"{self.figure.case} and {self.base.case} are of two runs, whose times do not compare",
                )
            elif self.unit is not None:
                value = (value - below) / self.unit
            else:
                value = value / below if below > 0 else float("inf")
        holds = None if value is None else bool(value <= self.limit)
        if holds and self.figure.wrong(result):
            holds, why = False, f"{self.figure.provider} on {self.figure.case} disagrees with fp64"
        return {"what": self.what, "limit": self.limit, "value": value, "holds": holds, "why": why}
