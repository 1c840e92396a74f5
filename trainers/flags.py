"""From the words of a command line, a YAML file or a recipe to a configuration; and the help that lists the flags.

Every field of a configuration is a flag, with the field's docstring; a comment above a block of fields is the title of a
group. Nothing here imports torch, nor do the configurations.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import itertools
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from fused_rlhf.trainers.config import TrainConfig, read_yaml
from fused_rlhf.words import nearest

RECIPES = {path.stem: path for path in sorted((Path(__file__).resolve().parent / "recipes").glob("*.yaml"))}
COMMON = {
    "--config FILE": f"YAML file, or the name of a recipe ({', '.join(RECIPES)}): sets the defaults of all flags.",
    "--dry-run": "Builds and checks everything, prints what the run would do and need, and stops.",
}
SWITCH = {"true": True, "false": False}


def default(name: str) -> TrainConfig:
    """The configuration of a command without any flag."""
    if name == "demo":
        return importlib.import_module("fused_rlhf.trainers.demo").DEFAULTS
    return importlib.import_module(f"fused_rlhf.trainers.{name}_config").Config()


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The configuration that the arguments of a command ask for.

    Raises ValueError or FileNotFoundError naming the flag, or the file and its key.
    """
    rest, file = take_config(arguments)
    base = default(name)
    base = from_file(file, base) if file is not None else base
    given = dict(read_flags(rest, type(base)))
    try:
        return dataclasses.replace(base, **given)
    except ValueError as error:
        raise ValueError(in_flags(str(error), base)) from error


def in_flags(message: str, config: TrainConfig) -> str:
    """A message that begins with the fields it is about, with their flags in their place."""
    names, colon, rest = message.partition(":")
    fields, asked = {field.name for field in dataclasses.fields(config)}, names.split(", ")
    return ", ".join(map(flag_of, asked)) + colon + rest if colon and fields.issuperset(asked) else message


def take_switch(arguments: Sequence[str], switch: str) -> tuple[list[str], bool]:
    return [argument for argument in arguments if argument != switch], switch in arguments


