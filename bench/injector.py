"""Injects known faults of nine kinds into clean rows, for `bench.report`; independent of how the report finds them."""

import copy
import json
import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stdnum import iban, luhn

Row = dict[str, Any]
COUNTS = {
    "exact_duplicate": 20,
    "contradiction": 24,
    "mislabelled": 24,
    "empty_output": 16,
    "truncated_output": 20,
    "wrong_roles": 18,
    "too_long": 10,
    "pii": 20,
    "test_leak": 20,
}
NAMES = ("maria", "jonas", "amina", "li", "oscar", "priya", "tom", "yuki")


@dataclass
class Dirty:
    """Rows with faults. `faults`: groups of lines; finding one of a group counts. `neutral`: untouched partners."""

    rows: list[Row] = field(default_factory=list)
    faults: dict[str, list[set[int]]] = field(default_factory=dict)
    lines: dict[str, set[int]] = field(default_factory=dict)
    neutral: set[int] = field(default_factory=set)


def inject(
    labelled: Sequence[Row],
    free: Sequence[Row],
    test: Sequence[Row],
    seed: int,
    counts: Mapping[str, int] | None = None,
) -> Dirty:
    """Returns all rows, shuffled, with faults, by default as many as COUNTS says.

    `labelled`: rows whose answer is a JSON object with one label; another row's label is a wrong one."""
    dice = random.Random(seed)
    labels = sorted({row["messages"][-1]["content"] for row in labelled})
    pool = dice.sample(list(labelled), len(labelled))
    both = dice.sample([*labelled[: len(labelled) // 2], *free], len(labelled) // 2 + len(free))
    marked: list[tuple[Row, str, Row | None]] = []
    used: set[int] = set()

    def take(source: Sequence[Row]) -> Row:
        row = next(row for row in source if id(row) not in used)
        used.add(id(row))
        return row

    for kind, count in (counts or COUNTS).items():
        for place in range(count):
            if kind == "test_leak":
                marked.append((leaked(test[place], dice), kind, None))
            elif kind in ("exact_duplicate", "contradiction"):
                partner = take(pool if kind == "contradiction" else both)
                made = repeated(partner, dice) if kind == "exact_duplicate" else contradicting(partner, labels, dice)
                marked += [(made, kind, partner), (partner, "", None)]
            else:
                source = pool if kind == "mislabelled" else both
                if kind == "truncated_output" and place % 2 and free:
                    source = free
                row = copy.deepcopy(take(source))
                marked.append((CHANGES[kind](row, labels, dice), kind, None))
    marked += [(row, "", None) for row in [*labelled, *free] if id(row) not in used]
    return _lay_out(dice.sample(marked, len(marked)))


def _lay_out(marked: Sequence[tuple[Row, str, Row | None]]) -> Dirty:
    dirty = Dirty([row for row, _, _ in marked])
    line_of = {id(row): line for line, (row, _, _) in enumerate(marked, 1)}
    for line, (_, kind, partner) in enumerate(marked, 1):
        if kind:
            related = {line_of[id(partner)]} if partner is not None else set()
            dirty.faults.setdefault(kind, []).append({line} | related)
            dirty.lines.setdefault(kind, set()).add(line)
            dirty.neutral |= related
    return dirty


def user(row: Row) -> Row:
    return next(message for message in row["messages"] if message["role"] == "user")


def edited(text: str, dice: random.Random) -> str:
    """Returns a text as another person might have typed it."""
    parts = text.split()
    edits: list[Callable[[], str]] = [
        lambda: f"Good morning. {text}",
        lambda: f"{text} Many thanks!",
        lambda: text.lower().rstrip("?.!"),
        lambda: _swapped(text, dice),
        lambda: " ".join(parts[:-1]) if len(parts) > 8 else f"So, {text}",
        lambda: f"{text.rstrip('?.!')}, could you help?" if len(text) > 50 else f"{text}!!",
    ]
    return dice.choice(edits)()


def _swapped(text: str, dice: random.Random) -> str:
    at = dice.randrange(1, len(text) - 2)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def repeated(row: Row, dice: random.Random) -> Row:
    made = copy.deepcopy(row)
    change = dice.choice([str, str, str.upper, lambda text: text.replace(" ", "  "), lambda text: f"\n{text} "])
    user(made)["content"] = change(user(made)["content"])
    return made


def contradicting(row: Row, labels: list[str], dice: random.Random) -> Row:
    made = mislabel(copy.deepcopy(row), labels, dice)
    if dice.random() < 0.6:
        user(made)["content"] = edited(user(made)["content"], dice)
    return made


def leaked(row: Row, dice: random.Random) -> Row:
    made = copy.deepcopy(row)
    if dice.random() < 0.4:
        user(made)["content"] = edited(user(made)["content"], dice)
    return made


def mislabel(row: Row, labels: list[str], dice: random.Random) -> Row:
    answer = row["messages"][-1]
    answer["content"] = dice.choice([label for label in labels if label != answer["content"]])
    return row


def empty(row: Row, _: list[str], dice: random.Random) -> Row:
    row["messages"][-1]["content"] = dice.choice(["", "", " ", "\n\n", "\t"])
    return row


def truncate(row: Row, _: list[str], dice: random.Random) -> Row:
    """Cuts the answer between two letters, as all cuts in files of known faults do; elsewhere if it has none."""
    text = row["messages"][-1]["content"]
    drawn = dice.randint(max(4, len(text) // 4), max(5, len(text) * 3 // 4))
    at = next((at for at in range(drawn, 0, -1) if is_inside_word(text, at)), drawn)
    row["messages"][-1]["content"] = text[:at]
    return row


def is_inside_word(text: str, at: int) -> bool:
    """Whether there is a letter both before and after this place."""
    return at < len(text) and text[at - 1 : at + 1].isalpha()


def mix_roles(row: Row, _: list[str], dice: random.Random) -> Row:
    messages = row["messages"]
    kind = dice.randrange(6)
    if kind == 0:
        messages[-1]["role"] = dice.choice(["gpt", "model", "chatbot", "Assistant"])
    elif kind == 1:
        messages.pop()
    elif kind == 2:
        messages.append({"role": "system", "content": "Answer briefly."})
    elif kind == 3:
        messages[-2:] = messages[:-3:-1]
    else:
        messages.insert(-1 if kind == 4 else len(messages), copy.deepcopy(messages[-2 if kind == 4 else -1]))
    return row


def lengthen(row: Row, _: list[str], dice: random.Random) -> Row:
    words = [dice.choice(("account", "the", "payment", "was", "in", "my", "statement", "again")) for _ in range(60)]
    user(row)["content"] += " " + " ".join(
        " ".join(dice.sample(words, 20)) + "." for _ in range(dice.choice([130, 600]))
    )
    return row


def digits(count: int, dice: random.Random) -> str:
    return "".join(dice.choices(string.digits, k=count))


def _card(dice: random.Random) -> str:
    number = dice.choice("45") + digits(14, dice)
    number += luhn.calc_check_digit(number)
    return number if dice.random() < 0.5 else " ".join(number[at : at + 4] for at in range(0, 16, 4))


def _iban(dice: random.Random) -> str:
    rest = f"{dice.choice(['37040044', '50010517'])}{digits(10, dice)}"
    return f"DE{iban.calc_check_digits('DE00' + rest)}{rest}"


def _phone(dice: random.Random) -> str:
    last = f"01{digits(2, dice)}"
    return dice.choice(
        [f"(415) 555-{last}", f"212-555-{last}", f"+1 312 555 {last}", f"+44 20 7946 0{digits(3, dice)}"]
    )


def _key(dice: random.Random) -> str:
    letters = string.ascii_letters + string.digits
    made = [
        "ghp_" + "".join(dice.choices(letters, k=36)),
        "AKIA" + "".join(dice.choices(string.ascii_uppercase + "234567", k=16)),
        "sk_live_" + "".join(dice.choices(letters, k=24)),
    ]
    return dice.choice(made)


def add_personal_data(row: Row, _: list[str], dice: random.Random) -> Row:
    value = dice.choice(
        [
            lambda: f"My address is {dice.choice(NAMES)}.{dice.choice(NAMES)}{digits(2, dice)}@example.org.",
            lambda: f"Call {_phone(dice)}.",
            lambda: f"The card is {_card(dice)}.",
            lambda: f"Use {_iban(dice)}.",
            lambda: f"SSN {dice.randint(100, 600)}-{dice.randint(10, 99)}-{dice.randint(1000, 9999)}.",
            lambda: f"The key is {_key(dice)}",
        ]
    )()
    user(row)["content"] += f" {value}"
    return row


CHANGES: dict[str, Callable[[Row, list[str], random.Random], Row]] = {
    "mislabelled": mislabel,
    "empty_output": empty,
    "truncated_output": truncate,
    "wrong_roles": mix_roles,
    "too_long": lengthen,
    "pii": add_personal_data,
}


def write(rows: Sequence[Row], path: Any) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
