"""Renders advice as one HTML page without scripts or external files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from tunery.planning import fitting, serving_quote
from tunery.planning.advisor import Advice
from tunery.planning.recommendation import HEADLINES
from tunery.planning.serving_quote import ServingQuote

_TEMPLATE = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    Path(__file__).with_suffix(".html.jinja").read_text(encoding="utf-8")
)
_COLOURS = {"prompt": "warn", "evaluate_both": "bar", "fine_tune": "good", "retrieval": "bad"}


def render(
    name: str,
    aim: str,
    made: Advice | None,
    *,
    state: Mapping[str, Any] | None = None,
    measured: Sequence[Mapping[str, str]] = (),
    currency: str = "",
    serving: ServingQuote | None = None,
) -> str:
    """Returns the page on the file `name`. `made`: the advice, None until its report is ready; `state`: the report's
    progress; `measured`: the rows of a baseline's table as text, with costs in `currency`; `serving`: the quote."""
    return _TEMPLATE.render(
        name=name,
        aim=aim.replace("_", " "),
        made=made,
        headline=made and HEADLINES[made.recommendation],
        colour=made and _COLOURS[made.recommendation],
        settings=made and [(one.field, _shown(one.value), one.text) for one in made.suggestions],
        cards=fitting.in_words(made.cards) if made else [],
        measured=measured,
        currency=currency,
        serving=serving_quote.in_words(serving),
        served_on=serving and serving_quote.heading(serving),
        state=state or {"status": "ready", "progress": 1.0, "error": None},
    )


def _shown(value: Any) -> str:
    return "left out" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
