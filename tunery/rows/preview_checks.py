"""Checks whether a preview's rows teach the right tokens, and lists the rows that fail."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tunery.rows.errors import CannotRender
from tunery.rows.messages import Example, Message
from tunery.rows.preview_model import Check
from tunery.rows.template import IGNORED, ChatTemplate


@dataclass(frozen=True)
class Marked:
    """A whole sequence with its labels, and the number of tokens that a run keeps. `ends_unlearned`: whether its last
    message has the weight 0."""

    input_ids: list[int]
    labels: list[int]
    max_tokens: int
    ends_unlearned: bool = False

    def runs(self) -> Iterator[range]:
        """Yields the ranges of consecutive learned tokens, up to the cut."""
        start = None
        kept = self.labels[: self.max_tokens]
        for place, label in enumerate([*kept, IGNORED]):
            if label != IGNORED and start is None:
                start = place
            elif label == IGNORED and start is not None:
                yield range(start, place)
                start = None


def ends_are_trained(template: ChatTemplate, marked: Marked) -> bool:
    """Whether each run of learned tokens has a stop token, after which only whitespace is learned."""

    def ends(run: range) -> bool:
        stops = [place for place in run if marked.input_ids[place] in template.eos_ids]
        after = marked.input_ids[stops[-1] + 1 : run.stop] if stops else []
        return bool(stops) and not template.tokenizer.decode(after, skip_special_tokens=False).strip()

    runs, length = list(marked.runs()), min(marked.max_tokens, len(marked.labels))
    if marked.labels[0] != IGNORED:  # prompts are learned too, so a run ends where an answer of weight 0 begins
        is_whole = length == len(marked.labels)
        runs = [] if is_whole and marked.ends_unlearned else [run for run in runs if run.stop == length]
    return all(map(ends, runs))


def begins_with_one_bos(template: ChatTemplate, marked: Marked) -> bool:
    """Whether the sequence does not begin with two BOS tokens."""
    bos = _special(template, "bos_token")
    return bos is None or marked.input_ids[:2] != [bos, bos]


def has_labels(_template: ChatTemplate, marked: Marked) -> bool:
    """Whether a token of the sequence is learned before the cut. The first never is."""
    return any(label != IGNORED for label in marked.labels[1 : marked.max_tokens])


def ends_are_no_padding(template: ChatTemplate, marked: Marked) -> bool:
    """Whether no stop token right after a learned answer is masked, as happens if padding is masked by its id."""
    ids, length = marked.input_ids, min(marked.max_tokens, len(marked.labels))
    return not any(
        run.stop < length and ids[run.stop] in template.eos_ids and ids[run.stop - 1] not in template.eos_ids
        for run in marked.runs()
    )


def shows_role(template: ChatTemplate, message: Message) -> bool:
    """Whether the template renders a message differently for another role; an error counts as different."""
    other = message.model_copy(update={"role": "assistant" if message.role == "user" else "user"})
    question, answer = Message(role="user", content="question"), Message(role="assistant", content="answer")
    comes_first = message.role in ("system", "developer", "user")
    beside = answer if message.role == "user" else question
    try:
        given, swapped = (
            template.render([each, beside] if comes_first else [beside, each]) for each in (message, other)
        )
    except CannotRender:
        return True
    return given != swapped


def _special(template: ChatTemplate, name: str) -> int | None:
    text = template.special_tokens.get(name)
    return None if text is None else template.tokenizer.token_to_id(text)


SequenceCheck = Callable[[ChatTemplate, Marked], bool]
SEQUENCE_CHECKS: dict[str, SequenceCheck] = {
    "end_of_turn_trained": ends_are_trained,
    "one_bos": begins_with_one_bos,
    "rows_have_labels": has_labels,
    "pad_is_not_end": ends_are_no_padding,
}
WORDS = {
    "rows_are_read": ("Every row can be read and rendered", "Correct the rows, as their errors say."),
    "roles_shown": (
        "The template marks the speaker of every role in the rows",
        "Use a base whose chat template marks these roles, or leave their messages out.",
    ),
    "end_of_turn_trained": (
        "The token that ends a turn is learned at the end of every answer",
        "Raise max_seq_length where the cut takes the end; otherwise use a base whose template ends its turns.",
    ),
    "one_bos": (
        "No row begins with two BOS tokens",
        "Remove the BOS token from the rows' texts or from the template.",
    ),
    "rows_have_labels": (
        "Every sequence has tokens that are learned",
        "Raise max_seq_length: the cut takes the whole answer, and the row is left out.",
    ),
    "pad_is_not_end": (
        "No end of an answer is masked as if it were padding",
        "Report this as a bug: labels must be set by position.",
    ),
}
"""Each check's question, and what to change where it fails."""


class Checker:
    """Checks the rows of one preview."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._failing: dict[str, list[int]] = {name: [] for name in WORDS}
        self._roles: dict[str, bool] = {}

    def refuse(self, number: int) -> None:
        """Records a row that cannot be read or rendered."""
        self._failing["rows_are_read"].append(number)

    def check_roles(self, number: int, example: Example) -> set[str]:
        """Returns the check's name where the template hides a role of the row."""
        for message in example.messages:
            if message.role not in self._roles and message.content and not message.tool_calls:
                self._roles[message.role] = shows_role(self._template, message)
        hidden = any(not self._roles.get(message.role, True) for message in example.messages)
        return self._note(number, {"roles_shown"} if hidden else set())

    def check_sequence(self, number: int, marked: Marked) -> set[str]:
        """Returns the names of the checks that a sequence fails."""
        return self._note(
            number, {name for name, check in SEQUENCE_CHECKS.items() if not check(self._template, marked)}
        )

    def _note(self, number: int, failed: set[str]) -> set[str]:
        for name in failed:
            if number not in self._failing[name]:
                self._failing[name].append(number)
        return failed

    def verdicts(self) -> list[Check]:
        """Returns all checks, with the rows that fail them."""
        return [
            Check(name=name, passed=not rows, what=what, rows=rows, advice=advice if rows else None)
            for name, rows in self._failing.items()
            for what, advice in [WORDS[name]]
        ]
