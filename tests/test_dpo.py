import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from fused_rlhf.trainers import cli, dpo, flags
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.dpo import Config, DPOTrainer, Totals
from fused_rlhf.trainers.engine import NonFiniteLoss
from tests import launch, tiny, tiny_vision
from tests.gsm8k import GSM8K, needs_gsm8k
from tests.launch import killed, logged, without_seconds

# Which of the two digits is even, after prompts and with completions of several lengths.
ROWS = [
    {
        "prompt": f"{'pick '[i % 5 :]}{i}:",
        "chosen": f"{2 * (i % 5)} {'yes' * (i % 3)}",
        "rejected": f"{2 * (i % 4) + 1}{'no' * (i % 2)}",
    }
    for i in range(60)
]


def small(tmp_path, name="run", **changes):
    options: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 1,
        "steps": 3,
        "batch_size": 6,
        "micro_batch_size": 6,
        "learning_rate": 3e-3,
        "num_test": 10,
        "output": str(tmp_path / name),
        "sample_steps": 0,
        "eval_steps": 0,
        "save_steps": 0,
    }
    return Config(**(options | changes))


def other_model(seed=1, **changes):
    """Of the kind that `small` builds, with other weights."""
    torch.manual_seed(seed)
    model = models.small_model(models.char_tokenizer(), 32, 1, 1024)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return model.eval()


def first_step(config, rows=ROWS, **given):
    result = dpo.train(dataclasses.replace(config, steps=1), rows=rows, **given)
    return next(row for row in result.metrics if row["phase"] == "dpo" and "grad_norm" in row)


def dense_sums(model, pairs):
    """Summed log-probs and lengths of the completions by the model's own logits, one sequence at a time, in fp64."""
    found = []
    for pair in pairs:
        for completion in (pair.chosen, pair.rejected):
            ids = torch.tensor([pair.prompt + completion])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
            start = len(pair.prompt)
            found.append(log_p[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]].sum())
    return torch.stack(found).view(-1, 2)


def close(found, expected, tolerance=2e-5):
    shared = set(found) & set(expected) - {"seconds", "phase"}
    assert len(shared) > 8
    wrong = {n: (found[n], expected[n]) for n in shared if found[n] != pytest.approx(expected[n], tolerance, tolerance)}
    assert not wrong


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.curves
def test_the_margin_rises_on_pairs_that_were_held_out(tmp_path, capsys):
    config = small(tmp_path, steps=40, batch_size=16, micro_batch_size=32, eval_steps=20)
    result = dpo.train(config, rows=ROWS)
    assert result.before["eval_rewards/margins"] == 0.0  # to the bit: policy and reference are one model
    assert result.before["eval_loss"] == pytest.approx(math.log(2))
    assert result.after["eval_rewards/margins"] > 0.5
    assert result.after["eval_rewards/accuracies"] > 0.99
    assert result.after["eval_loss"] < 0.5
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.metrics
    assert [row["step"] for row in rows] == [0, *range(1, 41), 40]
    halves = {f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    more = {"rewards/margins", "rewards/accuracies", "loss", "grad_norm", "learning_rate", "num_tokens", "nll"}
    assert halves | more | {"entropy", "mean_token_accuracy"} <= set(rows[1])
    assert {f"eval_{name}" for name in halves} | {"eval_loss", "eval_entropy"} <= set(rows[20])
    assert "eval_loss" not in rows[19]
    assert rows[1]["rewards/margins"] == 0.0 < rows[5]["rewards/margins"] < rows[40]["rewards/margins"]
    counts = [row["num_tokens"] for row in rows if "num_tokens" in row]
    assert 0 < counts[0] < counts[-1] == pytest.approx(40 * counts[0], rel=0.2)  # so far, with the prompts
    out = capsys.readouterr().out
    assert "before DPO: held-out reward margin 0.0000" in out
    assert "after DPO: held-out reward margin" in out
    model = AutoModelForCausalLM.from_pretrained(result.model_path, local_files_only=True)
    AutoTokenizer.from_pretrained(result.model_path, local_files_only=True)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000


def test_the_warm_up_teaches_the_completions_and_the_reference_is_what_it_leaves(tmp_path):
    config = small(tmp_path, warmup_steps=30, warmup_batch_size=16, warmup_learning_rate=1e-2, steps=2)
    result = dpo.train(config, rows=ROWS)
    warm = [row["loss"] for row in result.metrics if row["phase"] == "warmup"]
    assert len(warm) == 30
    assert warm[0] == pytest.approx(math.log(100), abs=0.7)
    assert warm[-1] < 0.5 * warm[0]
    assert result.before["eval_rewards/margins"] == 0.0
    precomputed = dpo.train(dataclasses.replace(config, precompute_ref=True, output=str(tmp_path / "b")), rows=ROWS)
    close(precomputed.metrics[-2], result.metrics[-2], 1e-4)
    assert precomputed.after == pytest.approx(result.after, rel=1e-3, abs=1e-4)


def test_samples_stand_beside_the_pairs_own_completions(tmp_path, capsys):
    dpo.train(small(tmp_path, sample_steps=2, sample_tokens=3), rows=ROWS)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1] * 4 + [2] * 4
    assert set(samples[0]) == {"step", "prompt", "completion", "chosen", "rejected"}
    by_prompt = {row["prompt"]: row for row in ROWS}
    assert all(s["chosen"].strip() == by_prompt[s["prompt"]]["chosen"].strip() for s in samples)
    assert "completion=" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ values of a first step


