"""python -m bench.gpu OUT_DIR, or `make gpu`: tests and benches on a bare GPU machine, in stages, in nine minutes.

The machine needs torch, triton, transformers and pytest, and this checkout; nothing is fetched. Peers come as wheels in
a folder (`--wheels`), installed into a temporary place. Every stage is a process with a share of the time, to which it
may add what earlier ones left over; where there is too little the last ones are left out. One that fails, hangs or
breaks the device leaves the others as they are. What lacks a package is `missing: NAME`, and no failure unless `--strict`
says so. OUT_DIR gets summary.json (rows, targets, stages), summary.txt, tests.log and bench.log, the summaries after every
stage.

    python -m bench.gpu out                          the real thing
    python -m bench.gpu out --only tests forward     these stages, or cases of stages, with all the time
    python -m bench.gpu out --dry-run                what would run, and for how long at least
    python -m bench.gpu out --device cpu --tiny      the same stages at toy sizes, without a GPU
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fused_rlhf.bench import checkout, report
from fused_rlhf.bench.command import number
from fused_rlhf.bench.suites import SUITES
from fused_rlhf.bench.targets import Target
from fused_rlhf.bench.text import table

LIMIT_S = 540.0
SECONDS = "SECONDS"  # in a command, stands for what the stage may take less the time to write its result
PYTHON = [sys.executable, "-m"]
INSTALL = "install"  # the stage without which others lack their peers

# Of suite `gpu`: the cases of a stage, and its seconds; of an H200's, 20 to 25 go by before the first row (imports, fp64,
# the compiler).
BENCHES: dict[str, tuple[float, tuple[str, ...]]] = {
    "main": (90, ("main", "forward", "zero", "frozen", "kl")),
    "accuracy": (45, ("accuracy", "outliers-4k", "outliers-8k")),
    "long": (50, ("n128k",)),
    "small": (40, ("n64", "n256", "n1024")),
    "narrow": (50, ("h896-16k", "h896-64k", "h1536-16k", "h1536-64k", "h2048-16k", "h2048-64k")),
    "sampled": (40, ("whole", "kept", "top_p", "ids")),
    "objectives": (80, ("logprobs", "sft", "dpo", "gspo", "entropy", "lora", "masters", "padded", "lengths")),
    "graphs": (35, ("graphs",)),
    "precision": (35, ("ieee", "tf32")),
}


@dataclass(frozen=True)
class Stage:
    """A command and the seconds it may take. `result`: the JSON it leaves behind, if it measures something; `junit`: the XML,
    if it tests something. `cases`: of the suite, those that it measures."""

    name: str
    command: list[str]
    limit_s: float
    log: str = "bench.log"
    result: Path | None = None
    junit: Path | None = None
    cases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Where:
    """What the stages of a machine have in common."""

    scratch: Path
    device: str = "cuda"
    tiny: bool = False
    wheels: Path | None = None
    commit: str | None = None

    @property
    def suite(self) -> str:
        return "gpu-tiny" if self.tiny else "gpu"


def stages(at: Where) -> list[Stage]:
    """All of them, the most important first."""
    benches = {name: bench(name, limit_s, cases, at) for name, (limit_s, cases) in BENCHES.items()}
    first = [install(at.wheels, at.scratch)] if at.wheels is not None else []
    return [
        *first,
        benches.pop("main"),
        tests(at.scratch),
        *(benches.pop(name) for name in ("accuracy", "long", "small", "narrow", "sampled")),
        step(at),
        *benches.values(),
        sanitizer("memcheck", at.device),
        sanitizer("racecheck", at.device),
    ]


def install(wheels: Path, scratch: Path) -> Stage:
    """One by one: a wheel that does not fit the machine leaves the others."""
    pip = "-m pip install -q --no-index --no-deps --no-compile --target"
    each = f'for wheel; do "$0" {pip} {site(scratch)} "$wheel" || echo "does not install here: $wheel"; done'
    return Stage(INSTALL, ["sh", "-c", each, sys.executable, *map(str, sorted(wheels.glob("*.whl")))], 8)


def tests(scratch: Path) -> Stage:
    report = scratch / "tests.xml"
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--durations=10", f"--junitxml={report}"]
    options += ["--continue-on-collection-errors"]  # what cannot be imported must not stop the others
    if importlib.util.find_spec("xdist") is not None:  # most of their time is the compiler's
        options += ["-n", str(min(8, os.cpu_count() or 1))]
    files = gpu_tests(checkout.needed("the tests of a GPU"))
    return Stage("tests", [*PYTHON, "pytest", *options, *files], 60, log="tests.log", junit=report)


def gpu_tests(root: Path) -> list[str]:
    """The test files that speak of the mark `gpu`, found by reading them: others import what a bare machine lacks."""

    def marks(path: Path) -> bool:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        return any(
            isinstance(n, ast.Attribute) and n.attr == "gpu" and getattr(n.value, "attr", "") == "mark" for n in nodes
        )

    return [str(path.relative_to(root)) for path in sorted((root / "tests").glob("test_*.py")) if marks(path)]


def bench(name: str, limit_s: float, cases: tuple[str, ...], at: Where) -> Stage:
    out = at.scratch / f"{name}.json"
    command = [*PYTHON, "fused_rlhf.bench", "--suite", at.suite, "--only", *cases, "--out", str(out)]
    command += ["--device", at.device, "--together", "--limit", SECONDS, "--count_imports"]
    command += ["--commit", at.commit] if at.commit else []
    return Stage(name, command, limit_s, result=out, cases=cases)


def sanitizer(tool: str, device: str) -> Stage:
    program = shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    )
    command = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    return Stage(tool, [*command, *PYTHON, "fused_rlhf.bench.probe", "--device", device], 20)


def step(at: Where) -> Stage:
    """The whole update of a 0.6B model."""
    out = at.scratch / "step.json"
    rows = ["prompt-heavy/ours-padded", "prompt-heavy/ours-shared"] if at.tiny else ["qwen3-0.6b"]
    command = [*PYTHON, "fused_rlhf.bench.step", "--only", *rows, "--device", at.device, "--rounds", "3"]
    return Stage("step", [*command, *(["--tiny"] if at.tiny else []), "--out", str(out)], 41, result=out)


def chosen(planned: Sequence[Stage], only: Sequence[str] | None, at: Where) -> list[Stage]:
    """The stages named; of a stage of which cases are named, those. Raises ValueError for a name that there is not."""
    if not only:
        return list(planned)
    names = {stage.name for stage in planned} | {case for stage in planned for case in stage.cases}
    if unknown := set(only) - names:
        known = ", ".join(stage.name + (f" ({', '.join(stage.cases)})" if stage.cases else "") for stage in planned)
        raise ValueError(f"--only: no stage or case {', '.join(sorted(unknown))}; there are {known}")
    found = []
    for stage in planned:
        some = tuple(case for case in stage.cases if case in only)
        if stage.name in only or stage.name == INSTALL:
            found.append(stage)
        elif some:
            found.append(bench(stage.name, stage.limit_s, some, at))
    return found


def shared(planned: Sequence[Stage], limit_s: float) -> list[Stage]:
    """Those that the time is enough for, the first ones before others, with limits that use it up: a stage cut short measures
    nothing."""
    fitting: list[Stage] = []
    for stage in planned:
        if sum(s.limit_s for s in (*fitting, stage)) <= limit_s:
            fitting.append(stage)
    total = sum(stage.limit_s for stage in fitting)
    return [replace(stage, limit_s=stage.limit_s * limit_s / total) for stage in fitting]


def site(scratch: Path) -> Path:
    """Where the wheels go; the stages find it by their PYTHONPATH, and the machine's own packages stay as they are."""
    return scratch / "site"


