"""Questions that only a picture answers, generated: how many squares it shows, and of what colour.

Answers are as frequent as each other, so that whoever does not look is right in one case of four.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE, CELLS = 32, 2  # pixels, and squares that fit side by side
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "gold": (230, 190, 40)}
COUNTS = ("1", "2", "3", "4")
QUESTIONS = {"colour?": tuple(COLOURS), "how many?": COUNTS}


def samples(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts with a picture and an answer; colours and counts in turn."""
    made = []
    for i in range(count):
        draw = random.Random(f"{seed} {i}")
        question = list(QUESTIONS)[i % 2]
        answer = {name: draw.choice(answers) for name, answers in QUESTIONS.items()}
        picture = squares(int(answer["how many?"]), COLOURS[answer["colour?"]], draw)
        made.append({"prompt": question, "answer": answer[question], "images": [picture]})
    return made


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """The same with the answer over another one."""
    made = []
    for i, sample in enumerate(samples(count, seed)):
        others = [answer for answer in QUESTIONS[sample["prompt"]] if answer != sample["answer"]]
        rejected = random.Random(f"{seed} {i} rejected").choice(others)
        images = sample["images"]
        made.append({"prompt": sample["prompt"], "chosen": sample["answer"], "rejected": rejected, "images": images})
    return made


def squares(count: int, colour: tuple[int, int, int], draw: random.Random) -> Image:
    """So many squares of one colour on grey; noise makes no two pictures alike."""
    from PIL import Image as images

    cell = SIZE // CELLS
    pixels = np.full((SIZE, SIZE, 3), draw.randint(90, 160), dtype=np.uint8)
    for at in draw.sample(range(CELLS * CELLS), count):
        top, left = (cell * i + draw.randint(0, 4) for i in divmod(at, CELLS))
        pixels[top : top + cell - 4, left : left + cell - 4] = colour
    noise = np.random.default_rng(draw.getrandbits(32)).integers(-10, 11, pixels.shape)
    return images.fromarray((pixels + noise).astype(np.uint8))
