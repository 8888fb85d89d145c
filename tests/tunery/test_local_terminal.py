"""Output for a terminal: durations, sizes, tables, loss curves and progress."""

import io
import math

import pytest
from rich.console import Console
from rich.table import Table

from tunery.local.terminal import JobProgress, Reporter, duration, loss_curve, print_whole, size


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (3600, "1:00:00"), (-3, "0:00"), (59.6, "1:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1234567, "1.2 MB"), (3e13, "30.0 TB")])
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("timed", "end"), [(True, " s\n"), (False, "was started again\n")])
def test_only_steps_that_follow_each_other_have_a_duration(timed: bool, end: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    Reporter(console, timed=timed)("api", "was started again")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().endswith(end)


def test_a_table_is_not_cut_where_the_terminal_is_narrow() -> None:
    console = Console(file=io.StringIO(), width=80)
    table = Table(box=None)
    for column in ("file", "sha256"):
        table.add_column(column, no_wrap=True)
    table.add_row("adapter_model.safetensors", "0123456789abcdef" * 4)
    print_whole(console, table)
    assert isinstance(console.file, io.StringIO)
    assert "0123456789abcdef" * 4 in console.file.getvalue()


def test_lines_of_a_table_are_not_filled_with_blanks() -> None:
    console = Console(file=io.StringIO(), width=80)
    table = Table.grid(padding=(0, 2))
    table.add_row("id", "short")
    table.add_row("warnings", "a long one, " * 20)
    print_whole(console, table)
    assert isinstance(console.file, io.StringIO)
    first, second = console.file.getvalue().splitlines()
    assert first == "id        short"
    assert second == "warnings  " + ("a long one, " * 20).rstrip()


def _rows(points: list[tuple[int, float]]) -> list[str]:
    chart = loss_curve(points, width=20, height=8, unicode=False).plain.splitlines()
    return [line.partition("|")[2] for line in chart[:8]]


def test_a_falling_loss_falls_in_the_picture() -> None:
    rows = _rows([(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0), (5, 0.0)])
    first_ink = [row.index("*") for row in rows]
    assert first_ink == sorted(first_ink)
    assert first_ink[0] == 0
    assert rows[-1].rstrip().endswith("*")
    assert len(rows[-1].rstrip()) == 20


def test_a_flat_loss_stays_in_one_row() -> None:
    rows = _rows([(1, 2.0), (10, 2.0)])
    assert [bool(row.strip()) for row in rows] == [True] + [False] * 7


@pytest.mark.parametrize("points", [[], [(1, math.nan)], [(1, math.inf)]])
def test_nothing_finite_gives_nothing(points: list[tuple[int, float]]) -> None:
    assert loss_curve(points).plain == ""


def test_a_single_point_is_drawn() -> None:
    assert "*" in "".join(_rows([(7, 1.5)]))


def test_validation_losses_are_marked_where_they_lie() -> None:
    chart = loss_curve([(1, 2.0), (10, 1.0)], [(10, 0.5)], width=20, height=8).plain.splitlines()
    row = next(line for line in chart if "◆" in line)
    assert row.index("◆") == len("   0.00 ┤") + 19


def _metrics(step: int, loss: float) -> dict[str, object]:
    data = {"step": step, "train_loss": loss, "total_steps": 20}
    return {"type": "metrics", "data": data}


def test_progress_shows_step_loss_and_time_left() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with JobProgress(console) as progress:
        progress.update({"status": "queued"}, [])
        progress.update({"status": "running", "phase": "training"}, [_metrics(1, 2.0), _metrics(2, 1.25)])
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "step 2/20" in text
    assert "loss 1.250" in text
    assert "left" in text
    assert progress.losses == [(1, 2.0), (2, 1.25)]


def test_progress_keeps_full_validation_losses_apart() -> None:
    progress = JobProgress(Console(file=io.StringIO()))
    event = {"type": "metrics", "data": {"step": 5, "full_valid_loss": 0.4, "total_steps": 20}}
    progress.update({"status": "running"}, [event])
    assert progress.valid_losses == [(5, 0.4)]
    assert progress.losses == []
