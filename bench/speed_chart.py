"""Draws the speed table as bars: `python -m bench.speed_chart [RESULT.json [CHART.svg]]`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bench.speed_table import median

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench/results/speed_table_h200.json"
CHART = ROOT / "docs/images/speed.svg"
WIDTH, LEFT, BAR, ROW = 880, 250, 420, 62
NAMES = {
    "qlora 8b": ("QLoRA 8B", "4 rows of 1,900 tokens"),
    "lora 8b": ("LoRA 8B", "4 rows of 1,900 tokens"),
    "qlora 8b real": ("QLoRA 8B", "32 rows of instruction data"),
    "lora 1b": ("LoRA 1B", "4 rows of 1,900 tokens"),
    "full 1b": ("full fine-tune 1B", "4 rows of 1,900 tokens"),
    "lora 0.6b": ("LoRA 0.6B", "4 rows of 1,900 tokens"),
}
PEERS = {"unsloth": "Unsloth", "trl-liger": "TRL with Liger"}


def speeds(runs: dict[str, list[dict[str, Any]]]) -> tuple[int, str, int] | None:
    """Returns Tunery's tokens a second, the fastest peer and its own; None if either failed."""
    found = {stack: run["tok_s"] for stack, one in runs.items() if (run := median(one)) is not None}
    ours = found.pop("tunery", None)
    if ours is None or not found:
        return None
    peer = max(found, key=lambda stack: found[stack])
    return ours, PEERS[peer], found[peer]


def draw(result: dict[str, Any]) -> str:
    """Returns the chart as SVG: a pair of bars for each row, the faster one as long as the space."""
    rows = {name: pair for name in NAMES if (row := result["rows"].get(name)) and (pair := speeds(row["runs"]))}
    height = 64 + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        ' font-family="ui-sans-serif, system-ui, \'DejaVu Sans\', sans-serif" font-size="14">',
        f"<title>Tokens per second of Tunery and of the fastest peer on one {escape(result['gpu'])}</title>",
        "<style>.page { fill: #ffffff; } .name { font-weight: 600; fill: #1a202c; } .what { font-size: 12.5px; "
        "fill: #4a5568; } .own { fill: #2b6cb0; } .peer { fill: #a0aec0; } .ratio { font-weight: 600; fill: #2f855a; "
        "text-anchor: end; }</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        '<text class="name" x="20" y="30">Tokens per second, as a job trains</text>',
        f'<text class="what" x="{WIDTH - 20}" y="30" text-anchor="end">one {escape(result["gpu"])}, '
        f"{result['date'][:10]}</text>",
    ]
    for number, (name, pair) in enumerate(rows.items()):
        parts += _row(48 + ROW * number, NAMES[name], *pair)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _row(top: int, names: tuple[str, str], ours: int, peer: str, theirs: int) -> Iterator[str]:
    yield f'<text class="name" x="20" y="{top + 18}">{escape(names[0])}</text>'
    yield f'<text class="what" x="20" y="{top + 38}">{escape(names[1])}</text>'
    for kind, stack, speed, y in (("own", "Tunery", ours, top), ("peer", peer, theirs, top + 23)):
        width = round(BAR * speed / max(ours, theirs))
        yield f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{width}" height="19" rx="3"/>'
        yield f'<text class="what" x="{LEFT + width + 8}" y="{y + 14}">{stack} {speed:,}</text>'
    yield f'<text class="ratio" x="{WIDTH - 20}" y="{top + 28}">{ours / theirs:.2f}x</text>'


def main() -> None:
    given = [Path(name) for name in sys.argv[1:3]]
    result, chart = [*given, *(RESULT, CHART)[len(given) :]]
    chart.write_text(draw(json.loads(result.read_text())))


if __name__ == "__main__":
    main()
