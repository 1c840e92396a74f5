import json
import math
from collections import Counter

import pytest

from fused_rlhf.trainers import pair_rows
from fused_rlhf.trainers.pair_rows import check_row
from fused_rlhf.trainers.pictures import read
from tests import tiny_vision
from tests.gsm8k import GSM8K, needs_gsm8k
from tests.test_pairs import ROW, assistant, user


def test_rows_of_every_form():
    plain = check_row(ROW, "row 1")
    assert (plain.where, plain.prompt, plain.chosen, plain.rejected) == ("row 1", "1+1=", "2", "3")
    assert (plain.images, plain.ref) == ((), None)
    assert check_row({"chosen": "ab", "rejected": "ac"}, "").prompt is None
    assert check_row({**ROW, "prompt": None}, "").prompt is None  # a column that other rows fill

    talk = [user("a"), assistant("b"), user("c")]
    implicit = check_row({"chosen": [*talk, assistant("d")], "rejected": [*talk, assistant("e")]}, "")
    assert (implicit.prompt, implicit.chosen, implicit.rejected) == (talk, [assistant("d")], [assistant("e")])
    for prompt in ("c", talk):  # given, and repeated in both
        repeated = {"prompt": prompt, "chosen": [*talk, assistant("d")], "rejected": [*talk, assistant("e")]}
        assert check_row(repeated, "") == implicit
    mixed = check_row({"prompt": talk, "chosen": "d", "rejected": [assistant("e")]}, "")
    assert mixed == implicit
    assert check_row({"prompt": "a", "chosen": [assistant("d")], "rejected": "e"}, "").prompt == [user("a")]

    refs = check_row({**ROW, "ref_chosen_logps": -1, "ref_rejected_logps": -2.5}, "")
    assert refs.ref == (-1.0, -2.5)
    a, b = (read(tiny_vision.picture(shade), "") for shade in (0, 200))
    assert check_row({**ROW, "images": [a, b]}, "").images == (a, b)
    assert check_row({**ROW, "image": a}, "").images == (a,)
    parts = [user([{"type": "image", "image": a}, {"type": "text", "text": "what?", "image": None}])]
    bare = [user([{"type": "image"}, {"type": "text", "text": "what?"}])]
    for row in ({**ROW, "prompt": parts}, {**ROW, "prompt": bare, "images": [a]}):
        assert (check_row(row, "").images, check_row(row, "").prompt) == ((a,), bare)
    shared = {"chosen": [*parts, assistant("d")], "rejected": [*parts, assistant("e")]}
    assert (check_row(shared, "").images, check_row(shared, "").prompt) == ((a,), bare)
    with pytest.raises(ValueError, match="row 1: images: expected none without a prompt, got 1"):
        check_row({"chosen": "ab", "rejected": "ac", "images": [a]}, "row 1")


def test_what_one_completion_alone_begins_with_is_its_own():
    talk = [user("a"), assistant("b"), user("c")]
    again = [assistant("b"), user("c"), assistant("d")]
    both = check_row({"prompt": talk, "chosen": again, "rejected": [*again[:2], assistant("e")]}, "")
    assert (both.chosen, both.rejected) == ([assistant("d")], [assistant("e")])
    one_alone = check_row({"prompt": talk, "chosen": [assistant("d")], "rejected": again}, "")
    assert (one_alone.prompt, one_alone.chosen, one_alone.rejected) == (talk, [assistant("d")], again)
    repeats_its_question = check_row({"prompt": talk, "chosen": "e", "rejected": again[1:]}, "")
    assert (repeats_its_question.chosen, repeats_its_question.rejected) == ([assistant("e")], [assistant("d")])


def test_rows_of_token_ids_are_refused_by_name():
    made = {f"{name}_input_ids": [5, 3] for name in ROW}
    with pytest.raises(
        ValueError, match=r"row 1: missing \['chosen', 'rejected'\]; .*'prompt_input_ids', .* are not read: "
    ):
        check_row(made, "row 1")
    texts = {"chosen": "ab", "rejected": "ac"}
    with pytest.raises(ValueError, match=r"row 1: prompt: expected a text .*, got token ids alone, 'prompt_input_ids'"):
        check_row({**texts, "prompt_input_ids": [5]}, "row 1")
    assert check_row({**ROW, "prompt_input_ids": [5]}, "row 1") == check_row(ROW, "row 1")
    assert check_row({**texts, "prompt_ids": None}, "row 1").prompt is None


