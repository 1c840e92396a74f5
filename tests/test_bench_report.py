"""What is made of a result: tables, plots, comparisons, the READMEs."""

from __future__ import annotations

import copy
import itertools
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fused_rlhf.bench import checkout, compare, plots, readme, report
from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.command import main
from fused_rlhf.bench.registry import PROVIDERS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "bench/results").glob("*/*.json"))
OF_RUNS = [path for path in RESULTS if "rows" in json.loads(path.read_text())]
# Those of whole updates have rows of their own kind: test_bench_step.py.
OF_SUITES = [path for path in OF_RUNS if not path.stem.startswith("step")]


def record(case: str, provider: str, shape: Case, seconds: float, **fields) -> dict:
    time = {"median": seconds, "p20": 0.98 * seconds, "p80": 1.02 * seconds}
    return {
        "case": case,
        "provider": provider,
        "label": shape.label,
        "op": shape.op,
        "shape": asdict(shape),
        "error": None,
        "entropy_nats": {"p10": 0.01, "p50": 0.5, "p90": 2.0},
        "errors": {"logprob_max_abs": 1e-6, "dhidden_rel": 2e-6, "dweight_rel": 3e-6},
        "wrong": False,
        **{f"{k}_s": time for k in ("both", "forward", "backward")},
        "peak_extra_bytes": 1e9 * seconds,
        "scratch_bytes": 5e8,
        "predicted_bytes": 1.1e9,
        "time_to_dense": 0.7 if provider != "dense" else 1.0,
        "gemm_share": 0.8,
        "gflops": 1234.0,
        "cpu_share": 0.99,
        "lengths": None,
        **fields,
    }


def document() -> dict:
    """As a run would write it: an op with three providers, and a sweep over N in which dense fails at the end."""
    base = Case(N=1024, H=64, V=1000, T=64)
    rows = [record("grpo", p, base, 1.0 + i) for i, p in enumerate(("dense", "trl", "ours-one_pass"))]
    for n in (1024, 2048, 4096):
        shape = replace(base, N=n, dtype="bf16")
        rows += [record(f"N={n}", p, shape, n / 1024) for p in ("dense", "ours-one_pass")]
    failed = {"error": "out of memory: 9.96 GB more were refused", "both_s": None, "peak_extra_bytes": None}
    rows[-2] |= failed
    rows[1]["wrong"] = True
    rows[2]["lengths"] = {"count": 4, "triton": 3, "dynamo": 0, "both_s": [0.1, 0.2, 0.1, 0.3]}
    return {
        "suite": "test",
        "command": "python -m bench --suite test",
        "commit": "abc",
        "date": "2026-01-02T03:04:05+00:00",
        "device": {"cpu": "a CPU", "threads": 2, "cpu_capability": "AVX512"},
        "versions": {"python": "3.11", "torch": "2.13.0", "trl": "1.16.0", "verl": None},
        "notes": [],
        "rows": rows,
        "targets": [{"what": "fast", "limit": 1.0, "value": 0.5, "holds": True, "why": ""}],
    }


def test_render_says_everything():
    text = report.render(document())
    for part in ("a CPU, 2 threads, AVX512", "commit abc", "torch 2.13.0", "WRONG", "9.96 GB more were refused"):
        assert part in text
    assert re.search(r"\| grpo +\| ours-one_pass +\| 4 +\| 3 +\| 0 +\| 100\.0 ms - 300\.0 ms \|", text)
    assert re.search(r"\| fast +\| <= 1 +\| 0\.5 +\| yes", text)
    assert "verl" not in text
    assert re.search(r"\| N=4096 \| dense .*\| 1\.10 GB \|.* refused", text)  # what failed shows its formula


