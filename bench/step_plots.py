"""Plots of whole updates, from the result alone: a panel for each case, a bar for each way, from zero.

time      over that of the case's first row, with its 95 % interval; beside it seconds, and how many times as fast
memory    activations: the peak over what weights, gradients and optimiser take
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from textwrap import fill
from typing import TYPE_CHECKING, Any

from fused_rlhf.bench.drawing import PANELS, TEXT, bar, lines, new_figure, verdict
from fused_rlhf.bench.text import gigabytes, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]


def time(ax: Axes, records: list[Record]) -> None:
    notes = []
    for place, r in enumerate(records):
        ratio = r["speedup"]
        share = 1 / ratio["value"]
        bar(ax, place, share, r)
        if ratio["low"] is not None:
            ends = [[max(share - 1 / ratio["high"], 0)], [max(1 / ratio["low"] - share, 0)]]
            ax.errorbar(share, place, xerr=ends, color="black", linewidth=1, capsize=3)
        faster = "" if r["provider"] == r["base"] else f", {ratio['value']:.2f}x as fast"
        notes.append(f"{seconds(r['update_s']['median'])}{faster}{verdict(r)}")
    lines(ax, records, notes)
    ax.set_xlim(left=0)
    ax.set_xlabel(f"time of an update over that of {records[0]['base']}", fontsize=TEXT)


def memory(ax: Axes, records: list[Record]) -> None:
    notes = []
    for place, r in enumerate(records):
        bar(ax, place, r["peak_bytes"] / 1e9, r)
        fewer = "" if r["provider"] == r["base"] else f", {r['less_memory']:.2f}x less"
        notes.append(f"{gigabytes(r['peak_bytes'])}{fewer}{verdict(r)}")
    lines(ax, records, notes)
    ax.set_xlim(left=0)
    ax.set_xlabel("activations, GB", fontsize=TEXT)


PANEL: dict[str, tuple[Callable[[Axes, list[Record]], None], Callable[[Record], bool]]] = {
    "time": (time, lambda r: r["speedup"] is not None),
    "memory": (memory, lambda r: bool(r["peak_bytes"] and r["less_memory"])),
}


def figures(result: Record) -> Iterator[tuple[str, Figure]]:
    """All of them, each with the name of its file."""
    for name, (drawn, shown) in PANEL.items():
        cases: dict[str, list[Record]] = defaultdict(list)
        for r in result["rows"]:
            if not r["error"] and shown(r):
                cases[r["case"]].append(r)
        some = list(cases.values())
        for start in range(0, len(some), PANELS):
            part = some[start : start + PANELS]
            figure, axes = new_figure(len(part), max(map(len, part)))
            for ax, records in zip(axes, part):
                drawn(ax, records)
                ax.set_title(fill(f"{records[0]['case']}: {records[0]['label']}", 60), fontsize=TEXT)
                ax.tick_params(labelsize=TEXT)
            yield name + (f"-{start // PANELS + 1}" if len(some) > PANELS else ""), figure
