import pytest

from fused_rlhf.trainers import cli


@pytest.mark.curves
def test_the_demo_says_what_it_did_and_where_it_is(tmp_path, capsys):
    flags = ["--warmup-steps", "2", "--steps", "2", "--hidden-size", "32", "--num-layers", "1"]
    flags += ["--threads", "0", "--max-operand", "30"]
    assert cli.main(["demo", "--output", str(tmp_path / "demo"), *flags]) == 0
    out = capsys.readouterr().out
    assert "before GRPO" in out
    for name in ("metrics.jsonl", "curves.png", "report.html", "samples.jsonl", "config.yaml", "model"):
        path = tmp_path / "demo" / name
        assert path.exists()
        assert str(path) in out
    assert "fused-rlhf grpo --config gsm8k_steps" in out