@pytest.fixture(scope="module")
def truth():
    """Summed log-probs of policy and reference for the batch of the first step, from dense logits."""
    policy, reference = other_model(1), other_model(2)
    return policy, reference


def given(policy):
    return {"model": other_model(1) if policy is None else policy, "tokenizer": models.char_tokenizer()}


def test_loss_and_metrics_are_those_of_dense_logits(tmp_path, truth):
    policy, reference = other_model(1), truth[1]
    config = small(tmp_path, beta=0.3, learning_rate=1e-9)
    trainer = dpo.prepare(config, ROWS, **given(policy), ref_model=other_model(2))
    batch = dpo.data.batch_at(trainer.train, config.seed, 0, config.batch_size)
    lp, ref = dense_sums(truth[0], batch), dense_sums(reference, batch)
    rewards = 0.3 * (lp - ref)
    margins = rewards[:, 0] - rewards[:, 1]
    row = dpo.fit(trainer).metrics[1]
    expected = {
        "loss": -logsigmoid(margins).mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).double().mean(),
        "logps/chosen": lp[:, 0].mean(),
        "logps/rejected": lp[:, 1].mean(),
        "nll": -lp[:, 0].sum() / sum(len(pair.chosen) for pair in batch),
        "num_tokens": sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in batch),
    }
    assert 0 < expected["rewards/accuracies"] < 1
    close(row, {name: float(value) for name, value in expected.items()})


@pytest.mark.parametrize("losses", [("sigmoid",), ("ipo", "sft"), ("simpo",)])
def test_neither_micro_batches_nor_the_layout_change_a_step(tmp_path, losses):
    model: dict[str, Any] = {} if losses == ("simpo",) else {"ref_model": other_model(2)}
    weighted = "sft" not in losses  # whose NLL meets the weights of all pairs
    config = small(tmp_path, "a", loss_type=losses, batch_size=7, micro_batch_size=14, use_weighting=weighted)
    whole = first_step(config, **given(None), **model)
    changes: list[dict[str, Any]] = [
        {"micro_batch_size": 4},
        {"layout": "packed"},
        {"layout": "packed", "micro_batch_size": 6},
        {"layout": "padded"},
        {"micro_batch_size": 32, "micro_batch_tokens": 40},
        {"micro_batch_size": 32, "micro_batch_tokens": 80, "layout": "packed"},
    ]
    for i, change in enumerate(changes):
        changed = dataclasses.replace(config, output=str(tmp_path / f"b{i}"), **change)
        close(first_step(changed, **given(None), **model), whole)


