"""Completion of commands and flags in a shell, by tyro's own generator."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping
from typing import Annotated, Any, Union

import tyro

from fused_rlhf.trainers import flags


def script(shell: str, trainers: Mapping[str, str], others: Mapping[str, str]) -> str:
    """What the shell is to read; `trainers` have the flags of their configurations, `others` none that is completed."""
    commands: list[Any] = []
    for name, text in trainers.items():
        own = flags.default(name)
        kind = dataclasses.make_dataclass(
            name, [("config", str, ""), ("dry_run", bool, False)], bases=(type(own),), frozen=True, kw_only=True
        )
        commands.append(Annotated[kind, tyro.conf.subcommand(name, description=text)])
    for name, text in others.items():
        commands.append(Annotated[dataclasses.make_dataclass(name, []), tyro.conf.subcommand(name, description=text)])
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        every: Any = Union[tuple(commands)]  # noqa: UP007
        tyro.cli(every, args=["--tyro-print-completion", shell], prog="fused-rlhf")
    return out.getvalue()
