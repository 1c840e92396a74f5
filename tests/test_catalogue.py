from pathlib import Path
from typing import Any

import pytest

import fused_rlhf as fr
from fused_rlhf import objectives, preferences
from fused_rlhf.objectives import catalogue

PAGE = (Path(__file__).resolve().parents[1] / "docs/objectives.md").read_text(encoding="utf-8")


def test_the_documentation_holds_the_tables_of_the_registries():
    """`python docs/fill.py` writes them."""
    begin, end = "<!-- objectives -->\n", "\n<!-- /objectives -->"
    assert PAGE.split(begin)[1].split(end)[0].strip() == catalogue.markdown()


@pytest.fixture
def _registries():
    tables: tuple[dict[str, Any], ...] = (objectives.SURROGATES, objectives.PRESETS, preferences.PREFERENCES)
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before):
        table.clear()
        table.update(kept)


@pytest.mark.usefixtures("_registries")
def test_a_new_objective_is_one_function_and_appears_in_the_tables():
    @objectives.surrogate
    def triangle(logprob, old, advantage, *, width: float = 1.0):
        """-A max(0, 1 - |r - 1| / width)   (of this test)"""
        return -advantage * (1 - ((logprob - old).exp() - 1).abs() / width).clamp(min=0)

    @preferences.preference()
    def half_hinge(pairs):
        """max(0, 1 - beta d) / 2"""
        return 0.5 * (1 - pairs.beta * pairs.margin).clamp(min=0)

    objectives.preset("Triangle", "triangle", "token_mean", width=0.5)
    text = catalogue.markdown()
    assert "| `Triangle` | `triangle` | `token_mean` | token |" in text
    assert "| `triangle` | -A max(0, 1 - \\|r - 1\\| / width) | width=1.0 |" in text
    assert "| `half_hinge` | max(0, 1 - beta d) / 2 | pairs | yes |" in text
    assert objectives.PRESETS["triangle"](width=0.2).options == {"width": 0.2}
    assert fr.DPO("half_hinge").losses == ("half_hinge",)
