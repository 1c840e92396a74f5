import logging
from typing import Any

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf import notices

HIDDEN = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(11, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    before = notices.log.level
    yield
    notices.log.setLevel(before)


def test_a_line_says_backend_and_head_once(caplog):
    with caplog.at_level(logging.INFO, "fused_rlhf"):
        for _ in range(2):
            notices.runs("log-probs", HIDDEN, fr.Head(WEIGHT, softcap=30.0), "auto", "padding is skipped")
    (message,) = caplog.messages
    assert message == (
        "fused_rlhf computes log-probs: backend chunked on cpu, float32; head (11, 8) float32 with softcap 30; "
        "padding is skipped"
    )


def test_a_head_in_words():
    lora = (torch.zeros(4, 8), torch.zeros(11, 4), 2.0)
    assert notices.in_words(fr.Head(WEIGHT)) == "head (11, 8) float32, its logits as they are"
    words = notices.in_words(fr.Head(WEIGHT.bfloat16(), torch.zeros(11), logit_scale=0.5, lora=lora))
    assert words == "head (11, 8) bfloat16 with bias, logit_scale 0.5, LoRA of rank 4"


def test_without_logging_the_line_goes_to_stderr_unless_the_logger_is_told_otherwise(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    notices.say("one")
    assert capsys.readouterr().err == "one\n"
    notices.log.setLevel(logging.WARNING)
    notices.say("two")
    assert not capsys.readouterr().err


def test_one_process_of_several_speaks(capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    notices.say("one")
    assert not capsys.readouterr().err


def liger():
    from fused_rlhf.integrations.liger import LigerFusedLinearORPOLoss

    LigerFusedLinearORPOLoss()(WEIGHT, torch.stack([HIDDEN, HIDDEN]), torch.tensor([[1, 2, -100], [3, 4, 5]]))


def verl():
    from fused_rlhf.integrations.verl import linear_cross_entropy

    linear_cross_entropy(HIDDEN, WEIGHT, torch.tensor([1, 2, 3]))


def trl_kernel():
    from fused_rlhf.integrations.trl import FusedLogProbs

    FusedLogProbs.apply(HIDDEN, WEIGHT, None, torch.tensor([1, 2, 3]), 1.0, 4)


def trl_head():
    from fused_rlhf.integrations.trl import add_fused_lm_head
    from fused_rlhf.trainers import model as models

    model: Any = models.build(hidden_size=32, num_layers=1)[0]
    add_fused_lm_head(model)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[-100, 2, 3]]), fused_lm_head=True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (liger, "fused_rlhf computes Liger's losses: backend chunked on cpu"),
        (verl, "fused_rlhf computes verl's log-probs: backend chunked on cpu"),
        (trl_kernel, "fused_rlhf computes TRL's log-probs: backend chunked on cpu"),
        (trl_head, "fused_rlhf computes TRL's log-probs: backend chunked on cpu"),
    ],
)
def test_every_drop_in_says_once_that_it_runs(call, words, caplog):
    with caplog.at_level(logging.INFO, "fused_rlhf"):
        call()
        call()
    (message,) = caplog.messages
    assert words in message


def test_the_drop_ins_own_checks_are_silent(caplog):
    from fused_rlhf.integrations.trl import _check_kernel, trl_utils

    with caplog.at_level(logging.INFO, "fused_rlhf"):
        _check_kernel.__wrapped__(trl_utils._ChunkedLogProbFunction)
    assert not caplog.messages
