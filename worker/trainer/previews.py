"""Writes a run's preview: the first rows, token by token, as it trained on them."""

from pathlib import Path

from tunery.rows import preview, preview_page, readers
from tunery.rows.encoding import find_encoder
from tunery.rows.preview_model import Check, Preview, Sequence
from worker.trainer.data import Row
from worker.trainer.training import Training

_ROWS = 10
_COMPARED = 1000
"""How many of the run's first rows, in file order, are compared: more than are shown."""


def write(t: Training, out: Path) -> None:
    """Writes `preview.json` and `preview.html`."""
    made = make(t)
    (out / "preview.json").write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (out / "preview.html").write_text(preview_page.draw(made, f"the rows of {t.run.job}"), encoding="utf-8")


def make(t: Training) -> Preview:
    """Returns the training file's preview, with one more check: tokens and labels match the run's rows."""
    made = preview.make(
        readers.chunks_of(t.folder / "data" / "train.jsonl"),
        t.template,
        find_encoder(t.plan.method, "training", t.plan.columns, t.plan.cut_answers),
        model=t.run.base_model,
        rows=_ROWS,
        max_tokens=t.plan.max_seq_length,
    )
    trained = {_of_row(row) for row in t.rows.rows[:_COMPARED]}
    return _compared(made, trained, leaves_out=t.plan.cut_answers != "keep")


def _compared(made: Preview, trained: set[tuple[tuple[int, ...], tuple[bool, ...]]], leaves_out: bool) -> Preview:
    """Adds the check that the preview shows only rows of the run."""
    failing = [
        row.number
        for row in made.rows
        if all(sequence.trained for sequence in row.sequences)  # truncation leaves other rows out of the run
        and any(_of_sequence(it) not in trained for it in row.sequences if not (leaves_out and it.cut))
    ]
    check = Check(
        name="rows_of_the_run",
        passed=not failing,
        what="These tokens and labels are those that the run trained on",
        rows=failing,
        advice="Report this as a bug: the preview must show the run's own rows." if failing else None,
    )
    return made.model_copy(update={"checks": [*made.checks, check], "passed": made.passed and check.passed})


def _of_row(row: Row) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Returns as much of a row as a preview shows, and which of its tokens are trained."""
    shown = preview.MOST_SHOWN
    learned = [label >= 0 for label in row.labels[:shown]]
    return tuple(row.input_ids[:shown]), (False, *learned[1:])


def _of_sequence(sequence: Sequence) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    kept = [token for token in sequence.tokens if token.state != "cut"]
    return tuple(token.id for token in kept), tuple(token.state == "trained" for token in kept)
