"""Reads a run's rows: those it trains and is measured on, and the largest work that they require of a step."""

from pathlib import Path

from tunery.failures import InvalidTrainingFile
from tunery.rows.encoding import find_encoder
from tunery.rows.template import ChatTemplate
from tunery.spec import Run
from worker.trainer import packing, preflight, prepared
from worker.trainer.data import Rows, read_rows
from worker.trainer.objective import Objective
from worker.trainer.replay import mixing


def training_rows(folder: Path, run: Run, template: ChatTemplate) -> Rows:
    """Returns the training rows. Raises InvalidTrainingFile."""
    encoder = find_encoder(run.plan.method, "training", run.plan.columns, run.plan.cut_answers)
    path, kept = folder / "data" / "train.jsonl", folder / prepared.NAME
    return read_rows(path, template, run.plan.max_seq_length, encoder=encoder, kept=kept)


def validation_rows(folder: Path, run: Run, template: ChatTemplate) -> Rows | None:
    """Returns the validation rows; None without a file. Raises InvalidTrainingFile, also if the plan needs a file."""
    path = folder / "data" / "valid.jsonl"
    if path.exists():
        encoder = find_encoder(run.plan.method, "validation", run.plan.columns, run.plan.cut_answers)
        return read_rows(path, template, run.plan.max_seq_length, "validation", encoder, folder / prepared.NAME)
    if run.plan.early_stopping or run.plan.select == "best":
        raise InvalidTrainingFile(
            role="validation",
            reason="It is missing, but early_stopping and select 'best' need its loss. Add a validation file.",
        )
    return None


def packs(run: Run, rows: Rows, objective: Objective, warnings: list[str]) -> bool:
    """Whether rows share sequences. Warns instead if the model would let packed rows see each other."""
    device = next(objective.parameters()).device
    if objective.knows_borders:
        objective.knows_borders = packing.keeps_rows_apart(objective, rows.rows, device)
    if not run.plan.packing or objective.knows_borders or packing.keeps_rows_apart(objective, rows.rows, device):
        return run.plan.packing
    warnings.append("This model cannot keep packed rows from attending to each other, so the rows were not packed.")
    return False


def work(run: Run, rows: Rows, valid: Rows | None, packs: bool, ranks: int) -> preflight.Work:
    """Returns the largest work that the run will require of a step on one of so many ranks."""
    lengths = sorted(rows.lengths, reverse=True)
    a_step = -(-mixing.most_of_a_step(rows, run.plan.batch_size) // ranks)
    packed = min(run.plan.max_seq_length, sum(lengths[:a_step]))
    return preflight.Work(
        technique=run.plan.technique,
        rows_a_step=a_step,
        mean_step=round(rows.tokens_a_step(run.plan.batch_size, ranks)),
        row=lengths[0],
        sequence=max(lengths[0], packed) if packs else lengths[0],
        packs=packs,
        validation=max(valid.examples, key=len) if valid is not None else None,
        rows_an_example=max(len(example.rows) for example in rows.examples),
        ranks=ranks,
    )