def take_config(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """-> the arguments without `--config FILE` or `--config=FILE`, and the FILE."""
    rest, file = [], None
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name == "--config":
            file = value if equals else next(remaining, None)
            if not file:
                raise ValueError("--config: expected the path of a YAML file after it")
        else:
            rest.append(argument)
    return rest, file


def read_flags(arguments: Sequence[str], config_class: type) -> Iterator[tuple[str, Any]]:
    """(field, value) of every flag in the arguments."""
    hints = field_hints(config_class)
    for flag, values in grouped(arguments):
        name = flag[2:].replace("-", "_")
        off = name.removeprefix("no_")
        if name in hints:
            yield name, read_flag(flag, hints[name], values)
        elif hints.get(off) is bool and not values:
            yield off, False
        else:
            raise ValueError(f"there is no flag {flag!r}{nearest(flag, flags_of(hints))}")


def grouped(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the values after it, `--flag value ...` or `--flag=value`."""
    groups: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(argument)
        else:
            meant = f" (did you mean '-{argument}'?)" if argument.startswith("-") else ""
            raise ValueError(f"expected a flag, --name value, got {argument!r}{meant}")
    return groups


def read_flag(flag: str, hint: Any, values: list[str]) -> Any:
    if hint is bool and not values:
        return True
    if hint is bool and len(values) == 1 and values[0].lower() in SWITCH:
        return SWITCH[values[0].lower()]
    if hint is bool:
        raise ValueError(f"{flag}: expected no value, true or false, got {' '.join(values)!r}")
    return read_as(hint, values, flag)


def command_of(recipe: str) -> str:
    """The command that a recipe is for: its last word, or grpo."""
    word = recipe.rpartition("_")[2]
    return word if word in ("dpo", "ppo") else "grpo"


def from_file(file: str, start: TrainConfig) -> Any:
    """`start` with the values in a YAML file or recipe, each read as its flag would be (so 1e-4 is a number).

    Raises FileNotFoundError or ValueError naming the file and the key.
    """
    path = RECIPES.get(file, Path(file).expanduser())
    if not path.is_file() and not path.suffix:
        words = f"{nearest(file, RECIPES)}; recipes are {list(RECIPES)}"
        raise FileNotFoundError(f"--config: there is neither a recipe nor a file {file!r}{words}")
    if file in RECIPES and not isinstance(start, type(default(command_of(file)))):
        raise ValueError(f"--config: the recipe {file!r} is one of `fused-rlhf {command_of(file)}`")
    hints = field_hints(type(start))
    values = read_yaml(path, type(start))
    read = {key: read_as(hints[key], values[key], f"{path}: {key}") for key in values}
    try:
        return dataclasses.replace(start, **read)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_as(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, dict) and get_origin(hint) is dict:
        items: list[Any] = [part for pair in value.items() for part in pair]
    else:
        items = value if isinstance(value, list) else [value]
    if not items and get_origin(hint) in (tuple, dict):
        return get_origin(hint)()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(hint, args=[str(item) for item in items])
    except SystemExit:
        got = " ".join(map(str, items)) if isinstance(value, list) else value
        meant = nearest(got, map(str, get_args(hint))) if get_origin(hint) is Literal else ""
        raise ValueError(f"{where}: expected {spelled(hint)}{meant}, got {repr(got) if items else 'nothing'}") from None


def spelled(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) is Literal:
        return f"one of {list(get_args(hint))}"
    if get_origin(hint) is tuple:
        return f"values of type {spelled(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"a name and a {spelled(get_args(hint)[1])}, as often as you like"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def field_hints(config_class: type) -> dict[str, Any]:
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def flags_of(names: Iterable[str]) -> list[str]:
    return ["--config", "--dry-run", "--help", *map(flag_of, names)]


# --------------------------------------------------------------------------------------------------------------- help


@dataclasses.dataclass
class Entry:
    """What the source of a configuration says about a field."""

    group: str
    text: str


def entries(config_class: type) -> dict[str, Entry]:
    """Every field, in the group where it first stood, with its last docstring."""
    found: dict[str, Entry] = {}
    for cls in reversed(config_class.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(cls))
        lines, group = source.splitlines(), ""
        body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
        for statement, after in itertools.pairwise(body):
            if not isinstance(statement, ast.AnnAssign):
                continue
            above = lines[statement.lineno - 2].strip()
            group = above.removeprefix("# ") if above.startswith("# ") else group
            name = ast.unparse(statement.target)
            known = found.setdefault(name, Entry(group, ""))
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                known.text = inspect.cleandoc(str(after.value.value))
    return found


def manual(name: str, description: str) -> str:
    """The help of a command."""
    config = default(name)
    hints, groups = field_hints(type(config)), dict[str, list[str]]()
    known = entries(type(config))
    for field, hint in hints.items():
        value = shown(getattr(config, field))
        groups.setdefault(known[field].group, []).append(
            described(f"{flag_of(field)} {metavar(hint)}".strip(), f"{known[field].text} [{value}]")
        )
    common = [described(flag, text) for flag, text in COMMON.items()]
    parts = [
        f"usage: fused-rlhf {name} [--flag value ...]",
        f"{description[0].upper()}{description[1:]}.",
        "\n".join(common),
    ]
    parts += ["\n".join([title, *lines]) for title, lines in groups.items()]
    return "\n\n".join([*parts, "[...]: the default. A switch --x is turned off by --no-x."])


def described(flag: str, text: str, indent: int = 30) -> str:
    width = max(min(shutil.get_terminal_size((120, 24)).columns, 120), 70)
    pad = " " * indent
    body = textwrap.fill(" ".join(text.split()), width, initial_indent=pad, subsequent_indent=pad)
    head = f"  {flag}"
    return f"{head}\n{body}" if len(head) > indent - 2 else head + body[len(head) :]


def metavar(hint: Any) -> str:
    origin, inner = get_origin(hint), [arg for arg in get_args(hint) if arg not in (type(None), ...)]
    if hint is bool:
        return ""
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin is dict:
        return "NAME NUMBER ..."
    if origin is tuple:
        return f"{metavar(inner[0])} ..."
    return metavar(inner[0]) if inner else {int: "N", float: "X"}.get(hint, "TEXT")


def shown(value: Any) -> str:
    """A default as one would write it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, dict)):
        return " ".join(f"{v}" for v in value) or "none"
    return "none" if value is None else str(value)
