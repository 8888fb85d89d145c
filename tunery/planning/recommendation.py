"""Recommends whether to fine-tune, by fixed rules on the usable rows and the owner's aim. Pure functions."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

Aim = Literal["output_format", "style", "domain_language", "new_facts", "latency", "general_accuracy"]
Choice = Literal["prompt", "evaluate_both", "fine_tune", "retrieval"]

FEW, MANY = 100, 1000
"""Usable rows: below the first, try a prompt first; above the second, a fine-tune is worth its cost."""
_BEHAVIOUR: Mapping[Aim, str] = {
    "output_format": "A consistent output format is what a fine-tune is best at: the model learns the form itself, and "
    "no request has to explain it.",
    "style": "A consistent style is what a fine-tune is best at: examples show a tone that instructions only describe.",
    "latency": "A small tuned model can perform one task as well as a large prompted one, with a shorter prompt: "
    "requests have fewer tokens and are faster.",
}
"""The aims for which a fine-tune is best, and why."""
_MOST_KINDS = 4
HEADLINES: Mapping[Choice, str] = {
    "prompt": "Write a prompt first; do not fine-tune yet.",
    "evaluate_both": "Try a prompt and a fine-tune, and compare them.",
    "fine_tune": "Fine-tune.",
    "retrieval": "Do not fine-tune: use retrieval (RAG).",
}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class Reason(_Model):
    """What a rule says, in plain words with the numbers that it read."""

    rule: str = Field(description="The rule's name, which never changes")
    text: str


class Rows(_Model):
    """A file's rows. `usable` are those that no finding of the report speaks against."""

    total: int
    usable: int
    left_out: dict[str, int] = Field(description="Rows that are not usable, by kind of finding")
    answer_tokens: int = Field(
        description="Tokens of the usable rows' answers, counted by the base's tokenizer; without a base, one per four "
        "bytes"
    )
    refused: str | None = Field(None, description="Why the file cannot be used for a job as it is")


class Rule(NamedTuple):
    """A rule; the first that applies decides. `says` has placeholders for the row counts."""

    name: str
    applies: Callable[[Rows, Aim], bool]
    choice: Choice
    says: str


RULES: tuple[Rule, ...] = (
    Rule(
        "facts_by_retrieval",
        lambda _, aim: aim == "new_facts",
        "retrieval",
        "Do not fine-tune to teach facts: it is unreliable. A fine-tune learns how to answer; it retains some facts, "
        "confuses others, sounds certain of both, and has to be repeated when a fact changes. Search your documents "
        "for each question and put the results into the prompt (retrieval, RAG).",
    ),
    Rule(
        "fewer_than_100",
        lambda rows, _: rows.usable < FEW,
        "prompt",
        "{usable:,} usable rows are fewer than 100: describe the task in the prompt, with the best 3 to 8 of them as "
        "examples, and use the others to evaluate it.",
    ),
    Rule(
        "behaviour_is_learned",
        lambda _, aim: aim in _BEHAVIOUR,
        "fine_tune",
        "{behaviour} {usable:,} usable rows are enough for that: the minimum is 100.",
    ),
    Rule(
        "from_100_to_1000",
        lambda rows, _: rows.usable <= MANY,
        "evaluate_both",
        "{usable:,} usable rows lie between 100 and 1,000, where either may be better: score a prompt with examples "
        "and a "
        "fine-tune on the same held-out rows, and choose the cheaper one that is good enough.",
    ),
    Rule(
        "more_than_1000",
        lambda _rows, _aim: True,
        "fine_tune",
        "{usable:,} usable rows are more than 1,000: a fine-tune is worth its cost.",
    ),
)
"""In the order in which they are tried."""


def decide(rows: Rows, aim: Aim) -> tuple[Choice, list[Reason]]:
    """Returns what to do, and why, with the deciding rule first."""
    rule = next(rule for rule in RULES if rule.applies(rows, aim))
    said = rule.says.format(usable=rows.usable, behaviour=_BEHAVIOUR.get(aim, ""))
    return rule.choice, [Reason(rule=rule.name, text=said), *_besides(rows, aim, rule.choice)]


def _besides(rows: Rows, aim: Aim, choice: Choice) -> list[Reason]:
    """Returns reasons that apply besides the deciding rule's."""
    found = []
    if rows.refused is not None:
        text = f"The file cannot be used for a job as it is: {rows.refused}"
        found.append(Reason(rule="refused_as_it_is", text=text))
    if rows.usable < rows.total:
        text = (
            f"{rows.total - rows.usable:,} of {rows.total:,} rows are not usable: {_kinds(rows.left_out)}. Clean the "
        )
        found.append(Reason(rule="rows_that_do_not_count", text=f"{text}file before you train on it."))
    if choice == "retrieval" and rows.usable >= FEW:
        text = "A fine-tune on these rows can still teach the form of answers that are based on the retrieved text."
        found.append(Reason(rule="form_beside_retrieval", text=text))
    if choice in ("evaluate_both", "fine_tune"):
        text = "Write the best prompt first and score it on the held-out rows: the fine-tune has to beat it."
        found.append(Reason(rule="prompt_first", text=text))
    if aim == "latency":
        text = "Merge the adapter (export.merged): a merged model adds no cost at run time."
        found.append(Reason(rule="merge_for_latency", text=text))
    return found


def _kinds(left_out: Mapping[str, int]) -> str:
    """`12 exact_duplicate, 3 refusal`: the most frequent kinds, as the report names them."""
    counts = sorted(left_out.items(), key=lambda item: -item[1])
    rest = sum(count for _, count in counts[_MOST_KINDS:])
    shown = [f"{count:,} {kind}" for kind, count in counts[:_MOST_KINDS]]
    return ", ".join(shown + ([f"{rest:,} others"] if rest else []))
