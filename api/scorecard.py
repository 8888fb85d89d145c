"""Draws a job's scorecard: base and tuned model on every figure, and the change with its interval."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from tunery.jobs.errors import NoScorecard
from tunery.jobs.model import Job
from tunery.trainer_protocol import Measure, Scorecard

_TEMPLATE = Environment(autoescape=True, undefined=StrictUndefined).from_string(
    Path(__file__).with_suffix(".svg.jinja").read_text(encoding="utf-8")
)
_LEFT, _WIDTH = 250, 320
"""The position of 0 %, and the distance from it to 100 %."""
_TOP, _LINE = 96, 30
_BETTER, _WORSE, _SAME = "#1a7f37", "#cf222e", "#59636e"


@dataclass(frozen=True)
class Line:
    """A figure in the drawing's coordinates."""

    name: str
    y: int
    base: float
    tuned: float
    colour: str
    change: str


def draw(job: Job) -> str:
    """Returns the SVG. Raises NoScorecard."""
    if job.scorecard is None:
        raise NoScorecard(id=job.id)
    score = Scorecard.model_validate(job.scorecard)
    figures = list(_figures(score))
    lines = [_line(place, name, found) for place, (name, found) in enumerate(figures)]
    notes = list(_notes(job, score))
    axis = _TOP + _LINE * len(lines) - 8
    return _TEMPLATE.render(
        job=job.id,
        title=job.tuned_model or job.model_name,
        rows=score.rows,
        ticks=[{"x": _place(fraction), "label": f"{fraction:.0%}"} for fraction in (0, 0.25, 0.5, 0.75, 1)],
        lines=lines,
        notes=notes,
        axis=axis,
        height=axis + 44 + 20 * len(notes),
    )


def _figures(score: Scorecard) -> Iterator[tuple[str, Measure]]:
    """Yields the figures: the task's own metric first, general ability last; older releases have only exact matches."""
    exact = Measure(
        base=score.base_exact, tuned=score.tuned_exact, gain=score.gain, low=score.gain_low, high=score.gain_high
    )
    metrics = score.metrics or {"exact": exact}
    yield from sorted(metrics.items(), key=lambda named: named[0] != score.primary)
    if score.general is not None:
        general = score.general
        yield (
            f"general ability ({general.items} questions)",
            Measure(
                base=general.base_accuracy, tuned=general.tuned_accuracy, gain=general.change,
                low=general.change_low, high=general.change_high,
            ),
        )  # fmt: skip


def _line(place: int, name: str, found: Measure) -> Line:
    points = "{:+.1f} points ({:+.1f} to {:+.1f})".format(*(100 * each for each in (found.gain, found.low, found.high)))
    colour = _BETTER if found.low > 0 else _WORSE if found.high < 0 else _SAME
    return Line(name, _TOP + _LINE * place, _place(found.base), _place(found.tuned), colour, points)


def _place(fraction: float) -> float:
    return round(_LEFT + _WIDTH * fraction, 1)


def _notes(job: Job, score: Scorecard) -> Iterator[str]:
    moved = score.general and score.general.forgetting
    if moved:
        yield (
            f"On {moved.prompts} general prompts: KL to the base {moved.kl:.3f} nats per token ({moved.kl_low:.3f} to "
            f"{moved.kl_high:.3f}), loss {moved.base_nll:.3f} before, {moved.tuned_nll:.3f} after"
        )
    if job.gate is not None:
        kept = "withheld" if job.withholds_model else "published"
        yield f"Gate: {job.gate['status']}, the model is {kept}"
