"""What a file must hold to be trained on, judged before a GPU is held. Its syntax was checked when it came in."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from tunery.errors import InvalidJSONL, InvalidNExamples, InvalidTrainingFile
from tunery.rows.encoding import encode_example
from tunery.rows.jsonl import iter_lines
from tunery.rows.messages import Example, FileRole, invalid, parse_line
from tunery.rows.template import ChatTemplate, Rendered

LEAST_EXAMPLES = 10
_SHOWN = 5
_MOST_FAULTS = 100


@dataclass
class Summary:
    """What a good file holds. Tokens, with the template only, are those of one epoch after the cut at `max_length`.
    `unlearnable`: lines whose whole answer is lost to the cut. `unscorable`: lines of a test file whose wanted answer
    has no text, a tool call alone."""

    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    unlearnable: list[int] = field(default_factory=list)
    unscorable: list[int] = field(default_factory=list)
    with_tools: int = 0

    def warnings(self, max_length: int) -> list[str]:
        """What the owner should know though the job goes on."""
        found = []
        if self.truncated:
            found.append(
                f"{self.truncated} of {self.examples} examples are longer than {max_length} tokens and lose their end. "
                "Raise max_seq_length to keep it."
            )
        if self.unlearnable:
            found.append(
                f"{len(self.unlearnable)} of {self.examples} examples lose their whole answer to the cut at "
                f"{max_length} tokens and are left out: {_lines(self.unlearnable)}."
            )
        if self.unscorable:
            found.append(
                f"{len(self.unscorable)} of {self.examples} test examples want a tool call and no text, which the "
                f"scorecard leaves out: {_lines(self.unscorable)}."
            )
        return found


def check_examples(
    chunks: Iterable[bytes],
    *,
    role: FileRole = "training",
    template: ChatTemplate | None = None,
    max_length: int = 2048,
    least: int | None = None,
) -> Summary:
    """Reads the whole file, row by row, in constant memory.

    `least`: examples that it must have (a training file 10, others 1). Without a template, rows are judged by their
    own form only. Raises InvalidTrainingFile, with the first fault and the lines of the others, or InvalidNExamples.
    """
    summary = Summary()
    faults: dict[int, InvalidTrainingFile] = {}
    try:
        for number, text in iter_lines(chunks):
            try:
                example = parse_line(text, number, role)
                _check_role(example, number, role)
                _count(summary, number, example, _encode(template, example, number, max_length, role))
                if role == "test" and example.messages[-1].content is None:
                    summary.unscorable.append(number)
            except InvalidTrainingFile as fault:
                faults[number] = fault
                if len(faults) == _MOST_FAULTS:
                    break
    except InvalidJSONL as error:
        raise InvalidTrainingFile(param=f"{role}_file", role=role, reason=error.message) from error
    if faults:
        raise _all_of(faults, role)
    _check_enough(summary, role, LEAST_EXAMPLES if least is None and role == "training" else least or 1)
    if len(summary.unscorable) == summary.examples:
        raise InvalidTrainingFile(
            param=f"{role}_file",
            role=role,
            reason="No example ends with a text, so none can be scored. Add some, or leave evaluation.test_file out.",
        )
    if template is not None and not summary.trained_tokens:
        raise InvalidTrainingFile(
            param=f"{role}_file",
            role=role,
            reason=f"No example has a trained token within max_seq_length ({max_length}). Raise max_seq_length.",
        )
    return summary


def _check_role(example: Example, number: int, role: FileRole) -> None:
    if role == "test" and example.messages[-1].role != "assistant":
        raise invalid(role, number, "does not end with an assistant message, which is the wanted answer. Add it.", "")


def _check_enough(summary: Summary, role: FileRole, least: int) -> None:
    if summary.examples < least:
        raise InvalidNExamples(param=f"{role}_file", role=role.capitalize(), n=summary.examples, least=least)


def _encode(
    template: ChatTemplate | None, example: Example, number: int, max_length: int, role: FileRole
) -> list[Rendered]:
    return encode_example(template, example, number, max_length=max_length, role=role) if template else []


def _all_of(faults: dict[int, InvalidTrainingFile], role: FileRole) -> InvalidTrainingFile:
    """The first fault in full: whoever mends a file wants to know that it is not the only one."""
    first, *others = faults
    reason = faults[first].fields["reason"]
    if others:
        reason += (
            f" There are more: {_lines(others)}{'; reading stopped there' if len(faults) == _MOST_FAULTS else ''}."
        )
    return InvalidTrainingFile(param=f"{role}_file", role=role, reason=reason)


def _lines(numbers: list[int]) -> str:
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"line{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_SHOWN]))}{more}"


def _count(summary: Summary, number: int, example: Example, sequences: list[Rendered]) -> None:
    summary.examples += 1
    summary.with_tools += bool(example.tools)
    for rendered in sequences:
        summary.tokens += len(rendered.input_ids)
        summary.trained_tokens += rendered.trained_tokens
        summary.longest = max(summary.longest, len(rendered.input_ids))
    summary.truncated += any(rendered.truncated for rendered in sequences)
    if sequences and all(rendered.trained_tokens == 0 for rendered in sequences):
        summary.unlearnable.append(number)


def check_disjoint(train: Iterable[bytes], held_out: Iterable[bytes], *, role: FileRole = "validation") -> None:
    """Raises InvalidTrainingFile, with line numbers, where a held-out row is a training row too.

    Rows are the same when their conversations are: ids and other extra keys do not count. Memory: some 100 bytes for
    each training row, however long it is.
    """
    lines_of_train: dict[bytes, int] = {}
    for number, text in iter_lines(train):
        lines_of_train.setdefault(_digest(text), number)
    shared = [
        f"line {number} (line {twin} there)"
        for number, text in iter_lines(held_out)
        if (twin := lines_of_train.get(_digest(text))) is not None
    ]
    if shared:
        more = f" and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
        raise InvalidTrainingFile(
            param=f"{role}_file",
            role=role,
            reason=f"It shares {len(shared)} example(s) with the training file: {', '.join(shared[:_SHOWN])}{more}. "
            "Remove them from one of the two.",
        )


def _digest(text: str) -> bytes:
    row = json.loads(text)
    conversation = {key: row[key] for key in ("messages", "tools", "functions") if key in row}
    return hashlib.blake2b(json.dumps(conversation, sort_keys=True).encode(), digest_size=16).digest()