def test_an_evaluation_counts_every_test_pair_once(tmp_path):
    config = small(tmp_path, steps=0, num_test=11, micro_batch_size=22, eval_samples=0)
    trainer = dpo.prepare(config, ROWS, **given(None), ref_model=other_model(2))
    whole = trainer.evaluate()
    trainer.config = dataclasses.replace(config, micro_batch_size=4)
    assert trainer.evaluate() == pytest.approx(whole, rel=1e-5)
    trainer.config = dataclasses.replace(config, eval_samples=3)
    assert trainer.evaluate()["eval_loss"] != pytest.approx(whole["eval_loss"], rel=1e-3)
    lp, ref = dense_sums(other_model(1), trainer.test), dense_sums(other_model(2), trainer.test)
    margins = 0.1 * ((lp - ref)[:, 0] - (lp - ref)[:, 1])
    assert whole["eval_rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-4)


def test_the_reference_may_be_a_folder_an_object_numbers_in_the_rows_or_taken_once(tmp_path):
    config = small(tmp_path, "a", num_test=0, ld_alpha=0.5)
    reference = other_model(2)
    expected = first_step(config, **given(None), ref_model=reference)
    reference.save_pretrained(tmp_path / "ref")
    models.char_tokenizer().save_pretrained(tmp_path / "ref")

    def changed(name, **change):
        return dataclasses.replace(config, output=str(tmp_path / name), **change)

    close(first_step(changed("b", ref_model=str(tmp_path / "ref")), **given(None)), expected)
    close(first_step(changed("c", precompute_ref=True), **given(None), ref_model=other_model(2)), expected)
    trainer = dpo.prepare(changed("d"), ROWS, **given(other_model(2)))
    batch = dpo.assemble(trainer, trainer.train)
    sums = trainer.engine(dpo.sums, trainer.config, batch).detach().view(2, -1).T.tolist()
    by_row = {
        pair.where: dict(zip(dpo.pair_rows.REFERENCE, ref)) for pair, ref in zip(trainer.train, sums, strict=True)
    }
    rows = [row | by_row[f"row {i}"] for i, row in enumerate(ROWS, 1)]
    close(first_step(changed("e"), rows, **given(None)), expected)


@pytest.mark.parametrize("precompute_ref", [False, True])
def test_with_lora_the_reference_is_the_model_without_its_adapters(tmp_path, precompute_ref):
    base = tiny.saved_model(tmp_path / "base", pad_token=None)  # EOS pads then
    options = {"lora_r": 4, "steps": 8, "learning_rate": 2e-2, "precompute_ref": precompute_ref}
    config = small(tmp_path, model=base, hidden_size=128, num_layers=4, **options)
    trainer = dpo.prepare(config, ROWS)
    assert trainer.reference is None
    before = {n: p.detach().clone() for n, p in trainer.loaded.model.named_parameters() if "lora" not in n}
    result = dpo.fit(trainer)
    assert result.before["eval_rewards/margins"] == 0.0
    assert result.after["eval_rewards/margins"] > 0.1
    after = dict(trainer.loaded.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    lp = dense_sums(trainer.loaded.model, trainer.test)
    ref = dense_sums(AutoModelForCausalLM.from_pretrained(base), trainer.test)
    margins = 0.1 * ((lp - ref)[:, 0] - (lp - ref)[:, 1])
    assert result.after["eval_rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-3)
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()


def test_a_mixture_of_experts_adds_its_auxiliary_loss(tmp_path):
    tokenizer = models.char_tokenizer()
    torch.manual_seed(0)
    experts = MixtralForCausalLM(
        MixtralConfig(  # type: ignore[call-arg]
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            experts_implementation="eager",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    objects: dict[str, Any] = {"model": experts, "tokenizer": tokenizer}
    config = small(tmp_path, router_aux_loss_coef=0.5, learning_rate=1e-9, micro_batch_size=12)
    row = first_step(config, **objects)
    plain = first_step(small(tmp_path, "b", learning_rate=1e-9, micro_batch_size=12), **objects)
    trainer = dpo.prepare(dataclasses.replace(config, output=str(tmp_path / "c")), ROWS, **objects)
    batch = dpo.assemble(trainer, sorted(dpo.data.batch_at(trainer.train, 0, 0, 6), key=lambda pair: pair.length))
    with torch.no_grad():
        aux = experts(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True
        ).aux_loss.item()
    assert row["aux_loss"] == pytest.approx(aux, rel=1e-5)
    assert row["loss"] == pytest.approx(plain["loss"] + 0.5 * aux, rel=1e-5)
    assert row["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected 0: the model has no experts"):
        dpo.prepare(small(tmp_path, "d", router_aux_loss_coef=0.5), ROWS)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
        {"rpo_alpha": 0.7, "label_smoothing": 0.1},
        {"f_divergence": "alpha_divergence", "f_alpha": 0.7},
        {"loss_type": ("orpo",), "rpo_alpha": 1.0},
        {"loss_type": ("discopop",), "discopop_tau": 0.2},
    ],
)
def test_the_options_of_the_objective_reach_it(tmp_path, options):
    import fused_rlhf as fr

    config = small(tmp_path, learning_rate=1e-9, micro_batch_size=12, **options)
    objective = config.loss()
    assert objective.beta == 0.1
    reference = {"ref_model": other_model(2)} if objective.needs_reference else {}
    trainer = dpo.prepare(config, ROWS, **given(None), **reference)
    batch = dpo.with_reference(trainer, dpo.assemble(trainer, dpo.data.batch_at(trainer.train, 0, 0, 6)))
    inputs = fr.lm_head.forward(trainer.loaded.model, batch.input_ids, batch.attention_mask)  # padded rows
    expected, _ = fr.linear_preference_loss(
        inputs.hidden[:, :-1],
        inputs.head.weight,
        batch.input_ids[:, 1:],
        objective=objective,
        completion_mask=batch.completion_mask[:, 1:],
        ref_logprobs=batch.ref_logprobs,
        **inputs.head.kwargs(),
    )
    assert trainer.step(1)["loss"] == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------- images


def picture_rows(count):
    """What colour a picture has."""
    return [
        {
            "prompt": [{"role": "user", "content": "colour?"}],
            "chosen": "red" if i % 2 else "green",
            "rejected": "green" if i % 2 else "red",
            "images": [tiny_vision.picture(240 if i % 2 else 10, 8 * (1 + i % 3))],
        }
        for i in range(count)
    ]


def test_a_vision_language_model_learns_from_what_it_sees(tmp_path):
    torch.manual_seed(0)
    model, processor = tiny_vision.build()
    config = small(tmp_path, steps=30, batch_size=8, micro_batch_size=8, learning_rate=5e-3, sample_steps=30)
    result = dpo.train(config, rows=picture_rows(30), model=model, tokenizer=processor)
    assert result.after["eval_rewards/accuracies"] > 0.99  # chance, without the picture, is one half
    assert result.after["eval_rewards/margins"] > 0.2
    trainer = dpo.prepare(small(tmp_path, "b", loss_type=("sft",)), picture_rows(6), model=model, tokenizer=processor)
    (pair,) = (trainer.encoder.with_images(pair) for pair in trainer.train[:1])
    batch = dpo.assemble(trainer, trainer.train[:1])
    found = trainer.engine(dpo.sums, trainer.config, batch)
    kinds = torch.nn.functional.pad(pair.extras["mm_token_type_ids"], (0, len(pair.chosen)))
    with torch.no_grad():
        length = len(pair.prompt) + len(pair.chosen)
        ids = batch.input_ids[:1, :length]
        log_p = model(input_ids=ids, **pair.extras | {"mm_token_type_ids": kinds}).logits[0].log_softmax(-1)
    rows = torch.arange(len(pair.prompt) - 1, length - 1)
    assert found[0].item() == pytest.approx(log_p[rows, torch.tensor(pair.chosen)].sum().item(), rel=1e-4)
    with pytest.raises(ValueError, match="layout: expected 'padded': its rows may hold pictures; got 'packed'"):
        dpo.prepare(small(tmp_path, "c", layout="packed"), picture_rows(6), model=model, tokenizer=processor)


# ---------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 4, "warmup_batch_size": 8}, {"precompute_ref": True}])
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, monkeypatch, options):
    config = small(tmp_path, "a", steps=6, save_steps=2, eval_steps=3, **options)
    whole = dpo.train(config, rows=ROWS)
    part = dataclasses.replace(config, output=str(tmp_path / "b"))
    calls = 0

    def interrupted(trainer, number):
        nonlocal calls
        calls += 1
        if number == 4:
            raise KeyboardInterrupt
        return step(trainer, number)

    step = DPOTrainer.step
    monkeypatch.setattr(DPOTrainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dpo.train(part, rows=ROWS)
    monkeypatch.setattr(DPOTrainer, "step", step)
    resumed = dpo.train(dataclasses.replace(part, resume=True), rows=ROWS)
    assert calls == 4
    assert without_seconds(resumed.metrics) == without_seconds(whole.metrics)
    assert resumed.after == whole.after
    weights = [(run.model_path / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]


def test_a_loss_that_is_not_finite_names_the_batch_and_leaves_a_checkpoint(tmp_path, monkeypatch):
    trainer = dpo.prepare(small(tmp_path, save_steps=1), ROWS)

    def broken(model, config, batch, totals, live):
        loss, metrics = share(model, config, batch, totals, live)
        return (loss * math.nan if trainer.engine.updates == 1 else loss), metrics

    share = dpo.preference_loss
    monkeypatch.setattr(dpo, "preference_loss", broken)
    with pytest.raises(NonFiniteLoss, match=r"step 2 \(pairs 6 to 11 of the shuffled training set\): the loss is nan"):
        dpo.fit(trainer)
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()


# ------------------------------------------------------------------------------------------------- several processes, CLI


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


SHORT = [
    "dpo",
    "--hidden-size",
    "32",
    "--num-layers",
    "1",
    "--steps",
    "3",
    "--batch-size",
    "6",
    "--micro-batch-size",
    "4",
]
SHORT += ["--learning-rate", "3e-3", "--num-test", "11", "--eval-steps", "2", "--sample-steps", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[], ["--fsdp"], ["--precompute-ref", "--warmup-steps", "2"], ["--micro-batch-tokens", "48", "--fsdp"]]
)
def test_two_processes_do_what_one_does(tmp_path, file, options):
    arguments = [*SHORT, "--data", str(file)]
    if "--fsdp" in options:  # an untied head, which is streamed
        arguments[1:5] = ["--model", tiny.saved_model(tmp_path / "base", tied=False)]
    if "--micro-batch-tokens" in options:
        arguments[arguments.index("--micro-batch-size") + 1] = "32"
    more = [option for option in options if option != "--fsdp"]
    one = launch.run([*arguments, *more], tmp_path / "one")
    two = launch.run([*arguments, *options], tmp_path / "two", processes=2)
    different = launch.worst(one, two)
    assert {"loss", "grad_norm", "eval_loss", "eval_rewards/margins", "num_tokens"} <= set(different)
    assert max(different.values()) < 1e-5
    assert ("streamed from 2 shards" in launch.log_of(tmp_path / "two").read_text()) == ("--fsdp" in options)


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_equals_the_uninterrupted_one(tmp_path, file):
    flags = [*SHORT, "--data", str(file), "--steps", "8", "--save-steps", "1", "--warmup-steps", "6"]
    flags += ["--warmup-batch-size", "8", "--sample-steps", "3", "--lr-schedule", "cosine"]
    want = launch.run(flags, tmp_path / "whole")
    part = tmp_path / "part"
    assert killed(flags, part, logged(4))  # in the warm-up
    assert killed([*flags, "--resume"], part, logged(10))
    got = launch.run([*flags, "--resume"], part)
    assert without_seconds(got) == without_seconds(want)
    for name in ("model/model.safetensors", "samples.jsonl"):
        assert (part / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@needs_gsm8k
def test_the_recipe_runs_on_the_real_solutions(tmp_path):
    config = flags.parse("dpo", ["--config", "gsm8k_dpo", "--data", str(GSM8K), "--output", str(tmp_path / "run")])
    config = dataclasses.replace(config, hidden_size=32, num_layers=1, warmup_steps=1, steps=1, eval_samples=8)
    trainer = dpo.prepare(dataclasses.replace(config, batch_size=2, warmup_batch_size=2))
    assert (len(trainer.train), len(trainer.test)) == (1749, 410)  # those of 2429 within max_length
    assert all(pair.length <= config.max_length for pair in trainer.train)
    assert not {pair.text for pair in trainer.train} & {pair.text for pair in trainer.test}
    after = dpo.fit(trainer).after
    assert after["eval_loss"] == pytest.approx(math.log(2), abs=0.05)


def test_the_command_line_runs_and_plans(tmp_path, file, capsys):
    arguments = [*SHORT, "--data", str(file), "--loss-type", "sigmoid", "sft", "--loss-weights", "1", "0.5"]
    arguments += ["--output", str(tmp_path / "run"), "--num-test", "3"]
    assert cli.main([*arguments, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "57 training and 3 test pairs" in planned
    assert "12 sequences of at most" in planned
    assert not (tmp_path / "run").exists()
    assert cli.main(arguments) == 0
    assert "after DPO" in capsys.readouterr().out
    assert cli.main(["dpo", "--data", str(tmp_path / "none.jsonl")]) == 2
    assert "there is no" in capsys.readouterr().err


def test_totals_are_those_of_the_pairs():
    pair = dpo.Pair("", "", [1], [2, 3], [4])
    assert Totals.of([pair, pair]) == Totals(2, 4, 2)


# -------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ("dpo",)}, "loss_type: expected one of .*'sigmoid'.*; got 'dpo'"),
        ({"loss_type": ("kto",)}, "loss_type: expected one of"),
        ({"loss_type": ()}, "losses must be a tuple of names"),
        ({"loss_weights": (1.0, 2.0)}, r"loss_weights: expected one for each of \('sigmoid',\)"),
        ({"beta": 0.0}, "beta: expected more than 0; got 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing must lie in"),
        ({"loss_type": ("hinge",), "label_smoothing": 0.1}, "label_smoothing is no option of"),
        ({"f_alpha": 0.5}, "f_alpha must be given with f_divergence='alpha_divergence'"),
        ({"ld_alpha": 1.5}, r"ld_alpha must lie in \[0, 1\], got 1.5"),
        ({"micro_batch_size": 3}, "micro_batch_size: expected an even number"),
        ({"loss_type": ("aot",), "micro_batch_size": 4}, "micro_batch_size: expected at least 2 x batch_size"),
        ({"loss_type": ("cpo",), "precompute_ref": True}, "ref_model, precompute_ref: expected none for"),
        ({"max_length": 1}, "max_length: expected at least 2, or None; got 1"),
        ({"truncate": "left"}, "truncate: expected one of"),
        ({"vocab_size": 100}, "vocab_size: expected 0, or more than 258"),
        (
            {"model": "a", "hidden_size": 128, "num_layers": 4, "vocab_size": 300},
            "vocab_size: expected 0 with model='a'",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        small(tmp_path, **options)


def test_what_prepare_refuses(tmp_path):
    config = small(tmp_path)
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"rows": None}, {}, "data: expected where the pairs of the task 'pairs' are read from; got None"),
        ({"rows": ROWS}, {"data": "x.jsonl"}, "data: expected none where rows are given"),
        ({"rows": []}, {}, "data: expected at least one pair to train on"),
        ({"rows": [*ROWS, {**ROWS[0], "rejected": ROWS[0]["chosen"]}]}, {}, "row 61: chosen and rejected are equal"),
        ({"rows": ROWS, "test_rows": [{"chosen": "a"}]}, {}, r"test row 1: missing \['rejected'\]"),
        ({"rows": ROWS, "model": other_model()}, {}, "model, tokenizer: expected both or neither"),
        (
            {"rows": [ROWS[0] | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}, *ROWS[1:]]},
            {},
            "in every row, or",
        ),
        (
            {"rows": [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0} for row in ROWS]},
            {"precompute_ref": True},
            "ref_model, precompute_ref: expected none where rows hold",
        ),
    ]
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            dpo.prepare(dataclasses.replace(config, **options), **arguments)
    assert not (tmp_path / "run").exists()
    wide = models.small_model(models.char_tokenizer("ab"), 32, 1)
    with pytest.raises(ValueError, match="ref_model: expected a vocabulary of 99 tokens, as the model has; got 5"):
        dpo.prepare(config, ROWS, ref_model=wide)
    short = models.small_model(models.char_tokenizer(), 32, 1, max_positions=8)
    with pytest.raises(ValueError, match=r"row \d+: prompt of \d+ tokens, .* beyond the model's context of 8"):
        dpo.prepare(config, ROWS, model=short, tokenizer=models.char_tokenizer())
    with pytest.raises(ValueError, match="max_length: expected at most the model's context of 8; got 9"):
        dpo.prepare(dataclasses.replace(config, max_length=9), ROWS, model=short, tokenizer=models.char_tokenizer())


def test_a_layout_is_refused_where_a_model_mixes_the_sequences_of_a_row(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    tokenizer = models.char_tokenizer()
    torch.manual_seed(0)
    recurrent = MambaForCausalLM(
        MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, state_size=4)
    )
    for parameter in recurrent.parameters():
        parameter.data.mul_(2.0)
    with pytest.raises(
        ValueError, match="layout: expected 'auto', which takes padded rows here, for packed: MambaForC"
    ):
        dpo.prepare(small(tmp_path, layout="packed"), ROWS, model=recurrent, tokenizer=tokenizer)


def test_own_pairs_want_a_model(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(ValueError, match="model: expected a folder or hub id with this data"):
        dpo.prepare(Config(data=str(path), output=str(tmp_path / "run")))
    dpo.prepare(Config(data=str(path), output=str(tmp_path / "run"), hidden_size=32))


def test_epochs_are_steps(tmp_path):
    trainer = dpo.prepare(small(tmp_path, steps=200, epochs=1.5), ROWS)
    assert (len(trainer.train), trainer.config.steps, trainer.config.epochs) == (50, 13, None)
    with pytest.raises(ValueError, match=r"steps, epochs: expected one of them; got \(3, 1\)"):
        small(tmp_path, epochs=1)
    with pytest.raises(ValueError, match="epochs: expected more than 0, or None; got 0"):
        small(tmp_path, steps=200, epochs=0)


def test_an_nll_under_weights_takes_whole_batches(tmp_path):
    small(tmp_path, use_weighting=True, rpo_alpha=0.5, micro_batch_size=12)
    for changes in ({"rpo_alpha": 0.5}, {"loss_type": ("sigmoid", "sft")}):
        with pytest.raises(ValueError, match="micro_batch_size: expected at least 2 x batch_size for an NLL"):
            small(tmp_path, use_weighting=True, **changes)


def test_the_held_out_pairs_are_the_same_for_every_seed(tmp_path):
    found = [[pair.text for pair in dpo.prepare(small(tmp_path, seed=seed), ROWS).test] for seed in (0, 1)]
    assert found[0] == found[1]
