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


def step(result: dict[str, Any]) -> Figure:
    """Memory and time of a whole training step."""
    drawn = figure(1.9)
    columns = (("peak_extra_bytes", 1e9, "GB beyond model and optimiser"), ("seconds", 1, "seconds"))
    for place, (key, unit, label) in enumerate(columns, 1):
        axes = drawn.add_subplot(1, 2, place)
        for row, side in enumerate(reversed(result["sides"])):
            name, color = SIDES[side["side"]]
            value = side[key] / unit
            axes.barh(name, value, color=color, height=0.6)
            axes.annotate(f"{value:.2g}", (value, row), (4, 0), textcoords="offset points", va="center")
        axes.set(xlim=(0, 1.12 * max(side[key] for side in result["sides"]) / unit), xlabel=label)
    shape = result["shape"]
    what = f"A training step, {shape['layers']} layers, T={shape['tokens']} H={shape['hidden']} V={shape['vocabulary']} fp32"
    drawn.suptitle(conditions(what, result), fontsize=8)
    return drawn


def conditions(what: str, result: dict[str, Any]) -> str:
    device = result["device"]
    return f"{what}; {device['cpu']}, {device['threads']} threads, torch {result['versions']['torch']}"


if __name__ == "__main__":
    for name, draw, source in (("memory", memory, "long"), ("step", step, "step")):
        found = draw(json.loads((RESULTS / f"{source}.json").read_text(encoding="utf-8")))
        found.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
        print(f"docs/pictures/{name}.svg")
