"""Pictures of samples: every form that data sets and processors have them in, each at its place.

    a column    images or image: one picture or a list of them, for the places that the prompt's messages leave open; before
                the first user's text where they leave none
    a part      {"type": "image", "image" | "path" | "url" | "base64": picture}, {"type": "image_url", "image_url": address},
                or {"type": "image"} alone, a place for a picture of the column
    a picture   PIL, a path, its bytes, {"bytes", "path"} as data sets have it, an array of uint8, (H, W) or (H, W, 3 or 4),
                base64 or a data: address

Nothing is fetched from the network. A picture is read once when a run begins, to be checked, measured and identified by its
content, and loaded when it is used, turned as its EXIF orientation says.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Message = dict[str, Any]

COLUMNS = ("images", "image")
KEYS = ("image", "path", "url", "base64")  # of a part of type "image"
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap width and height


@dataclass(frozen=True)
class Picture:
    """A picture that has been checked; equal to another of the same content."""

    source: Any = field(compare=False)  # PIL, a path or bytes
    where: str = field(compare=False)  # row and field, for messages
    digest: str
    size: tuple[int, int]  # width and height, as `load` gives it

    @staticmethod
    def of(source: Any, where: str) -> Picture:
        """Raises PictureError, beginning with `where`, where it is no picture."""
        with _reading(source, where):
            return Picture(source, where, *_measured(source))

    @functools.lru_cache(maxsize=16)  # noqa: B019 - few, and those of a group of completions are one
    def load(self) -> Image:
        """In RGB, upright. Raises PictureError naming row and field where it can no longer be read."""
        from PIL import ImageOps

        with _reading(self.source, self.where):
            return ImageOps.exif_transpose(_opened(self.source)).convert("RGB")

    def __repr__(self) -> str:
        return f"<picture{_name(self.source)} {self.size[0]}x{self.size[1]} {self.digest[:16]}>"


class PictureError(ValueError):
    """A picture cannot be read."""


@contextmanager
def _reading(source: Any, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Pillow's readers raise anything over a broken file
        raise PictureError(f"{where}: the picture{_name(source)} cannot be read: {error}") from error


def _name(source: Any) -> str:
    return f" {str(source)!r}" if isinstance(source, Path) else ""


def _opened(source: Any) -> Image:
    from PIL import Image  # only those who have pictures need it

    if isinstance(source, Image.Image):
        return source
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _measured(source: Any) -> tuple[str, tuple[int, int]]:
    """Digest and size of an upright picture, which is decoded, so that what is broken shows."""
    source = source.read_bytes() if isinstance(source, Path) else source
    found = _opened(source)
    width, height = found.size
    sideways = found.getexif().get(ORIENTATION) in SIDEWAYS
    if isinstance(source, bytes):
        content = source
        found.load()
    else:
        content = f"{found.mode} {found.size} ".encode() + found.tobytes()
    return hashlib.sha256(content).hexdigest(), (height, width) if sideways else (width, height)


def read(value: Any, where: str) -> Picture:
    """A picture of any form.

    Raises ValueError, beginning with `where`, for an address of the network and for what is no picture.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, (bytes, bytearray)):
        return Picture.of(bytes(value), where)
    if isinstance(value, (str, Path)):
        return Picture.of(_text(value, where), where)
    if hasattr(value, "__array__") and not hasattr(value, "getexif"):
        return Picture.of(_array(value, where), where)
    if not hasattr(value, "getexif"):
        raise ValueError(
            f"{where}: expected a picture (PIL, a path, its bytes, base64, an array of uint8), got a {type(value).__name__}"
        )
    return Picture.of(value, where)


def _text(value: str | Path, where: str) -> Path | bytes:
    text = str(value)
    if text.startswith(("http://", "https://", "ftp://", "s3://", "gs://", "hf://")):
        raise ValueError(f"{where}: expected a picture that is here, got the address {text:.80}: nothing is fetched")
    if text.startswith("data:"):
        head, _, body = text.partition(",")
        return _decoded(body, where) if head.endswith(";base64") else unquote(body).encode("latin-1")
    path = Path(unquote(text.removeprefix("file://")) if text.startswith("file://") else text).expanduser()
    if _is_file(path):
        return path.absolute()
    if len(text) > 64 and set(text) <= BASE64:
        return _decoded(text, where)
    raise ValueError(f"{where}: there is no picture {text[:200]!r}, beside the data's file or in the working directory")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long for a name
        return False


BASE64 = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n\r")


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: expected base64, got {text[:40]!r}...: {error}") from error


def _array(value: Any, where: str) -> Image:
    from PIL import Image

    array = np.asarray(value)
    fits = array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
    if not fits or 0 in array.shape:
        raise ValueError(
            f"{where}: expected an array of uint8, (height, width) or (height, width, 3 or 4), got {array.dtype} "
            f"{tuple(array.shape)}"
        )
    return Image.fromarray(array)


