import pytest
import torch

from fused_rlhf.trainers import model as models


def test_character_tokenizer_round_trips():
    tokenizer = models.char_tokenizer()
    text = "Q: 12+3 = ?\nA: $15."
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]


def test_a_built_model_is_saved_and_loaded_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = models.build(hidden_size=32, num_layers=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = models.load(str(tmp_path))
    input_ids = tokenizer("1+2=3", return_tensors="pt")["input_ids"]
    assert loaded_tokenizer("1+2=3")["input_ids"] == input_ids[0].tolist()
    assert loaded_tokenizer.padding_side == "left"
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, atol=0, rtol=0)
    assert models.max_positions(loaded) == 256


def test_a_missing_model_is_named(tmp_path):
    for name in (str(tmp_path / "gone"), "./gone", "runs/some/where", "~/gone-model", "gone"):
        with pytest.raises(FileNotFoundError, match=r"gone|where"):
            models.load(name)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        models.load(str(tmp_path))


def test_a_path_below_an_existing_folder_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder 'runs/demo'"):
        models.load("runs/demo")
