"""`python -m worker.trainer.export FOLDER`: exports of a model that a job left before.

FOLDER holds `export.json` (an `ExportOrder`), `base/`, `artifact/`, and in `data/` such of train.jsonl, valid.jsonl
and test.jsonl as there still are. Into `out/` go `merged/` and `gguf/`, and into `results.json` what was written or
refused.
"""

import json
import logging
import sys
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from tunery.planning.precision import Precision
from tunery.rows.encoding import find_encoder
from tunery.rows.messages import FileRole
from tunery.rows.template import ChatTemplate
from tunery.spec import ExportOrder, Full
from tunery.trainer_protocol import Exported
from worker.trainer.data import Row, read_rows
from worker.trainer.export import work
from worker.trainer.export.errors import NoRows

_ROLES: dict[str, FileRole] = {"test": "test", "valid": "validation", "train": "training"}


def carry_out(folder: Path) -> list[Exported]:
    """Makes the exports that the folder's order lists; returns the result of each."""
    order = ExportOrder.model_validate_json((folder / "export.json").read_text())
    template = ChatTemplate.load(folder / "artifact")
    results: list[Exported] = []
    (folder / "out").mkdir()
    work.carry_out(
        work.Work(
            asked=order.export,
            name=order.model,
            base=folder / "base",
            artifact=folder / "artifact",
            out=folder / "out",
            is_whole=isinstance(order.trained_with, Full),
            precision=_precision(folder / "artifact"),
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            template=template,
            rows=lambda: _rows(folder / "data", order, template),
            say=results.append,
        )
    )
    return results


def _precision(artifact: Path) -> Precision:
    return Precision(**json.loads((artifact / "training_config.json").read_text())["precision"])


def _rows(folder: Path, order: ExportOrder, template: ChatTemplate) -> list[Row]:
    """Returns the rows of the job's remaining files, held-out ones first. Raises NoRows."""
    found: list[Row] = []
    for name, role in _ROLES.items():
        path, encoder = folder / f"{name}.jsonl", find_encoder(order.method, role, order.columns)
        if path.exists():
            found += read_rows(path, template, order.row_tokens, role, encoder).rows
    if not found:
        raise NoRows()
    return found


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m worker.trainer.export FOLDER\n")
        return 2
    logging.basicConfig(level=logging.INFO)
    disable_progress_bar()
    folder = Path(sys.argv[1])
    results = [result.model_dump(exclude={"type"}) for result in carry_out(folder)]
    (folder / "results.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
