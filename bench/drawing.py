"""What the pictures of results are made of: figures of panels, a line of a panel for each row, bars from zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
WAYS = ("gemm", "dense", "torch-lce", "trl", "liger", "cce", "verl")  # what a provider's name starts with: its colour
PANELS = 6  # of a figure
TEXT = 8  # points


def color(provider: str) -> str:
    place = next((i for i, way in enumerate(WAYS) if provider.startswith(way)), None)
    return f"C{place + 2 if place is not None else 0 if 'two_phase' not in provider else 1}"


def new_figure(panels: int, lines: int = 6) -> tuple[Figure, list[Axes]]:
    """`lines`: bars of the fullest panel."""
    # The object-oriented interface: no window system, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.6 * columns, (1.3 + 0.28 * lines) * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def lines(ax: Axes, records: list[Record], notes: list[str]) -> None:
    """A line of the panel for each record, from the top, with its name to the left and its note at the right end."""
    ax.set_yticks(range(len(records)), [r["provider"] for r in records], fontsize=TEXT)
    ax.set_ylim(len(records) - 0.5, -0.5)
    right = ax.secondary_yaxis("right")
    right.set_yticks(range(len(records)), notes, fontsize=TEXT)
    right.tick_params(length=0)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    right.spines["right"].set_visible(False)


def verdict(r: Record) -> str:
    return ", WRONG" if r["wrong"] else ""


def bar(ax: Axes, place: int, length: float, r: Record) -> None:
    ax.barh(place, length, color=color(r["provider"]), hatch="///" if r["wrong"] else "", edgecolor="white")