@dataclass
class Ended:
    """How a stage did: "ok", "missing: NAME" where it could not run for want of a package or program, or what went wrong.

    `missing`: packages that some of its rows or test files would have needed.
    """

    how: str
    missing: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # of tests

    @property
    def good(self) -> bool:
        return self.how == "ok" or self.how.startswith("missing")


ABSENT = re.compile(r"No module named '?([\w.]+)'?|needs ([\w-]+), which is not installed")


def absent(text: str) -> str | None:
    """The package that an import of it last failed for; none of ours, whose absence is a mistake."""
    found = [first or second for first, second in ABSENT.findall(text)]
    package = found[-1].partition(".")[0] if found else ""
    return package if package not in ("", "fused_rlhf", "tests") else None


def verdict(stage: Stage, code: int, said: str) -> Ended:
    """Of a stage that came to its end; `said`: its part of the log."""
    ordinary = Ended("ok" if code == 0 else f"exit status {code}")
    if stage.junit is not None and stage.junit.exists():
        found = tested(stage.junit)
        return found if code in PYTEST_CODES or not found.good else ordinary
    if stage.result is not None and stage.result.exists():
        rows = json.loads(stage.result.read_text())["rows"]
        missing = sorted({name for row in rows if (name := absent(row["error"] or ""))})
        bad = [row for row in rows if row["provider"].startswith("ours") and (row["error"] or row["wrong"])]
        wanted = {absent(row["error"] or "") for row in bad}
        if code != 0 and bad and None not in wanted:
            return Ended(f"missing: {', '.join(sorted(filter(None, wanted)))}", missing)
        return Ended(ordinary.how, missing)
    last = (said.strip().splitlines() or [""])[-1]
    if code != 0 and (name := absent(last)):
        return Ended(f"missing: {name}", [name])
    return ordinary


