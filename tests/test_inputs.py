import io
from typing import Any

import pytest
import torch
from PIL import Image

from fused_rlhf.trainers import inputs
from fused_rlhf.trainers import model as models


@pytest.fixture
def tokenizer():
    return models.char_tokenizer()


def test_images_get_their_place_before_the_first_users_text():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "what?"}]
    got = inputs.with_images(messages, 2)
    assert got[0] == messages[0]
    assert got[1]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]
    placed = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    assert inputs.with_images(placed, 1) == placed
    assert inputs.with_images(messages, 0) == messages


def test_an_image_is_seen_beside_a_column_of_images_without_any():
    nothing: tuple[Any, ...] = (None, [], ())
    for images in nothing:
        assert inputs.images_of({"images": images, "image": "a.png"}) == ["a.png"]
    assert inputs.images_of({"images": ["a.png", "b.png"], "image": None}) == ["a.png", "b.png"]
    assert inputs.images_of({"images": None, "image": None}) == []


def test_a_model_without_a_processor_refuses_images(tokenizer):
    with pytest.raises(ValueError, match=r"images: the model takes none, but there are 1 with the text '1\+1='"):
        inputs.encode(tokenizer, None, "1+1=", [Image.new("RGB", (4, 4))])


def test_images_come_in_many_forms(tmp_path):
    image = Image.new("RGB", (3, 2), (9, 8, 7))
    image.save(tmp_path / "i.png")
    buffer = io.BytesIO()
    image.save(buffer, "png")
    for form in (image, str(tmp_path / "i.png"), {"bytes": buffer.getvalue()}, {"path": str(tmp_path / "i.png")}):
        got = inputs.load_image(form)
        assert (got.size, got.mode, got.getpixel((0, 0))) == ((3, 2), "RGB", (9, 8, 7))
    with pytest.raises(ValueError, match="images: expected an image, a path or its bytes, got a int"):
        inputs.load_image(7)
    assert inputs.images_of({"image": image}) == [image]
    assert inputs.images_of({"images": (image, image)}) == [image, image]
    assert inputs.images_of({"prompt": "p"}) == []


def test_collate_pads_what_is_aligned_and_concatenates_the_rest():
    rows = [
        {
            "pixel_values": torch.ones(4, 2),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
            "mm_token_type_ids": torch.tensor([[0, 1]]),
        },
        {},
        {
            "pixel_values": torch.zeros(2, 2),
            "image_grid_thw": torch.tensor([[1, 1, 2]]),
            "mm_token_type_ids": torch.tensor([[1, 0, 1]]),
        },
    ]
    got = inputs.collate(rows, 4)
    assert got["pixel_values"].shape == (6, 2)
    assert got["image_grid_thw"].tolist() == [[1, 2, 2], [1, 1, 2]]
    assert got["mm_token_type_ids"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]
    assert inputs.collate(rows, 4, left=True)["mm_token_type_ids"].tolist() == [[0, 0, 0, 1], [0] * 4, [0, 1, 0, 1]]
    assert inputs.collate([{}, {}], 4) == {}
