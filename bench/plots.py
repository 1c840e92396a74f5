"""Plots of a result, from its JSON alone. Each is drawn where the rows for it are there, as a small PNG.

memory, error, roof       a panel per case: peak memory or error against time, and the share of the GEMM roof
scaling-AXIS              time and memory over one axis of the shape, where some rows differ in that alone
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Record = dict[str, Any]
AXES = ("N", "T", "V", "H", "density", "zero_rows")  # what a sweep may run over
WAYS = ("gemm", "dense", "torch-lce", "trl", "liger", "cce", "verl")  # what a provider's name starts with: its colour
PANELS = 6  # of a figure


def color(provider: str) -> str:
    place = next((i for i, way in enumerate(WAYS) if provider.startswith(way)), None)
    return f"C{place + 2 if place is not None else 0 if 'two_phase' not in provider else 1}"


def measured(result: Record) -> list[Record]:
    return [r for r in result["rows"] if not r["error"]]


def sweeps(records: list[Record], axis: str) -> Iterator[tuple[str, dict[str, list[Record]]]]:
    """Groups of rows that differ in `axis` alone, at three places or more: a name, and provider -> rows.

    A sweep over the length of one sequence changes N along with T, and is one over T.
    """
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        shape = dict(r["shape"])
        one_sequence = shape["N"] == shape["T"]
        if axis not in shape or (one_sequence and axis == "N"):
            continue
        dropped = {axis, "seed", *(("N",) if one_sequence and axis == "T" else ())}
        groups[tuple(sorted((k, v) for k, v in shape.items() if k not in dropped))][r["provider"]].append(r)
    for key, providers in groups.items():
        known = {
            name: sorted(rows, key=lambda r: r["shape"][axis])
            for name, rows in providers.items()
            if len({r["shape"][axis] for r in rows}) >= 3
        }
        if known:
            yield f"{dict(key)['op']} {dict(key)['dtype']}", known


def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    # The object-oriented interface: no window system, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def logarithmic(axis: Axis) -> None:
    """1, 2, 5, 10 ... in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def scatter(ax: Axes, records: list[Record], y: Callable[[Record], float | None], label: str) -> None:
    """A dot per row, time to the right; a cross where the result was wrong."""
    for place, r in enumerate(sorted(records, key=lambda r: y(r) or 0.0)):
        value = y(r)
        if value:
            ax.plot(r["both_s"]["median"], value, "X" if r["wrong"] else "o", color=color(r["provider"]))
            name, at = r["provider"] + (" (wrong)" if r["wrong"] else ""), (r["both_s"]["median"], value)
            # Neighbours in height have their names on different sides.
            ax.annotate(name, at, xytext=(4, 4 if place % 2 else -9), textcoords="offset points", fontsize=7)
    ax.set(xlabel="seconds", ylabel=label, xscale="log", yscale="log")
    ax.margins(0.3)
    logarithmic(ax.xaxis)
    logarithmic(ax.yaxis)


def memory(r: Record) -> float | None:
    return r["peak_extra_bytes"] and r["peak_extra_bytes"] / 1e9


def error(r: Record) -> float | None:
    return r["errors"].get("dhidden_rel") or r["errors"].get("logprob_max_abs")


def roof(ax: Axes, records: list[Record]) -> None:
    known = sorted((r for r in records if r["gemm_share"] is not None), key=lambda r: r["gemm_share"])
    names, colors = [r["provider"] for r in known], [color(r["provider"]) for r in known]
    ax.barh(names, [100 * r["gemm_share"] for r in known], color=colors)
    ax.axvline(100, color="grey", linewidth=0.8)
    ax.set(xlabel="% of the bare products' speed")


def panels(result: Record) -> Iterator[tuple[str, Figure]]:
    """The cases with several methods, but for those that a sweep shows."""
    good = measured(result)
    swept = {r["case"] for a in AXES for _, found in sweeps(good, a) for rows in found.values() for r in rows}
    cases: dict[str, list[Record]] = defaultdict(list)
    for r in good:
        if r["case"] not in swept or r["case"] == r["op"]:
            cases[r["case"]].append(r)
    shown = [rows for rows in cases.values() if sum(not r["provider"].startswith("gemm") for r in rows) >= 2]
    for start in range(0, len(shown), PANELS):
        part = f"-{start // PANELS + 1}" if len(shown) > PANELS else ""
        for name in ("memory", "error", "roof"):
            some = shown[start : start + PANELS]
            if name == "roof":
                some = [rows for rows in some if any(r["gemm_share"] is not None for r in rows)]
            if not some:
                continue
            figure, axes = new_figure(len(some))
            for ax, rows in zip(axes, some):
                methods = [r for r in rows if not r["provider"].startswith("gemm")]
                if name == "memory":
                    scatter(ax, methods, memory, "peak extra memory, GB")
                elif name == "error":
                    scatter(ax, methods, error, "relative error of dX, or of log-probs")
                else:
                    roof(ax, rows)
                ax.set_title(fill(f"{rows[0]['case']}: {rows[0]['label']}", 60), fontsize=7)
                ax.tick_params(labelsize=7)
            yield name + part, figure


def scaling(result: Record, axis: str) -> Iterator[tuple[str, Figure]]:
    """A cross where a provider failed, at the memory that its formula gives."""
    failed = [r for r in result["rows"] if r["error"] and r.get("predicted_bytes")]
    for name, providers in sweeps(measured(result) + failed, axis):
        figure, (time, space) = new_figure(2)
        for provider, rows in providers.items():
            good = [r for r in rows if not r["error"]]
            x = [r["shape"][axis] for r in good]
            style: dict[str, Any] = {"color": color(provider), "linewidth": 1.2, "markersize": 3}
            time.plot(x, [r["both_s"]["median"] for r in good], "o-", label=provider, **style)
            space.plot(x, [r["peak_extra_bytes"] / 1e9 for r in good], "o-", **style)
            for r in rows:
                if r["error"]:
                    space.plot(r["shape"][axis], r["predicted_bytes"] / 1e9, "x", color=color(provider), markersize=8)
        for ax, label in ((time, "seconds"), (space, "peak extra memory, GB")):
            ax.set(xlabel=axis, ylabel=label, yscale="log")
            logarithmic(ax.yaxis)
            if axis in ("N", "T", "V", "H"):
                ax.set_xscale("log", base=2)
            ax.tick_params(labelsize=7)
            ax.grid(alpha=0.3)
        time.legend(fontsize=7)
        note = ";  x: failed, memory by formula" if any(r["error"] for rows in providers.values() for r in rows) else ""
        figure.suptitle(f"{name}, over {axis}{note}", fontsize=9)
        yield f"scaling-{axis}-{name.replace(' ', '-')}", figure


def draw(result: Record, folder: Path) -> list[Path]:
    """Writes the PNGs, of 256 colours so that they stay small; returns their paths."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in [*panels(result), *(found for axis in AXES for found in scaling(result, axis))]:
        figure.set_dpi(90)
        figure.canvas.draw()
        image = Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
        paths.append(folder / f"{name}.png")
        image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(paths[-1], optimize=True)
    return paths
