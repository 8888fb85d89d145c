"""A terminal session as an SVG.

    COLORTERM=truecolor script -qec 'stty cols 100; make demo' demo.typescript
    python docs/images/draw.py < demo.typescript > docs/images/demo.svg

What is drawn is the screen as it was left: what was overwritten or erased is gone.
"""

import io
import re
import sys
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

from rich.console import Console
from rich.text import Text

WIDTH = 100
_PIECES = re.compile(
    r"\x1b\[(?P<numbers>[\d;]*)(?P<letter>[A-Za-z])"
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b\[\?[\d;]*[a-z]|\x1b[()][A-Z0-9]|\x1b."  # titles, the cursor: not drawn
    r"|(?P<control>[\r\n\b])|(?P<text>[^\x00-\x1f]+)"
)
_NOISE = re.compile(r"^(Script (started|done)|make(\[\d+\])?:) .*\n", flags=re.MULTILINE)


@dataclass
class Screen:
    """A terminal as high as it takes, so that nothing scrolls away; one (style, character) a cell.

    Not pyte: it is complete in its author's eyes and rests, and this is all that rich's live displays need.
    """

    rows: list[list[tuple[str, str]]] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0
    style: str = ""

    def feed(self, session: str) -> None:
        for piece in _PIECES.finditer(session):
            if piece["letter"]:
                self._obey(piece["letter"], piece["numbers"])
            elif piece["control"]:
                self._move(piece["control"])
            else:
                for character in piece["text"] or "":
                    self._write(character)

    def lines(self) -> list[str]:
        """Each row as text with ANSI styles, without blanks at its end."""
        return [_styled(row) for row in self.rows]

    def _write(self, character: str) -> None:
        if self.column == WIDTH:
            self._go(self.row + 1, 0)
        row = self.rows[self.row]
        row += [("", " ")] * (self.column + 1 - len(row))
        row[self.column] = (self.style, character)
        self.column += 1

    def _move(self, control: str) -> None:
        if control == "\n":
            self._go(self.row + 1, self.column)
        else:
            self.column = 0 if control == "\r" else max(0, self.column - 1)

    def _obey(self, letter: str, numbers: str) -> None:
        count = int(numbers.partition(";")[0] or 1)
        if letter == "m":
            self.style = "" if numbers in ("", "0") else f"{self.style}\x1b[{numbers}m"
        elif letter == "K":
            self._erase(numbers or "0")
        elif letter in "AB":
            self._go(self.row + (count if letter == "B" else -count), self.column)
        elif letter in "CDG":
            self.column = {"C": self.column + count, "D": max(0, self.column - count), "G": count - 1}[letter]

    def _erase(self, which: str) -> None:
        row = self.rows[self.row]
        if which == "0":
            del row[self.column :]
        elif which == "1":
            row[: self.column + 1] = [("", " ")] * (self.column + 1)
        else:
            row.clear()

    def _go(self, row: int, column: int) -> None:
        self.row, self.column = max(0, row), column
        self.rows += [[] for _ in range(self.row + 1 - len(self.rows))]


def _styled(row: list[tuple[str, str]]) -> str:
    runs = [(style, "".join(text for _, text in cells)) for style, cells in groupby(row, key=itemgetter(0))]
    return "".join(f"\x1b[0m{style}{text}" for style, text in runs).rstrip()


def picture(session: str) -> str:
    """The SVG."""
    screen = Screen()
    screen.feed(_NOISE.sub("", session))
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi("\n".join(screen.lines()).strip("\n")))
    # Without the font that rich would have the reader's browser fetch from somebody's server.
    return re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="make demo"), flags=re.DOTALL)


if __name__ == "__main__":
    # Bytes: as text, Python would make a line's end of every carriage return, and a line of every redrawing.
    sys.stdout.write(picture(sys.stdin.buffer.read().decode()))