@pytest.mark.parametrize("path", OF_RUNS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_results_can_be_read(path, capsys):
    report.main([str(path)])
    text = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["commit"] in text
    assert all(r["provider"] in text for r in result["rows"])


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = plots.draw(document(), tmp_path)
    assert sorted(path.name for path in drawn) == [
        "error.png",
        "memory.png",
        "roof.png",
        "scaling-N-grpo-bf16.png",
    ]
    for path in drawn:
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert path.stat().st_size < 80_000


def boxes(figure):
    """The words of a figure and where they are; ticks outside of an axis are not drawn."""
    figure.canvas.draw()
    words = [*([figure._suptitle] if figure._suptitle else []), *(w for box in figure.legends for w in box.get_texts())]
    for ax in figure.axes:
        words.append(ax.title)
        for axis in (axis for part in (ax, *ax.child_axes) for axis in (part.xaxis, part.yaxis)):
            low, high = sorted(axis.get_view_interval())
            words.append(axis.label)
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            words += [label for tick in ticks for label in (tick.label1, tick.label2)]
    shown = [word for word in words if word.get_visible() and word.get_text().strip()]
    return [(word.get_text(), word.get_window_extent(figure.canvas.get_renderer())) for word in shown]


@pytest.mark.parametrize("path", OF_RUNS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_two_words_of_a_picture_overlap_and_amounts_begin_at_zero(path):
    pytest.importorskip("matplotlib")
    for name, figure in plots.figures(json.loads(path.read_text())):
        found = boxes(figure)
        for (one, a), (other, b) in itertools.combinations(found, 2):
            assert not a.padded(-1).overlaps(b.padded(-1)), (name, one, other)
        for text, box in found:
            assert figure.bbox.padded(1).contains(*box.min), (name, text)
            assert figure.bbox.padded(1).contains(*box.max), (name, text)
        for ax in figure.axes:
            low, high = ax.get_xlim()
            if name.startswith(("memory", "roof", "time")):
                assert low == 0, name
            if name.startswith("error"):
                assert high / low > 0.99 * 10**plots.DECADES


@pytest.mark.parametrize("path", OF_SUITES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_rows_are_wrong_by_todays_rule_and_pictures_say_so(path):
    """A verdict that a change of the rule has overtaken has to be judged again."""
    pytest.importorskip("matplotlib")
    result = json.loads(path.read_text())
    known = [r for r in result["rows"] if not r["error"] and r["provider"] in PROVIDERS]
    for r in known:
        tolerance = PROVIDERS[r["provider"]].tolerance[r["shape"]["dtype"]]
        assert r["wrong"] == (not tolerance.allows(r["errors"])), (r["case"], r["provider"])
    for name, figure in plots.panels(result):
        marked = sum("WRONG" in text for text, _ in boxes(figure))
        assert marked <= sum(r["wrong"] for r in known), name


def test_a_wrong_row_is_marked_in_every_panel_and_no_other_is():
    pytest.importorskip("matplotlib")
    for name, figure in plots.panels(document()):
        marked = [text for text, _ in boxes(figure) if "WRONG" in text]
        assert len(marked) == 1, name  # trl's, of three


def test_sweeps_of_one_name_have_files_of_their_own():
    base = Case(N=1024, H=64, V=1000, T=64)
    shapes = [replace(base, V=v, N=n) for v in (1000, 2000) for n in (1024, 2048, 4096)]
    rows = [record(f"{s.V} {s.N}", "dense", s, 1.0) for s in shapes]
    names = [name for name, _ in plots.figures({**document(), "rows": rows})]
    assert names == ["scaling-N-grpo-fp32", "scaling-N-grpo-fp32-2"]


@pytest.mark.slow
@pytest.mark.parametrize("path", OF_RUNS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_plots_of_committed_results(path, tmp_path):
    pytest.importorskip("matplotlib")
    result = json.loads(path.read_text())
    drawn = plots.draw(result, tmp_path)
    done = {row["case"] for row in result["rows"] if row["error"] is None}
    known = [row["case"] for row in result["rows"] if row["error"] is None or plots.too_large(row)]
    assert bool(drawn) == any(known.count(case) > 1 for case in done)  # there is something to compare
    assert all(p.stat().st_size < 80_000 for p in drawn)


def test_sweeps_find_what_differs_in_one_axis():
    rows = document()["rows"]
    ((name, providers),) = plots.sweeps(rows, "N")
    assert name == "grpo bf16"
    assert [r["shape"]["N"] for r in providers["dense"]] == [1024, 2048, 4096]
    assert not list(plots.sweeps(rows, "T"))
    one_sequence = [record("x", "ours", Case(N=n, T=n, H=8, V=100), 1.0) for n in (64, 128, 256)]
    assert not list(plots.sweeps(one_sequence, "N"))
    ((_, providers),) = plots.sweeps(one_sequence, "T")
    assert len(providers["ours"]) == 3


def changed(rows: dict[int, dict]) -> dict:
    new = copy.deepcopy(document())
    for index, fields in rows.items():
        new["rows"][index] |= fields
    return new


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({}, []),
        ({2: {"time_to_dense": 0.76}}, []),  # 1.09 times
        ({2: {"time_to_dense": 0.8}}, ["grpo ours-one_pass: slower, 1.14x over dense"]),
        ({0: {"gemm_share": 0.6}}, ["grpo dense: slower, 1.33x over the bare products"]),
        ({2: {"time_to_dense": None, "gemm_share": 0.6}}, ["grpo ours-one_pass: slower, 1.33x over the bare products"]),
        ({2: {"time_to_dense": 0.8, "both_s": {"median": 1.3, "p20": 0.9, "p80": 1.9}}}, []),  # the spreads overlap
        ({0: {"both_s": {"median": 9.0, "p20": 9.0, "p80": 9.0}}}, []),  # times of two runs
        ({2: {"peak_extra_bytes": 3.3e9}}, ["grpo ours-one_pass: larger, 3.00 GB -> 3.30 GB"]),
        ({2: {"errors": {"dhidden_rel": 9e-6}}}, ["grpo ours-one_pass: less accurate, dhidden_rel 2e-06 -> 9e-06"]),
        ({2: {"wrong": True}}, ["grpo ours-one_pass: wrong now"]),
        ({2: {"error": "no such thing"}}, ["grpo ours-one_pass: fails: no such thing"]),
        ({2: {"shape": asdict(Case(N=2048))}}, []),  # another problem
    ],
)
def test_compare(rows, words):
    text, worse = compare.compare(document(), changed(rows))
    assert worse == words
    assert "commit abc" in text
    assert ("nothing became worse" in text) == (not words)


def test_times_without_a_yardstick_are_not_compared():
    bare = {"time_to_dense": None, "gemm_share": None, "both_s": {"median": 99.0, "p20": 99.0, "p80": 99.0}}
    text, worse = compare.compare(document(), changed({2: bare}))
    assert worse == []
    assert f"{compare.NOT_COMPARED}grpo ours-one_pass\n" in text
    assert compare.NOT_COMPARED not in compare.compare(document(), document())[0]


def test_several_runs_are_told_apart():
    result = document()
    assert "several runs" not in report.render(result)
    for row in result["rows"]:
        row["run"] = "first" if row["case"] == "grpo" else "second"
    result["rows"][2]["waits"] = 6
    text = report.render(result)
    assert "several runs, and times compare within one alone: grpo | N=1024, N=2048, N=4096" in text
    assert re.search(r"\| grpo \| ours-one_pass \| 6 ", text)


def test_compare_on_the_command_line(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(document()))
    new.write_text(json.dumps(changed({2: {"wrong": True}})))
    assert main(["--compare", str(old), str(old)]) == 0
    assert main(["--compare", str(old), str(new)]) == 1
    assert "wrong now" in capsys.readouterr().out


def test_results_of_earlier_versions_can_be_compared():
    result = json.loads((ROOT / "bench/results/epyc-2threads/foundation.json").read_text())
    assert compare.compare(result, result)[1] == []


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout with one result and two READMEs."""
    folder = tmp_path / "bench/results/here"
    folder.mkdir(parents=True)
    (folder / "r.json").write_text(json.dumps(document()))
    monkeypatch.setattr(checkout, "found", lambda: tmp_path)
    for name in readme.FILES:
        (tmp_path / name).write_text("nothing here\n")
    return tmp_path


def test_tables_of_a_readme(repository):
    place = "<!-- bench: here/r.json | cases=grpo | providers=dense,ours-one_pass | columns=both,dense -->"
    (repository / "README.md").write_text(f"before\n\n{place}\nold\n<!-- bench end -->\n\nafter\n")
    assert readme.update() == [("README.md", True), ("bench/README.md", False)]
    text = (repository / "README.md").read_text()
    assert text.startswith(f"before\n\n{place}\n\n| case")
    assert text.endswith("<!-- bench end -->\n\nafter\n")
    assert "old" not in text
    assert "[here/r.json](bench/results/here/r.json)" in text
    assert "a CPU, 2 threads" in text
    assert "trl |" not in text
    assert readme.update() == [("README.md", False), ("bench/README.md", False)]


@pytest.mark.parametrize(("options", "word"), [("case=grpo", "takes cases"), ("cases=nothing", "no such rows")])
def test_tables_that_cannot_be_made(repository, options, word):
    (repository / "README.md").write_text(f"<!-- bench: here/r.json | {options} -->\n<!-- bench end -->\n")
    with pytest.raises(ValueError, match=word):
        readme.update()


def test_the_readmes_are_in_sync_with_the_committed_results():
    stale = [name for name, changes in readme.update(write=False) if changes]
    assert not stale, f"run python -m bench --readme, which updates {', '.join(stale)}"
    assert readme.PLACE.search((ROOT / "bench/README.md").read_text())
