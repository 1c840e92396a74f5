"""Rows with pictures: every form that they come in, what must be refused, and those that the trainers learn from.

A row is written once, with PIL pictures in its messages' parts: what a processor's own `apply_chat_template` takes. Its
forms say the same otherwise.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Message = dict[str, Any]
Chat = list[Message]
Sample = dict[str, Any]

SIZES = ((40, 28), (28, 56), (64, 32), (36, 44), (16, 80))
PLACE = {"type": "image"}


def picture(shade: int, width: int = 16, height: int = 8) -> Image.Image:
    """Unlike those of other shades not in its colour alone, which a norm might take away."""
    gradient = Image.linear_gradient("L").resize((width, height)).rotate(shade)
    return Image.merge("RGB", [gradient, Image.new("L", (width, height), shade), gradient.point(lambda x: 255 - x)])


def shot(i: int, shade: int = 0) -> Image.Image:
    """Picture number `i`, of a size of its own."""
    return picture(shade or 20 + 45 * i, *SIZES[i])


def said(role: str, *parts: Any) -> Message:
    """A message of texts, pictures and parts."""

    def made(part: Any) -> Any:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return part if isinstance(part, dict) else PLACE | {"image": part}

    return {"role": role, "content": list(map(made, parts))}


def user(*parts: Any) -> Message:
    return said("user", *parts)


A, B, C = shot(0), shot(1), shot(2)
TURNS: Chat = [user(B, "First?"), said("assistant", "1"), user(C, "and", A, "?")]

# Chats of no picture to three, of several sizes and turns.
MIXED: list[Chat] = [
    [user("What is", A, "this?")],
    [user("2+2?")],
    TURNS,
    [user(shot(4), "and", shot(3), "?")],
]
ONE_EACH: list[Chat] = [[user(shot(i), f"What {'is ' * i}it?")] for i in range(4)]
COMPLETIONS = (("yes", "no"), ("4", "five"), ("1, 2", "3"), ("a", "bcd"))


def placed(chat: Chat) -> tuple[Chat, list[Image.Image]]:
    """The chat with places, and the pictures that belong there."""
    parts = [part for message in chat for part in message["content"]]
    bare = [
        message | {"content": [PLACE if p["type"] == "image" else p for p in message["content"]]} for message in chat
    ]
    return bare, [part["image"] for part in parts if part["type"] == "image"]


def row_of(chat: Chat, number: int = 0) -> Sample:
    """A row for every trainer, with a column of pictures."""
    prompt, images = placed(chat)
    chosen, rejected = ([said("assistant", text)] for text in COMPLETIONS[number])
    return {"prompt": prompt, "images": images, "chosen": chosen, "rejected": rejected, "number": number}


# --------------------------------------------------------------------------------------------------------------- forms


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def text_of(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def address_of(image: Image.Image) -> Message:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text_of(image)}"}}


def path_of(image: Image.Image, folder: Path) -> str:
    path = folder / f"{image.width}.png"
    path.write_bytes(png(image))
    return str(path)


def forms(folder: Path) -> dict[str, list[tuple[Sample, Chat]]]:
    """name -> rows in this form, each with the chat that it says."""
    parts: dict[str, Callable[[Image.Image], Any]] = {
        "PIL": lambda image: image,
        "path": lambda image: PLACE | {"path": path_of(image, folder)},
        "data: address": address_of,
        "base64": lambda image: PLACE | {"base64": text_of(image)},
        "array": lambda image: PLACE | {"image": np.asarray(image)},
    }
    two = [user(A, "and", B, "what?")]
    made = {name: [({"prompt": [user(form(A), "and", form(B), "what?")]}, two)] for name, form in parts.items()}
    prompt, images = placed(two)
    column = {
        "prompt": [{"role": "user", "content": "what?"}],
        "images": [{"bytes": png(x), "path": None} for x in (A, B)],
    }
    none = [user("2+2?")]
    return made | {
        "column, places": [({"prompt": prompt, "images": images}, two)],
        "column of bytes": [(column, [user(A, B, "what?")])],
        "one": [({"prompt": [user(A, "what?")]}, [user(A, "what?")])],
        "three": [({"prompt": [user(A, B, C, "what?")]}, [user(A, B, C, "what?")])],
        "an earlier turn": [({"prompt": [*TURNS[:2], user("b?")]}, [*TURNS[:2], user("b?")])],
        "with and without": [
            ({"prompt": [user(PLACE, "what?")], "images": [A]}, [user(A, "what?")]),
            ({"prompt": none, "images": []}, none),
            ({"prompt": none, "images": None}, none),
        ],
    }


def refusals(folder: Path, tokens: set[str]) -> dict[str, tuple[Sample, str]]:
    """name -> a row that no trainer may take, and the field that is to be named; `tokens`: the family's of images."""
    broken = folder / "broken.png"
    broken.write_bytes(png(shot(3))[:-200])
    asked, one = [user(PLACE, "what?")], {"prompt": [user(PLACE, "what?")], "images": [A]}
    made: dict[str, tuple[Sample, str]] = {
        "a place without a picture": ({"prompt": asked}, "images"),
        "a picture too many": (one | {"images": [A, B]}, "images"),
        "an address": ({"prompt": [user({"type": "image_url", "image_url": "https://a.org/b.png"}, "?")]}, "prompt"),
        "an address in the column": (one | {"images": ["https://a.org/b.png"]}, "images"),
        "a broken file": (one | {"images": [str(broken)]}, "images"),
        "a broken file in its part": ({"prompt": [user(PLACE | {"path": str(broken)}, "?")]}, "prompt"),
        "a video": ({"prompt": [user({"type": "video", "video": "a.mp4"}, "what?")]}, "prompt"),
    }
    for token in sorted(tokens):
        made |= {
            f"{token} in a text": ({"prompt": [user(f"what is {token}?")]}, "prompt"),
            f"{token} beside a picture": (one | {"prompt": [user(PLACE, f"what is {token}?")]}, "prompt"),
            f"{token} in a completion": (one | {"chosen": [said("assistant", f"a {token}")]}, "chosen"),
        }
    return made
