"""Plots of a result, from its JSON alone. Each is drawn where the rows for it are there, as a small PNG.

memory, error, roof       a panel per case, a line per method: peak memory from zero, with the time beside it; error on a
                          scale of decades, with what the method promises; share of the bare products' speed
scaling-AXIS              time and memory over one axis of the shape, where some rows differ in that alone; from zero, or
                          on a scale of decades where they span more than one

A method's name stands on the axis, so that no two can overprint each other. A row that was wrong is hatched and says so; one
that had too little memory shows what its formula gives, as an outline.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from math import ceil, floor, log10
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from fused_rlhf.bench import step_plots
from fused_rlhf.bench.drawing import PANELS, TEXT, bar, color, lines, new_figure, verdict
from fused_rlhf.bench.text import gigabytes, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Record = dict[str, Any]
AXES = ("N", "T", "V", "H", "density", "zero_rows")  # what a sweep may run over
DECADES = 3  # that an axis of errors shows at least: less makes a few per cent look like a difference


def measured(result: Record) -> list[Record]:
    return [r for r in result["rows"] if not r["error"]]


def too_large(r: Record) -> bool:
    """Whether a row has no figures because of its memory, which its formula knows."""
    return bool(r["error"] and r.get("predicted_bytes") and r["error"].startswith(("out of memory", "not started")))


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


def logarithmic(axis: Axis) -> None:
    """1, 2, 5, 10 ... in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def sizes(axis: Axis, values: list[int]) -> None:
    """Ticks at these, as 512, 8k, 128k."""
    from matplotlib.ticker import NullLocator

    axis.set_minor_locator(NullLocator())
    axis.set_ticks(values, [f"{v // 1024}k" if v % 1024 == 0 else str(v) for v in values])


def memory(ax: Axes, records: list[Record]) -> None:
    """Bars from zero."""
    records = sorted(records, key=lambda r: r["predicted_bytes"] if r["error"] else r["peak_extra_bytes"])
    notes = []
    for place, r in enumerate(records):
        if r["error"]:
            ax.barh(place, r["predicted_bytes"] / 1e9, color="none", edgecolor=color(r["provider"]), linestyle="--")
            notes.append(f"{gigabytes(r['predicted_bytes'])} by formula: did not fit")
        else:
            bar(ax, place, r["peak_extra_bytes"] / 1e9, r)
            notes.append(f"{gigabytes(r['peak_extra_bytes'])}, {seconds(r['both_s']['median'])}{verdict(r)}")
    lines(ax, records, notes)
    ax.set_xlim(left=0)
    ax.set_xlabel("peak extra memory, GB", fontsize=TEXT)


def error_of(r: Record) -> float | None:
    """Of the gradients, the larger; where there are none, of the log-probs."""
    gradients = [r["errors"][key] for key in ("dhidden_rel", "dweight_rel") if key in r["errors"]]
    return max(gradients, default=None) or r["errors"].get("logprob_max_abs")


def error(ax: Axes, records: list[Record]) -> None:
    """Points over decades; a bar beside each is what its provider promises."""
    known = sorted(((e, r) for r in records if (e := error_of(r))), key=lambda pair: pair[0])
    gradients = any("dhidden_rel" in r["errors"] for _, r in known)
    promises = [r.get("tolerance", {}).get("gradient" if gradients else "logprob") for _, r in known]
    low, high = decades([e for e, _ in known] + [p for p in promises if p])
    for place, ((value, r), promised) in enumerate(zip(known, promises)):
        ax.plot(value, place, "X" if r["wrong"] else "o", color=color(r["provider"]))
        if promised:
            ax.plot([promised, promised], [place - 0.35, place + 0.35], color="grey", linewidth=1.5)
    lines(ax, [r for _, r in known], [f"{value:.1e}{verdict(r)}" for value, r in known])
    ax.set(xscale="log", xlim=(low, high))
    ax.grid(axis="x", alpha=0.3)
    what = "relative error of dX or dW, the larger" if gradients else "largest error of a log-prob, nats"
    ax.set_xlabel(f"{what}{'; grey: promised' if any(promises) else ''}", fontsize=TEXT)


