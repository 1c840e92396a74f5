import pytest

from fused_rlhf.trainers import adapters
from fused_rlhf.trainers import model as models
from tests import tiny
from tests.vision_families import FAMILIES


@pytest.mark.parametrize("family", ["gemma3", "qwen2.5-vl", "mllama"])
def test_adapters_of_an_image_text_model_lie_in_its_language_model(tmp_path, family):
    def adapted(**changes):
        model, _ = FAMILIES[family]()
        made = adapters.with_adapters(tiny.config(tmp_path, lora_r=2, **changes), model)
        names = {name.split(".lora_A")[0] for name, _ in made.named_parameters() if ".lora_A." in name}
        vision = {name for name in names if "vision" in name or "visual" in name or "projector" in name}
        return len(names - vision), len(vision), adapters.in_words(made)

    for names in ((), ("q_proj", "v_proj"), (r".*layers\.0\..*_proj",)):
        language, vision, words = adapted(lora_target_modules=names)
        assert (language > 0, vision) == (True, 0)
        assert words == f"LoRA adapters on {language} layers of the language model, 0 of what reads pictures"
    language, vision, words = adapted(lora_language_only=False)
    assert vision > 0
    assert words == f"LoRA adapters on {language} layers of the language model, {vision} of what reads pictures"


def test_a_pattern_of_layers_matches_whole_names(tmp_path):
    model, _ = models.build(32, 2)
    made = adapters.with_adapters(
        tiny.config(tmp_path, lora_r=2, lora_target_modules=(r".*layers\.1\.mlp\..*_proj",)), model
    )
    assert adapters.in_words(made) == "LoRA adapters on 3 layers of the language model"
    names = {
        name.split(".lora_A")[0].split("model.", 2)[-1] for name, _ in made.named_parameters() if ".lora_A." in name
    }
    assert names == {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    for wrong, words in (
        ((".*mlp.*", "q_proj"), "names, or one pattern alone"),
        (("(",), r"'\(' is no pattern"),
        (("nowhere",), "nowhere"),
    ):
        with pytest.raises(ValueError, match=f"lora_target_modules: .*{words}"):
            adapters.with_adapters(tiny.config(tmp_path, lora_r=2, lora_target_modules=wrong), models.build(32, 1)[0])
    with pytest.raises(ValueError, match="lora_language_only: expected True, for it changes nothing without lora_r"):
        tiny.config(tmp_path, lora_language_only=False)
