import json
from typing import Any

import numpy as np
import pytest

from fused_rlhf.trainers import data
from fused_rlhf.trainers.data import Task
from fused_rlhf.trainers.rollout_config import RolloutConfig
from tests.gsm8k import GSM8K, needs_gsm8k


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.", [("48/2=", "24")]),
        ("<<48+24=72>>72 and <<5-3=2>>2\n#### 72", [("48+24=", "72"), ("5-3=", "2")]),
        ("<<12/60=0.2>>0.2 per minute", []),  # no whole number
        ("<<0.2*50=10>>10", []),  # a decimal operand
        ("<<16-3-4=9>>9", []),  # three operands
        ("<<3/2=1>>1", []),  # the annotation is wrong
        ("<<200*2=400>>400", []),  # beyond max_operand
        ("<<3-5=-2>>", []),  # negative
        ("<<4/0=0>>", []),
        ("<< 7*8 = 56 >>", [("7*8=", "56")]),
        ("<<30=30>>30", []),
    ],
)
def test_steps_of_an_answer(text, prompts):
    assert [(s["prompt"], s["answer"]) for s in data.steps_of(text, max_operand=99)] == prompts


@needs_gsm8k
def test_gsm8k_steps_of_the_real_files():
    task = data.gsm8k_steps(GSM8K, max_operand=20)
    assert (len(task.train), len(task.test)) == (7455, 1349)
    assert all(eval(s["prompt"][:-1]) == int(s["answer"]) for s in task.test)
    assert "7455 of 23716 steps" in task.note


@needs_gsm8k
def test_gsm8k_questions_of_the_real_files():
    task = data.gsm8k(GSM8K)
    assert (len(task.train), len(task.test)) == (7473, 1319)
    assert task.train[0]["answer"] == "72"
    assert all(float(s["answer"]) is not None for s in (*task.train, *task.test))


def test_prompts_are_put_into_a_format():
    rows: list[dict[str, Any]] = [{"prompt": f"{i}{{}}=", "answer": str(i)} for i in range(8)]
    config = RolloutConfig(prompt_format="1=1\n{prompt} {x}")
    task = data.load_for(config, Task(rows[:6], rows[6:], "exact_match"))
    assert [s["prompt"] for s in task.train] == [f"1=1\n{i}{{}}= {{x}}" for i in range(6)]
    assert [s["prompt"] for s in task.test] == ["1=1\n6{}= {x}", "1=1\n7{}= {x}"]
    assert task.test[1]["answer"] == "7"
    rows[7]["prompt"] = [{"role": "user", "content": "7"}]
    with pytest.raises(ValueError, match=r"prompt_format: expected {prompt}, for test sample 1 has messages"):
        data.load_for(config, Task(rows[:6], rows[6:], "exact_match"))
    with pytest.raises(ValueError, match=r"prompt_format: expected a text with {prompt} in it; got 'What is it\?'"):
        RolloutConfig(prompt_format="What is it?")


def test_arithmetic_is_right_whole_and_held_out():
    task = data.arithmetic(max_operand=9, num_test=20)
    assert len(task.train) + len(task.test) == 100 + 55
    assert all(eval(s["prompt"][:-1]) == int(s["answer"]) >= 0 for s in (*task.train, *task.test))
    assert not {s["prompt"] for s in task.train} & {s["prompt"] for s in task.test}
    assert data.arithmetic(max_operand=9, num_test=20) == task
    with pytest.raises(ValueError, match="num_test: 155 leaves nothing"):
        data.arithmetic(max_operand=9, num_test=155)


def test_own_prompts_from_a_file_and_a_folder(tmp_path):
    rows = [{"prompt": f"{i}", "answer": str(i), "level": i} for i in range(10)]
    task = data.prompts(write(tmp_path / "rows.jsonl", rows))
    assert (len(task.train), len(task.test)) == (8, 2)
    assert sorted(s["level"] for s in (*task.train, *task.test)) == list(range(10))
    write(tmp_path / "train.jsonl", rows[:7])
    write(tmp_path / "test.jsonl", rows[7:])
    assert data.prompts(tmp_path) == Task(rows[:7], rows[7:], "exact_match", f"prompts of {tmp_path}")


