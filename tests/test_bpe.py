from transformers import AutoTokenizer

from fused_rlhf.trainers.bpe import bpe_tokenizer

SOME = ["Natalia sold 48 clips in April.", "Natalia sold 24 clips in May."] * 3


def test_any_text_comes_back_and_those_learned_from_are_short(tmp_path):
    tokenizer = bpe_tokenizer(SOME, 300)
    assert len(tokenizer) <= 300
    for text in (*SOME, "naïve ½ 12.5 %\n\n", "漢字"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(SOME[0])["input_ids"]) < len(SOME[0]) / 2
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert again(SOME)["input_ids"] == tokenizer(SOME)["input_ids"]
    assert (again.pad_token, again.eos_token, again.padding_side) == ("<pad>", "<eos>", "left")


def test_every_digit_is_a_token():
    tokenizer = bpe_tokenizer(SOME, 300)
    assert tokenizer.convert_ids_to_tokens(tokenizer("4824")["input_ids"]) == list("4824")


def test_the_same_texts_give_the_same_vocabulary():
    assert all(bpe_tokenizer(SOME, 300).get_vocab() == bpe_tokenizer(SOME, 300).get_vocab() for _ in range(3))
