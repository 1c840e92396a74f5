import gc

import pytest
from matplotlib.figure import Figure

from fused_rlhf.trainers import curves
from fused_rlhf.trainers.dpo import DPOTrainer
from fused_rlhf.trainers.grpo import GRPOTrainer
from fused_rlhf.trainers.ppo import PPOTrainer


def rows(phase, **columns):
    length = len(next(iter(columns.values())))
    return [{"phase": phase, "step": i} | {name: c[i] for name, c in columns.items()} for i in range(length)]


ROWS = [
    *rows("warmup", loss=[3.0, 2.0], accuracy=[0.1, 0.2]),
    *rows("grpo", loss=[3e-8, -2e-9], reward=[0.0, 0.5], entropy=[1.0, 0.5], kl=[None, None], score=[1.0, 1.0]),
]
NAMES = ("reward", "loss", "kl", "entropy", "score", "never")


def test_a_panel_is_of_one_phase_and_the_runs_own_comes_first():
    found = [(panel.phase, panel.name) for panel in curves.panels(ROWS, NAMES)]
    assert found == [*(("grpo", name) for name in ("reward", "loss", "entropy", "score")), ("warmup", "loss")]
    assert [panel.title for panel in curves.panels(ROWS, NAMES)][-2:] == ["score on held-out prompts", "warm-up: loss"]


def test_what_is_measured_on_held_out_samples_shares_the_panel():
    some = rows("dpo", loss=[0.7, 0.6], eval_loss=[0.7, 0.65], eval_margin=[0.0, 1.0])
    first, second = curves.panels(some, ("loss", "eval_loss", "eval_margin"))
    assert (first.trained, first.held_out) == ([(0, 0.7), (1, 0.6)], [(0, 0.7), (1, 0.65)])
    assert (second.name, second.trained, second.held_out) == ("eval_margin", [(0, 0.0), (1, 1.0)], [])


@pytest.mark.curves
def test_noise_and_constants_are_named_and_not_drawn():
    made = curves.figure(ROWS, NAMES)
    assert [axes.get_title() for axes in made.axes] == ["reward", "entropy of the next token", "warm-up: loss"]
    assert made.get_supxlabel() == "not drawn, for it did not change: loss 0, score on held-out prompts 1"
    assert all(axes.lines for axes in made.axes)
    assert [axes.lines[0].get_color() for axes in made.axes] == ["tab:blue", "tab:blue", "tab:orange"]
    assert curves.figure(ROWS, ("kl", "score", "never")) is None
    assert curves.figure(rows("grpo", reward=[0.5]), ("reward",)) is None


@pytest.mark.curves
def test_an_svg_stands_in_a_page_and_names_are_no_formulas():
    text = curves.svg(rows("test", **{"cost in $ & $x_": [1.0, 2.0]}), ("cost in $ & $x_",))
    assert text.startswith("<svg")
    assert text.rstrip().endswith("</svg>")
    assert "<script" not in text


@pytest.mark.parametrize("count", range(1, 13))
def test_few_places_stay_empty(count):
    columns = curves.columns_for(count)
    assert columns <= 4
    assert -count % columns <= 1


def test_every_trainer_draws_its_entropy_and_what_has_a_title():
    for trainer in (GRPOTrainer, PPOTrainer, DPOTrainer):
        assert any("entropy" in name for name in trainer.plotted)
    drawn = {name for trainer in (GRPOTrainer, PPOTrainer, DPOTrainer) for name in trainer.plotted}
    assert set(curves.TITLES) - drawn == set()


@pytest.mark.curves
def test_nothing_is_left_of_a_figure_that_is_written(tmp_path):
    assert curves.svg(rows("grpo", reward=[0.5]), ("reward",)) == ""
    curves.png(ROWS, NAMES, tmp_path / "curves.png")  # fonts and styles stay
    assert (tmp_path / "curves.png").stat().st_size > 1000
    gc.disable()
    try:
        curves.png(ROWS, NAMES, tmp_path / "curves.png")
        curves.svg(ROWS, NAMES)
        assert not [it for it in gc.get_objects() if isinstance(it, Figure)]
    finally:
        gc.enable()
