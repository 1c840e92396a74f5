"""python -m bench, or fused-rlhf bench: ours and the peers measured in one run. bench/README.md says how to read it.

What is asked is checked before torch is imported, so that help and refusals come at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from fused_rlhf.bench.plan import Plan, Row
from fused_rlhf.bench.registry import MODELS, OPS, PROVIDERS, Case
from fused_rlhf.bench.run import run
from fused_rlhf.bench.suites import SUITES, Suite
from fused_rlhf.words import nearest

DEVICES = ("cpu", "cuda")


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Raises ValueError for arguments that do not fit, with the nearest name where one is unknown."""
        args, unknown = self.parse_known_args(arguments)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            raise ValueError(f"there is no argument {unknown[0]!r}{nearest(unknown[0], flags)}; see {self.prog} --help")
        return args


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    names = sorted(known)

    def checked(value: str) -> str:
        if value not in names:
            meant = nearest(value, names)
            raise argparse.ArgumentTypeError(f"got {value!r}{meant}; expected one of {', '.join(names)}")
        return value

    return checked


def number(kind: type[int] | type[float], *, positive: bool = True) -> Callable[[str], Any]:
    what = ("a whole number" if kind is int else "a number") + (" above 0" if positive else "")

    def checked(value: str) -> int | float:
        try:
            found = kind(value)
        except ValueError:
            found = math.nan
        if not math.isfinite(found) or (positive and found <= 0):
            raise argparse.ArgumentTypeError(f"expected {what}, got {value!r}")
        return found

    return checked


KINDS: dict[str, Callable[[str], Any]] = {
    "int": number(int, positive=False),
    "float": number(float, positive=False),
    "str": str,
}
CHOICES = {"op": one_of(OPS)}  # of the case's fields; the others' bounds are checked by `Case`


def parser(prog: str) -> Parser:
    p = Parser(prog=prog, description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    which = p.add_mutually_exclusive_group()
    which.add_argument("--suite", type=one_of(SUITES), metavar="NAME", help="a named run (default: quick); see --list")
    which.add_argument("--quick", action="store_const", const="quick", dest="suite", help="the same as --suite quick")
    which.add_argument("--long", action="store_true", help="1k to 64k tokens, dense against ours, to watch")
    which.add_argument("--providers", nargs="+", type=one_of(PROVIDERS), metavar="NAME", help="one case, see below")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the result here as JSON")
    p.add_argument("--plots", type=Path, metavar="DIR", help="draw the result there (needs matplotlib)")
    p.add_argument("--only", nargs="+", metavar="NAME", help="only these rows: a case, a provider or CASE/PROVIDER")
    p.add_argument("--rounds", type=number(int), metavar="COUNT", help="for every row, instead of the suite's own")
    p.add_argument("--device", type=one_of(DEVICES), default="cpu", metavar="|".join(DEVICES))
    p.add_argument("--threads", type=number(int), metavar="COUNT", help="instead of the suite's own, 2 or 1")
    p.add_argument("--together", action="store_true", help="one process per case, not per sample (always on a GPU)")
    help_limit = "seconds that the measurements may take, without imports; then it reports what it has"
    p.add_argument("--limit", type=number(float), metavar="SECONDS", help=help_limit)
    p.add_argument("--count_imports", action="store_true", help="let imports count in --limit")
    help_memory = "what a process may take on a CPU (default: what is free)"
    p.add_argument("--memory", type=number(float), metavar="GB", help=help_memory)
    p.add_argument("--commit", help="commit to record where the checkout is no repository")
    other = p.add_argument_group("instead of measuring")
    other.add_argument("--list", action="store_true", help="show suites, ops, providers and models")
    other.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="show what became worse")
    other.add_argument("--readme", action="store_true", help="fill in the tables of the READMEs, in a checkout")
    one = p.add_argument_group("one case instead of a suite: --providers and what differs from the default case")
    one.add_argument("--model", type=one_of(MODELS), metavar="NAME", help="H and V of this model's head")
    for f in fields(Case):
        if f.type == "bool":
            one.add_argument(f"--{f.name}", action="store_true", default=None)
        else:
            kind = CHOICES.get(f.name, KINDS[str(f.type)])
            one.add_argument(f"--{f.name}", type=kind, metavar=f.name.upper(), help=f"default: {f.default!r}")
    return p


def parse(prog: str, arguments: list[str]) -> argparse.Namespace:
    """Raises ValueError for arguments that do not fit, by themselves or with each other."""
    args = parser(prog).parse(arguments)
    of_suite = ("inputs", "data") if args.suite == "real" else ()
    given = [f"--{f.name}" for f in fields(Case) if f.name not in of_suite and getattr(args, f.name) is not None]
    given += ["--model"] if args.model else []
    if given and not args.providers:
        raise ValueError(
            f"{given[0]} is of a case of your own, which needs --providers, such as --providers dense ours"
        )
    for name in ("model", "inputs"):
        if (value := getattr(args, name)) and (args.H is not None or args.V is not None):
            raise ValueError(f"--{name} {value} says H and V: leave out --H and --V")
    if args.model and args.inputs:
        raise ValueError("--inputs says H and V: leave out --model")
    ready_to_write(args.out, args.plots)
    return args


def ready_to_write(out: Path | None, plots: Path | None) -> None:
    """Raises ValueError where --out or --plots cannot be written."""
    if out is not None:
        writable("--out", out, out.parent)
        if out.is_dir():
            raise ValueError(f"--out: expected a file to write, got the folder {str(out)!r}")
    if plots is not None:
        writable("--plots", plots, plots)
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plots needs matplotlib: pip install 'fused-rlhf[train]'")


