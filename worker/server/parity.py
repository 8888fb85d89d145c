"""Compares the model server's answers with those of a run's scorecard.

Reads `greedy.jsonl`, and the base and artifact of the run directory as the model server reads them from storage. A
difference, or a model that cannot be loaded, is a result and not an error.
"""

import errno
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch

from tunery import serving
from tunery.artifacts import manifest
from tunery.errors import TuneryError
from tunery.serving import Chosen, Files, TunedFiles
from tunery.spec import Run
from tunery.storage import Directory
from tunery.trainer_protocol import GREEDY, GreedyAnswer, Served, TokenDifference
from worker.server.backends.embedded import Engine
from worker.server.batch import Row
from worker.server.generation import Generation
from worker.server.schemas import ChatRequest, parse
from worker.server.streams import Stream
from worker.supervisor.staging import EXPORTS
from worker.trainer.decoding.ties import Precision, tie

LEAST_EQUAL = 0.96
"""The fraction of rows that must be equal, or ties, in bf16."""
_OF_THE_HOST = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
"""Errors of the host's disk, memory and open files. Others, such as that of a missing file, are the model's."""
_SPARED_FROM = 10
"""From this many rows on, one may differ in bf16, even if that is more than LEAST_EQUAL leaves."""


@dataclass(frozen=True)
class Compared:
    """The comparison of a row's answers. `is_tie`: rounding explains the difference."""

    tokens: int
    difference: TokenDifference | None = None
    is_tie: bool = False

    @property
    def is_broken(self) -> bool:
        """Whether the prompts differ, or one answer ends where the other continues: rounding does not explain that."""
        found = self.difference
        return found is not None and (found.place == "prompt" or found.trained is None or found.served is None)


def check(run_dir: Path, rows: int, tokens: int, device: str) -> Served:
    """Compares at most `rows` rows and `tokens` tokens of each.

    Raises torch.OutOfMemoryError, and OSError where the host fails: neither says anything about the model.
    """
    run = Run.model_validate_json((run_dir / "spec.json").read_text())
    precision = _precision(run_dir / "out", device)
    asked = _spread(_read(run_dir / GREEDY), rows)
    try:
        models, chosen = _lay_out(run_dir, run)
        nothing = Directory(run_dir / ".nothing")
        engine = Engine(models, nothing, device, graphs=True, prompts_first=True, now=run.now)
        compared = _compare(engine, chosen, asked, tokens, precision)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever it is, the model server would meet it too
        if isinstance(error, OSError) and error.errno in _OF_THE_HOST:
            raise
        return Served(status="refused", rows=len(asked), precision=precision, reason=_reason(error))
    return judge(compared, precision)


def judge(compared: Sequence[Compared], precision: Precision) -> Served:
    """Returns the verdict from all rows."""
    unequal = [found for found in compared if found.difference is not None and not found.is_tie]
    spared = 0 if precision == "float32" else max(int(len(compared) * (1 - LEAST_EQUAL)), len(compared) >= _SPARED_FROM)
    differs = len(unequal) > spared or any(found.is_broken for found in unequal)
    ties = sum(found.is_tie for found in compared)
    return Served(
        status="differs" if differs else "equal",
        rows=len(compared),
        equal=len(compared) - len(unequal) - ties,
        ties=ties,
        tokens=sum(found.tokens for found in compared),
        precision=precision,
        first_difference=next((found.difference for found in unequal), None),
    )


def _precision(artifact: Path, device: str) -> Precision:
    """Returns the precision of the sums on both sides; on a GPU the model server computes them in bf16."""
    compute = json.loads((artifact / "training_config.json").read_text())["precision"]["compute"]
    return "float32" if compute == "float32" and device == "cpu" else "bfloat16"


