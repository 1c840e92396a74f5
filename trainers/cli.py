"""The command line: `fused-rlhf grpo | dpo | ppo | demo | merge | info | completion | bench`.

Every field of a configuration is a flag. `--config FILE` takes the flags' defaults from a YAML file, or from one of the
recipes in recipes/ by its name; `--dry-run` builds and checks everything, says what the run would do, and stops.

torch and transformers are imported once the arguments are known to be right: help and refusals come at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import fused_rlhf
from fused_rlhf.words import nearest

TRAINERS = {
    "grpo": "group-relative policy optimisation from verifiable rewards",
    "dpo": "preference optimisation from chosen and rejected completions",
    "ppo": "proximal policy optimisation with a value model",
    "demo": "a small model learns sums by GRPO, on a CPU, in minutes",
}
OTHERS = {
    "merge": "a run's LoRA adapters, merged into their base: a model that from_pretrained loads",
    "info": "versions, devices, the backend that auto takes, and what is missing for what",
    "completion": "a script that completes commands and flags in bash or zsh",
    "bench": "time, memory and error beside other libraries: `fused-rlhf bench --quick`",
}
COMMANDS = TRAINERS | OTHERS
USAGE = """usage: fused-rlhf COMMAND [--flag value ...]

{commands}

  --help, --version; fused-rlhf COMMAND --help lists a command's flags"""
# What every run imports (the curves at its end), and the extra that brings an optional package.
NEEDED = ("transformers", "accelerate", "tyro", "yaml", "tqdm", "matplotlib")
EXTRAS = dict.fromkeys((*NEEDED, "datasets", "peft", "tokenizers", "safetensors"), "train")
EXTRAS |= {"liger_kernel": "liger", "triton": "gpu", "gguf": "real"}


@dataclass(frozen=True)
class Command:
    """A trainer, as its module has it."""

    prepare: Callable[[Any], Any]
    plan: Callable[[Any], str]
    fit: Callable[[Any], Any]
    closing: Callable[[Any, Any], str] = lambda config, result: ""  # what is printed at the end


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; -> its exit status: 0, 2 for bad input, 1 for a run that had to stop, 130 after Ctrl-C."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        return say(USAGE.format(commands="\n".join(f"  {command:<12}{text}" for command, text in COMMANDS.items())))
    if name in ("-V", "--version", "version"):
        return say(f"fused-rlhf {fused_rlhf.__version__}")
    if name not in COMMANDS:
        meant = nearest(name, (*COMMANDS, "--help", "--version"))
        return refuse(ValueError(f"there is no command {name!r}{meant}; commands are {', '.join(COMMANDS)}"), 2)
    run: Callable[[list[str]], int] = OWN.get(name, lambda rest: train(name, rest))
    try:
        return run(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return refuse(ValueError(missing(name, [package])), 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as of `| head`; at its end Python would say so again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def say(text: str) -> int:
    print(text, flush=True)
    return 0


def refuse(error: Exception, status: int) -> int:
    print(f"fused-rlhf: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def absent(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def missing(name: str, packages: Sequence[str]) -> str:
    extra = EXTRAS[packages[0]]
    return f"fused-rlhf {name} needs {', '.join(packages)}: pip install 'fused-rlhf[{extra}]'"


# ----------------------------------------------------------------------------------------------------------- trainers


def train(name: str, arguments: list[str]) -> int:
    if without := absent(NEEDED):
        return refuse(ValueError(missing(name, without)), 2)
    from fused_rlhf.trainers import flags  # which needs some of them

    if "--help" in arguments or "-h" in arguments:
        return say(flags.manual(name, TRAINERS[name]))
    arguments, dry_run = flags.take_switch(arguments, "--dry-run")
    try:
        config = flags.parse(name, arguments)
    except (ValueError, TypeError, OSError) as error:
        return refuse(error, 2)
    return carry_out(command(name), config, dry_run)


def command(name: str) -> Command:
    """Imports what the command needs and no more."""
    if name == "demo":
        demo = importlib.import_module("fused_rlhf.trainers.demo")
        grpo = importlib.import_module("fused_rlhf.trainers.grpo")
        return Command(grpo.prepare, grpo.plan, grpo.fit, demo.closing)
    module = importlib.import_module(f"fused_rlhf.trainers.{name}")
    return Command(module.prepare, module.plan, module.fit)


def carry_out(found: Command, config: Any, dry_run: bool) -> int:
    import transformers

    from fused_rlhf.trainers import flags
    from fused_rlhf.trainers.checkpoint import CheckpointError
    from fused_rlhf.trainers.engine import NonFiniteLoss, leave
    from fused_rlhf.trainers.rewards import RewardError

    transformers.utils.logging.disable_progress_bar()  # ours is enough
    try:
        try:
            state = found.prepare(config)
        except (ValueError, TypeError, OSError) as error:
            return refuse(ValueError(flags.in_flags(str(error), config)), 2)
        text = found.plan(state) if dry_run else found.closing(config, found.fit(state))
    except (RewardError, NonFiniteLoss, CheckpointError) as error:
        return refuse(error, 1)
    if text:
        print(text)
    leave()
    return 0


# ------------------------------------------------------------------------------------------------------------- others


def merge(arguments: list[str]) -> int:
    """Merge adapters into their base."""
    parser = Parser("fused-rlhf merge", description=f"{COMMANDS['merge']}.")
    parser.add_argument("source", metavar="RUN", help="a run's output folder, or a folder of adapters")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the model goes; new or empty")
    help_dtype = "dtype of the weights; default: as the base has it (the sum is taken in float32)"
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help=help_dtype)
    try:
        given = parser.parse_args(arguments)
        if without := absent(("transformers", "peft")):
            return refuse(ValueError(missing("merge", without)), 2)
        merging = importlib.import_module("fused_rlhf.trainers.merge")
        source, output = merging.places(given.source, given.output)
        return say(merging.merge(source, output, given.dtype))
    except (ValueError, OSError) as error:
        return refuse(error, 2)


def info(arguments: list[str]) -> int:
    """Say what is here."""
    try:
        Parser("fused-rlhf info", description=f"{COMMANDS['info']}.").parse_args(arguments)
    except ValueError as error:
        return refuse(error, 2)
    return say(importlib.import_module("fused_rlhf.trainers.info").report())


def completion(arguments: list[str]) -> int:
    """Print a script for the shell to read: `source <(fused-rlhf completion bash)`."""
    parser = Parser("fused-rlhf completion", description="Completion in a shell: source <(fused-rlhf completion bash)")
    parser.add_argument("shell", choices=["bash", "zsh"])
    try:
        shell = parser.parse_args(arguments).shell
    except ValueError as error:
        return refuse(error, 2)
    if without := absent(("tyro", "yaml")):
        return refuse(ValueError(missing("completion", without)), 2)
    return say(importlib.import_module("fused_rlhf.trainers.completion").script(shell, TRAINERS, OTHERS))


def bench(arguments: list[str]) -> int:
    """Measure: python -m fused_rlhf.bench."""
    return importlib.import_module("fused_rlhf.bench.command").main(arguments, "fused-rlhf bench")


OWN: dict[str, Callable[[list[str]], int]] = {"merge": merge, "info": info, "completion": completion, "bench": bench}


if __name__ == "__main__":
    sys.exit(main())
