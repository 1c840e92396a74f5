"""The built image-text model: saved, loaded, and looking."""

import json

import pytest
import torch

from fused_rlhf.trainers import cli, shapes, small_vision
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.conversation import encode


def test_it_is_saved_and_loaded_and_sees(tmp_path):
    torch.manual_seed(0)
    model, processor = models.build(32, 1, pictures=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = models.load(str(tmp_path))
    sample, other = shapes.samples(3, 0)[::2]
    logits = []
    for which, its in ((model, processor), (loaded, again)):
        for row in (sample, {**sample, "images": other["images"]}):
            made = encode(its.tokenizer, its, row)
            assert made.ids.count(its.image_token_id) == (shapes.SIZE // small_vision.PATCH) ** 2
            logits.append(which.eval()(input_ids=torch.tensor([made.ids]), **made.extras).logits[0, -1])
    torch.testing.assert_close(logits[0], logits[2], atol=0, rtol=0)
    assert (logits[0] - logits[1]).abs().max() > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("command", "recipe", "blind"), [("dpo", "pictures_dpo", 0.5), ("grpo", "pictures", 0.25)])
def test_the_recipes_must_look_and_do(tmp_path, command, recipe, blind):
    assert cli.main([command, "--config", recipe, "--output", str(tmp_path / "run"), "--threads", "1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    name = "eval_rewards/accuracies" if command == "dpo" else "accuracy"
    found = [row[name] for row in rows if name in row and row["phase"] == command]
    assert found[-1] > blind + 0.15
    if command == "grpo":
        assert found[-1] > found[0] + 0.05
