"""Pictures in every form, each at its place, or refused by row and field."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from fused_rlhf.trainers import pictures
from fused_rlhf.trainers.pictures import PictureError, at_places, gathered, located, read

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))


def encoded(image=PICTURE, kind="png", **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def text_of(image=PICTURE):
    return base64.b64encode(encoded(image)).decode()


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a picture.png").write_bytes(encoded())
    return tmp_path / "a picture.png"


def same(picture):
    return np.array_equal(np.asarray(picture.load()), np.asarray(PICTURE))


def test_a_picture_in_every_form(file):
    forms = {
        "PIL": PICTURE,
        "with transparency": PICTURE.convert("RGBA"),
        "path": file,
        "its text": str(file),
        "file:": file.as_uri(),
        "bytes": encoded(),
        "a data set's bytes": {"bytes": encoded(), "path": None},
        "a data set's path": {"bytes": None, "path": str(file)},
        "an array": np.asarray(PICTURE),
        "a tensor": torch.from_numpy(np.array(PICTURE)),
        "base64": text_of(),
        "a data address": f"data:image/png;base64,{text_of()}",
    }
    for name, form in forms.items():
        picture = read(form, "row 1: images")
        assert same(picture), name
        assert picture.size == (6, 4), name
    assert read(np.zeros((3, 2), np.uint8), "").load().size == (2, 3)
    assert read(read(PICTURE, ""), "") == read(PICTURE, "")
    assert repr(read(file, "")).startswith(f"<picture '{file}' 6x4 ")


def test_pictures_are_told_apart_by_content(file, tmp_path):
    (tmp_path / "copy.png").write_bytes(file.read_bytes())
    assert read(file, "a") == read(tmp_path / "copy.png", "b")
    assert read(PICTURE, "") == read(PICTURE.copy(), "")
    other = PICTURE.copy()
    other.putpixel((0, 0), (1, 2, 3))
    assert read(other, "") != read(PICTURE, "")


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6  # to be turned by 90 degrees, clockwise
    picture = read(encoded(exif=exif), "")
    assert picture.size == picture.load().size == (4, 6)
    assert np.array_equal(np.asarray(picture.load()), np.rot90(np.asarray(PICTURE), -1))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("https://example.org/a.png", "expected a picture that is here, got the address https://example.org/a.png"),
        ("gone.png", "there is no picture 'gone.png'"),
        (b"no picture", "the picture cannot be read"),
        (7, "expected a picture .*, got a int"),
        ({"bytes": None, "path": None}, "expected a picture .*, got a NoneType"),
        (np.zeros((3, 4, 5), np.uint8), r"expected an array of uint8, .* got uint8 \(3, 4, 5\)"),
        (np.zeros((4, 4, 3)), r"expected an array of uint8, .* got float64 \(4, 4, 3\)"),
        ("data:image/png;base64,????", "expected base64"),
    ],
)
def test_what_is_no_picture_is_refused(value, words):
    with pytest.raises(ValueError, match=f"row 3: images: {words}"):
        read(value, "row 3: images")


def test_a_broken_file_is_named_at_the_door_or_when_it_is_used(file, tmp_path):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("png", "jpeg"):
        (tmp_path / "half").write_bytes(encoded(noise, kind)[:-500])
        with pytest.raises(PictureError, match=r"row 1: images: the picture '.*half' cannot be read"):
            read(tmp_path / "half", "row 1: images")
    file.write_bytes(encoded(noise))
    picture = read(file, "row 2: images")
    file.write_bytes(b"gone")
    with pytest.raises(PictureError, match=r"row 2: images: the picture '.*a picture.png' cannot be read"):
        picture.load()


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


PLACE = {"type": "image"}
RED, BLUE = Image.new("RGB", (5, 5), "red"), Image.new("RGB", (6, 5), "blue")


def colours(row):
    return [picture.load().getpixel((0, 0)) for picture in row["images"]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user(PLACE, "a"), user(PLACE, "b")], "images": [RED, BLUE]},
        {"prompt": [user(PLACE, "a"), user(PLACE, "b")], "images": (RED, BLUE), "image": None},
        {"prompt": [user({"type": "image", "image": RED}, "a"), user({"type": "image", "image": BLUE}, "b")]},
        {"prompt": [user({"type": "image", "image": RED, "path": None}, "a"), user(PLACE | {"base64": text_of(BLUE)}, "b")],
         "images": None},
        {"prompt": [user({"type": "image", "url": f"data:image/png;base64,{text_of(RED)}"}, "a"),
                    user({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text_of(BLUE)}"}}, "b")],
         "images": []},
    ],
)  # fmt: skip
def test_a_rows_pictures_are_gathered_in_order(row):
    made = gathered({**row, "answer": "x"}, "row 1")
    assert made["prompt"] == [user(PLACE, "a"), user(PLACE, "b")]
    assert colours(made) == [(255, 0, 0), (0, 0, 255)]
    assert made["answer"] == "x"
    assert gathered(made, "row 1") == made


def test_rows_with_one_picture_or_none():
    assert colours(gathered({"prompt": "what?", "image": RED}, "")) == [(255, 0, 0)]
    assert gathered({"prompt": "what?"}, "") == {"prompt": "what?"}
    assert gathered({"prompt": "what?", "images": None}, "") == {"prompt": "what?", "images": []}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": [user(PLACE)]}, r"images: expected 1, one for each part of type 'image' in the prompt, got 0"),
        ({"prompt": [user(PLACE)], "images": [RED, BLUE]}, "images: expected 1, one for each part .* got 2"),
        ({"prompt": [user(PLACE, PLACE)], "image": RED}, "images: expected 2, .* got 1"),
        (
            {"prompt": [user({"type": "image", "image": RED})], "images": [BLUE]},
            "images: expected none beside pictures in ",
        ),
        (
            {"prompt": [user({"type": "image", "image": RED}, PLACE)]},
            "prompt: 2 parts of type 'image', but 1 pictures in",
        ),
        ({"prompt": "a", "images": [RED], "image": BLUE}, "images, image: expected pictures in one of these columns"),
        ({"prompt": "a", "images": [RED, "gone.png"]}, r"images\[1\]: there is no picture 'gone.png'"),
        ({"prompt": [user({"type": "image", "url": "http://a/b.png"})]}, "prompt: expected a picture that is here"),
        ({"prompt": [user({"type": "image_url"})]}, "prompt: a part of type 'image_url' has no address"),
        ({"prompt": [user({"type": "image", "image": RED, "path": "a.png"})]}, "prompt: a part of type 'image' holds "),
    ],
)
def test_places_and_pictures_must_match(row, words):
    with pytest.raises(ValueError, match=f"row 7: {words}"):
        gathered(row, "row 7")


def test_paths_of_a_file_lead_to_its_folder(file):
    folder = file.parent
    row = {
        "prompt": [user({"type": "image", "path": file.name})],
        "images": [file.name, "other.png"],
        "answer": file.name,
    }
    made = located(row, folder)
    assert made["images"] == [str(file), "other.png"]
    assert made["prompt"] == [user({"type": "image", "path": str(file)})]
    assert made["answer"] == file.name
    assert located({"image": {"bytes": None, "path": file.name}}, folder)["image"] == {"bytes": None, "path": str(file)}


def test_pictures_get_their_place_before_the_first_users_text():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "what?"}]
    got = at_places(messages, 2)
    assert got[0] == messages[0]
    assert got[1]["content"] == [PLACE, PLACE, {"type": "text", "text": "what?"}]
    placed = [user("a", PLACE)]
    assert at_places(placed, 1) == placed
    assert at_places(messages, 0) == messages
