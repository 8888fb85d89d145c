"""Cleans one file: `python -m tunery.datasets.cleaning FOLDER`.

FOLDER holds a Cleaning in cleaning_order.json, a report's Order in order.json, the files that these name, and
report.json if the findings of a base's report are used. Writes clean.jsonl, held-out.jsonl and cleaning.json there, and
progress meanwhile. Exits with EXIT_USER_ERROR and the reason if the file cannot be cleaned.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tunery import plugins
from tunery.datasets import progress
from tunery.datasets.cleaning.order import IMPLAUSIBLE, TRUNCATED, Cleaning
from tunery.datasets.report.order import Order
from tunery.errors import TuneryError
from tunery.trainer_protocol import EXIT_USER_ERROR

if TYPE_CHECKING:
    from tunery.datasets.report.case import Finding


def main(folder: Path) -> int:
    """Cleans the file; returns the exit status."""
    plugins.load(plugins.names(), "worker")
    from tunery.datasets.cleaning import cleaner  # imported here to report a missing package
    from tunery.datasets.report import elsewhere

    order = Cleaning.model_validate_json((folder / "cleaning_order.json").read_text())
    known = Order.model_validate_json((folder / "order.json").read_text())
    order.max_tokens = known.max_tokens
    done = cleaner.clean(
        folder / "rows",
        folder / "clean.jsonl",
        order,
        held_out=folder / "held-out.jsonl" if order.held_out else None,
        against=folder / "against" if known.compares else None,
        base=folder / "base" if known.base else None,
        others=elsewhere.read(folder / "others", known.others),
        benchmark_folder=Path(known.benchmark) if known.benchmark else None,
        known=_known(folder / "report.json"),
        progress=lambda fraction: progress.write(folder, fraction),
    )
    (folder / "cleaning.json").write_text(json.dumps(done.as_dict()))
    return 0


def _known(report: Path) -> "list[Finding] | None":
    """Returns what a base judged in the file's report; None without such a report."""
    from tunery.datasets.report.case import Finding  # as above

    if not report.exists():
        return None
    found = json.loads(report.read_text())["findings"]
    return [Finding(**finding) for finding in found if finding["kind"] in (IMPLAUSIBLE, TRUNCATED)]


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except TuneryError as error:
        sys.stderr.write(f"{error.message}\n")
        sys.exit(EXIT_USER_ERROR)
