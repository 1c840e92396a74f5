import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from fused_rlhf.trainers import model as models
from fused_rlhf.trainers import value
from fused_rlhf.trainers.inputs import Encoded
from fused_rlhf.trainers.ppo_config import Config
from fused_rlhf.trainers.rollout import assemble
from fused_rlhf.trainers.value import PolicyAndValue, ScalarModel

# transformers takes any field of a configuration, and its signature names some.
ONE: dict[str, Any] = {"num_labels": 1}


def loaded_of(model, tokenizer):
    return models.Loaded(model, tokenizer, None)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return models.build(32, 2)


@pytest.fixture(scope="module")
def completions(pair):
    """Rows of unequal length, so that there is padding."""
    tokenizer = pair[1]
    prompts = [Encoded(tokenizer(text)["input_ids"]) for text in ("12+3=", "1", "7-7=")]
    answers = [tokenizer(text)["input_ids"] for text in ("15", "123", "0")]
    return assemble(prompts, answers, [tokenizer.eos_token_id], tokenizer)


@pytest.fixture(scope="module")
def classifier(pair, tmp_path_factory):
    """The folder of a reward model with a head that is not zero, over the policy's vocabulary."""
    folder = tmp_path_factory.mktemp("reward")
    pair[0].save_pretrained(folder / "causal")
    pair[1].save_pretrained(folder / "causal")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "causal", num_labels=1)
    model.save_pretrained(folder / "score")
    pair[1].save_pretrained(folder / "score")
    return folder / "score"


def test_a_folders_reward_is_that_of_transformers_own_classifier(pair, completions, classifier):
    """Whose last token is the last that is no padding token."""
    judge = value.reward_of(Config(), str(classifier), loaded_of(*pair))
    theirs = AutoModelForSequenceClassification.from_pretrained(classifier)
    want = theirs(completions.input_ids, completions.attention_mask).logits[:, 0]
    got = value.rewards_of(judge, completions)
    assert got.std() > 1e-3
    torch.testing.assert_close(got, want.detach())


def test_padding_and_the_rows_beside_do_not_matter(pair, completions, classifier):
    judge = value.reward_of(Config(), str(classifier), loaded_of(*pair))
    together = value.rewards_of(judge, completions)
    alone = torch.cat([value.rewards_of(judge, completions[[i]]) for i in range(3)])
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("source", ["shared", "copy", "folder"])
def test_values_are_the_head_on_the_last_hidden_state_and_begin_at_zero(pair, completions, classifier, source):
    policy = copy.deepcopy(pair[0])
    folder = str(classifier.parent / "causal")
    head = value.value_of(Config(value_model=folder if source == "folder" else source), loaded_of(policy, pair[1]))
    both = PolicyAndValue(policy, head)
    with torch.no_grad():
        _, values = both(completions.batch())
        assert values.shape == (completions.completion_mask.sum(),)
        assert values.dtype == torch.float32
        assert values.abs().max() == 0
        linear: Any = head if source == "shared" else head.score
        nn.init.normal_(linear.weight)
        linear.bias.fill_(0.5)
        inputs, values = both(completions.batch())
        states = policy(completions.input_ids, completions.attention_mask.long(), output_hidden_states=True)
        hidden = states.hidden_states[-1]
    before = hidden[:, :-1][completions.completion_mask[:, 1:]]
    want = (before * linear.weight[0]).sum(-1) + 0.5
    torch.testing.assert_close(values, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inputs.hidden, before, atol=1e-5, rtol=1e-5)


def test_a_shared_head_trains_the_body_and_a_copy_leaves_the_policy_alone(pair, completions):
    for source, touched in (("shared", True), ("copy", False)):
        policy = copy.deepcopy(pair[0])
        both = PolicyAndValue(policy, value.value_of(Config(value_model=source), loaded_of(policy, pair[1])))
        linear: Any = both.value if source == "shared" else both.value.score
        nn.init.ones_(linear.weight)
        both(completions.batch())[1].square().sum().backward()
        assert (policy.model.layers[0].mlp.up_proj.weight.grad is not None) == touched
        assert linear.weight.grad.abs().max() > 0


def test_a_reward_models_own_head_stays_in_a_value_model(pair, completions, classifier):
    policy = copy.deepcopy(pair[0])
    critic: Any = value.value_of(Config(value_model=str(classifier)), loaded_of(policy, pair[1]))
    theirs = AutoModelForSequenceClassification.from_pretrained(classifier)
    assert torch.equal(critic.score.weight, theirs.score.weight)


def test_values_stay_in_fp32_under_autocast():
    head, hidden = nn.Linear(8, 1), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value.scalars(head, hidden)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, head(hidden)[:, 0])
    assert value.scalars(head.double(), hidden.double()).dtype == torch.float64
    bf16 = value.scalars(nn.Linear(8, 1, bias=False).bfloat16(), hidden.bfloat16())
    assert bf16.dtype == torch.float32


