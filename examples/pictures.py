"""Pictures in every form that rows may have them, and a step of GRPO over these rows."""

import base64
import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from fused_rlhf.trainers.grpo import Config, train
from fused_rlhf.trainers.small_vision import build  # any image-text model and its processor will do

# Models that are downloaded bring theirs; the small one has none.
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{% endfor %}"
)


def rows(folder: Path) -> list[dict]:
    """One for each form: in a column beside a text, or in the parts of a message."""
    picture = Image.fromarray(np.full((32, 32, 3), (220, 40, 40), dtype=np.uint8))
    picture.save(folder / "red.png")
    stream = io.BytesIO()
    picture.save(stream, "png")
    text = base64.b64encode(stream.getvalue()).decode()
    forms = [picture, str(folder / "red.png"), stream.getvalue(), np.asarray(picture), f"data:image/png;base64,{text}"]
    parts = [
        {"type": "image", "image": picture},
        {"type": "image", "path": str(folder / "red.png")},
        {"type": "image", "base64": text},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
    ]
    question = {"type": "text", "text": "colour?"}
    return [
        *({"prompt": "colour?", "images": [form], "answer": "red"} for form in forms),
        *({"prompt": [{"role": "user", "content": [part, question]}], "answer": "red"} for part in parts),
    ]


def main() -> int:
    model, processor = build(hidden_size=32, num_layers=1)
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    with tempfile.TemporaryDirectory() as folder:
        samples = rows(Path(folder))
        config = Config(
            output=folder + "/run", steps=1, prompts_per_step=len(samples), num_generations=2, max_new_tokens=3
        )
        train(config, task=samples, model=model, tokenizer=processor)
    return len(samples)


if __name__ == "__main__":
    main()
