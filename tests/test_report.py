import dataclasses
import json
import os
import re
import shutil
import subprocess

import pytest

from fused_rlhf.trainers.report import Report, evaluations, fields, first_and_last, in_words, short

EVIL = "</pre><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
SAMPLE = {"step": 7, "prompt": "1+1=", "completion": EVIL, "reward": 0.5}
REPORT = Report(
    name="GRPO",
    folder="runs/<b>",
    state="interrupted after step 7 of 9",
    seconds=12.4,
    made_of=["113,280 parameters", "backend chunked on cpu"],
    before={"accuracy": 0.25},
    after={"accuracy": 0.5},
    warnings=["the reward 'x' scored no completion (in 2 steps)"],
    curves='<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><path d="M0 0L9 9"/></svg>',
    samples=[[SAMPLE], []],
    changed={"learning_rate": 3e-4, "task": "a & b"},
    options="learning_rate: 0.0003\n",
)


def test_the_page_holds_the_run():
    page = REPORT.html()
    for part in (
        "<title>GRPO: runs/&lt;b&gt;</title>",
        "interrupted after step 7 of 9; 12 s",
        "<div>113,280 parameters</div>",
        '<td class="number">0.25</td><td class="number">0.5</td><td class="number">+0.25</td>',
        "the reward &#39;x&#39; scored no completion (in 2 steps)",
        REPORT.curves,
        "<h2>Samples of step 7</h2>",
        "<tr><th>task</th><td><pre>a &amp; b</pre></td></tr>",
        "<pre>learning_rate: 0.0003\n</pre>",
    ):
        assert part in page
    assert page.count("<h2>Samples") == 1
    empty = dataclasses.replace(REPORT, before={}, after={}, warnings=[], curves="", samples=[], changed={}).html()
    assert "Evaluation" not in empty
    assert "Warnings" not in empty
    assert "Nothing that was logged has changed." in empty
    assert "all as by default" in empty


def test_the_page_is_whole_in_itself_and_its_texts_are_no_markup():
    page = REPORT.html()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=[\"']|url\(|@import", page)
    assert "default-src 'none'" in page


def test_evaluations_in_words():
    rows = list(evaluations({"accuracy": 0.25, "old": 1.0}, {"accuracy": 0.125, "new": 2.0}))
    assert rows == [("accuracy", "0.25", "0.125", "-0.125"), ("old", "1", "", ""), ("new", "", "2", "")]


def test_values_in_words():
    assert in_words(0.123456) == "0.1235"
    assert in_words([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]) == (
        "user: Hi\nassistant: null"
    )
    assert in_words({"a": b"x"}) == '{"a": "b\'x\'"}'
    assert in_words("x" * 2001) == "x" * 2000 + " ... (2,001 characters)"


def test_short_samples_share_a_table():
    few = [fields({"step": 1, "prompt": "1+1=", "completion": "2"}), fields({"prompt": "1+2=", "completion": "3"})]
    assert short(few)
    assert not short([*few, fields({"prompt": "1+1="})])
    assert not short([fields({"prompt": "1+1=\n"})])
    assert not short([fields({"prompt": "1" * 121})])
    table = "<tr><th>prompt</th><th>completion</th></tr>\n<tr><td><pre>1+1=</pre></td><td><pre>2</pre></td></tr>"
    some = [{"step": 1, "prompt": "1+1=", "completion": "2"}]
    assert table in dataclasses.replace(REPORT, samples=[some]).html()


def test_samples_are_of_the_last_and_the_first_step_and_of_several_prompts(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("")
    assert first_and_last(path) == []
    rows = [{"step": step, "prompt": str(i // 4), "n": i} for step in (1, 20, 30) for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    last, first = first_and_last(path)
    assert [row["step"] for row in (*last, *first)] == [30] * 6 + [1] * 6
    assert [row["n"] for row in last] == [0, 1, 4, 5, 8, 9]


@pytest.mark.slow
def test_a_browser_shows_the_page_and_runs_nothing_of_it(tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        assert "CI" not in os.environ, "chromium must be on the path in CI: apt-get install chromium"
        pytest.skip("no chromium on the path")
    (tmp_path / "report.html").write_text(REPORT.html(), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    page, picture = (tmp_path / "report.html").as_uri(), tmp_path / "page.png"

    def show(*more):
        return subprocess.run([browser, *options, *more, page], capture_output=True, text=True, timeout=120, check=True)

    dom = show("--dump-dom").stdout
    assert "<title>GRPO: runs/&lt;b&gt;</title>" in dom  # else one of the sample's scripts has run
    assert dom.count("<svg") == 1
    assert "&lt;script&gt;document.title" in dom
    show("--window-size=800,1000", f"--screenshot={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")