def writable(name: str, path: Path, folder: Path) -> None:
    """Raises ValueError unless `folder` is there and may be written to, or can be made."""
    there = next(place for place in [folder, *folder.absolute().parents] if place.exists())
    if not there.is_dir():
        raise ValueError(f"{name} {str(path)!r}: expected a folder at {str(there)!r}, which is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{name} {str(path)!r}: the folder {str(there)!r} cannot be written to")


def listing() -> str:
    lines = [f"suite     {name}: {make().about}" for name, make in sorted(SUITES.items())]
    lines += [f"op        {op.name}: {op.about}" for op in OPS.values()]
    lines += [f"model     {name}: H={shape.H} V={shape.V}" for name, shape in MODELS.items()]
    return "\n".join([*lines, "provider  " + ", ".join(PROVIDERS)])


def chosen_suite(args: argparse.Namespace) -> tuple[str, Suite]:
    if args.providers:
        given = {f.name: getattr(args, f.name) for f in fields(Case) if getattr(args, f.name) is not None}
        case = prepared(Case(**given | _head(args.model)))
        for name in args.providers:
            if not PROVIDERS[name].takes(case):
                able = ", ".join(other for other, provider in PROVIDERS.items() if provider.takes(case))
                raise ValueError(f"--providers: {name} does not have the case {case.label}; {able} do")
        return "custom", Suite("", {"case": case}, [Row("case", p, 3) for p in args.providers])
    name = ("long" if args.device == "cpu" else "gpu-long") if args.long else args.suite or "quick"
    suite = SUITES[name]()
    if name == "real":
        given = {key: value for key in ("inputs", "data") if (value := getattr(args, key)) is not None}
        suite = replace(suite, cases={key: prepared(replace(case, **given)) for key, case in suite.cases.items()})
    return name, suite


def prepared(case: Case) -> Case:
    """With H and V of the model whose inputs it has, if any. Raises ValueError, FileNotFoundError where that is not there."""
    if not case.inputs:
        if case.data:
            raise ValueError("--data is what a model reads, and needs --inputs, such as --inputs smollm2")
        return case
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("--inputs needs transformers: pip install 'fused-rlhf[train]'")
    from fused_rlhf.bench import real

    return real.prepared(case)


def _head(model: str | None) -> dict[str, int]:
    return {} if model is None else MODELS[model]._asdict()


def chosen_rows(args: argparse.Namespace, name: str, suite: Suite) -> list[Row]:
    """Raises ValueError for a name of --only that no row has."""
    if not args.only:
        return suite.rows
    names = {row: {row.case, row.provider, f"{row.case}/{row.provider}"} for row in suite.rows}
    known = sorted(set[str]().union(*names.values()))
    for wanted in args.only:
        if wanted not in known:
            meant = nearest(wanted, known)
            cases = ", ".join(suite.cases)
            raise ValueError(
                f"--only: {name} has no row {wanted!r}{meant}; expected a provider, CASE/PROVIDER or {cases}"
            )
    return [row for row in suite.rows if names[row] & set(args.only)]


def planned(args: argparse.Namespace, command: str) -> Plan:
    name, suite = chosen_suite(args)
    rows = chosen_rows(args, name, suite)
    if args.device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    return Plan(
        name,
        suite.cases,
        [Row(r.case, r.provider, args.rounds) for r in rows] if args.rounds else rows,
        device=args.device,
        threads=args.threads or suite.threads,
        together=args.together or suite.together or args.device == "cuda",
        groups=suite.groups,
        in_turn=suite.in_turn,
        repeats=suite.repeats,
        warmup=2 if args.device == "cuda" else 1,
        limit_s=suite.limit_s if args.limit is None else args.limit,
        count_imports=args.count_imports,
        memory=args.memory * 1e9 if args.memory else suite.memory,
        predict=suite.predict,
        out=args.out,
        command=command,
        commit=args.commit,
        targets=[t for t in suite.targets if not args.only or t.reads <= {(r.case, r.provider) for r in rows}],
    )


def measured(plan: Plan, folder: Path | None) -> int:
    from fused_rlhf.bench import plots, report

    result = run(plan)
    print(report.render(result))
    if folder:
        print("\n".join(str(path) for path in plots.draw(result, folder)))
    return 1 if any(r["wrong"] or r["error"] for r in result["rows"] if r["provider"].startswith("ours")) else 0


def compared(old: Path, new: Path) -> int:
    from fused_rlhf.bench import compare, report

    text, worse = compare.compare(report.read(old), report.read(new))
    print(text)
    return 1 if worse else 0


def updated() -> int:
    from fused_rlhf.bench import readme

    print("\n".join(f"{path}: {'updated' if changed else 'as it was'}" for path, changed in readme.update()))
    return 0


def main(arguments: Sequence[str] | None = None, prog: str = "python -m bench") -> int:
    """-> exit status: 0; 1 where a row of ours is wrong or failed, or something became worse; 2 for bad input."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        args = parse(prog, given)
        if args.list:
            print(listing())
            return 0
        if args.compare:
            return compared(*args.compare)
        if args.readme:
            return updated()
        plan = planned(args, f"{prog} {shlex.join(given)}")
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        return measured(plan, args.plots)
    except KeyboardInterrupt:
        return 130
