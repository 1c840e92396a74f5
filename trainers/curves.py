"""The curves of a run: a panel for each metric that says something, in the colour of its phase.

A panel is of one phase: the steps of a warm-up and those after it are of different lengths, and mean different things. What
was measured on held-out samples (`eval_loss` beside `loss`) is a dashed line. Metrics that did not change are named below.
"""

from __future__ import annotations

import gc
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WARMUP = "warmup"
COLOURS = {WARMUP: "tab:orange"}
COLOUR = "tab:blue"  # of the phase that the run is for
NOISE = 1e-6  # of values around 1, as GRPO's loss on-policy: the terms cancel but for their rounding

TITLES = {
    "accuracy": "accuracy on held-out prompts",
    "clip_ratio/region_mean": "share of clipped ratios",
    "completion_length": "tokens of a completion",
    "dead_sequences": "sequences without an advantage",
    "entropy": "entropy of the next token",
    "grad_norm": "norm of the gradient",
    "kl": "KL to the reference",
    "live/clip_ratio/region_mean": "share of clipped ratios, where there is an advantage",
    "live/entropy": "entropy, where there is an advantage",
    "logps/chosen": "log-prob of the chosen",
    "logps/rejected": "log-prob of the rejected",
    "loss/policy_avg": "policy loss",
    "loss/value_avg": "value loss",
    "objective/entropy": "entropy of a completion",
    "objective/kl": "KL to the reference, of a completion",
    "objective/kl_coef": "weight of the KL",
    "objective/scores": "score",
    "policy/clipfrac_avg": "share of clipped ratios",
    "reward": "reward",
    "reward_std": "spread of rewards within a group",
    "rewards/accuracies": "pairs ranked as they should be",
    "rewards/margins": "reward margin of the pairs",
    "score": "score on held-out prompts",
    "val/explained_variance": "variance explained by the values",
}

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Panel:
    phase: str
    name: str
    trained: Points
    held_out: Points

    @property
    def title(self) -> str:
        plain = self.name.replace("_", " ").replace("/", ", ")
        return f"warm-up: {plain}" if self.phase == WARMUP else TITLES.get(self.name, plain)

    @property
    def flat(self) -> float | None:
        """The value, where there is but one; None where it changes."""
        values = [value for _, value in (*self.trained, *self.held_out)]
        least, most = min(values), max(values)
        if most - least > NOISE * max(1.0, abs(most)):
            return None
        return most if abs(most) > NOISE else 0.0


def panels(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Panel]:
    """Of the rows of metrics.jsonl; the phase that the run is for comes first, the warm-up last."""
    found = []
    for phase in sorted(dict.fromkeys(row["phase"] for row in rows), key=lambda phase: phase == WARMUP):

        def points(name: str, phase: str = phase) -> Points:
            return [(row["step"], row[name]) for row in rows if row["phase"] == phase and row.get(name) is not None]

        for name in names:
            if name.startswith("eval_") and name.removeprefix("eval_") in names:
                continue
            panel = Panel(phase, name, points(name), points(f"eval_{name}") if f"eval_{name}" in names else [])
            if panel.trained or panel.held_out:
                found.append(panel)
    return found


def figure(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Figure | None:
    """None where nothing changed that could be drawn."""
    # Figure alone, without pyplot: no display, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    every = panels(rows, names)
    drawn = [panel for panel in every if panel.flat is None]
    if not drawn:
        return None
    columns = columns_for(len(drawn))
    made = Figure(figsize=(4 * columns, 2.8 * math.ceil(len(drawn) / columns) + 0.3), layout="constrained")
    FigureCanvasAgg(made)
    for i, panel in enumerate(drawn):
        _draw(made.add_subplot(math.ceil(len(drawn) / columns), columns, i + 1), panel)
    if still := [panel for panel in every if panel.flat is not None]:
        words = ", ".join(f"{panel.title} {panel.flat:.3g}" for panel in still)
        made.supxlabel(f"not drawn, for it did not change: {words}", fontsize=8, color="0.4", wrap=True)
    return made


def columns_for(count: int) -> int:
    """At most 4, so that as few places as can be stay empty."""
    return count if count < 4 else min((4, 3, 2), key=lambda columns: -count % columns)


def _draw(axes: Any, panel: Panel) -> None:
    colour = COLOURS.get(panel.phase, COLOUR)
    for points, style, label in ((panel.trained, "-", "training"), (panel.held_out, "--", "held out")):
        if points:
            marker = "o" if len(points) < 20 else None
            axes.plot(*zip(*points, strict=True), style, color=colour, marker=marker, markersize=4, label=label)
    if panel.trained and panel.held_out:
        axes.legend(fontsize=8)
    axes.set_title(panel.title, fontsize=10, parse_math=False)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(panel.name, fontsize=8, color="0.4", parse_math=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def png(rows: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Write the curves to a file, where there are some."""
    made = figure(rows, names)
    if made is not None:
        made.savefig(path, dpi=100)
    del made
    _release()


def svg(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """For the body of a page; empty where there are no curves."""
    made, text = figure(rows, names), io.StringIO()
    if made is None:
        return ""
    made.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    del made
    _release()
    return text.getvalue()[text.getvalue().index("<svg") :]


def _release() -> None:
    """A figure's parts refer to each other: 10,000 objects each, which Python would leave for hundreds of steps."""
    gc.collect()
