"""Two results of the same suite side by side: which rows became slower, larger or less accurate."""

from __future__ import annotations

from typing import Any

from fused_rlhf.bench.text import gigabytes, number, seconds, table

SLOWER = 1.10  # and the spreads (20 - 80 %) do not overlap
LARGER, LARGER_BYTES = 1.05, 32e6
LESS_ACCURATE, FLOOR = 2.0, 1e-6


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, list[str]]:
    """-> a table of the rows that both have, and a line for each that became worse.
    Raises ValueError where they have none in common.

    Times of two runs say as much of the machine as of the code. What is compared is each over `dense`, or else over the bare
    products, of its own run; a row with neither is not, and that is said.
    """
    before = {(r["case"], r["provider"]): r for r in old["rows"]}
    worse, lines, alone = [], [], []
    for r in new["rows"]:
        was = before.get((r["case"], r["provider"]))
        if was is None or was["shape"] != {key: r["shape"].get(key) for key in was["shape"]}:
            continue
        found = _worse(was, r)
        worse += [f"{r['case']} {r['provider']}: {what}" for what in found]
        if not (was["error"] or r["error"] or yardstick(was, r)):
            alone.append(f"{r['case']} {r['provider']}")
        lines.append([r["case"], r["provider"], *_cells(was), *_cells(r), ", ".join(found)])
    if not lines:
        raise ValueError("--compare: the two results have no row in common: the same case, provider and shape")
    columns = ["time", "/ dense", "peak extra", "dX err"]
    head = ["case", "provider", *(f"{c} (old)" for c in columns), *columns, "worse"]
    conditions = [f"{name}: commit {r['commit']}, {r['date']}" for name, r in (("old", old), ("new", new))]
    said = [NOT_COMPARED + ", ".join(alone)] if alone else []
    return "\n".join([*conditions, "", table(head, lines), "", *said, *(worse or ["nothing became worse"])]), worse


NOT_COMPARED = "times of two runs, without dense or bare products in both, not compared: "


def yardstick(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, float] | None:
    """What both were measured beside, and how much longer the new one takes over it."""
    if old["time_to_dense"] and new["time_to_dense"] and new["provider"] != "dense":
        return "dense", new["time_to_dense"] / old["time_to_dense"]
    if old.get("gemm_share") and new.get("gemm_share") and not new["provider"].startswith("gemm"):
        return "the bare products", old["gemm_share"] / new["gemm_share"]
    return None


def _cells(r: dict[str, Any]) -> list[str]:
    if r["error"]:
        return [r["error"][:30], "-", "-", "-"]
    return [
        seconds(r["both_s"]["median"]),
        number(r["time_to_dense"]),
        gigabytes(r["peak_extra_bytes"]),
        number(r["errors"].get("dhidden_rel"), 2),
    ]


def _worse(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    if new["error"] or old["error"]:
        return [f"fails: {new['error']}"] if new["error"] and not old["error"] else []
    found = []
    over, ratio = yardstick(old, new) or ("", 1.0)
    apart = new["both_s"]["p20"] / new["both_s"]["median"] * ratio > old["both_s"]["p80"] / old["both_s"]["median"]
    if ratio > SLOWER and apart:
        found.append(f"slower, {ratio:.2f}x over {over}")
    was, now = old["peak_extra_bytes"], new["peak_extra_bytes"]
    if was is not None and now is not None and now > LARGER * was + LARGER_BYTES:
        found.append(f"larger, {gigabytes(was)} -> {gigabytes(now)}")
    for key, error in new["errors"].items():
        if error > LESS_ACCURATE * old["errors"].get(key, error) + FLOOR:
            found.append(f"less accurate, {key} {old['errors'][key]:.2g} -> {error:.2g}")
    return [*found, *(["wrong now"] if new["wrong"] and not old["wrong"] else [])]
