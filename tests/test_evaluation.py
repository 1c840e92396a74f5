import torch

from fused_rlhf.trainers import evaluation
from fused_rlhf.trainers.data import Task
from fused_rlhf.trainers.inputs import encode
from fused_rlhf.trainers.rollout import generate
from fused_rlhf.trainers.rollout_config import RolloutConfig
from tests import tiny


def test_unseen_prompts_are_counted_apart():
    train = [{"prompt": "a", "answer": "1"}]
    test = [{"prompt": p, "answer": "1"} for p in ("a", "b", "c", "a")]
    right = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert evaluation.accuracies(right, test, train) == {"accuracy": 0.75, "accuracy_unseen": 0.5}
    assert evaluation.accuracies(right[1:3], test[1:3], train) == {"accuracy": 0.5}
    assert evaluation.accuracies(right[:1], test[:1], train) == {"accuracy": 1.0}
    assert (
        evaluation.describe({"accuracy": 0.75, "accuracy_unseen": 0.5}) == "accuracy 75.0 %, accuracy on unseen 50.0 %"
    )


def test_an_answer_that_is_null_is_none():
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}]
    assert evaluation.has_answers(Task(rows, rows[:1], "exact_match"))
    assert not evaluation.has_answers(Task(rows, rows, "exact_match"))


def test_correct_compares_the_greedy_answer(tmp_path):
    own, loaded = tiny.build(tmp_path)
    greedy = generate(loaded.model, loaded.tokenizer, [encode(loaded.tokenizer, None, "1+1=")], max_new_tokens=3)
    samples = [{"prompt": "1+1=", "answer": greedy.texts[0]}, {"prompt": "1+1=", "answer": greedy.texts[0] + "1"}]
    config = RolloutConfig(max_new_tokens=3, micro_batch_size=1)
    right = evaluation.correct(own, loaded, Task([], samples, "exact_match"), config, samples)
    assert right.tolist() == [1.0, 0.0]