def _read(path: Path) -> list[GreedyAnswer]:
    return [GreedyAnswer.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _spread(asked: list[GreedyAnswer], most: int) -> list[GreedyAnswer]:
    return asked[:: max(1, -(-len(asked) // most))]


def _lay_out(run_dir: Path, run: Run) -> tuple[Path, Chosen]:
    """Returns the model server's models folder, which holds the base and the artifact, and the model to request."""
    models = run_dir / ".served"
    shutil.rmtree(models, ignore_errors=True)
    models.mkdir()
    technique = run.plan.technique.type
    base = _put(run_dir / "base", models, weighed=False)
    tuned = _put(run_dir / "out", models, weighed=technique != "full")
    return models, Chosen(
        base=Files(id=run.base_model, prefix="base", manifest_sha256=base),
        tuned=TunedFiles(id=run.job, prefix="out", manifest_sha256=tuned, technique=technique),
    )


def _put(source: Path, models: Path, *, weighed: bool) -> str:
    """Links a model's files, except exports, into a folder named by their manifest's digest; returns the digest.

    `weighed`: the manifest lists the weights. Reading a whole model's weights again takes longer than all answers.
    """
    folder = models / source.name
    folder.mkdir()
    late = []
    for path in source.resolve().iterdir():
        if path.is_dir() and f"{path.name}/" not in EXPORTS:
            shutil.copytree(path, folder / path.name)
        elif path.suffix == ".safetensors" and not weighed:
            late.append(path)
        elif path.is_file() and path.name != manifest.NAME:
            (folder / path.name).symlink_to(path)
    listed = manifest.describe(folder)
    (folder / manifest.NAME).write_bytes(listed.encode())
    for path in late:
        (folder / path.name).symlink_to(path)
    folder.rename(models / listed.sha256)
    return listed.sha256


def _compare(
    engine: Engine, chosen: Chosen, asked: list[GreedyAnswer], tokens: int, precision: Precision
) -> list[Compared]:
    """Answers rows together, as the model server does: those of a batch as far as its memory has room, others a few at
    once.
    """
    answers = [engine.answer(_request(one, chosen, min(tokens, one.limit))) for one in asked]
    _finish(engine, answers)
    turns = [_turn(one, answer) for one, answer in zip(asked, answers, strict=True)]
    before = [
        [*answer.prompt_ids, *one.ids[:turn]]
        for one, answer, turn in zip(asked, answers, turns, strict=True)
        if turn is not None
    ]
    logits = iter(_logits(engine, chosen, before))
    return [
        _compare_row(one, answer) if turn is None else _compare_tokens(one, answer, turn, next(logits), precision)
        for one, answer, turn in zip(asked, answers, turns, strict=True)
    ]


def _request(one: GreedyAnswer, chosen: Chosen, most: int) -> ChatRequest:
    body: dict[str, Any] = {"model": "tuned", "messages": one.messages, "temperature": 0, "max_tokens": most}
    return parse(serving.encode({**body, **({"tools": one.tools} if one.tools else {})}, chosen))


def _finish(engine: Engine, answers: list[Generation]) -> None:
    pieces = {id(answer): iter(answer) for answer in answers}
    while pieces:
        left = [answer for answer in answers if id(answer) in pieces]
        if not isinstance(left[0].stream, Row):  # its keys are counted once they are there: too late to wait
            left = left[: engine.streams]
        for answer in engine.advance(left):
            if next(pieces[id(answer)], None) is None:
                del pieces[id(answer)]


def _turn(one: GreedyAnswer, answer: Generation) -> int | None:
    """Returns the place at which the answers to equal prompts have different tokens; None without one."""
    place = _first_difference(one.ids[: answer.max_tokens], answer.ids)
    if place is None or place >= min(len(one.ids), len(answer.ids)) or one.prompt_ids != answer.prompt_ids:
        return None
    return place


def _compare_tokens(
    one: GreedyAnswer, answer: Generation, place: int, logits: torch.Tensor, precision: Precision
) -> Compared:
    """Compares answers that have different tokens at a place, by the model server's logits there."""
    trained, served = float(logits[one.ids[place]]), float(logits[answer.ids[place]])
    gap = abs(trained - served)
    found = _describe(one, answer, "answer", place, one.ids, answer.ids, gap)
    return Compared(len(answer.ids), found, is_tie=gap <= tie(max(abs(trained), abs(served)), precision))


def _compare_row(one: GreedyAnswer, answer: Generation) -> Compared:
    """Compares answers that are equal, to different prompts, or of which one has ended."""
    prompt = _first_difference(one.prompt_ids, answer.prompt_ids)
    wanted = one.ids[: answer.max_tokens]
    place = _first_difference(wanted, answer.ids)
    if prompt is not None:
        return Compared(len(answer.ids), _describe(one, answer, "prompt", prompt, one.prompt_ids, answer.prompt_ids))
    if place is None:
        return Compared(len(answer.ids))
    return Compared(len(answer.ids), _describe(one, answer, "answer", place, wanted, answer.ids))


def _first_difference(wanted: Sequence[int], given: Sequence[int]) -> int | None:
    pairs = enumerate(zip_longest(wanted, given))
    return next((place for place, (one, other) in pairs if one != other), None)


def _logits(engine: Engine, chosen: Chosen, before: list[list[int]]) -> list[torch.Tensor]:
    """Returns the model server's logits of the token that follows each of these, which it reads together."""
    if not before:
        return []
    ready, streams, found = engine.hold(chosen), list[Stream](), list[torch.Tensor]()
    try:
        for ids in before:
            streams.append(ready.stream(ids))
        for stream in streams:
            found.append(stream.logits())
            stream.close()  # a later one may wait for its memory
        return found
    finally:
        for stream in streams:
            stream.close()
        ready.release()


def _describe(
    one: GreedyAnswer,
    answer: Generation,
    where: Literal["prompt", "answer"],
    place: int,
    wanted: Sequence[int],
    given: Sequence[int],
    gap: float | None = None,
) -> TokenDifference:
    def text(ids: Sequence[int]) -> str | None:
        return None if place >= len(ids) else answer.tokenizer.id_to_token(ids[place]) or f"token {ids[place]}"

    return TokenDifference(
        row=one.row, place=where, position=place + 1, trained=text(wanted), served=text(given), gap=gap
    )


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, TuneryError) else f"{type(error).__name__}: {error}".partition("\n")[0]
