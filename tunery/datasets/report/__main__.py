"""Makes one report: `python -m tunery.datasets.report FOLDER`.

FOLDER holds an Order in order.json and the files that it names. Writes report.json, summary.json and digests there, and
progress meanwhile. Exits with EXIT_USER_ERROR and the reason as the last line if a file cannot be read.
"""

import json
import sys
from pathlib import Path

from tunery import plugins
from tunery.datasets import progress
from tunery.datasets.report.order import Order
from tunery.errors import TuneryError
from tunery.trainer_protocol import EXIT_USER_ERROR


def main(folder: Path) -> int:
    """Makes the report; returns the exit status."""
    plugins.load(plugins.names(), "worker")
    from tunery.datasets.report import (  # imported here to report a missing package
        answer_ends,
        elsewhere,
        maker,
        plausibility,
    )

    order = Order.model_validate_json((folder / "order.json").read_text())
    weights = folder / "weights"  # of a base that this host can run
    made = maker.make(
        folder / "rows",
        folder / "against" if order.compares else None,
        base=folder / "base" if order.base else None,
        base_name=order.base,
        max_tokens=order.max_tokens,
        benchmark_folder=Path(order.benchmark) if order.benchmark else None,
        losses=plausibility.read(folder / "losses.json"),
        ask=answer_ends.asking(weights, order.max_tokens) if weights.exists() else None,
        columns=order.columns,
        others=elsewhere.read(folder / "others", order.others),
        progress=lambda fraction: progress.write(folder, fraction),
    )
    (folder / "report.json").write_text(json.dumps(made.as_dict()))
    (folder / "digests").write_bytes(made.digests)
    (folder / "summary.json").write_text(json.dumps(made.summary()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except TuneryError as error:
        sys.stderr.write(f"{error.message}\n")
        sys.exit(EXIT_USER_ERROR)
