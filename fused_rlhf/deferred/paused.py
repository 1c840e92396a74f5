"""When heads of deferred models give ordinary logits after all: in this thread, while something else looks after them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_local = threading.local()


def is_paused() -> bool:
    return getattr(_local, "depth", 0) > 0


@contextlib.contextmanager
def paused() -> Iterator[None]:
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        yield
    finally:
        _local.depth -= 1