PYTEST_CODES = (0, 1, 5)  # all is well, a test or a file failed, there is no test


def tested(junit: Path) -> Ended:
    """Of pytest's report: a file that could not be imported for a missing package has not failed."""
    counts, missing = Counter[str](), dict[str, None]()
    for test in ElementTree.parse(junit).iter("testcase"):
        problems = [p for kind in ("failure", "error", "skipped") if (p := test.find(kind)) is not None]
        if not problems:
            counts["passed"] += 1
            continue
        problem = problems[0]
        name = absent(problem.text or "")
        if problem.get("message", "").startswith("collection") and name:
            missing[name] = None
        else:
            counts["skipped" if problem.tag == "skipped" else "failed"] += 1
    how = f"{counts['failed']} tests failed" if counts["failed"] else "ok"
    if missing and not counts:
        how = f"missing: {', '.join(missing)}"
    return Ended(how, list(missing), dict(counts))


def run_stage(stage: Stage, out: Path, scratch: Path, timeout_s: float) -> Ended:
    """Runs it, and ends its whole process group at the limit."""
    command = [f"{max(timeout_s - 8, 1):.0f}" if word == SECONDS else word for word in stage.command]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site(scratch)), os.environ.get("PYTHONPATH", "")])}
    with (out / stage.log).open("a+") as log:
        log.write(f"\n--- {stage.name}: {' '.join(command)}\n")
        log.flush()
        begin = log.tell()
        try:
            process = subprocess.Popen(
                command,
                cwd=checkout.needed("a stage"),
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError:
            name = Path(command[0]).name
            return Ended(f"missing: {name}", [name])
        except OSError as e:
            return Ended(f"did not start: {e}")
        with ended(process):
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return Ended(f"stopped after {timeout_s:.0f} s")
        log.seek(begin)
        return verdict(stage, code, log.read())


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A child of the stage may outlive it; the next stage must have the machine to itself."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def carry_out(planned: Sequence[Stage], out: Path, scratch: Path, targets: Sequence[Target] = ()) -> dict[str, Any]:
    """All stages in order, each within its limit plus what the earlier ones left; -> the merged result."""
    out.mkdir(parents=True, exist_ok=True)
    started, allowed = time.time(), 0.0
    result: dict[str, Any] = {"rows": [], "stages": []}
    for stage in planned:
        allowed += stage.limit_s
        begin = time.time()
        found = run_stage(stage, out, scratch, max(allowed - (begin - started), 1.0))
        seconds = round(time.time() - begin, 1)
        record = {"stage": stage.name, "seconds": seconds, "ended": found.how, "missing": found.missing}
        result["stages"].append(record | ({"tests": found.counts} if found.counts else {}))
        if stage.result is not None and stage.result.exists():
            result = merged(result, json.loads(stage.result.read_text()))
        result["targets"] = [target.judge(result) for target in targets]
        result["seconds"] = round(time.time() - started, 1)
        (out / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "summary.txt").write_text(render(result) + "\n")
        print(f"[{result['seconds']:5.0f} s] {stage.name}: {found.how} ({seconds:.0f} s)", flush=True)
    return result


def merged(result: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """With the rows of another stage. Each carries its run, and none is compared with those of another."""
    if part["suite"] == "step":  # rows of another kind
        return {**result, "step": part}
    kept: dict[str, Any] = {key: result[key] for key in ("stages", "step") if key in result}
    rows, versions = result["rows"] + part["rows"], {**result.get("versions", {}), **part["versions"]}
    return {**part, "rows": rows, "versions": versions, "command": "python -m bench.gpu", **kept}


def render(result: dict[str, Any]) -> str:
    parts = [report.render(result)] if result["rows"] else []
    parts += [report.render(result["step"])] if "step" in result else []
    lines = []
    for stage in result["stages"]:
        counts = ", ".join(f"{count} {what}" for what, count in stage.get("tests", {}).items())
        lines.append([stage["stage"], stage["ended"], f"{stage['seconds']:.0f} s", counts, ", ".join(stage["missing"])])
    return "\n\n".join([*parts, table(["stage", "ended", "time", "tests", "missing"], lines)])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    p.add_argument("out", type=Path, metavar="OUT_DIR")
    p.add_argument("--wheels", type=Path, help="folder of wheels to install for the run (peers)")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--tiny", action="store_true", help="toy sizes")
    p.add_argument("--commit", help="commit to record where the checkout is no repository")
    p.add_argument("--only", nargs="+", metavar="NAME", help="only these stages, or these cases of theirs")
    help_limit = f"seconds for all stages (default: {LIMIT_S:g}), shared as they need"
    p.add_argument("--limit", type=number(float), default=LIMIT_S, metavar="SECONDS", help=help_limit)
    p.add_argument("--strict", action="store_true", help="what is missing counts as a failure")
    p.add_argument("--dry-run", action="store_true", help="show the stages and stop")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """-> exit status: 0; 1 where a stage failed, or with --strict lacked something."""
    p = parser()
    args = p.parse_args(arguments)
    if args.wheels is not None and not list(args.wheels.glob("*.whl")):
        p.error(f"--wheels {args.wheels}: no wheels there")
    if checkout.found() is None:
        p.error("the tests and benches of a GPU machine need a checkout of the repository")
    with tempfile.TemporaryDirectory() as folder:
        at = Where(Path(folder), args.device, args.tiny, args.wheels and args.wheels.resolve(), args.commit)
        try:
            wanted = chosen(stages(at), args.only, at)
            planned = shared(wanted, args.limit)
        except ValueError as error:
            p.error(str(error))
        if not planned:
            p.error(f"--limit must be at least {min(s.limit_s for s in wanted):.0f} (s), got {args.limit:g}")
        fitting = {stage.name for stage in planned}
        for stage in wanted:
            if stage.name not in fitting:
                print(
                    f"{stage.name}: left out, it needs {stage.limit_s:.0f} s of the {args.limit:.0f} s: --limit, --only"
                )
        if args.dry_run:
            for stage in planned:
                print(f"{stage.name} (at least {stage.limit_s:.0f} s): {' '.join(stage.command)}")
            return 0
        cases = {case for stage in planned for case in stage.cases}
        targets = [t for t in SUITES[at.suite]().targets if {case for case, _ in t.reads} <= cases]
        result = carry_out(planned, args.out.resolve(), at.scratch, targets)
    print("\n" + render(result))
    return 1 if failed(result["stages"], args.strict) else 0


def failed(records: Sequence[dict[str, Any]], strict: bool) -> bool:
    return any(not Ended(r["ended"]).good or (strict and r["missing"]) for r in records)


if __name__ == "__main__":
    raise SystemExit(main())
