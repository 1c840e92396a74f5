"""Six of the families of bench/pictures.md, tried again; and the table, whose cells are all right."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
from fused_rlhf.bench import picture_checks as checks
from fused_rlhf.bench import pictures
from fused_rlhf.bench.picture_family import Family
from fused_rlhf.bench.pictures import Row, markdown, shown, wrong
from fused_rlhf.trainers.collation import Collator
from tests.vision_families import FAMILIES

TABLE = Path(pictures.__file__).parent / "results" / "pictures.json"
SIX = ("qwen2.5-vl", "llava-onevision", "gemma3", "idefics3", "paligemma", "mllama")
GOOD = Row("some", "11/11", "11/11", "19/19", 1e-7, 0.1, 1e-7, 1e-7, 1e-7, 14, 1e-7, "ValueError: no")


def committed() -> dict[str, Row]:
    return {name: Row(**row) for name, row in json.loads(TABLE.read_text())["rows"].items()}


@pytest.mark.parametrize("name", SIX)
def test_a_family_is_right_in_every_column(name: str) -> None:
    row = pictures.tried(name, trl=False)
    assert wrong(row) == [], row
    old = committed()[name]
    assert (row.prompts, row.pairs, row.refused) == (old.prompts, old.pairs, old.refused)
    assert row.adapters == old.adapters


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-vl", "idefics3"])
def test_a_step_equals_trls(name: str) -> None:
    pytest.importorskip("trl", reason="TRL is the oracle")
    family = Family(name)
    assert {shown(column, check(family)) for column, check in pictures.TRL.items()} == {"equal"}


def test_the_table_has_every_family_and_none_is_wrong() -> None:
    rows = committed()
    assert list(rows) == list(FAMILIES)
    assert not {name: wrong(row) for name, row in rows.items() if wrong(row)}
    versions = json.loads(TABLE.read_text())["versions"]
    assert (TABLE.parent.parent / "pictures.md").read_text() == markdown(list(rows.values()), versions)


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("prompts", "wrong: PIL"),
        ("pairs", "10/11"),
        ("refused", "0/0"),
        ("batch", 1e-3),
        ("seen", 0.0),
        ("dpo", float("nan")),
        ("grpo", "failed: AssertionError: completions differ where they are sampled alone"),
        ("ppo", ""),
        ("adapters", 0),
    ],
)
def test_a_cell_that_is_wrong_is_told(column: str, cell: Any) -> None:
    assert wrong(GOOD) == []
    changed: dict[str, Any] = {column: cell}
    assert wrong(dataclasses.replace(GOOD, **changed)) == [column]


def test_cells_of_trl() -> None:
    found = [shown("trl", cell) for cell in (1e-7, 0.03, "0.03: its prompts have no BOS", "ValueError: no")]
    words = ["equal", "TRL differs by 0.03", "TRL differs by 0.03: its prompts have no BOS", "ValueError: no"]
    assert found == words


def test_a_batch_that_is_put_together_otherwise_is_seen_to_be_wrong() -> None:
    family = Family("mllama")
    assert checks.batch(family) < 1e-5
    family.collator = Collator(**{**vars(family.collator), "share": "all"})
    assert checks.batch(family) > 1e-3
    family.collator = Collator()
    assert pictures.attempt(checks.batch, family).startswith("failed: ")
