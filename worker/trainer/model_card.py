"""Writes the measurements in an artifact's README, from `scorecard.json` and `gate.json` beside it."""

from collections.abc import Iterator
from pathlib import Path

from tunery.trainer_protocol import Gated, GeneralScore, Score


def sections(artifact: Path) -> Iterator[str]:
    """Yields Markdown: the scorecard's figures and the gate's verdict, if the model was measured."""
    if (artifact / "scorecard.json").exists():
        score = Score.model_validate_json((artifact / "scorecard.json").read_text())
        yield "## Measured\n\n" + "\n".join(_table(score))
    if (artifact / "gate.json").exists():
        yield "## Gate\n\n" + _gate(Gated.model_validate_json((artifact / "gate.json").read_text()))


def _table(score: Score) -> Iterator[str]:
    yield f"Base and tuned model on {score.rows} held-out rows, the change with its paired 95 % interval."
    yield ""
    yield "| what | base | tuned | change |"
    yield "| --- | --- | --- | --- |"
    measures = score.metrics.items()
    if not measures:
        yield _row("exact", score.base_exact, score.tuned_exact, score.gain, score.gain_low, score.gain_high)
    for name, found in sorted(measures, key=lambda named: named[0] != score.primary):
        label = f"{name} (the task's own)" if name == score.primary else name
        yield _row(label, found.base, found.tuned, found.gain, found.low, found.high)
    if score.general is not None:
        yield from _general(score.general)


def _general(score: GeneralScore) -> Iterator[str]:
    name = f"general ability, {score.items} questions"
    change = (score.change, score.change_low, score.change_high)
    yield _row(name, score.base_accuracy, score.tuned_accuracy, *change)
    moved = score.forgetting
    if moved is not None:
        change = (moved.nll_change, moved.nll_change_low, moved.nll_change_high)
        yield (
            f"| loss on {moved.prompts} general prompts, nats | {moved.base_nll:.3f} | {moved.tuned_nll:.3f} | "
            "{:+.3f} ({:+.3f} to {:+.3f}) |".format(*change)
        )
        yield (
            f"| KL to the base there, nats per token | | {moved.kl:.3f} | ({moved.kl_low:.3f} to {moved.kl_high:.3f}) |"
        )


def _row(name: str, base: float, tuned: float, *change: float) -> str:
    shown = "{:+.1f} points ({:+.1f} to {:+.1f})".format(*(100 * each for each in change))
    return f"| {name} | {base:.1%} | {tuned:.1%} | {shown} |"


def _gate(verdict: Gated) -> str:
    kept = "withheld until its owner publishes it" if verdict.withheld else "published"
    lines = [f"- `{each.name}` {each.limit:g}: {each.status}" for each in verdict.checks]
    return "\n".join([f"**{verdict.status}**: the model is {kept}.", "", *lines])
