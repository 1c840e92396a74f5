"""python -m bench.step: whole updates (body, head, backward, clipping, optimiser) by our trainers, TRL's and dense logits.

Rollouts are synthetic and there before the clock starts. bench/README.md says how to read the result.

    python -m bench.step --out bench/results/cpu-2core/step.json --plots bench/results/cpu-2core/plots/step
    python -m bench.step --only prompt-heavy "dpo/ours-shared" --rounds 7
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fused_rlhf.bench.command import DEVICES, Parser, number, one_of, ready_to_write
from fused_rlhf.bench.step_cases import Plan, full, on_gpu, tiny
from fused_rlhf.words import nearest

PROG = "python -m bench.step"


def parser() -> Parser:
    p = Parser(prog=PROG, description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    p.add_argument("--tiny", action="store_true", help="the cases at toy sizes, in seconds")
    p.add_argument("--only", nargs="+", metavar="NAME", help="only these: a case, a way or CASE/WAY; see --list")
    p.add_argument("--rounds", type=number(int), default=5, metavar="COUNT", help="default: 5")
    p.add_argument("--device", type=one_of(DEVICES), default="cpu", metavar="|".join(DEVICES))
    p.add_argument("--threads", type=number(int), default=2, metavar="COUNT", help="default: 2")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the result here as JSON, after each case")
    p.add_argument("--plots", type=Path, metavar="DIR", help="draw the result there (needs matplotlib)")
    p.add_argument("--list", action="store_true", help="show cases and ways, and measure nothing")
    return p


def chosen(plan: Plan, only: Sequence[str] | None) -> Plan:
    """Raises ValueError for a name that no row has."""
    if not only:
        return plan
    names = {(case, way): {case, way.name, f"{case}/{way.name}"} for case, ways in plan.ways.items() for way in ways}
    known = sorted(set[str]().union(*names.values()))
    for wanted in only:
        if wanted not in known:
            cases = ", ".join(plan.cases)
            meant = nearest(wanted, known)
            raise ValueError(f"--only: there is no row {wanted!r}{meant}; expected a way, CASE/WAY or one of {cases}")
    ways = {case: [way for way in ways if names[case, way] & set(only)] for case, ways in plan.ways.items()}
    ways = {case: some for case, some in ways.items() if some}
    targets = [t for t in plan.targets if {t.slower, t.faster} <= set(ways.get(t.case, ()))]
    return Plan({case: plan.cases[case] for case in ways}, ways, targets)


def listing(plan: Plan) -> str:
    lines = []
    for name, case in plan.cases.items():
        lines += [f"{name}: {case.label}", "  " + ", ".join(way.name for way in plan.ways[name])]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """-> exit status: 0; 1 where a row of ours is wrong or failed; 2 for bad input."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        args = parser().parse(given)
        plan = tiny() if args.tiny else on_gpu() if args.device == "cuda" else full()
        plan = chosen(plan, args.only)
        if args.list:
            print(listing(plan))
            return 0
        ready_to_write(args.out, args.plots)
        if args.device == "cuda" and not importlib.import_module("torch").cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here")
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        return measured(plan, args, shlex.join([*PROG.split(), *given]))
    except KeyboardInterrupt:
        return 130


def measured(plan: Plan, args: argparse.Namespace, command: str) -> int:
    from fused_rlhf.bench import plots, report
    from fused_rlhf.bench.step_run import run

    result = run(plan, rounds=args.rounds, device=args.device, threads=args.threads, command=command, out=args.out)
    print(report.render(result))
    if args.plots:
        print("\n".join(str(path) for path in plots.draw(result, args.plots)))
    return 1 if any(r["wrong"] or r["error"] for r in result["rows"] if r["provider"].startswith("ours")) else 0


if __name__ == "__main__":
    raise SystemExit(main())