def test_own_prompts_from_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [{"prompt": f"{i}", "answer": str(i)} for i in range(10)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    task = data.prompts(tmp_path / "rows.parquet")
    assert sorted((*task.train, *task.test), key=lambda s: int(s["prompt"])) == rows


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing/train\.jsonl"):
        data.gsm8k_steps(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no file .*rows\.parquet"):
        data.prompts(tmp_path / "rows.parquet")
    with pytest.raises(FileNotFoundError, match="no folder"):
        data.prompts(tmp_path / "rows.csv")
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame([{"prompt": "1", "reply": "2"}]).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet, row 1: missing \['answer'\]"):
        data.prompts(tmp_path / "bad.parquet")
    write(tmp_path / "train.jsonl", [{"question": "a", "answer": "b #### 1"}, {"question": "a", "reply": "b"}])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: missing \['answer'\].*\['question', 'reply'\]"):
        data.gsm8k_steps(tmp_path)
    write(tmp_path / "train.jsonl", [{"question": "a", "answer": "no marker"}])
    with pytest.raises(ValueError, match=r"row 1: the answer has no '####'"):
        data.gsm8k(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "answer"\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: not JSON"):
        data.prompts(tmp_path)
    (tmp_path / "train.jsonl").write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="line 1: expected an object"):
        data.prompts(tmp_path)


def test_check_refuses_empty_and_incomplete_samples():
    good = {"prompt": "1", "answer": "1"}
    data.check(Task([good], [good], "exact_match"))
    with pytest.raises(ValueError, match="train data set is empty"):
        data.check(Task([], [good], "exact_match"))
    with pytest.raises(ValueError, match=r"train sample 1: missing \['answer'\]"):
        data.check(Task([good, {"prompt": "1"}], [good], "exact_match"))
    with pytest.raises(ValueError, match="test sample 0: prompt must be a text"):
        data.check(Task([good], [{"prompt": "", "answer": "1"}], "exact_match"))


def test_rows_of_token_ids_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"train sample 0: missing \['prompt'\]; .*\['input_ids'\] are not read: expected"
    ):
        data.check(Task([{"input_ids": [1, 2], "answer": "1"}], [], "exact_match"))


def test_rows_keep_their_numbers_where_some_are_held_out(tmp_path):
    rows = [{"prompt": str(i), "answer": "1"} for i in range(20)]
    config = RolloutConfig(max_operand=9)
    task = data.load_for(config, rows)
    where = [data.where_of(row, "train", -1) for row in task.train]
    assert where == [f"train sample {row['prompt']}" for row in task.train]
    assert where != sorted(where)
    given = data.load_for(config, Task(rows, rows, "exact_match"))
    assert data.where_of(given.test[3], "test", 3) == "test sample 3"
    path = write(tmp_path / "rows.jsonl", rows)
    read = data.prompts(path)
    assert [data.where_of(row, "", 0) for row in read.test] == [
        f"{path}, row {int(r['prompt']) + 1}" for r in read.test
    ]
    with pytest.raises(ValueError, match="train sample 7: prompt must be a text"):
        data.load_for(config, [*rows[:7], {"prompt": 3, "answer": "1"}, *rows[7:], {"prompt": None, "answer": "1"}])
    with pytest.raises(ValueError, match="train sample 1: expected a dict of columns by their names"):
        data.load_for(config, [rows[0], dict[Any, Any]({3: "a"}) | rows[1]])


def test_an_answer_that_is_null_is_missing(tmp_path):
    rows = [{"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": None}]
    with pytest.raises(ValueError, match="test sample 1: answer: expected one, got None"):
        data.check(Task(rows[:1], rows, "exact_match"))
    data.check(Task(rows, rows, "exact_match"), answers=False)
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: answer: expected one, got None"):
        data.prompts(write(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("prompt", ["a\ud83d", [{"role": "user", "content": "\ud83d"}]])
def test_half_a_character_is_refused_by_row_and_field(prompt):
    with pytest.raises(ValueError, match=r"row 3: prompt: expected whole characters, got '\\ud83d' at [01]"):
        data.check_prompt(prompt, "row 3")


def test_a_prompt_may_be_messages():
    messages = [{"role": "user", "content": "1+1?"}]
    data.check(Task([{"prompt": messages, "answer": "2"}], [{"prompt": messages, "answer": "2"}], "exact_match"))
    for wrong in ([], [{"role": "user"}], ["1+1?"], 7, np.array([1, 2])):
        with pytest.raises(ValueError, match="row 3: prompt must be a text or a list of messages"):
            data.check_prompt(wrong, "row 3")


def test_the_stream_goes_through_all_samples_in_every_epoch_and_can_be_entered_anywhere():
    samples = [{"prompt": str(i), "answer": ""} for i in range(5)]
    stream = [sample["prompt"] for sample in data.batch_at(samples, 0, 0, 15)]
    epochs = [stream[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == list("01234") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [sample["prompt"] for sample in data.batch_at(samples, 0, 4, 3)] == stream[4:7]
    assert [sample["prompt"] for sample in data.batch_at(samples, 1, 0, 15)] != stream


def test_held_out_rows_are_a_fifth_at_most():
    rows = [{"n": i} for i in range(10)]
    train, test = data.hold_out(rows, 500, seed=0)
    assert (len(train), len(test)) == (8, 2)
    assert sorted(row["n"] for row in (*train, *test)) == list(range(10))
    assert len(data.hold_out(rows, 1, seed=0)[1]) == 1


@pytest.mark.parametrize("name", ["prompts", "completions"])
def test_a_column_that_would_hide_what_a_reward_is_about_is_refused(name):
    some = [{"prompt": "1", "answer": "1"}] * 3
    with pytest.raises(ValueError, match=f"test sample 2: the column '{name}' must have another name"):
        data.check(data.Task(some, [*some[:2], some[0] | {name: "x"}], "exact_match"))


def test_a_fingerprint_is_that_of_the_samples_alone():
    class Picture:
        size = (3, 4)

    rows = [{"prompt": "1", "image": Picture()}, {"prompt": [{"role": "user", "content": b"x"}]}]
    again = [{"prompt": "1", "image": Picture()}, rows[1]]
    assert data.fingerprint(rows) == data.fingerprint(again)
    assert data.fingerprint(rows) != data.fingerprint(rows[::-1])
    assert data.fingerprint([{"a": {(1, 2): 3}}]) == data.fingerprint([{"a": {(1, 2): 3}}])  # keys that JSON has not
    assert data.fingerprint([{"prompt": b"x"}]) != data.fingerprint([{"prompt": b"y"}])