@pytest.mark.parametrize("row", [None, 3, "1+1=", [ROW], {3: "1+1=", "chosen": "2"}])
def test_what_is_no_row_of_pairs_is_refused_by_number(row):
    with pytest.raises(ValueError, match="row 2: "):
        pair_rows.check([ROW, row], "row")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": ...}, r"row 7: missing \['chosen'\]; the columns there are \['prompt', 'rejected'\]"),
        ({"rejected": "2"}, "row 7: chosen and rejected are equal: '2'"),
        ({"chosen": " \n"}, r"row 7: chosen is empty: ' \\n'"),
        ({"rejected": None}, "row 7: rejected: expected a text or a list of messages with role and content, got None"),
        ({"chosen": [{"role": "assistant"}]}, "row 7: chosen: expected a text or a list of messages"),
        ({"chosen": [assistant("")]}, "row 7: chosen is empty"),
        ({"chosen": [assistant([{"type": "text", "text": ""}])]}, "row 7: chosen is empty"),
        ({"prompt": ""}, "row 7: prompt is empty: ''"),
        ({"chosen": "\ud83d"}, "row 7: chosen: expected whole characters"),
        (
            {"chosen": [assistant([{"type": None}])]},
            "row 7: chosen: expected content as a text or in parts with a type",
        ),
        ({"prompt": []}, "row 7: prompt is empty"),
        ({"prompt": 3}, "row 7: prompt: expected a text or a list of messages with role and content, got 3"),
        (
            {"prompt": None, "chosen": [assistant("a")]},
            "row 7: without a prompt, chosen and rejected must be two texts",
        ),
        (
            {"prompt": None, "chosen": [user("a")], "rejected": [user("b")]},
            "row 7: prompt is empty: no message is shared",
        ),
        (
            {"prompt": None, "chosen": [user("a")], "rejected": [user("a"), assistant("b")]},
            "row 7: chosen is empty: no message is left",
        ),
        (
            {"prompt": [user("a")], "chosen": [assistant([{"type": "image"}])]},
            "row 7: chosen: expected text alone; images belong to the prompt",
        ),
        ({"ref_chosen_logps": -1.0}, r"row 7: missing \['ref_rejected_logps'\]"),
        *(
            (
                {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} | {name: value},
                f"row 7: {name}: expected a finite",
            )
            for name in pair_rows.REFERENCE
            for value in (None, math.nan, -math.inf, "-1.5", [-1.0], True)
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_by_number_and_field(change, message):
    row = {name: value for name, value in (ROW | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        pair_rows.check([ROW] * 6 + [row], "row")


def test_files_of_every_kind_hold_the_same_pairs(tmp_path):
    import datasets

    rows = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(20)]
    jsonl, parquet, folder = tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "both"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    folder.mkdir()
    for name, some in (("train", rows[5:]), ("test", rows[:5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    found = [pair_rows.load("pairs", str(source), num_test=4, seed=0) for source in (jsonl, parquet)]
    for split in found:
        assert (len(split.train), len(split.test)) == (16, 4)
    assert [p.chosen for p in found[0].test] == [p.chosen for p in found[1].test]
    assert found[0].train[0].where.startswith(f"{jsonl}, row ")
    split = pair_rows.load("pairs", str(folder), num_test=4, seed=0)
    assert [p.chosen for p in split.test] == ["0", "2", "4", "6", "8"]
    assert split.test[2].where == f"{folder}, test row 3"
    assert "15 to train on, 5 held out" in split.note


def test_held_out_pairs_share_no_prompt_with_those_trained_on():
    rows = [{"prompt": f"{i // 3}", "chosen": f"{i}", "rejected": "x"} for i in range(60)]
    every = pair_rows.check(rows, "row")
    train, test = pair_rows.hold_out(every, 10, seed=0)
    assert len(train) + len(test) == 60
    assert len(test) == 12  # whole prompts, of three pairs each
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert (train, test) == pair_rows.hold_out(every, 10, seed=0)
    assert test != pair_rows.hold_out(every, 10, seed=1)[1]
    assert len(pair_rows.hold_out(every, 1000, seed=0)[1]) == 12  # a fifth
    assert pair_rows.hold_out(every, 0, seed=0)[1] == []
    same = pair_rows.check([{"prompt": "1", "chosen": f"{i}", "rejected": "x"} for i in range(9)], "row")
    assert len(pair_rows.hold_out(same, 5, seed=0)[0]) == 9  # one prompt: nothing else to train on


@needs_gsm8k
def test_solutions_of_the_real_file():
    made = pair_rows.load("gsm8k-solutions", str(GSM8K), num_test=500, seed=0)
    train, test = made.train, made.test
    rows = [json.loads(line) for line in (GSM8K / "example_model_solutions.jsonl").read_text().splitlines()]
    right = {row["question"]: sum(row[s]["is_correct"] for s in pair_rows.SOLVERS) for row in rows}
    assert len(train) + len(test) == sum(n * (4 - n) for n in right.values()) == 2429
    assert 0.19 < len(test) / 2429 < 0.21
    per_prompt = Counter(p.prompt for p in (*train, *test))
    assert set(per_prompt.values()) == {3, 4}  # one or three of four are right: 3 pairs; two: 4
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    truth = {f"Question: {row['question']}\nAnswer:": row["ground_truth"].rpartition("A: ")[2] for row in rows}
    agree = [str(p.chosen).rpartition("A: ")[2].strip() == truth[str(p.prompt)] for p in train]
    wrong = [str(p.rejected).rpartition("A: ")[2].strip() == truth[str(p.prompt)] for p in train]
    assert sum(agree) > 0.99 * len(train)  # 18 or 18.0
    assert sum(wrong) < 0.01 * len(train)
    assert pair_rows.load(
        "gsm8k-solutions", str(GSM8K / "example_model_solutions.jsonl"), 500, 0
    ) == pair_rows.Preferences(
        *pair_rows.hold_out(pair_rows.gsm8k_solutions(GSM8K), 500, 0),
        note=f"pairs of {GSM8K / 'example_model_solutions.jsonl'}: {len(train)} to train on, {len(test)} held out",
    )


def test_a_file_that_is_not_there_or_lacks_a_column(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: there is no .*none\.jsonl"):
        pair_rows.load("pairs", str(tmp_path / "none.jsonl"), 5, 0)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({"prompt": "a", "chosen": "b"}) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: missing \['rejected'\]"):
        pair_rows.load("pairs", str(path), 5, 0)
