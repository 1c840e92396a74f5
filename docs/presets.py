"""The presets on the API page as what they are: constructors, with signature and docstring.

The site's pages are made of the source, which is read, not run; there a preset is a name that `preset(...)` is assigned to.
"""

from __future__ import annotations

from typing import Any

import griffe


class Presets(griffe.Extension):
    """Puts the function that Python finds under such a name in the place of the attribute."""

    def on_module(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        names = [name for name, found in mod.attributes.items() if called(found.value) == "preset"]
        if names:
            running = griffe.inspect(mod.path)
            for name in names:
                mod.set_member(name, running[name])


def called(value: Any) -> str | None:
    """The function whose call a value is."""
    return str(value.function) if isinstance(value, griffe.ExprCall) else None
