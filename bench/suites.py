"""Named runs and the figures they must reach: which rows are measured, and what is claimed of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from bench.registry import Case
from bench.run import Row, bf16_products


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
            elif self.unit is not None:
                value = (value - below) / self.unit
            else:
                value = value / below if below > 0 else float("inf")
        holds = None if value is None else bool(value <= self.limit)
        if holds and self.figure.wrong(result):
            holds, why = False, f"{self.figure.provider} on {self.figure.case} disagrees with fp64"
        return {"what": self.what, "limit": self.limit, "value": value, "holds": holds, "why": why}


@dataclass(frozen=True)
class Suite:
    about: str
    cases: dict[str, Case]
    rows: list[Row]
    targets: list[Target] = field(default_factory=list)


def rows(case: str, providers: str, rounds: int) -> list[Row]:
    return [Row(case, provider, rounds) for provider in providers.split()]


# -------------------------------------------------------------------------------------------------------------- quick


def quick() -> Suite:
    small = Case(N=512, H=128, V=8000, T=128)
    cases = {
        "fwd": replace(small, op="logprobs_fwd"),
        "fwd_bwd": replace(small, op="logprobs_fwd_bwd"),
        "grpo": small,
        "grpo bf16": replace(small, N=128, dtype="bf16"),
    }
    return Suite(
        "every op and provider at a small shape, to see that all is well: the times say little",
        cases,
        rows("fwd", "dense ours trl", 1)
        + rows("fwd_bwd", "dense ours", 1)
        + rows("grpo", "gemm-blocked dense ours-one_pass ours-two_phase trl liger", 1)
        + rows("grpo bf16", "dense ours-one_pass", 1),
    )


# --------------------------------------------------------------------------------------------------------- foundation


def foundation() -> Suite:
    """One update of a 0.5B model's head (Qwen2.5-0.5B: H=896, V=151936) on 2 cores. Dense bf16 is left out where it
    would take minutes; its target is "not measured" there."""
    main = Case(N=2048, H=896, V=151936, T=256)
    cases = {
        "main": main,
        "forward": replace(main, op="logprobs_fwd"),
        "zero rows": replace(main, beta=0.0, zero_rows=0.8),
        "frozen": replace(main, frozen_head=True),
        "bf16": replace(main, dtype="bf16"),
        "long": replace(main, N=16384),
    }
    one, two = "ours-one_pass", "ours-two_phase"
    targets = [
        Target("fp32 one-pass time / dense", 0.68, Figure("main", one), Figure("main", "dense")),
        Target("fp32 one-pass time / TRL", 0.50, Figure("main", one), Figure("main", "trl")),
        Target("fp32 one-pass time / Liger", 0.75, Figure("main", one), Figure("main", "liger")),
        Target(
            "fp32 one-pass extra memory / dense",
            0.30,
            Figure("main", one, "peak_extra_bytes"),
            Figure("main", "dense", "peak_extra_bytes"),
        ),
        Target(
            "bf16, rounded logits allowed: one-pass time / dense",
            0.62,
            Figure("bf16", f"{one}-rounded"),
            Figure("bf16", "dense"),
        ),
        Target("N=16384 one-pass extra memory, bytes", 1.3e9, Figure("long", one, "peak_extra_bytes")),
        Target(
            "N=16384 one-pass time per token / N=2048",
            1.1,
            Figure("long", one, "us_per_token"),
            Figure("main", one, "us_per_token"),
        ),
        Target(
            "80 % zero-advantage rows: two-phase backward / none",
            1 / 3,
            Figure("zero rows", two, "backward_s"),
            Figure("main", two, "backward_s"),
        ),
        Target("frozen head: one-pass time / trainable", 0.75, Figure("frozen", one), Figure("main", one)),
    ]
    return Suite(
        "the CPU figures of the foundation",
        cases,
        rows("main", f"gemm-blocked dense {one} {two} trl liger", 3)
        + rows("main", "gemm", 1)
        + rows("zero rows", f"{one} {two}", 2)
        + rows("frozen", f"{one} {two}", 2)
        + rows("forward", "dense ours trl", 2)
        + rows("bf16", f"{'dense ' if bf16_products() else ''}dense-fp32 {one} {one}-rounded", 1)
        + rows("long", one, 1),
        targets,
    )


# ---------------------------------------------------------------------------------------------------------------- GPU


def gpu(scale: int = 1) -> Suite:
    """One update of an 8B model's head (Qwen3-8B: H=4096, V=151936). `scale` divides every size, for a trial run."""
    main = Case(
        N=8192 // scale, H=max(4096 // scale, 32), V=max(151936 // scale, 1000), T=max(1024 // scale, 8), dtype="bf16"
    )
    sweep = {f"n{k}k": replace(main, N=main.N * k // 8, T=main.N * k // 8) for k in (16, 32, 64, 128)}
    cases = {
        "main": main,
        "forward": replace(main, op="logprobs_fwd"),
        "zero": replace(main, beta=0.0, zero_rows=0.8),
        "frozen": replace(main, frozen_head=True),
        "accuracy": replace(main, op="logprobs_fwd_bwd", N=main.N // 4),
        **sweep,
    }
    one, two = "ours-one_pass", "ours-two_phase"
    scratch = "scratch_bytes"
    # What may grow with N: dX in fp32 and 64 bytes per row of vectors.
    growth = (cases["n128k"].N - main.N) * (4 * main.H + 64)
    targets = [
        Target("one-pass / three bare GEMMs", 1.15, Figure("main", one), Figure("main", "gemm")),
        Target("one-pass / TRL", 0.70, Figure("main", one), Figure("main", "trl")),
        Target("two-phase / four bare GEMMs", 1.20, Figure("main", two), Figure("main", "gemm", "recompute_s")),
        Target("two-phase / TRL", 0.90, Figure("main", two), Figure("main", "trl")),
        Target("forward only / one bare GEMM", 1.15, Figure("forward", "ours"), Figure("forward", "gemm")),
        Target("80 % zero-gradient rows: two-phase / TRL", 0.45, Figure("zero", two), Figure("zero", "trl")),
        Target("scratch memory: two-phase / TRL", 0.20, Figure("main", two, scratch), Figure("main", "trl", scratch)),
        Target("scratch memory: one-pass / TRL", 1.0, Figure("main", one, scratch), Figure("main", "trl", scratch)),
        *(
            Target(
                f"scratch growth to N=128k over fp32 dX and 64 B a row: {name}",
                1.0,
                Figure("n128k", provider, scratch),
                Figure("main", provider, scratch),
                unit=growth,
            )
            for name, provider in (("one-pass", one), ("two-phase", two))
        ),
        Target("max log-prob error at logits of +-25, nats", 5e-5, Figure("accuracy", "ours", "logprob_max_abs")),
        *(
            Target(
                f"{grad} error / dense torch with fp32 logits",
                2.0,
                Figure("accuracy", "ours", f"{grad}_rel"),
                Figure("accuracy", "dense-fp32", f"{grad}_rel"),
            )
            for grad in ("dhidden", "dweight")
        ),
        *(
            Target(
                f"time per token, N=T=128k / N=8k: {name}",
                1.1,
                Figure("n128k", provider, "us_per_token"),
                Figure("main", provider, "us_per_token"),
            )
            for name, provider in (("one-pass", one), ("two-phase", two))
        ),
    ]
    return Suite(
        "the GPU figures: time against bare products and peers, memory and time up to 128k tokens, accuracy",
        cases,
        rows("main", f"gemm dense trl liger {one} {two}", 10)
        + rows("forward", "gemm dense trl ours", 10)
        + rows("zero", f"trl {one} {two}", 10)
        + rows("accuracy", "dense dense-fp32 trl ours", 2)
        + [row for name in sweep for row in rows(name, f"trl {one} {two}", 2)]
        + rows("frozen", f"gemm trl {one} {two}", 10),
        targets,
    )


SUITES: dict[str, Callable[[], Suite]] = {
    "quick": quick,
    "foundation": foundation,
    "gpu": gpu,
    "gpu-tiny": partial(gpu, 128),
}
