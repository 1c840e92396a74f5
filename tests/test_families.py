"""Thirty of the families of bench/families.md, tried again: each column is what the table says, and none is wrong."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
families = pytest.importorskip("fused_rlhf.bench.families")
TABLE = Path(families.__file__).parent / "results" / "families.json"

# family: columns that are right, the others being refused
EVERYWHERE = "none right left resized"
NOT_LEFT = "none right resized"
THIRTY = {
    "causal:qwen2": EVERYWHERE,
    "causal:qwen3_moe": EVERYWHERE,
    "causal:llama": EVERYWHERE,
    "causal:gemma2": EVERYWHERE,
    "causal:gpt2": EVERYWHERE,
    "causal:gpt_bigcode": EVERYWHERE,
    "causal:gpt_neo": EVERYWHERE,
    "causal:gptj": EVERYWHERE,
    "causal:opt": EVERYWHERE,
    "causal:bloom": EVERYWHERE,
    "causal:mpt": EVERYWHERE,
    "causal:falcon": EVERYWHERE,
    "causal:mamba": EVERYWHERE,
    "causal:bamba": EVERYWHERE,
    "causal:bert": EVERYWHERE,
    "causal:roberta": NOT_LEFT,
    "causal:bart": NOT_LEFT,
    "seq2seq:t5": EVERYWHERE,
    "seq2seq:bart": NOT_LEFT,
    "seq2seq:marian": NOT_LEFT,
    "seq2seq:m2m_100": NOT_LEFT,
    "masked:bert": "",
    "masked:roberta": "",
    "masked:distilbert": "",
    "masked:modernbert": "",
    "vision:llava": EVERYWHERE,
    "vision:qwen2_vl": EVERYWHERE,
    "vision:gemma3": EVERYWHERE,
    "speech:whisper": NOT_LEFT,
    "speech:voxtral": EVERYWHERE,
}


def test_thirty() -> None:
    assert len(THIRTY) == 30
    assert {kind.split(":")[0] for kind in THIRTY} == set(families.KINDS)


@pytest.mark.parametrize("family", THIRTY)
def test_a_family_is_as_the_table_says(family: str) -> None:
    row = families.tried(*family.split(":"))
    right = THIRTY[family].split()
    assert row.get("none") is not None, row  # built, and run
    assert {c: row[c] for c in families.COLUMNS} == {
        c: "right" if c in right else "refused" for c in families.COLUMNS
    }, row


def test_the_table_has_every_family_and_none_is_wrong() -> None:
    rows = json.loads(TABLE.read_text())["rows"]
    found = {name: families.verdict(row) for name, row in rows.items()}
    assert not [name for name, verdict in found.items() if verdict in ("wrong", "failed")]
    assert set(THIRTY) <= set(found)
    assert all(
        row.get("why") or families.verdict(row) == "right" or "not" in families.verdict(row) for row in rows.values()
    )
