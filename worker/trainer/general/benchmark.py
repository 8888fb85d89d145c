"""The general benchmark: multiple-choice questions, and prompts with human answers, none of which a run trains on.

Both are in `data/`; NOTICE names their sources. Which of them a run takes depends only on how many it takes, so that
runs can be compared.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from tunery.errors import TuneryError
from tunery.rows.messages import Example, Message
from tunery.rows.template import ChatTemplate
from worker.trainer.data import Row

Entry = TypeVar("Entry")

_DATA = Path(__file__).parent / "data"
_SEED = 0
"""Seed of the sample, not the run's own: two runs on one base must answer the same questions."""


@dataclass(frozen=True)
class Item:
    """A question: the text before its choices, the delimiter between them, and the right choice's index `answer`."""

    prefix: str
    choices: tuple[str, ...]
    answer: int
    delimiter: str = " "


@dataclass(frozen=True)
class Tokens:
    """An item's token ids: the question's, and those that each choice adds."""

    prefix: list[int]
    choices: tuple[list[int], ...]

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.choices))


def load_items(count: int | None = None) -> list[Item]:
    """Returns the shipped questions, without a chat template: all 800, or a seeded sample of `count`."""
    return [
        Item(f"Question: {row['question']}\nAnswer:", tuple(row["choices"]), row["answer"])
        for row in sample(_read("multiple_choice.jsonl"), count)
    ]


def load_prompts(template: ChatTemplate, count: int | None, longest: int) -> list[Row]:
    """Returns the shipped prompts as rows whose labels are their answers, each of at most `longest` tokens.

    A prompt is left out if the model's template refuses it or no token of its answer is left.
    """
    rows = []
    for entry in sample(_read("prompts.jsonl"), count):
        messages = [Message.model_validate(message) for message in entry["messages"]]
        try:
            rendered = template.encode(Example(messages=messages), longest)
        except TuneryError:
            continue
        row = Row(rendered.input_ids, rendered.labels)
        rows += [row] if row.labelled else []
    return rows


def digest(items: list[Item]) -> str:
    """Returns a digest of the questions and their order."""
    text = json.dumps([[item.prefix, item.delimiter, item.choices, item.answer] for item in items])
    return hashlib.sha256(text.encode()).hexdigest()


def encode(tokenizer: Tokenizer, item: Item) -> Tokens:
    """Returns the ids of an item's prefix and of each choice after it.

    As in lm-evaluation-harness, a choice's tokens are those of the whole text after as many as the prefix has.
    """
    start = _begin(tokenizer)
    ids = _ids(tokenizer, item.prefix)
    choices = tuple(_ids(tokenizer, f"{item.prefix}{item.delimiter}{choice}")[len(ids) :] for choice in item.choices)
    return Tokens(start + ids, choices)


def _begin(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that the tokenizer puts before any text, as Llama's and Gemma's do."""
    whole, bare = tokenizer.encode("a").ids, _ids(tokenizer, "a")
    ends = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
    return list(whole[: ends[0]]) if ends else []


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_DATA / name).read_text(encoding="utf-8").splitlines()]


def sample(rows: Sequence[Entry], count: int | None) -> list[Entry]:
    """Returns all rows, or a seeded sample of `count` in their original order."""
    if count is None or count >= len(rows):
        return list(rows)
    chosen = random.Random(_SEED).sample(range(len(rows)), count)  # noqa: S311 (not for security)
    return [rows[i] for i in sorted(chosen)]
