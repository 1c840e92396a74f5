"""Fused LM-head, log-softmax, KL and policy objectives: the `[tokens, vocabulary]` logits never exist."""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

# A wheel holds kernels/, trainers/ and bench/ in this folder, a checkout links to them from here. Where links cannot be
# made (an sdist, a zip as pip unpacks it, Windows) they are found beside this folder; a type checker then sees `Any`.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

__version__ = "0.1.0"

if _TYPE_CHECKING:
    from fused_rlhf.api import *  # noqa: F403
else:
    # torch comes with the first name that is asked for: a command line answers `--help` without it.
    def __getattr__(name):
        if not name.startswith("_") and _find_spec(f"{__name__}.{name}"):  # without the rest, of which it may be a part
            return _import_module(f"{__name__}.{name}")
        known = globals()
        if not name.startswith("_") or name == "__all__":
            api = _import_module("fused_rlhf.api")
            known.update({public: getattr(api, public) for public in api.__all__}, __all__=api.__all__)
        if name not in known:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return known[name]

    def __dir__():
        return sorted({*globals(), *_import_module("fused_rlhf.api").__all__})
