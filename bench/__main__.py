"""python -m bench: measure ours and the peers in one run. See bench/README.md."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from bench import report
from bench.registry import OPS, PROVIDERS, Case
from bench.run import Plan, child, run
from bench.suites import SUITES, Suite, rows


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    p.add_argument("--suite", choices=sorted(SUITES), default="quick", help="a named run (default: quick)")
    p.add_argument("--quick", action="store_const", const="quick", dest="suite", help="the same as --suite quick")
    p.add_argument("--out", type=Path, help="write the result here as JSON")
    p.add_argument("--only", nargs="+", metavar="NAME", help="only these rows: a case, a provider or CASE/PROVIDER")
    p.add_argument("--rounds", type=int, help="rounds for every row, instead of the suite's own")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--together", action="store_true", help="one process per case, not per sample (always on a GPU)")
    p.add_argument(
        "--limit", type=float, default=math.inf, help="seconds that the run may take; then it reports what it has"
    )
    p.add_argument("--commit", help="commit to record where the checkout is no repository")
    p.add_argument("--list", action="store_true", help="show suites, ops and providers, then stop")
    one = p.add_argument_group("one case instead of a suite: give --providers and what differs from the default case")
    one.add_argument("--providers", nargs="+", metavar="NAME")
    for f in fields(Case):
        if f.type == "bool":
            one.add_argument(f"--{f.name}", action="store_true")
        else:
            kind = {"int": int, "float": float, "str": str}[str(f.type)]
            one.add_argument(f"--{f.name}", type=kind, default=f.default)
    p.add_argument("--one", metavar="SPEC", help=argparse.SUPPRESS)  # one task, made by run.py
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser().parse_args(given)
    if args.one:
        child(json.loads(args.one))
        return 0
    if args.list:
        for name, make in sorted(SUITES.items()):
            print(f"suite     {name}: {make().about}")
        print("op       ", ", ".join(OPS))
        print("provider ", ", ".join(PROVIDERS))
        return 0
    if args.providers:
        case = Case(**{f.name: getattr(args, f.name) for f in fields(Case)})
        name, suite = "custom", Suite("", {"case": case}, rows("case", " ".join(args.providers), args.rounds or 3))
    else:
        name, suite = args.suite, SUITES[args.suite]()
    only = set(args.only or ())
    chosen = [r for r in suite.rows if not only or only & {r.case, r.provider, f"{r.case}/{r.provider}"}]
    if not chosen:
        raise SystemExit(f"--only {' '.join(args.only)}: no such row in {name}")
    if args.rounds:
        chosen = [type(r)(r.case, r.provider, args.rounds) for r in chosen]
    command = "python -m bench " + shlex.join(given)
    plan = Plan(
        name,
        suite.cases,
        chosen,
        device=args.device,
        threads=args.threads,
        together=args.together or args.device == "cuda",
        warmup=2 if args.device == "cuda" else 1,
        limit_s=args.limit,
        out=args.out,
        command=command,
        commit=args.commit,
        targets=[t for t in suite.targets if not only or t.reads <= {(r.case, r.provider) for r in chosen}],
    )
    result = run(plan)
    print(report.render(result))
    return 1 if any(r["wrong"] or r["error"] for r in result["rows"] if r["provider"].startswith("ours")) else 0


if __name__ == "__main__":
    raise SystemExit(main())
