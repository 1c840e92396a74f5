"""The command line: `fused-rlhf grpo | dpo | ppo | demo | bench`.

Every field of a configuration is a flag. `--config FILE` takes the flags' defaults from a YAML file, or from one of the
recipes in recipes/ by its name; `--dry-run` builds and checks everything, says what the run would do, and stops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import transformers
import tyro

from fused_rlhf.trainers.checkpoint import CheckpointError
from fused_rlhf.trainers.config import TrainConfig, read_yaml
from fused_rlhf.trainers.engine import NonFiniteLoss, leave
from fused_rlhf.trainers.rewards import RewardError

RECIPES = {path.stem: path for path in sorted((Path(__file__).resolve().parent / "recipes").glob("*.yaml"))}
COMMANDS = {
    "grpo": "group-relative policy optimisation from verifiable rewards",
    "dpo": "preference optimisation from chosen and rejected completions",
    "ppo": "proximal policy optimisation with a value model",
    "demo": "a small model learns sums by GRPO, on a CPU, in minutes",
    "bench": "measurements against other libraries (python -m bench, in a checkout)",
}
FLAGS = f"""--config FILE.yaml, or the name of a recipe ({", ".join(RECIPES)}), sets the defaults of all flags.
--dry-run builds and checks everything, prints what the run would do and need, and stops."""


@dataclass(frozen=True)
class Command:
    """A trainer, as its module has it."""

    prepare: Callable[[Any], Any]
    plan: Callable[[Any], str]
    fit: Callable[[Any], Any]
    default: TrainConfig
    closing: Callable[[Any, Any], str] = lambda config, result: ""  # what is printed at the end


def command(name: str) -> Command:
    """Imports what the command needs and no more."""
    if name == "demo":
        demo = importlib.import_module("fused_rlhf.trainers.demo")
        grpo = importlib.import_module("fused_rlhf.trainers.grpo")
        return Command(grpo.prepare, grpo.plan, grpo.fit, demo.DEFAULTS, demo.closing)
    module = importlib.import_module(f"fused_rlhf.trainers.{name}")
    return Command(module.prepare, module.plan, module.fit, module.Config())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; -> its exit status: 0, 2 for bad input, 1 for a run that had to stop, 130 after Ctrl-C."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in COMMANDS:
        return usage(name)
    if name == "bench":
        return bench(arguments)
    transformers.utils.logging.disable_progress_bar()  # ours is enough
    try:
        try:
            found = command(name)
            arguments, dry_run = take_switch(arguments, "--dry-run")
            config = parse(name, arguments)
            state = found.prepare(config)
        except (ValueError, TypeError, OSError) as error:
            return refuse(error, 2)
        text = found.plan(state) if dry_run else found.closing(config, found.fit(state))
    except (RewardError, NonFiniteLoss, CheckpointError) as error:
        return refuse(error, 1)
    except KeyboardInterrupt:
        return 130
    if text:
        print(text)
    leave()
    return 0


def refuse(error: Exception, status: int) -> int:
    print(f"fused-rlhf: error: {error}", file=sys.stderr)
    return status


def usage(name: str) -> int:
    asked = name in ("-h", "--help")
    lines = [f"  {command:<7}{text}" for command, text in COMMANDS.items()]
    text = "\n".join(["usage: fused-rlhf COMMAND [--flags]; fused-rlhf COMMAND --help lists them", "", *lines])
    print(
        text if asked else f"fused-rlhf: error: there is no command {name!r}\n{text}",
        file=sys.stdout if asked else sys.stderr,
    )
    return 0 if asked else 2


def bench(arguments: Sequence[str]) -> int:
    """The bench suite is part of a checkout, not of the installed package."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "bench" / "__main__.py").is_file():
        print("fused-rlhf: error: bench needs a checkout of the repository; run it in there", file=sys.stderr)
        return 2
    return subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=checkout).returncode


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The configuration that the arguments of a command ask for; SystemExit where tyro refuses them."""
    rest, file = take_config(arguments)
    default = command(name).default
    default = from_file(file, default) if file is not None else default
    return tyro.cli(
        type(default),
        args=rest,
        default=default,
        prog=f"fused-rlhf {name}",
        description=f"{COMMANDS[name].capitalize()}.\n\n{FLAGS}",
    )


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


def from_file(file: str, default: TrainConfig) -> Any:
    """`default` with the values in a YAML file or recipe, each read as its flag would be (so 1e-4 is a number).

    Raises FileNotFoundError or ValueError naming the file and the key.
    """
    path = RECIPES.get(file, Path(file).expanduser())
    hints = get_type_hints(type(default))
    values = read_yaml(path, type(default))
    return dataclasses.replace(default, **{key: read_as(hints[key], values[key], f"{path}: {key}") for key in values})


def read_as(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, dict) and get_origin(hint) is dict:
        items: list[Any] = [part for pair in value.items() for part in pair]
    else:
        items = value if isinstance(value, list) else [value]
    if not items:
        return get_origin(hint)()  # an empty tuple or dict
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(hint, args=[str(item) for item in items])
    except SystemExit:
        raise ValueError(
            f"{where}: expected {hint.__name__ if isinstance(hint, type) else hint}, got {value!r}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
