"""python -m bench.gpu OUT_DIR: tests and benches on a bare GPU machine, in under nine minutes.

The machine needs torch, triton, transformers and pytest, and this checkout; nothing is fetched. Peers come as wheels in
a folder (`--wheels`), installed into a temporary place. Every stage is a process with a time limit of its own, to which
it may add what earlier ones left over; one that fails, hangs or breaks the device leaves the others as they are.
OUT_DIR gets summary.json (rows, targets, stages), summary.txt, tests.log and bench.log, the summary after every stage.

    python -m bench.gpu out                     the real thing
    python -m bench.gpu out --dry-run           what would run, and for how long at most
    python -m bench.gpu out --device cpu --tiny the same stages at toy sizes, without a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_rlhf.bench import checkout, report
from fused_rlhf.bench.suites import SUITES
from fused_rlhf.bench.targets import Target
from fused_rlhf.bench.text import table

LIMIT_S = 540
SECONDS = "SECONDS"  # in a command, stands for what the stage may take less the time to write its result


@dataclass(frozen=True)
class Stage:
    """A command and the seconds it may take. `result`: the JSON it leaves behind, if it measures something."""

    name: str
    command: list[str]
    limit_s: float
    log: str = "bench.log"
    result: Path | None = None


def stages(scratch: Path, device: str, suite: str, wheels: Path | None, commit: str | None) -> list[Stage]:
    python = [sys.executable, "-m"]

    def bench(name: str, cases: Sequence[str], limit_s: float) -> Stage:
        out = scratch / f"{name}.json"
        command = [
            *python,
            "fused_rlhf.bench",
            "--suite",
            suite,
            "--only",
            *cases,
            "--out",
            str(out),
            "--device",
            device,
        ]
        command += ["--together", "--limit", SECONDS, "--count_imports"]
        command += ["--commit", commit] if commit else []
        return Stage(name, command, limit_s, result=out)

    found: list[Stage] = []
    if wheels is not None:
        pip = [
            *python,
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--target",
            str(site(scratch)),
        ]
        found.append(Stage("install", [*pip, *map(str, sorted(wheels.glob("*.whl")))], 25))
    tests = [*python, "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--durations=10"]
    tests += ["--continue-on-collection-errors"]  # tests of what is not installed there must not stop the others
    tests += ["--collect-only"] if device == "cpu" else []
    found += [
        Stage("tests", tests, 130, log="tests.log"),
        bench("main", ["main"], 95),
        bench("forward", ["forward"], 45),
        bench("zero", ["zero"], 45),
        bench("accuracy", ["accuracy"], 45),
        bench("sweep", ["n128k", "n16k", "n32k", "n64k"], 100),
        bench("frozen", ["frozen"], 40),
    ]
    return found


def site(scratch: Path) -> Path:
    """Where the wheels go; the stages find it by their PYTHONPATH, and the machine's own packages stay as they are."""
    return scratch / "site"


def run_stage(stage: Stage, out: Path, scratch: Path, timeout_s: float) -> dict[str, Any]:
    """Runs it with its whole process group ended at the limit; -> how it ended."""
    command = [f"{max(timeout_s - 8, 1):.0f}" if word == SECONDS else word for word in stage.command]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site(scratch)), os.environ.get("PYTHONPATH", "")])}
    started = time.time()
    with (out / stage.log).open("a") as log:
        log.write(f"\n--- {stage.name}: {' '.join(command)}\n")
        log.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=checkout.needed("a stage"),
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as e:
            return {"stage": stage.name, "seconds": 0.0, "ended": f"did not start: {e}"}
        try:
            code = process.wait(timeout_s)
            ended = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {timeout_s:.0f} s"
        # A child of the stage may outlive it; the next stage must have the machine to itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {"stage": stage.name, "seconds": round(time.time() - started, 1), "ended": ended}


def carry_out(planned: Sequence[Stage], out: Path, scratch: Path, targets: Sequence[Target] = ()) -> dict[str, Any]:
    """All stages in order, each within its limit plus what the earlier ones left; -> the merged result."""
    out.mkdir(parents=True, exist_ok=True)
    started, allowed = time.time(), 0.0
    result: dict[str, Any] = {"rows": [], "stages": []}
    for stage in planned:
        allowed += stage.limit_s
        ended = run_stage(stage, out, scratch, max(allowed - (time.time() - started), 1.0))
        result["stages"].append(ended)
        if stage.result is not None and stage.result.exists():
            part = json.loads(stage.result.read_text())
            rows, versions = result["rows"] + part["rows"], {**result.get("versions", {}), **part["versions"]}
            merged = {"rows": rows, "versions": versions, "stages": result["stages"], "command": "python -m bench.gpu"}
            result = {**part, **merged}
        result["targets"] = [target.judge(result) for target in targets]
        result["seconds"] = round(time.time() - started, 1)
        (out / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "summary.txt").write_text(render(result) + "\n")
        print(f"[{result['seconds']:5.0f} s] {stage.name}: {ended['ended']} ({ended['seconds']:.0f} s)", flush=True)
    return result


def render(result: dict[str, Any]) -> str:
    lines = [[s["stage"], s["ended"], f"{s['seconds']:.0f} s"] for s in result["stages"]]
    parts = [report.render(result)] if result["rows"] else []
    return "\n\n".join([*parts, table(["stage", "ended", "time"], lines)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for the run (peers)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--commit", help="commit to record where the checkout is no repository")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these stages")
    parser.add_argument("--dry-run", action="store_true", help="show the stages and stop")
    args = parser.parse_args(arguments)
    if args.wheels is not None and not list(args.wheels.glob("*.whl")):
        parser.error(f"--wheels {args.wheels}: no wheels there")
    if checkout.found() is None:
        parser.error("the tests and benches of a GPU machine need a checkout of the repository")
    suite = "gpu-tiny" if args.tiny else "gpu"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        planned = stages(scratch, args.device, suite, args.wheels and args.wheels.resolve(), args.commit)
        unknown = set(args.only or ()) - {stage.name for stage in planned}
        if unknown:
            parser.error(
                f"--only: no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in planned)}"
            )
        planned = [stage for stage in planned if not args.only or stage.name in args.only]
        assert sum(stage.limit_s for stage in planned) < LIMIT_S
        if args.dry_run:
            for stage in planned:
                print(f"{stage.name} (at most {stage.limit_s:g} s): {' '.join(stage.command)}")
            return 0
        result = carry_out(planned, args.out.resolve(), scratch, SUITES[suite]().targets)
    print("\n" + render(result))
    return 0 if all(stage["ended"] == "ok" for stage in result["stages"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
