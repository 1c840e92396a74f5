"""The command line: `fused-rlhf grpo`, `fused-rlhf demo`.

Every field of a configuration is a flag. `--config FILE` takes the flags' defaults from a YAML file, or from one of the
recipes in recipes/ by its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import transformers
import tyro

from fused_rlhf.trainers import demo, grpo
from fused_rlhf.trainers.loop import read_yaml
from fused_rlhf.trainers.rewards import RewardError

RECIPES = {path.stem: path for path in sorted((Path(__file__).resolve().parent / "recipes").glob("*.yaml"))}
CONFIG_HELP = f"--config FILE.yaml, or the name of a recipe ({', '.join(RECIPES)}), sets the defaults of all flags."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; -> its exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    transformers.utils.logging.disable_progress_bar()  # ours is enough
    try:
        try:
            config = parse(sys.argv[1:] if argv is None else argv)
            state = grpo.prepare(config)
        except (ValueError, TypeError, OSError) as error:
            return refuse(error)
        result = grpo.fit(state)
    except RewardError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130
    if isinstance(config, demo.Demo):
        print(demo.closing(config, result))
    return 0


def refuse(error: Exception) -> int:
    print(f"fused-rlhf: error: {error}", file=sys.stderr)
    return 2


def parse(argv: Sequence[str]) -> grpo.Config:
    """The configuration that the arguments ask for; its class says which command it is."""
    arguments, file = take_config(argv)
    defaults: dict[str, grpo.Config] = {"grpo": grpo.Config(), "demo": demo.DEFAULTS}
    if file is not None and arguments and arguments[0] in defaults:
        defaults[arguments[0]] = from_file(file, defaults[arguments[0]])
    grpo_command = tyro.conf.subcommand("grpo", default=defaults["grpo"], description=f"GRPO. {CONFIG_HELP}")
    demo_command = tyro.conf.subcommand("demo", default=defaults["demo"], description=f"A short run. {CONFIG_HELP}")
    return tyro.cli(
        Annotated[grpo.Config, grpo_command] | Annotated[demo.Demo, demo_command],  # type: ignore[arg-type]
        args=arguments,
        prog="fused-rlhf",
        description="Reinforcement learning from verifiable rewards, with an LM head that never holds its logits.",
    )


def take_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """-> the arguments without `--config FILE` or `--config=FILE`, and the FILE."""
    rest, file = [], None
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "--config":
            file = value if equals else next(arguments, None)
            if not file:
                raise ValueError("--config: expected the path of a YAML file after it")
        else:
            rest.append(argument)
    return rest, file


def from_file(file: str, default: grpo.Config) -> grpo.Config:
    """`default` with the values in a YAML file or recipe, each read as its flag would be (so 1e-4 is a number).

    Raises FileNotFoundError or ValueError naming the file and the key.
    """
    path = RECIPES.get(file, Path(file).expanduser())
    hints = get_type_hints(type(default))
    values = read_yaml(path, type(default))
    return dataclasses.replace(default, **{key: read_as(hints[key], values[key], f"{path}: {key}") for key in values})


def read_as(hint: Any, value: Any, where: str) -> Any:
    arguments = [str(item) for item in (value if isinstance(value, list) else [value])]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(hint, args=arguments)
    except SystemExit:
        raise ValueError(
            f"{where}: expected {hint.__name__ if isinstance(hint, type) else hint}, got {value!r}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
