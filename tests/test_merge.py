import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fused_rlhf.trainers import adapters, cli
from fused_rlhf.trainers import model as models


@pytest.fixture
def run(tmp_path):
    """A folder as a LoRA run leaves it, its base in bf16, and the logits of the model with its adapters on."""
    torch.manual_seed(0)
    model, tokenizer = models.build(hidden_size=32, num_layers=1)
    for folder in (tmp_path / "base", tmp_path / "run" / "model"):
        tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "run" / "model")
    ids = torch.arange(3, 15).view(2, 6)
    return tmp_path / "run", ids, adapted.eval()(ids).logits.detach()


@pytest.mark.parametrize("inside", [False, True], ids=["run", "adapters"])
def test_the_merged_model_loads_and_is_the_adapted_one(run, tmp_path, capsys, inside):
    folder, ids, expected = run
    source = folder / "model" if inside else folder
    assert cli.main(["merge", str(source), "--output", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "merged into its base: " in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("12").input_ids
    assert not (tmp_path / "out" / adapters.FILE).exists()
    assert cli.main(["merge", str(source), "--output", str(tmp_path / "out")]) == 2  # nothing is written over
    assert "--output: expected a folder that is new or empty" in capsys.readouterr().err


def test_the_dtype_is_the_base_s_own(run, tmp_path):
    assert cli.main(["merge", str(run[0]), "--output", str(tmp_path / "out")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_what_holds_no_adapters_is_refused(tmp_path, capsys):
    (tmp_path / "whole" / "model").mkdir(parents=True)
    (tmp_path / "whole" / "model" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / adapters.FILE).write_text('{"base_model_name_or_path": "/nowhere/base"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / adapters.FILE).write_text("{}")
    for name, message in (
        ("gone", "RUN: there is no folder"),
        ("empty", f"no {adapters.FILE} in it or in its model/"),
        ("whole", "model' is a whole model already"),
        ("lost", "the base of the adapters in"),
        ("broken", "whose adapter_config.json names their base"),
    ):
        assert cli.main(["merge", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "out").exists()
    for words, message in (
        ([], "arguments are required: RUN, --output"),
        (["x", "--output", "y", "--dtype", "int8"], "invalid choice: 'int8'"),
    ):
        assert cli.main(["merge", *words]) == 2
        assert message in capsys.readouterr().err
