"""python -m bench: measure ours and the peers in one run. See bench/README.md."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from bench import compare, plots, readme, report
from bench.plan import Plan, Row
from bench.registry import MODELS, OPS, PROVIDERS, Case
from bench.run import child, run
from bench.suites import SUITES, Suite


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    p.add_argument("--suite", choices=sorted(SUITES), default="quick", help="a named run (default: quick)")
    p.add_argument("--quick", action="store_const", const="quick", dest="suite", help="the same as --suite quick")
    p.add_argument("--long", action="store_true", help="1k to 64k tokens, dense against ours, to watch")
    p.add_argument("--out", type=Path, help="write the result here as JSON")
    p.add_argument("--plots", type=Path, metavar="DIR", help="draw the result there (needs matplotlib)")
    p.add_argument("--only", nargs="+", metavar="NAME", help="only these rows: a case, a provider or CASE/PROVIDER")
    p.add_argument("--rounds", type=int, help="rounds for every row, instead of the suite's own")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--together", action="store_true", help="one process per case, not per sample (always on a GPU)")
    p.add_argument("--limit", type=float, help="seconds that the run may take; then it reports what it has")
    p.add_argument(
        "--memory", type=float, metavar="GB", help="what a process may take on a CPU (default: what is free)"
    )
    p.add_argument("--commit", help="commit to record where the checkout is no repository")
    other = p.add_argument_group("instead of measuring")
    other.add_argument("--list", action="store_true", help="show suites, ops, providers and models")
    other.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="show what became worse")
    other.add_argument("--readme", action="store_true", help="fill in the tables of the READMEs from bench/results")
    one = p.add_argument_group("one case instead of a suite: give --providers and what differs from the default case")
    one.add_argument("--providers", nargs="+", metavar="NAME")
    one.add_argument("--model", choices=sorted(MODELS), help="H and V of this model's head")
    for f in fields(Case):
        if f.type == "bool":
            one.add_argument(f"--{f.name}", action="store_true")
        else:
            kind = {"int": int, "float": float, "str": str}[str(f.type)]
            one.add_argument(f"--{f.name}", type=kind, default=f.default)
    p.add_argument("--one", metavar="SPEC", help=argparse.SUPPRESS)  # one task, made by run.py
    return p


def listing() -> str:
    lines = [f"suite     {name}: {make().about}" for name, make in sorted(SUITES.items())]
    lines += [f"op        {op.name}: {op.about}" for op in OPS.values()]
    lines += [f"model     {name}: H={shape.H} V={shape.V}" for name, shape in MODELS.items()]
    return "\n".join([*lines, "provider  " + ", ".join(PROVIDERS)])


def chosen_suite(args: argparse.Namespace) -> tuple[str, Suite]:
    if args.providers:
        case = Case(**{f.name: getattr(args, f.name) for f in fields(Case)} | _head(args.model))
        return "custom", Suite("", {"case": case}, [Row("case", p, 3) for p in args.providers])
    name = ("long" if args.device == "cpu" else "gpu-long") if args.long else args.suite
    return name, SUITES[name]()


def _head(model: str | None) -> dict[str, int]:
    return {} if model is None else MODELS[model]._asdict()


def measured(args: argparse.Namespace, command: str) -> int:
    name, suite = chosen_suite(args)
    only = set(args.only or ())
    chosen = [r for r in suite.rows if not only or only & {r.case, r.provider, f"{r.case}/{r.provider}"}]
    if not chosen:
        raise SystemExit(f"--only {' '.join(args.only)}: no such row in {name}")
    if args.rounds:
        chosen = [Row(r.case, r.provider, args.rounds) for r in chosen]
    plan = Plan(
        name,
        suite.cases,
        chosen,
        device=args.device,
        threads=args.threads,
        together=args.together or suite.together or args.device == "cuda",
        repeats=suite.repeats,
        warmup=2 if args.device == "cuda" else 1,
        limit_s=suite.limit_s if args.limit is None else args.limit,
        memory=args.memory * 1e9 if args.memory else suite.memory,
        predict=suite.predict,
        out=args.out,
        command=command,
        commit=args.commit,
        targets=[t for t in suite.targets if not only or t.reads <= {(r.case, r.provider) for r in chosen}],
    )
    result = run(plan)
    print(report.render(result))
    if args.plots:
        print("\n".join(str(path) for path in plots.draw(result, args.plots)))
    return 1 if any(r["wrong"] or r["error"] for r in result["rows"] if r["provider"].startswith("ours")) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser().parse_args(given)
    if args.one:
        child(json.loads(args.one))
        return 0
    if args.list:
        print(listing())
        return 0
    if args.compare:
        old, new = (json.loads(path.read_text()) for path in args.compare)
        text, worse = compare.compare(old, new)
        print(text)
        return 1 if worse else 0
    if args.readme:
        print("\n".join(f"{path}: {'updated' if changed else 'as it was'}" for path, changed in readme.update()))
        return 0
    return measured(args, "python -m bench " + shlex.join(given))


if __name__ == "__main__":
    raise SystemExit(main())
