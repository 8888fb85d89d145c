"""Prompts with examples, made of an eval file's rows and written as chats."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tunery.datasets.report import rows as report_rows
from tunery.datasets.report.rows import SYSTEM, Row
from tunery.datasets.shots import choice
from tunery.failures import InvalidTrainingFile
from tunery.planning.advice import answer_limit
from tunery.planning.prompting import MOST_SHOTS, Prompts, ShotsOrder, Variant
from tunery.rows import readers
from tunery.rows.encoding import CHATS, encode_answer, read_rows
from tunery.rows.formats import SourceRow
from tunery.rows.messages import Example, FileRole, Message, is_answerable
from tunery.rows.shapes import FileShape
from tunery.rows.template import ChatTemplate
from tunery.spec import Columns, Evaluation, named_columns


@dataclass(frozen=True)
class _Case:
    """What prompts are made of: eval rows, by their names, and examples, as they are sent and as they are compared."""

    folder: Path
    order: ShotsOrder
    template: ChatTemplate
    limit: int
    asked: dict[str, Example]
    shown: list[Example]
    questions: list[Row]
    known: list[Row]


def make(folder: Path, order: ShotsOrder) -> Prompts:
    """Writes the prompts of each variant into `folder`/prompts. Raises InvalidTrainingFile."""
    read = islice(_read(folder / "rows", "test", order.columns), order.max_rows)
    asked = {row.name: example for row, example in read}
    questions = [report_rows.of_example(place, example) for place, example in enumerate(asked.values())]
    shown, left_out = _examples(folder / "examples", questions, order.columns)
    known = [report_rows.of_example(place, example) for place, example in enumerate(shown)]
    if not asked:
        raise InvalidTrainingFile(param="eval_file", role="test", reason="It has no rows. Add some.")
    template = ChatTemplate.load(folder / "base")
    longest = max(template.answer_length(answer) for _, answer in _encoded(template, asked))
    limit = answer_limit(Evaluation(max_new_tokens=order.max_new_tokens), longest)
    case = _Case(folder, order, template, limit, asked, shown, questions, known)
    return Prompts(variants=list(_variants(case)), examples=len(shown), left_out=left_out, limit=case.limit)


def _read(path: Path, role: FileRole, columns: Columns | None) -> Iterator[tuple[SourceRow, Example]]:
    for row in read_rows(readers.chunks_of(path), role, FileShape(named_columns(columns))):
        yield row, CHATS.parse(row, role)


def _examples(path: Path, questions: list[Row], columns: Columns | None) -> tuple[list[Example], int]:
    """Returns the usable examples, and the number of those that ask the same as an eval row."""
    if not path.exists():
        return [], 0
    found = {row.number: example for row, example in _read(path, "training", columns) if is_answerable(example)}
    leaks = choice.leaked([report_rows.of_example(line, example) for line, example in found.items()], questions)
    return [example for line, example in found.items() if line not in leaks], len(leaks)


def _variants(case: _Case) -> Iterator[Variant]:
    """Each variant, its prompts written."""
    kinds = [False, True] if case.order.retrieval == "nearest" else [False]
    if case.order.shots == "auto":
        yield _write(case, Variant(shots=0))
        if case.shown:
            most = _most_shots(case, kinds)
            yield from (_write(case, Variant(shots=most, nearest=nearest)) for nearest in kinds if most)
        return
    for shots in dict.fromkeys(case.order.shots):
        for nearest in kinds[: 2 if shots else 1]:
            yield _write(case, Variant(shots=shots, nearest=nearest))


def _most_shots(case: _Case, kinds: Sequence[bool]) -> int:
    """Returns the largest power of two of examples with which every prompt and its answer fit into the context."""
    shots = MOST_SHOTS
    while shots and (
        shots > len(case.shown)
        or any(_too_long(case, _prompted(case, Variant(shots=shots, nearest=kind))) for kind in kinds)
    ):
        shots //= 2
    return shots


def _write(case: _Case, variant: Variant) -> Variant:
    """Writes the variant's prompts; returns the variant, with the reason if there are none."""
    if variant.shots > len(case.shown):
        why = (
            f"{variant.shots} examples are requested, but only {len(case.shown)} may be shown: request fewer, or add "
            "some"
        )
        return variant.model_copy(
            update={"error": f"{why}. Examples with nearly the same question as an eval row are excluded."}
        )
    prompted = _prompted(case, variant)
    if longest := _too_long(case, prompted):
        why = (
            f"A prompt and its answer need up to {longest:,} tokens, but the base's context has {case.order.context:,}."
        )
        return variant.model_copy(update={"error": f"{why} Lower 'shots'."})
    lines = (json.dumps(example.model_dump(exclude_none=True), ensure_ascii=False) for example in prompted.values())
    (case.folder / "prompts" / f"{variant.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return variant


def _prompted(case: _Case, variant: Variant) -> dict[str, Example]:
    """Returns the eval rows, by their names, with the variant's examples before each."""
    if not variant.shots:
        return case.asked
    if variant.nearest:
        texts = [row.question for row in case.questions], [row.question for row in case.known]
        places = choice.nearest(*texts, variant.shots)
    else:
        chosen = choice.balanced([row.answer for row in case.known], case.order.seed)[: variant.shots]
        places = [chosen] * len(case.asked)
    both = zip(case.asked.items(), places, strict=True)
    return {name: _with_examples(asked, [case.shown[place] for place in chosen]) for (name, asked), chosen in both}


def _with_examples(asked: Example, shown: Sequence[Example]) -> Example:
    """Returns the row with the examples' turns after its own system messages; those of the examples are left out."""
    first = next((at for at, one in enumerate(asked.messages) if one.role not in SYSTEM), 0)
    turns: list[Message] = [turn for one in shown for turn in one.messages if turn.role not in SYSTEM]
    return asked.model_copy(update={"messages": [*asked.messages[:first], *turns, *asked.messages[first:]]})


def _too_long(case: _Case, prompted: Mapping[str, Example]) -> int:
    """Returns the tokens of the longest prompt and its answer where they do not fit into the context, else 0."""
    longest = max(len(prompt) for prompt, _ in _encoded(case.template, prompted)) + case.limit
    return longest if case.order.context is not None and longest > case.order.context else 0


def _encoded(template: ChatTemplate, examples: Mapping[str, Example]) -> Iterator[tuple[list[int], list[int]]]:
    return (encode_answer(template, example, name) for name, example in examples.items())
