"""The documentation says what is so: its code runs, its generated parts are those of their sources, its names are there."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf import backends, objectives, preferences
from fused_rlhf.backends import sizes
from fused_rlhf.kernels.interface import Needs, Work
from fused_rlhf.kernels.statistics import STATISTICS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a page: line of the first line, and text."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [(text[: m.start(2)].count("\n"), m[2]) for m in FENCE.finditer(text) if m[1] == language]


def run_blocks(page: str) -> dict[str, Any]:
    """All of a page's Python, one block after the other in one namespace; an error names line and page."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(DOCS / page), "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A page may write files, register things and draw random numbers."""
    from fused_rlhf.bench.registry import PROVIDERS

    tables: tuple[dict[str, Any], ...] = (
        *(objectives.SURROGATES, objectives.PRESETS, preferences.PREFERENCES, preferences.PRESETS),
        *(STATISTICS, backends.BACKENDS, PROVIDERS),
    )
    before = [dict(table) for table in tables]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_rewards", None)
    for table, kept in zip(tables, before):
        table.clear()
        table.update(kept)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_code_of_a_page_runs(page: str) -> None:
    if page == "ways/trl.md":
        pytest.importorskip("trl")
    assert run_blocks(page)


def test_the_page_of_the_trainers_holds_commands_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is built and checked, and stops before its first step."""
    from fused_rlhf.trainers import cli

    run_blocks("ways/trainers.md")
    commands = [
        line.partition("  #")[0]
        for _, text in blocks("ways/trainers.md", "sh")
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("fused-rlhf ") and not re.search("smollm2|gsm8k", line)  # which are not in the checkout
    ]
    assert len(commands) == 9
    small = ["--hidden-size", "32", "--num-layers", "1", "--dry-run"]
    for command in commands:
        assert cli.main([*shlex.split(command)[1:], *small]) == 0, (command, capsys.readouterr().err)
        assert "tokens" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_generated_parts_are_those_of_their_sources(page: str) -> None:
    """`python docs/fill.py` writes them."""
    pytest.importorskip("triton")  # whose formulas are among them
    spec = importlib.util.spec_from_file_location("fill", DOCS / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    text = (DOCS / page).read_text(encoding="utf-8")
    assert fill.filled(text) == text


def test_the_table_of_memory_is_that_of_the_backends() -> None:
    for label, found in sizes.rows(1000, 5000, 64, torch.bfloat16):
        name = dict(sizes.ROWS)[label]
        for (_, route, trains), size in zip(sizes.COLUMNS, found, strict=True):
            work = Work(route, 1000, 64, 5000, torch.bfloat16, Needs(True, trains, False))
            assert size == backends.load(name).memory(work)
    assert "| dense | 0.04 | 0.06 |" in sizes.table(1000, 5000, 64)


def test_sizes_are_printed_for_anyones_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert sizes.main(["2048", "151936", "896", "fp32"]) == 0
    assert "chunked (CPU)" in capsys.readouterr().out
    assert sizes.main(["2048", "many"]) == 2
    assert "expected N V H" in capsys.readouterr().err


def test_every_public_name_is_in_the_api() -> None:
    shown = set(re.findall(r"^::: fused_rlhf\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(fr.__all__) <= shown
    assert all(hasattr(fr, name) or importlib.util.find_spec(f"fused_rlhf.{name}") for name in shown)


def spoken(node: ast.AST) -> str | None:
    """A string of the source, with NUL for what is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values)
    return None


def test_messages_that_people_search_for_are_those_of_the_source() -> None:
    """Of each row's first column, between its dots."""
    sources = [path for folder in ("kernels", "fused_rlhf", "trainers") for path in (ROOT / folder).glob("**/*.py")]
    texts = [t for path in sources for node in ast.walk(ast.parse(path.read_text("utf-8"))) if (t := spoken(node))]
    table = re.findall(r"^\| `([^|]+)` \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(table) > 30
    patterns = [re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL) for message in table]
    lost = [message for message, p in zip(table, patterns) if not any(map(p.search, texts))]
    assert not lost


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    page = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    assert "fused_rlhf.linear_policy_loss" in page
    shown = {name: page.split(f'id="fused_rlhf.{name}"')[1].split("<h3 ")[0] for name in ("GRPO", "SimPO")}
    for name, words in (("GRPO", ("epsilon_high", "0.2", "arXiv:2402.03300")), ("SimPO", ("loss_type", "beta"))):
        text = re.sub("<[^>]+>", "", shown[name])
        assert all(word in text for word in (f"{name}(", "Loss", "Parameters:", *words)), text


def drawing() -> Any:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    return draw


def test_the_pictures_show_the_results_from_zero_and_nothing_twice() -> None:
    draw = drawing()
    for name, source in (("memory", "long"), ("step", "step")):
        assert (DOCS / f"pictures/{name}.svg").exists()
        drawn = getattr(draw, name)(json.loads((draw.RESULTS / f"{source}.json").read_text(encoding="utf-8")))
        drawn.canvas.draw()
        assert all(axes.get_xlim()[0] == 0 for axes in drawn.axes)
        texts = [t for axes in drawn.axes for t in (*axes.texts, axes.title)] + [drawn._suptitle]
        boxes = [t.get_window_extent() for t in texts if t is not None and t.get_text()]
        assert len(boxes) >= 3
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(drawn.bbox.x0 <= box.x0 and box.x1 <= drawn.bbox.x1 for box in boxes)


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) < 8000
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_code_of_the_readme_runs() -> None:
    pytest.importorskip("trl")
    from fused_rlhf.trainers.model import build

    ids = torch.randint(3, 90, (4, 7))
    namespace: dict[str, Any] = {"model": build(32, 1)[0], "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    namespace |= {"mask": torch.ones_like(ids), "advantages": torch.randn(4), "old": torch.full((4, 6), -4.0)}
    for _, code in blocks("../README.md", "python"):
        exec(code, namespace)
    assert namespace["loss"].isfinite()
