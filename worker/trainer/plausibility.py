"""`python -m worker.trainer.plausibility FOLDER`: measures how plausible a base finds a file's answers.

FOLDER has `weights`, `rows` and a PlausibilityOrder in plausibility.json; an AnswerLoss for each row that was read, or
an AnswerEnd if only these were ordered, is written to losses.json. Rows are read in random order until the order's time
is over.
"""

import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tunery.failures import InvalidTrainingFile
from tunery.rows import readers
from tunery.rows.answer_losses import AnswerEnd, AnswerLoss, PlausibilityOrder
from tunery.rows.encoding import CHATS_OR_PAIRS
from tunery.rows.errors import CannotRender
from tunery.rows.messages import Example, Message
from tunery.rows.shapes import FileShape
from tunery.rows.template import ChatTemplate
from worker.trainer.answer_ends import AnswerEnds

_BATCH = 1024
"""Tokens of a batch, including padding."""
_NO_QUESTION = "Write something."


@dataclass(frozen=True)
class _Answer:
    """The ids of a row's answer with its end token, of its prompt, and of a prompt that asks nothing."""

    line: int
    asked: list[int]
    unasked: list[int]
    answer: list[int]


def main(folder: Path) -> int:
    """Returns the exit status."""
    order = PlausibilityOrder.model_validate_json((folder / "plausibility.json").read_text())
    template = ChatTemplate.load(folder / "weights")
    examples = _examples(folder / "rows", order.most_rows, order.columns)
    answers = [answer for line, example in examples if (answer := _encode(template, line, example, order.max_tokens))]
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "weights", dtype=torch.float32).eval()
    (folder / "losses.json").write_text(json.dumps(measure(model, AnswerEnds(template), answers, order)))
    return 0


def _examples(path: Path, most: int, columns: Mapping[str, str]) -> list[tuple[int, Example]]:
    """Returns at most `most` rows that a job would accept, in random order."""
    shape = FileShape(columns)
    found: list[tuple[int, Example]] = []
    for source in readers.read(readers.chunks_of(path)):
        try:
            found.append((source.number, CHATS_OR_PAIRS.parse(source._replace(shape=shape), "training")))
        except InvalidTrainingFile:  # the report says so
            continue
    return random.Random(0).sample(found, min(most, len(found)))  # noqa: S311 (draws rows to read)


def _encode(template: ChatTemplate, line: int, example: Example, longest: int) -> _Answer | None:
    """Returns the row's last answer; None if it has none that fits into `longest` tokens."""
    if not example.messages or example.messages[-1].role != "assistant" or not example.messages[-1].content:
        return None
    nothing = [Message(role="user", content=_NO_QUESTION), example.messages[-1]]
    try:
        asked, answer = template.encode_answer(example)
        unasked, same = template.encode_answer(Example(messages=nothing))
    except CannotRender:
        return None
    fits = len(asked) + len(answer) <= longest and len(answer) > 1 and answer[-1] in template.eos_ids
    return _Answer(line, asked, unasked, answer) if fits and same == answer else None


def measure(model: Any, ends: AnswerEnds, answers: Sequence[_Answer], order: PlausibilityOrder) -> list[dict[str, Any]]:
    """Returns what is ordered of as many answers as its time allows. Batches are of similar length, in random order."""
    began, found = time.monotonic(), []
    with torch.inference_mode():
        for batch in _batches(answers):
            found += [said.model_dump() for said in (_ends if order.ends_only else _losses)(model, ends, batch)]
            if time.monotonic() - began > order.seconds:
                break
    return found


_BLOCK = 64


def _batches(answers: Sequence[_Answer]) -> Iterator[list[_Answer]]:
    for start in range(0, len(answers), _BLOCK):
        batch: list[_Answer] = []
        for one in sorted(answers[start : start + _BLOCK], key=_size):
            if batch and _size(one) * (len(batch) + 1) > _BATCH:
                yield batch
                batch = []
            batch.append(one)
        yield batch


def _size(answer: _Answer) -> int:
    return max(len(answer.asked), len(answer.unasked)) + len(answer.answer)


def _ends(model: Any, ends: AnswerEnds, batch: Sequence[_Answer]) -> Iterator[AnswerEnd]:
    asked = _likely(model, [(one.asked, one.answer) for one in batch])
    yield from (_end(ends, one, likely) for one, likely in zip(batch, asked, strict=True))


def _losses(model: Any, ends: AnswerEnds, batch: Sequence[_Answer]) -> Iterator[AnswerLoss]:
    asked = _likely(model, [(one.asked, one.answer) for one in batch])
    unasked = _likely(model, [(one.unasked, one.answer) for one in batch])
    for one, likely, likely_alone in zip(batch, asked, unasked, strict=True):
        loss, alone = (_loss(one, given) for given in (likely, likely_alone))
        said = _end(ends, one, likely)
        yield AnswerLoss(**said.model_dump(), tokens=len(one.answer) - 1, loss=loss, alone=alone)


def _end(ends: AnswerEnds, one: _Answer, likely: torch.Tensor) -> AnswerEnd:
    return ends.judge(one.line, one.answer[:-1], likely)


def _loss(one: _Answer, likely: torch.Tensor) -> float:
    """Returns the answer's mean loss in nats per token, without its end."""
    return float(-likely[:-1].gather(1, torch.tensor(one.answer[:-1])[:, None]).mean())


def _likely(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[torch.Tensor]:
    """Yields the log probabilities at each token of an answer, its end included."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, (prompt, answer) in enumerate(rows):
        ids[place, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        mask[place, : len(prompt) + len(answer)] = 1
    first = min(len(prompt) for prompt, _ in rows) - 1  # the logits of prompts alone would take most of the memory
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=longest - first).logits
    for place, (prompt, answer) in enumerate(rows):
        before = logits[place, len(prompt) - 1 - first : len(prompt) + len(answer) - 1 - first]
        yield functional.log_softmax(before.float(), dim=-1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
