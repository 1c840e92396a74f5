"""Runs of the command line in processes of their own, for tests of resuming and of several processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import forks

ROOT = Path(__file__).resolve().parent.parent
MODULE = ["-m", "fused_rlhf.trainers.cli"]
# The same without curves, which take longer to draw than a small run takes to train.
WITHOUT_CURVES = """
import sys
from fused_rlhf.trainers import cli, run
run.curves.figure = lambda rows, names: None
sys.exit(cli.main())
"""


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def command(arguments: Sequence[str], processes: int, launcher: str, program: Sequence[str]) -> list[str]:
    """`program` with these arguments, by a launcher ("torchrun", "accelerate", or "fsdp": the latter's FSDP2)."""
    port = free_port()
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
    else:
        kind = ["--multi_gpu"] if launcher == "accelerate" else ["--use_fsdp", "--fsdp_version", "2"]
        start = ["-m", "accelerate.commands.launch", *kind, "--num_processes", str(processes)]
        start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        start += ["--main_process_port", port]
    return [sys.executable, *start, *program, *arguments]


def started(arguments: Sequence[str], output: Path, processes: int = 1, **env: str) -> list[forks.Fork]:
    """`fused-rlhf` in so many forks, with what torchrun would tell each; their output goes beside `output`."""
    return forked(["-c", WITHOUT_CURVES, *arguments, "--output", str(output)], log_of(output), processes, **env)


def forked(arguments: Sequence[str], log: Path, processes: int = 1, **env: str) -> list[forks.Fork]:
    """`python` in so many forks, with what torchrun would tell each."""
    if processes > 1:
        env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
        env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} if processes > 1 else {} for i in range(processes)]
    return [forks.start(arguments, log.parent, environment(**env, **rank), log) for rank in ranks]


def together(code: str, folder: Path, processes: int = 2) -> None:
    """Python code in so many processes, which must all end well."""
    log = folder / "together.log"
    codes = [process.wait() for process in forked(["-c", code], log, processes)]
    assert not any(codes), log.read_text()[-6000:]


def in_the_interpreter(code: str, folder: Path, processes: int = 2) -> None:
    """As `together`, in Triton's interpreter, which must be chosen before triton is imported: not in a fork."""
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes)}
    log = folder / "log"
    with log.open("w") as said:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT, env=environment(**shared, RANK=str(rank), TRITON_INTERPRET="1"), stdout=said, stderr=said,
            )
            for rank in range(processes)
        ]  # fmt: skip
        codes = [rank.wait() for rank in ranks]
    assert codes == [0] * processes, log.read_text()[-5000:]


def log_of(output: Path) -> Path:
    return output.parent / f"{output.name}.log"


def run(
    arguments: Sequence[str],
    output: Path,
    processes: int = 1,
    launcher: str = "",
    program: Sequence[str] = MODULE,
    **env: str,
) -> list[dict[str, Any]]:
    """Run to the end; -> the rows of metrics.jsonl. Without a launcher the processes are forks, which start at once."""
    if launcher:
        full = command([*arguments, "--output", str(output)], processes, launcher, program)
        with log_of(output).open("a") as log:
            codes = [subprocess.run(full, cwd=output.parent, env=environment(**env), stdout=log, stderr=log).returncode]
    else:
        codes = [process.wait() for process in started(arguments, output, processes, **env)]
    assert not any(codes), log_of(output).read_text()[-6000:]
    return rows(output)


def killed(arguments: Sequence[str], output: Path, when: Callable[[Path], bool]) -> bool:
    """Start a run and send SIGKILL as soon as `when(output)` holds; True where it was still running."""
    (process,) = started(arguments, output)
    while process.poll() is None and not when(output):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def logged(count: int) -> Callable[[Path], bool]:
    """The run has logged this many rows."""
    return lambda output: (output / "metrics.jsonl").exists() and len(rows_so_far(output)) >= count


def rows_so_far(output: Path) -> list[str]:
    return (output / "metrics.jsonl").read_text().splitlines()


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