def decades(values: list[float]) -> tuple[float, float]:
    """Whole decades around the values, `DECADES` of them at least."""
    low, high = floor(log10(min(values))), ceil(log10(max(values)) + 1e-9)
    missing = max(DECADES - (high - low), 0)
    return 10.0 ** (low - missing // 2), 10.0 ** (high + missing - missing // 2)


def roof(ax: Axes, records: list[Record]) -> None:
    """Bars from zero."""
    known = sorted(records, key=lambda r: -r["gemm_share"])
    for place, r in enumerate(known):
        bar(ax, place, 100 * r["gemm_share"], r)
    ax.axvline(100, color="grey", linewidth=0.8)
    lines(ax, known, [f"{r['gemm_share']:.0%}{verdict(r)}" for r in known])
    ax.set_xlim(left=0)
    ax.set_xlabel("% of the bare products' speed", fontsize=TEXT)


def bare(r: Record) -> bool:
    return r["provider"].startswith("gemm")


# How each panel is drawn, and of which rows of a case.
PANEL: dict[str, tuple[Callable[[Axes, list[Record]], None], Callable[[Record], bool]]] = {
    "memory": (
        memory,
        lambda r: not bare(r) and (too_large(r) or (not r["error"] and r["peak_extra_bytes"] is not None)),
    ),
    "error": (error, lambda r: not bare(r) and not r["error"] and bool(error_of(r))),
    "roof": (roof, lambda r: not r["error"] and r.get("gemm_share") is not None),
}


def title(r: Record) -> str:
    return r["label"] if r["label"].startswith(r["case"]) else f"{r['case']}: {r['label']}"


def panels(result: Record) -> Iterator[tuple[str, Figure]]:
    """The cases with several methods, but for those that a sweep shows."""
    good = measured(result)
    swept = {r["case"] for a in AXES for _, found in sweeps(good, a) for rows in found.values() for r in rows}
    cases: dict[str, list[Record]] = defaultdict(list)
    for r in result["rows"]:
        if r["case"] not in swept or r["case"] == r["op"]:
            cases[r["case"]].append(r)
    done = {r["case"] for r in good if not bare(r)}
    for name, (drawn, shown) in PANEL.items():
        chosen = [[r for r in rows if shown(r)] for case, rows in cases.items() if case in done]
        chosen = [rows for rows in chosen if sum(not bare(r) for r in rows) >= 2]
        for start in range(0, len(chosen), PANELS):
            some = chosen[start : start + PANELS]
            figure, axes = new_figure(len(some), max(map(len, some)))
            for ax, rows in zip(axes, some):
                drawn(ax, rows)
                ax.set_title(fill(title(rows[0]), 52), fontsize=TEXT)
                ax.tick_params(labelsize=TEXT)
            yield name + (f"-{start // PANELS + 1}" if len(chosen) > PANELS else ""), figure


def scaling(result: Record, axis: str) -> Iterator[tuple[str, Figure]]:
    """A cross where a provider had too little memory, at what its formula gives."""
    names: Counter[str] = Counter()
    for name, providers in sweeps(measured(result) + [r for r in result["rows"] if too_large(r)], axis):
        names[name] += 1
        figure, (time, space) = new_figure(2)
        places = sorted({r["shape"][axis] for rows in providers.values() for r in rows})
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
            ax.set(xlabel=axis, ylabel=label)
            low, high = ax.dataLim.intervaly
            if high > 10 * low:
                ax.set_yscale("log")
                logarithmic(ax.yaxis)
            else:
                ax.set_ylim(0, 1.05 * high)
            if axis in ("N", "T", "V", "H"):
                ax.set_xscale("log", base=2)
                sizes(ax.xaxis, places)
            ax.tick_params(labelsize=TEXT)
            ax.grid(alpha=0.3)
        figure.legend(*time.get_legend_handles_labels(), loc="outside right center", fontsize=TEXT)
        failed = any(r["error"] for rows in providers.values() for r in rows)
        note = ";  x: did not fit, memory by formula" if failed else ""
        shape = next(iter(providers.values()))[0]["shape"]
        swept = {axis, "N"} if axis == "T" and shape["N"] == shape["T"] else {axis}
        fixed = " ".join(f"{key}={shape[key]}" for key in ("N", "H", "V", "T") if key not in swept)
        over = "one sequence of T" if len(swept) > 1 else axis
        figure.suptitle(f"{name} {fixed}, over {over}{note}", fontsize=TEXT + 1)
        again = f"-{names[name]}" if names[name] > 1 else ""
        yield f"scaling-{axis}-{name.replace(' ', '-')}{again}", figure


def figures(result: Record) -> Iterator[tuple[str, Figure]]:
    """All of them, each with the name of its file."""
    if result["suite"] == "step":
        yield from step_plots.figures(result)
        return
    yield from panels(result)
    for axis in AXES:
        yield from scaling(result, axis)


def draw(result: Record, folder: Path) -> list[Path]:
    """Writes the PNGs, of 256 colours so that they stay small; returns their paths."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures(result):
        figure.set_dpi(90)
        figure.canvas.draw()
        image = Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
        paths.append(folder / f"{name}.png")
        image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(paths[-1], optimize=True)
    return paths
