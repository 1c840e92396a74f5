"""The JSON document of a run: conditions, then one flat record per row."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fused_rlhf.bench import checkout
from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.ops import OPS
from fused_rlhf.bench.plan import Plan, Row
from fused_rlhf.bench.registry import PROVIDERS

TIMES = ("forward_s", "backward_s", "both_s")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20 % and 80 %."""
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [*values] * 2
    return {"median": statistics.median(values), "p20": low, "p80": high}


def summarise(plan: Plan, found: dict[Row, dict[str, Any]]) -> dict[str, Any]:
    """The JSON document: conditions, then one flat record per row."""
    records = [_record(plan, row, found[row]) for row in plan.rows]
    for record in records:
        if record["error"] is None:
            _relate(record, records)
    packages = {p for row in plan.rows for p in PROVIDERS[row.provider].packages}
    bf16 = any(plan.cases[row.case].dtype == "bf16" for row in plan.rows)
    result: dict[str, Any] = {
        "suite": plan.name,
        "command": plan.command,
        "commit": plan.commit or commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_info(plan.device, plan.threads),
        "versions": versions(packages | {"triton", "transformers"}),
        "notes": [NO_BF16] if plan.device == "cpu" and bf16 and not bf16_products() else [],
        "rows": records,
    }
    result["targets"] = [target.judge(result) for target in plan.targets]
    return result


NO_BF16 = (
    "This CPU has no bf16 instructions (capability below AVX512), and torch's bf16 matrix products are far slower on "
    "it than fp32 ones. Ratios to dense bf16 or to TRL in bf16 say what the machine lacks, not how the algorithms "
    "compare; dense-fp32, which converts the operands first, is the useful yardstick for bf16 operands here."
)


def bf16_products() -> bool:
    """Whether torch has fast bf16 matrix products on this CPU; without, dense bf16 takes minutes at any real size."""
    import torch

    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


def _record(plan: Plan, row: Row, found: dict[str, Any]) -> dict[str, Any]:
    case, provider, samples = plan.cases[row.case], PROVIDERS[row.provider], found["samples"]
    tolerance = provider.tolerance[case.dtype]
    record: dict[str, Any] = {
        "case": row.case,
        "provider": row.provider,
        "label": case.label,
        "op": case.op,
        "shape": asdict(case),
        "run": found.get("run"),
        "rounds": len(samples),
        "error": found.get("error") or (None if samples else "not run"),
        "entropy_nats": found.get("entropy_nats"),
        "errors": found.get("errors", {}),
        "tolerance": tolerance._asdict(),
        "flops": case.flops,
        "least_bytes": case.least_bytes,
        "predicted_bytes": predicted_bytes(row.provider, case, plan.device),
        "lengths": found.get("lengths"),
        "waits": found.get("waits"),
    }
    record["wrong"] = not tolerance.allows(record["errors"])
    if record["error"] is None:
        record |= {key: spread([s[key] for s in samples]) for key in TIMES}
        seconds = record["both_s"]["median"]
        record["us_per_token"] = seconds / case.N * 1e6
        record["gflops"] = case.flops / seconds / 1e9
        for key, of in (("peak_extra_bytes", max), ("scratch_bytes", max), ("cpu_share", statistics.median)):
            values = [s[key] for s in samples if s.get(key) is not None]
            record[key] = of(values) if values else None  # type: ignore[operator]
        if provider.roof:  # the products of a backward that recomputes the logits
            record["recompute_s"] = spread([s["both_s"] + s["forward_s"] for s in samples])
        record["samples"] = samples
    return record


def predicted_bytes(provider: str, case: Case, device: str) -> float | None:
    formula = PROVIDERS[provider].memory
    return None if formula is None else formula(case, device)


def _relate(record: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Ratios to rows that it took turns with: dense torch on the same case, bare products of the same operands."""
    good = [r for r in records if r["error"] is None and r["run"] == record["run"]]
    seconds = record["both_s"]["median"]
    dense = next((r for r in good if r["case"] == record["case"] and r["provider"] == "dense"), None)
    record["time_to_dense"] = seconds / dense["both_s"]["median"] if dense else None
    record["memory_to_dense"] = None
    if dense and dense["peak_extra_bytes"] and record["peak_extra_bytes"] is not None:
        record["memory_to_dense"] = record["peak_extra_bytes"] / dense["peak_extra_bytes"]
    case, bare = Case(**record["shape"]), []
    for r in good:
        same = all(r["shape"][k] == record["shape"][k] for k in ("H", "V", "dtype"))
        roof = Case(**r["shape"])
        if PROVIDERS[r["provider"]].roof and same and roof.products[1]:
            # Seconds of one product and row; bare products leave out no row.
            each = [
                r[key]["median"] / (roof.N * count) for key, count in zip(("forward_s", "backward_s"), roof.products)
            ]
            bare.append(sum(s * p * n for s, p, n in zip(each, case.products, case.rows)))
    # The least products that the op needs, bare and in the faster of the ways tried, over the time taken.
    record["gemm_share"] = min(bare) / seconds if bare and OPS[case.op].whole else None


def versions(packages: set[str]) -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{name: version(name) for name in sorted(packages)}}


def device_info(device: str, threads: int) -> dict[str, Any]:
    import torch

    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    info: dict[str, Any] = {
        "kind": device,
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return info


def commit() -> str | None:
    """The commit of this checkout, "-dirty" after it when files differ; None outside a repository."""
    root = checkout.found()
    if root is None:
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
