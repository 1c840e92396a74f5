"""The two pictures of the README, from committed results: `python docs/draw.py` (needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURES = ROOT / "bench/results/cpu-2core", ROOT / "docs/pictures"
SIDES = {"dense": ("dense logits", "#ef6c00"), "ours": ("fused-rlhf", "#3f51b5")}
WAYS = {
    "dense": SIDES["dense"],
    "trl": ("TRL's trainer", "#8d6e63"),
    "ours-padded": ("ours, padded rows", "#9fa8da"),
    "ours-shared": ("ours, prompt once", "#3f51b5"),
}


def figure(height: float) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": "fused-rlhf", "font.size": 9, "axes.spines.top": False}
    matplotlib.rcParams["axes.spines.right"] = False
    return Figure(figsize=(7, height), layout="constrained")


def memory(result: dict[str, Any], longest: int = 16384) -> Figure:
    """Peak beyond the inputs against the length of one sequence; hollow where it did not fit: by formula."""
    drawn = figure(3.1)
    axes = drawn.add_subplot()
    for provider, side in (("dense", "dense"), ("ours-one_pass", "ours")):
        rows = [r for r in result["rows"] if r["provider"] == provider and r["shape"]["N"] <= longest]
        label, color = SIDES[side]
        tokens = [r["shape"]["N"] for r in rows]
        taken = [r["predicted_bytes" if r["error"] else "peak_extra_bytes"] / 1e9 for r in rows]
        axes.plot(tokens, taken, color=color, linewidth=1.5, label=label)
        for x, y, row in zip(tokens, taken, rows):
            axes.plot(x, y, "o", color=color, markerfacecolor="white" if row["error"] else color, clip_on=False)
            if x == longest:
                text = f"{y:.1f} GB" + (", by formula: refused on this machine" if row["error"] else "")
                axes.annotate(text, (x, y), (-8, 6), textcoords="offset points", ha="right", va="bottom")
    axes.set(
        xlim=(0, None),
        ylim=(0, 1.15 * axes.dataLim.ymax),
        xlabel="tokens of one sequence",
        ylabel="GB beyond the inputs",
    )
    axes.set_xticks([0, 1024, 4096, 8192, 16384], ["0", "1k", "4k", "8k", "16k"])
    axes.legend(frameon=False, loc="center left")
    shape = result["rows"][0]["shape"]
    axes.set_title(conditions(f"GRPO, forward and backward, H={shape['H']} V={shape['V']} fp32", result), fontsize=8)
    return drawn


def step(result: dict[str, Any], case: str = "prompt-heavy") -> Figure:
    """Time and memory of a whole update; the interval is that of the time over padded rows'."""
    rows = sorted((r for r in result["rows"] if r["case"] == case and r["provider"] in WAYS), key=order)
    base = next(r["update_s"]["median"] for r in rows if r["provider"] == r["base"])
    times = [[base / (r["speedup"][end] or r["speedup"]["value"]) for end in ("high", "value", "low")] for r in rows]
    drawn = figure(0.9 + 0.27 * len(rows))
    left, right = drawn.add_subplot(1, 2, 1), drawn.add_subplot(1, 2, 2)
    bars(left, rows, times)
    bars(right, rows, [[r["peak_bytes"] / 1e9] * 3 for r in rows])
    left.set_yticks(range(len(rows)), [WAYS[r["provider"]][0] for r in rows])
    left.set_xlabel("seconds")
    right.set_yticks([])
    right.set_xlabel("GB beyond model, gradients and optimiser")
    drawn.suptitle(conditions(f"An update, {rows[0]['label']}", result), fontsize=8)
    return drawn


def order(row: dict[str, Any]) -> int:
    return list(WAYS).index(row["provider"])


def bars(axes: Any, rows: list[dict[str, Any]], values: list[list[float]]) -> None:
    """A bar from zero for each row, with its number; values: the ends of the interval around it."""
    for y, (row, (low, value, high)) in enumerate(zip(rows, values, strict=True)):
        axes.barh(y, value, color=WAYS[row["provider"]][1], height=0.6)
        if high > low:
            axes.errorbar(value, y, xerr=[[value - low], [high - value]], color="black", linewidth=1, capsize=2)
        axes.annotate(f"{value:.3g}", (high, y), (4, 0), textcoords="offset points", va="center")
    axes.set(xlim=(0, 1.15 * max(high for *_, high in values)), ylim=(len(rows) - 0.5, -0.5))


def conditions(what: str, result: dict[str, Any]) -> str:
    device = result["device"]
    return f"{what}; {device['cpu']}, {device['threads']} threads, torch {result['versions']['torch']}"


if __name__ == "__main__":
    for name, draw, source in (("memory", memory, "long"), ("step", step, "step")):
        found = draw(json.loads((RESULTS / f"{source}.json").read_text(encoding="utf-8")))
        found.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
        print(f"docs/pictures/{name}.svg")
