"""The rows of the speed measurements: random tokens, nearly all of them labelled, the same for every trainer."""

import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from worker.trainer.data import Row, order

SEED = 0
LONGEST = 2048
SHORTEST = 31
SHUFFLED_BY = 7
"""The seed of the runs that are measured as jobs run."""
TEMPLATE_TOKENS = 4
"""Tokens of a row of two messages outside their contents, by the tokenizer and template of `make_model`."""
_PROMPT = "QXJZ"


def lengths(kind: str, count: int) -> list[int]:
    """Returns the lengths of `count` rows in tokens.

    `full`: LONGEST. `long`: 1,900 to 1,906. `real`: those of instruction data, log-normal with a median of 190.
    """
    numbers = random.Random(0)
    if kind == "full":
        return [LONGEST] * count
    if kind == "long":
        return [numbers.randrange(1900, 1907) for _ in range(count)]
    return [min(LONGEST, max(SHORTEST, int(numbers.lognormvariate(5.25, 0.75)))) for _ in range(count)]


def of_lengths(wanted: list[int]) -> list[Row]:
    """Returns rows of these lengths, every token to be learnt."""
    numbers = random.Random(SEED)
    made = ([numbers.randrange(10, 500) for _ in range(length)] for length in wanted)
    return [Row(ids, ids) for ids in made]


def rows(count: int, length: int) -> list[Row]:
    """Returns `count` rows of `length` tokens."""
    return of_lengths([length] * count)


def chats(wanted: list[int]) -> list[dict[str, Any]]:
    """Returns rows of a file, of these lengths: answers of random letters, a token each."""
    numbers = random.Random(1)
    rest = TEMPLATE_TOKENS + len(_PROMPT)
    answers = ["".join(numbers.choice("JQXZ") for _ in range(length - rest)) for length in wanted]
    return [
        {"messages": [{"role": "user", "content": _PROMPT}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]


def as_a_job_reads(model: Path, wanted: list[int]) -> list[list[int]]:
    """Returns the token ids of `chats` in the order in which a job's first epoch sees them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in chats(wanted)]
    ids: list[list[int]] = tokenizer(rows, add_special_tokens=False)["input_ids"]
    return [ids[i] for i in order(len(ids), SHUFFLED_BY, 0)]


def in_order(made: list[Row]) -> list[list[int]]:
    """Returns the rows' tokens in the order of Tunery's first epoch."""
    return [made[i].input_ids for i in order(len(made), SEED, 0)]
