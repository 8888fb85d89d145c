"""Draws in a terminal: a job's progress bar and its loss curve. Pure rich, no service, no torch."""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

WORDS = {
    "validating_files": "checking files",
    "queued": "queued",
    "running": "starting",
    "paused": "paused",
    "succeeded": "done",
    "failed": "failed",
    "cancelled": "cancelled",
}
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # Unicode's numbering: row by row, left and right


def duration(seconds: float) -> str:
    """Formats seconds: `75` -> `1:15`, `3700` -> `1:01:40`."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Formats bytes in powers of 1000: `1234567` -> `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def literal_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Returns a console that prints strings as they are: a token `[/INST]` is no markup, a name's `:bank:` no emoji."""
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def print_whole(console: Console, table: Table) -> None:
    """Prints a table at its full width, so that the terminal wraps lines instead of cutting ids and digests.

    Without the blanks that fill each line to the longest one's width: a narrow terminal would show them as empty lines.
    """
    wide = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    options = console.options.update(width=max(wide, console.width))
    for segments in console.render_lines(table, options, pad=False):
        line = Text.assemble(*((part.text, part.style or "") for part in segments))
        line.rstrip()
        console.print(line, soft_wrap=True)


class Reporter:
    """Prints one line a step; with `timed`, the time since the one before, if steps follow each other directly."""

    def __init__(self, console: Console, *, timed: bool = True) -> None:
        self._console, self._timed = console, timed
        self._last = time.monotonic()

    def __call__(self, name: str, where: str) -> None:
        now = time.monotonic()
        took, self._last = now - self._last, now
        line = Text.assemble(("  ✓ ", "green"), f"{name:<14}", (where, "dim"))
        if self._timed:
            line.append(f"  {took:.1f} s", style="dim cyan")
        self._console.print(line, soft_wrap=True)


class JobProgress:
    """Prints one live line for a job: its phase, the bar, steps, loss and time left.

    `update` takes the job and its events as the API's JSON; the losses are kept for `loss_curve`.
    """

    def __init__(self, console: Console) -> None:
        self.losses: list[tuple[int, float]] = []
        self.valid_losses: list[tuple[int, float]] = []
        self._started = time.monotonic()
        self._step, self._total, self._first_step_at = 0, 0, 0.0
        self._first_step = 0
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<14}"),
            BarColumn(bar_width=34),
            TextColumn("{task.fields[steps]}"),
            TextColumn("[cyan]{task.fields[loss]}"),
            TextColumn("[dim]{task.fields[left]}"),
            console=console,
            transient=False,
        )
        self._task: TaskID = self._progress.add_task("queued", total=None, steps="", loss="", left="")

    def __enter__(self) -> "JobProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, job: dict[str, Any], new_events: Sequence[dict[str, Any]]) -> None:
        """`new_events` oldest first, each given once."""
        for event in new_events:
            self._take(event)
        status, progress = str(job.get("status")), job.get("progress") or {}
        self._step = max(self._step, int(progress.get("step") or 0))
        self._total = int(progress.get("total_steps") or self._total)
        done = status in ("succeeded", "failed", "cancelled")
        words = str(job.get("phase") or WORDS.get(status, status)) if status == "running" else WORDS.get(status, status)
        self._progress.update(
            self._task,
            description=words,
            total=self._total or None,
            completed=self._step,
            steps=f"step {self._step}/{self._total}" if self._total else "",
            loss=f"loss {self.losses[-1][1]:.3f}" if self.losses else "",
            left=f"took {self._elapsed()}" if done else self._left(job),
        )

    def _take(self, event: dict[str, Any]) -> None:
        data = event.get("data") or {}
        if event.get("type") != "metrics" or "step" not in data:
            return
        step = int(data["step"])
        self._step = max(self._step, step)
        self._total = int(data.get("total_steps") or self._total)
        if not self._first_step_at:
            self._first_step, self._first_step_at = step, time.monotonic()
        if "train_loss" in data:
            self.losses.append((step, float(data["train_loss"])))
        if "full_valid_loss" in data:
            self.valid_losses.append((step, float(data["full_valid_loss"])))

    def _elapsed(self) -> str:
        return duration(time.monotonic() - self._started)

    def _left(self, job: dict[str, Any]) -> str:
        if finish := job.get("estimated_finish"):
            return f"{duration(float(finish) - time.time())} left"
        done, left = self._step - self._first_step, self._total - self._step
        if done > 0 and left > 0:
            return f"{duration((time.monotonic() - self._first_step_at) / done * left)} left"
        return self._elapsed()


def loss_curve(
    points: Sequence[tuple[int, float]],
    marks: Sequence[tuple[int, float]] = (),
    *,
    width: int = 64,
    height: int = 10,
    unicode: bool = True,
) -> Text:
    """Returns a chart of (step, loss), with `marks` (full validation losses) as diamonds; empty without a finite point.

    `width` and `height` in characters, axes apart. A character of the curve has 2 x 4 dots.
    """
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    marks = [(step, loss) for step, loss in marks if math.isfinite(loss)]
    if not points:
        return Text()
    steps = [step for step, _ in [*points, *marks]]
    losses = [loss for _, loss in [*points, *marks]]
    first, span = min(steps), max(max(steps) - min(steps), 1)
    high, rise = max(losses), (max(losses) - min(*losses, 0.0)) or 1.0
    dots = [(x, (high - y) / rise) for x, y in _dense(points, first, span, width * 2)]
    diamonds = {
        (round((high - y) / rise * (height - 1)), round((step - first) / span * (width - 1))) for step, y in marks
    }
    chart = Text()
    for number, cells in enumerate(_cells(dots, width, height)):
        labelled = number % 3 == 0 or number == height - 1
        label = f"{high - rise * number / max(height - 1, 1):7.2f}" if labelled else ""
        chart.append(f"{label:>7} {'┤' if unicode else '|'}", style="dim")
        for column, cell in enumerate(cells):
            if (number, column) in diamonds:
                chart.append("◆" if unicode else "o", style="bold magenta")
            else:
                chart.append((chr(_BRAILLE + cell) if unicode else "*") if cell else " ", style="cyan")
        chart.append("\n")
    chart.append(f"{'':>7} {'└' if unicode else '+'}{('─' if unicode else '-') * width}\n", style="dim")
    chart.append(f"{'':>9}{f'step {first}':<{width - 8}}{first + span:>8}", style="dim")
    return chart


def _cells(dots: Sequence[tuple[int, float]], width: int, height: int) -> list[list[int]]:
    """Returns Braille patterns, row by row; a dot is (dot column, share of the height from the top)."""
    cells = [[0] * width for _ in range(height)]
    for x, down in dots:
        row = min(height * 4 - 1, int(down * (height * 4 - 1) + 0.5))
        cells[row // 4][x // 2] |= _DOTS[row % 4][x % 2]
    return cells


def _dense(points: Sequence[tuple[int, float]], first: int, span: int, columns: int) -> list[tuple[int, float]]:
    """Returns one (dot column, loss) a column, on straight lines between neighbours: a short run draws a line too."""
    at = [((step - first) / span * (columns - 1), loss) for step, loss in sorted(points)]
    dense = [(round(x), loss) for x, loss in at]
    for (x0, y0), (x1, y1) in itertools.pairwise(at):
        for x in range(math.ceil(x0), math.floor(x1) + 1):
            dense.append((x, y0 + (y1 - y0) * ((x - x0) / (x1 - x0)) if x1 > x0 else y1))
    return dense
