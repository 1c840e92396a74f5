import torch

from fused_rlhf.trainers import model as models
from fused_rlhf.trainers import warmup


def test_encode_marks_the_answer_and_its_eos():
    tokenizer = models.char_tokenizer()
    samples = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "9*9=", "answer": 81}]
    input_ids, attention_mask, answer_mask = warmup.encode(tokenizer, samples)
    assert input_ids.shape == attention_mask.shape == answer_mask.shape == (2, 7)
    assert tokenizer.decode(input_ids[0]) == "1+1=2<eos><pad>"
    assert tokenizer.decode(input_ids[1][answer_mask[1]]) == "81<eos>"
    assert tokenizer.decode(input_ids[0][answer_mask[0]]) == "2<eos>"
    assert torch.equal(attention_mask, torch.arange(7) < torch.tensor([[6], [7]]))
