"""The objectives as Markdown tables, read from the registries: `python -m fused_rlhf.objectives.catalogue` prints them.

docs/objectives.md holds what this prints, and a test that the two agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from fused_rlhf import objectives, preferences
from fused_rlhf.objectives import registry
from fused_rlhf.objectives.registry import keywords


def formula(function: Callable[..., Any]) -> str:
    """For a cell of a table."""
    return registry.formula(function).replace("|", "\\|")


def options(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters
    return ", ".join(f"{name}={parameters[name].default!r}" for name in parameters if name in keywords(function))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown() -> str:
    """Presets, surrogates, KL estimators, token weights and preference losses, a table each."""
    presets = []
    for name, make in objectives.PRESETS.items():
        extra = {"max_completion_length": 1} if name == "dr_grpo" else {}
        loss = make(**extra)
        presets.append((f"`{make.__name__}`", f"`{loss.surrogate}`", f"`{loss.token_weight}`", loss.level))
    functions = [
        *((f"`{name}`", formula(f), options(f)) for name, f in objectives.SURROGATES.items()),
        *((f"`{name}` (KL)", formula(f), "") for name, f in objectives.KL_ESTIMATORS.items()),
        *((f"`{name}` (weight)", formula(f), options(f)) for name, f in objectives.TOKEN_WEIGHTS.items()),
    ]
    pairs = [
        (f"`{name}`", formula(loss.function), "pairs" if loss.paired else "single", "yes" if loss.reference else "no")
        for name, loss in preferences.PREFERENCES.items()
    ]
    return "\n\n".join(
        [
            table(("policy preset", "surrogate", "token weight", "level of the ratio"), presets),
            table(("policy term", "formula", "options"), functions),
            table(("preference loss", "formula", "over", "reference"), pairs),
        ]
    )


if __name__ == "__main__":
    print(markdown())