def described(value: Any) -> Any:
    """What tells one picture from another, for JSON; of anything else its repr."""
    return value.digest if isinstance(value, Picture) else repr(value)


# ------------------------------------------------------------------------------------------------------------- of rows


def located(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A row of a file in `folder`, the relative paths of its pictures made whole where they lead there."""

    def found(value: Any) -> Any:
        if isinstance(value, str) and len(value) < 4096 and _is_file(folder / value):
            return str((folder / value).absolute())
        if isinstance(value, Mapping):
            return {key: found(inner) if key in ("path", "url") else inner for key, inner in value.items()}
        return [found(inner) for inner in value] if isinstance(value, list) else value

    def of_part(part: Any) -> Any:
        if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
            return part
        return {key: inner if key == "type" else found(inner) for key, inner in part.items()}

    made = {name: found(value) if name in COLUMNS else value for name, value in row.items()}
    return {name: _with_parts(value, of_part) for name, value in made.items()}


def gathered(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row with a prompt whose pictures, of parts or of the column, are all in the column `images`, in order.

    Raises ValueError naming row and field: a place without its picture, a picture without its place, both a column and
    pictures in parts, what is no picture.
    """
    prompt = in_parts(row["prompt"], f"{where}: prompt")
    column = of_column(row, where)
    places = parts_of(prompt)
    own = [part["image"] for part in places if "image" in part]
    if own and column:
        raise ValueError(
            f"{where}: images: expected none beside pictures in the prompt's parts, got {len(column)} and {len(own)}"
        )
    if own and len(own) < len(places):
        raise ValueError(f"{where}: prompt: {len(places)} parts of type 'image', but {len(own)} pictures in them")
    if not own and places and len(column) != len(places):
        raise ValueError(
            f"{where}: images: expected {len(places)}, one for each part of type 'image' in the prompt, got {len(column)}"
        )
    found = own or column
    bare = _with_parts(prompt, lambda part: {"type": "image"} if _is_picture(part) else part)
    made = {name: value for name, value in row.items() if name not in COLUMNS} | {"prompt": bare}
    return made | {"images": found} if found or any(name in row for name in COLUMNS) else made


def of_column(row: Mapping[str, Any], where: str) -> list[Picture]:
    """The pictures of a row's column `images` or `image`; of one of them, where both hold some."""
    found = []
    for name in COLUMNS:
        value = row.get(name)
        if value is None:
            continue
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        numbered = [(f"{where}: {name}" + (f"[{i}]" if len(values) > 1 else ""), one) for i, one in enumerate(values)]
        found.append([read(one, place) for place, one in numbered])
    filled = [some for some in found if some]
    if len(filled) > 1:
        raise ValueError(f"{where}: images, image: expected pictures in one of these columns, got both")
    return filled[0] if filled else []


def in_parts(prompt: Any, where: str) -> Any:
    """Messages whose parts of type image hold a `Picture` under "image", or none; anything else as it is."""
    return _with_parts(prompt, lambda part: _part(part, where))


def _with_parts(messages: Any, change: Callable[[Any], Any]) -> Any:
    """Messages with each part changed; anything else as it is."""
    if not isinstance(messages, list):
        return messages
    made = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, (list, tuple)):
            message = {**message, "content": list(map(change, content))}
        made.append(message)
    return made


def _part(part: Any, where: str) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image_url":
        address = part.get("image_url")
        address = address.get("url") if isinstance(address, Mapping) else address
        if address is None:
            raise ValueError(f"{where}: a part of type 'image_url' has no address")
        return {"type": "image", "image": read(address, where)}
    if kind != "image":
        return part
    given = [(key, part[key]) for key in KEYS if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"{where}: a part of type 'image' holds {[key for key, _ in given]}: expected one of them")
    if not given:
        return {"type": "image"}
    key, value = given[0]
    if key == "base64":
        value = _decoded(value, where) if isinstance(value, str) and not value.startswith("data:") else value
    return {"type": "image", "image": read(value, where)}


def parts_of(messages: Any) -> list[Message]:
    """The parts of type image, turn after turn."""
    found: list[Any] = []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            found += filter(_is_picture, content)
    return found


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def at_places(messages: Sequence[Message], count: int) -> list[Message]:
    """Messages whose parts say where their `count` pictures are: before the first user's text where none says so."""
    if count == 0 or parts_of(list(messages)):
        return list(messages)
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    content = messages[first].get("content", "")
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    with_parts = {**messages[first], "content": [{"type": "image"}] * count + texts}
    return [with_parts if i == first else message for i, message in enumerate(messages)]


@functools.lru_cache(maxsize=512)
def blank(size: tuple[int, int]) -> Image:
    """A grey picture, for what depends on the size alone."""
    from PIL import Image

    return Image.new("RGB", size, (128, 128, 128))
