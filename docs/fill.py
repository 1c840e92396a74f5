"""The generated parts of the documentation: `python docs/fill.py` writes them, a test holds them to their sources.

<!-- objectives -->  <!-- /objectives -->     from the registries
<!-- memory -->      <!-- /memory -->         from the backends' own formulas
<!-- bench: ... -->  <!-- bench end -->       from bench/results, as bench/readme.py has it
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.append(str(DOCS.parent))  # as a script, from wherever it is called

from fused_rlhf.backends import sizes  # noqa: E402
from fused_rlhf.bench import readme  # noqa: E402
from fused_rlhf.objectives import catalogue  # noqa: E402

PLACES: dict[str, Callable[[], str]] = {"objectives": catalogue.markdown, "memory": sizes.markdown}
LINK = re.compile(r"\[([^\]]+)\]\(bench/results/[^)]+\)")


def filled(text: str) -> str:
    """A page with every place as its source has it."""
    for name, content in PLACES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{content()}\n\n{end}{rest.split(end)[1]}"
    # The site has no results to link to.
    return LINK.sub(r"`bench/results/\1`", readme.filled(text, "bench/results/"))


if __name__ == "__main__":
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            page.write_text(filled(text), encoding="utf-8")
            print(f"{page.relative_to(DOCS.parent)}: updated")
