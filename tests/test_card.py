import yaml

from fused_rlhf.trainers.card import model_card
from fused_rlhf.trainers.grpo_config import Config


def test_the_card_says_what_the_model_is_and_how_it_was_made():
    card = model_card(Config(model="Qwen/Qwen3-0.6B", beta=0.04, rewards=("exact_match",)), {"accuracy": 0.5})
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "Qwen/Qwen3-0.6B",
        "library_name": "transformers",
        "tags": ["fused-rlhf", "grpo"],
    }
    assert "| accuracy | 0.5 |" in body
    assert "AutoModelForCausalLM" in body
    options = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert options == {"model": "Qwen/Qwen3-0.6B", "beta": 0.04, "rewards": ["exact_match"]}


def test_the_card_of_an_adapter_loads_with_peft():
    card = model_card(Config(model="Qwen/Qwen3-0.6B", lora_r=8), {})
    assert "library_name: peft" in card
    assert "from peft import AutoPeftModelForCausalLM" in card
    given = model_card(Config(), {}, adapters=True)  # adapters of the caller's
    assert "library_name: peft" in given


def test_a_folder_is_no_base_model_and_how_the_run_was_begun_is_no_option(tmp_path):
    card = model_card(Config(model=str(tmp_path), resume=True, eval_samples=0, beta=0.04), {})
    _, head, body = card.split("---\n", 2)
    assert "base_model" not in yaml.safe_load(head)
    options = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert options == {"model": str(tmp_path), "eval_samples": 0, "beta": 0.04}
