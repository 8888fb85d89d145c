"""The README's picture of a terminal shows the final screen, without what a live display has overwritten."""

import re
import subprocess
import sys
from pathlib import Path

SPINNER = "\x1b[?25l\x1b[32m⠋\x1b[0m unpacking\r\x1b[2K\x1b[32m⠙\x1b[0m unpacking\r\n\x1b[?25h\r\x1b[1A\x1b[2K"


def _drawn(root: Path, session: str) -> list[str]:
    """Draws a recorded session; returns the picture's lines of text."""
    drawn = subprocess.run(
        [sys.executable, root / "docs/images/draw.py"], input=session.encode(), capture_output=True, check=True
    ).stdout.decode()
    assert "@font-face" not in drawn
    lines: dict[str, str] = {}
    for height, text in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*clip-path[^>]*>(.*?)</text>', drawn):
        lines[height] = lines.get(height, "") + text
    return [line.replace("&#160;", " ").rstrip() for line in lines.values()]


def test_a_spinner_leaves_nothing(root: Path) -> None:
    assert _drawn(root, f"first\r\n{SPINNER}second\r\n") == ["first", "second"]


def test_what_is_written_over_is_gone(root: Path) -> None:
    assert _drawn(root, "step 10/50 left\r\x1b[1mstep 50/50\x1b[0m\x1b[K\r\nabc\b\bX\x1b[10GY\r\n") == [
        "step 50/50",
        "aXc      Y",
    ]


def test_a_long_line_goes_on_in_the_next(root: Path) -> None:
    assert _drawn(root, "a" * 100 + "\r\n" + "b" * 103 + "\r\n") == ["a" * 100, "b" * 100, "bbb"]


def test_what_recording_and_make_say_is_left_out(root: Path) -> None:
    session = 'Script started on 2026-01-01 [COMMAND="make demo"]\nmake: Nothing to be done\r\nhi\r\nScript done on x\n'
    assert _drawn(root, session) == ["hi"]
