"""Runs of the command line in processes of their own, for tests of resuming and of several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODULE = ["-m", "fused_rlhf.trainers.cli"]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def command(arguments: Sequence[str], processes: int = 1, launcher: str = "torchrun") -> list[str]:
    """`fused-rlhf` with these arguments, by itself or by a launcher ("torchrun" or "accelerate")."""
    if processes == 1:
        return [sys.executable, *MODULE, *arguments]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
    else:
        start = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        start += ["--main_process_port", port]
    return [sys.executable, *start, *MODULE, *arguments]


def run(
    arguments: Sequence[str], output: Path, processes: int = 1, launcher: str = "torchrun", **env: str
) -> list[dict[str, Any]]:
    """Run to the end; -> the rows of metrics.jsonl."""
    full = command([*arguments, "--output", str(output)], processes, launcher)
    found = subprocess.run(full, cwd=output.parent, env=environment(**env), capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    return rows(output)


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def without_seconds(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def worst(some: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest difference of each metric between two runs with the same rows, relative where it is above 1."""
    assert [row["step"] for row in some] == [row["step"] for row in others]
    result: dict[str, float] = {}
    for row, other in zip(without_seconds(some), without_seconds(others), strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if isinstance(value, float):
                result[name] = max(result.get(name, 0.0), abs(value - other[name]) / max(abs(value), 1.0))
            else:
                assert value == other[name], name
    return result