def test_the_copy_of_a_lora_policy_has_adapters_of_its_own(pair, completions):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = peft.get_peft_model(copy.deepcopy(pair[0]), settings)
    critic = value.value_of(Config(value_model="copy"), loaded_of(policy, pair[1]))
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert {"score.weight", "score.bias"} < trained
    assert all("lora" in name or name.startswith("score.") for name in trained)
    assert {p.data_ptr() for p in critic.parameters()}.isdisjoint(p.data_ptr() for p in policy.parameters())


def test_any_model_with_a_score_is_a_reward_model_and_any_head_can_be_put_on(pair, completions):
    vocabulary = len(pair[1])
    gpt2 = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0, **ONE)
    ).eval()
    got = value.rewards_of(value.reward_of(Config(), gpt2, loaded_of(*pair)), completions)
    want = gpt2(completions.input_ids, attention_mask=completions.attention_mask.long()).logits[:, 0]
    torch.testing.assert_close(got, want.detach())
    made = ScalarModel(pair[0], nn.Linear(32, 1))
    assert value.reward_of(Config(), made, loaded_of(*pair)) is made


def test_what_is_no_reward_or_value_model_is_refused(pair, classifier, tmp_path):
    policy, tokenizer = pair
    loaded = loaded_of(policy, tokenizer)
    causal = classifier.parent / "causal"
    with pytest.raises(ValueError, match="reward_model: expected a model with a trained head called `score`; got"):
        value.reward_of(Config(), str(causal), loaded)
    with pytest.raises(
        ValueError, match="reward_model: expected a model with a head called `score`, or a ScalarModel; got 'Qwen3"
    ):
        value.reward_of(Config(), policy, loaded)
    with pytest.raises(ValueError, match="reward_model: expected the policy's own vocabulary"):
        value.reward_of(Config(), str(classifier), loaded_of(policy, models.char_tokenizer("0123456789")))
    with pytest.raises(FileNotFoundError, match="value_model: there is no folder"):
        value.value_of(Config(value_model=str(tmp_path / "gone")), loaded)
    with pytest.raises(FileNotFoundError, match=r"reward_model: the folder .* has no config.json"):
        value.reward_of(Config(), str(tmp_path), loaded)
    two = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=2)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="value_model: expected a head with one output"):
        value.value_of(Config(value_model=str(tmp_path / "two")), loaded)
    with pytest.raises(ValueError, match="score: expected a head with one output"):
        ScalarModel(policy, nn.Linear(32, 2))


class Judge(nn.Module):
    """A reward model as some libraries have them: a body under the name of its prefix, and a head of any kind."""

    base_model_prefix = "backbone"

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.score = body, head


def test_any_module_with_a_body_and_a_score_is_a_reward_model(pair, completions):
    torch.manual_seed(2)
    for head in (nn.Linear(32, 1), nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 1))):
        judge = value.reward_of(Config(), Judge(pair[0].model, head), loaded_of(*pair))
        got = value.rewards_of(judge, completions)
        ids, mask = completions.input_ids, completions.attention_mask
        states = head(pair[0].model(ids, mask.long()).last_hidden_state)[..., 0]
        want = states[range(3), mask.sum(1) - 1]
        torch.testing.assert_close(got, want.detach())
    for wrong, words in (
        (Judge(pair[0].model, nn.Sequential(nn.Linear(32, 2))), r"numbers of shape \(1, 2, 2\)"),
        (Judge(nn.Linear(3, 3), nn.Linear(3, 1)), "it raised TypeError"),
        (nn.Linear(3, 1), "a model with a head called `score`"),
    ):
        with pytest.raises(ValueError, match=f"reward_model: .*{words}"):
            value.reward_of(Config(), wrong, loaded_of(*pair))


def test_a_value_model_may_be_an_object(pair, completions, classifier):
    theirs = AutoModelForSequenceClassification.from_pretrained(classifier)
    loaded = loaded_of(*pair)
    critic = value.value_of(Config(), loaded, theirs)
    assert isinstance(critic, ScalarModel)
    assert critic.score is theirs.score
    bare = models.build(32, 1)[0]
    headed: Any = value.value_of(Config(), loaded, bare)
    assert headed.score.weight.abs().max() == 0
    own = ScalarModel(bare, nn.Linear(32, 1))
    assert value.value_of(Config(), loaded, own) is own
    with pytest.raises(ValueError, match="value_model: expected none beside one given as an object; got 'copy'"):
        value.value_of(Config(value_model="copy"), loaded, bare)
    with pytest.raises(ValueError, match="value_model: expected another model than the policy"):
        value.value_of(Config(), loaded, pair[0])
    few = models.small_model(models.char_tokenizer("012"), 32, 1)
    with pytest.raises(ValueError, match="value_model: expected a vocabulary of 99 tokens, as the model has; got 6"):
        value.value_of(Config(), loaded, few)
