"""A terminal session as an SVG.

    script -qec 'make demo' demo.typescript
    python docs/images/draw.py < demo.typescript > docs/images/demo.svg

What is drawn is the screen as it was left: lines that were overwritten or erased are gone.
"""

import io
import re
import sys

from rich.console import Console
from rich.text import Text

WIDTH = 100
_PIECES = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|\x1b[()][A-Z0-9]|([\r\n])|([^\x1b\r\n]+)")


def screen(session: str) -> list[str]:
    """The lines that are left, colours kept. Knows what rich's live displays use: up, erase, carriage return."""
    lines, row = [""], 0
    for number, letter, control, text in _PIECES.findall(session):
        if control == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif control == "\r":
            lines[row] = "\r" + lines[row]  # marks that the next text starts the line anew
        elif letter == "A":
            row = max(0, row - int(number or 1))
        elif letter == "K":
            lines[row] = ""
        elif letter == "m":
            lines[row] += f"\x1b[{number}m"
        elif text:
            lines[row] = text if lines[row].startswith("\r") else lines[row] + text
    return [line.lstrip("\r") for line in lines]


def main() -> None:
    lines = [line for line in screen(sys.stdin.read()) if not line.startswith("Script ")]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi("\n".join(lines).strip("\n")))
    # Without the font that rich would have the reader's browser fetch from somebody's server.
    sys.stdout.write(re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="make demo"), flags=re.DOTALL))


if __name__ == "__main__":
    main()
