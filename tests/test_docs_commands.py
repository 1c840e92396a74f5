"""Every command that the documentation shows is one that there is, with the flags that it has."""

from __future__ import annotations

import importlib.util
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from fused_rlhf.trainers import cli, flags

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "bench/README.md",
    *sorted(f"docs/{p.relative_to(ROOT / 'docs')}" for p in ROOT.glob("docs/**/*.md")),
]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(fused-rlhf [^`]+|python -m [^`]+|make [^`]+)`")
ADDED = "checkpointed"  # a provider that its page adds
HEADS = ("fused-rlhf ", "torchrun ", "accelerate launch", "python -m ", "python3 -m ", "pip ", "make ")


def commands(text: str) -> list[str]:
    """Those in blocks of sh, wherever they are indented to, and those within a line; without comments."""
    blocks = [textwrap.dedent(body) for _, language, body in FENCE.findall(text) if language == "sh"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(words) for line in [*lines, *INLINE.findall(text)] if (words := shlex.split(line, comments=True))]


def check(words: list[str]) -> None:
    """Raises unless this is a command of ours, or one that installs us."""
    match words:
        case ["fused-rlhf", name, *rest] if name in cli.TRAINERS:
            flags.parse(name, [word for word in rest if word != "--dry-run"])
        case ["fused-rlhf", "bench", *rest]:
            check(["python", "-m", "bench", *rest])
        case ["fused-rlhf", name, *_]:
            assert name in cli.OTHERS
        case ["torchrun", *rest]:
            at = rest.index("-m")
            assert rest[at + 1] == "fused_rlhf"
            check(["fused-rlhf", *rest[at + 2 :]])
        case ["python" | "python3", "-m", "bench", *rest]:
            module = importlib.import_module("fused_rlhf.bench.command")
            module.parser("bench").parse_args([word for word in rest if word != ADDED])
        case ["python" | "python3", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case ["make", *targets]:
            assert set(targets) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        case ["pip", "install", *what]:
            extras = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
            asked = [name for word in what for name in word.partition("[")[2].rstrip("]").split(",") if name]
            assert set(asked) <= set(extras["optional-dependencies"])
        case ["pip", "download", *_]:
            pass
        case _:
            raise ValueError(f"no test knows {words}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page: str) -> None:
    for command in commands((ROOT / page).read_text(encoding="utf-8")):
        try:
            check(command.split())
        except (ValueError, SystemExit, AssertionError) as error:
            pytest.fail(f"{page}: {command}: {error}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_blocks_of_sh(page: str) -> None:
    """Where the test above finds them."""
    text = FENCE.sub(lambda found: "" if found[2] else found[3], (ROOT / page).read_text(encoding="utf-8"))
    assert [
        line
        for line in text.splitlines()
        if line.startswith(HEADS) or (re.match(r" {4,}", line) and line.strip().startswith(HEADS))
    ] == []


def test_what_is_wrong_is_found() -> None:
    text = "- a list:\n\n  ```sh\n  fused-rlhf grpo --stepz 3 \\\n      --seed 1   # a comment\n  ```\n\nand `make nothing`."
    assert commands(text) == ["fused-rlhf grpo --stepz 3 --seed 1", "make nothing"]
    for command in commands(text):
        with pytest.raises((ValueError, AssertionError)):
            check(command.split())
