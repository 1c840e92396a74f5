"""report.html of a run: what it was, what came of it, its curves, samples and options on one page.

The page is whole in itself: no script, font, picture or style comes from elsewhere, and a policy in it says so to the browser.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import fused_rlhf

SHOWN = 6  # samples of a step
ALIKE = 2  # of them of one prompt
WIDTH = 120  # characters of all columns of a table
LONGEST = 2000  # characters of a text

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ name }}: {{ folder }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
.state { color: #666; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #eee; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: #555; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.4 ui-monospace, monospace; }
article { border: 1px solid #ddd; border-radius: 6px; padding: .5rem 1rem; margin: .75rem 0; }
article td:last-child { width: 100%; }
svg { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>{{ name }}: {{ folder }}</h1>
<p class="state">{{ state }}; {{ "%.0f"|format(seconds) }} s</p>
{% for line in made_of %}<div>{{ line }}</div>
{% endfor %}
{% if evaluation %}
<h2>Evaluation</h2>
<table>
<tr><th></th><th>before</th><th>after</th><th>change</th></tr>
{% for key, first, last, change in evaluation %}
<tr><th>{{ key }}</th>
<td class="number">{{ first }}</td><td class="number">{{ last }}</td><td class="number">{{ change }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% if warnings %}
<h2>Warnings</h2>
<ul>{% for line in warnings %}<li>{{ line }}</li>{% endfor %}</ul>
{% endif %}
<h2>Curves</h2>
{% if curves %}{{ curves }}{% else %}<p>Nothing that was logged has changed.</p>{% endif %}
{% for step, some in samples %}
<h2>Samples of step {{ step }}</h2>
{% if some|short %}
<table>
<tr>{% for key, _ in some[0] %}<th>{{ key }}</th>{% endfor %}</tr>
{% for sample in some %}<tr>{% for _, text in sample %}<td><pre>{{ text }}</pre></td>{% endfor %}</tr>
{% endfor %}
</table>
{% else %}
{% for sample in some %}
<article><table>
{% for key, text in sample %}<tr><th>{{ key }}</th><td><pre>{{ text }}</pre></td></tr>
{% endfor %}
</table></article>
{% endfor %}
{% endif %}
{% endfor %}
<h2>Options</h2>
<table>
{% for key, value in changed %}<tr><th>{{ key }}</th><td><pre>{{ value }}</pre></td></tr>
{% else %}<tr><td>all as by default</td></tr>
{% endfor %}
</table>
<details><summary>all of them, as <code>--config</code> reads them</summary><pre>{{ options }}</pre></details>
<p class="state">{{ versions }}</p>
</body>
</html>
"""


@dataclass(frozen=True)
class Report:
    """What the page tells. Samples are the rows of samples.jsonl, `curves` an <svg>."""

    name: str
    folder: str
    state: str  # how it ended
    seconds: float
    made_of: Sequence[str]
    before: Mapping[str, float]
    after: Mapping[str, float]
    warnings: Sequence[str]
    curves: str
    samples: Sequence[Sequence[dict[str, Any]]]
    changed: Mapping[str, Any]  # options other than by default
    options: str  # all, in YAML

    def html(self) -> str:
        """Every text but the curves is escaped."""
        page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        page.filters["short"] = short
        torch_version, its = torch.__version__, transformers.__version__
        return page.from_string(PAGE).render(
            name=self.name,
            folder=self.folder,
            state=self.state,
            seconds=self.seconds,
            made_of=self.made_of,
            evaluation=[*evaluations(self.before, self.after)],
            warnings=self.warnings,
            curves=Markup(self.curves),
            samples=[(some[0].get("step"), [fields(sample) for sample in some]) for some in self.samples if some],
            changed=list(self.changed.items()),
            options=self.options,
            versions=f"fused-rlhf {fused_rlhf.__version__}, transformers {its}, torch {torch_version}",
        )


def evaluations(before: Mapping[str, float], after: Mapping[str, float]) -> Iterable[tuple[str, str, str, str]]:
    """(name, before, after, change) in words."""
    for name in dict.fromkeys([*before, *after]):
        first, last = before.get(name), after.get(name)
        old, new = ("" if value is None else f"{value:.4g}" for value in (first, last))
        yield name, old, new, "" if first is None or last is None else f"{last - first:+.4g}"


def fields(sample: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, in_words(value)) for name, value in sample.items() if name != "step"]


def short(samples: Sequence[Sequence[tuple[str, str]]]) -> bool:
    """Whether they fit a table with a row each: the same columns, few and of a few words."""
    names = {tuple(name for name, _ in sample) for sample in samples}
    longest = max(sum(len(text) for _, text in sample) for sample in samples)
    return len(names) == 1 and longest <= WIDTH and not any("\n" in text for sample in samples for _, text in sample)


def in_words(value: Any) -> str:
    """A column's value as a reader wants it: a conversation by its speakers, a number in four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and value and all(isinstance(part, dict) and "role" in part for part in value):
        text = "\n".join(f"{part['role']}: {in_words(part.get('content'))}" for part in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    more = f" ... ({len(text):,} characters)" if len(text) > LONGEST else ""
    return text[:LONGEST] + more


def first_and_last(path: Path) -> list[list[dict[str, Any]]]:
    """Some samples of the last and of the first step in samples.jsonl, of several prompts."""
    steps: list[list[dict[str, Any]]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            sample = json.loads(line)
            if not steps or steps[-1][0]["step"] != sample["step"]:
                del steps[1:]
                steps.append([])
            alike = sum(other.get("prompt") == sample.get("prompt") for other in steps[-1])
            if len(steps[-1]) < SHOWN and alike < ALIKE:
                steps[-1].append(sample)
    return steps[::-1]
