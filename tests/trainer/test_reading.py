"""The trainer and the job's validation read a file alike: same verdict, same counts, same tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from tunery.datasets import rules
from tunery.datasets.rules import Summary, check_examples
from tunery.failures import InvalidTrainingFile
from tunery.rows.encoding import Encoded
from tunery.rows.template import ChatTemplate
from worker.trainer.data import Rows, read_parsed, read_rows

FAULTS = Path(__file__).parents[1] / "data" / "faults"
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content or '' }}{{ message.tool_calls | default([]) | tojson }}"
    "{{ message.reasoning_content }}{{ message.name }}{{ message.tool_call_id }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(folder: Path, source: str) -> ChatTemplate:
    tiny_models.tokenizer(folder, source)
    return ChatTemplate.load(folder)


def validated(path: Path, made: ChatTemplate, length: int) -> Summary | str:
    data = path.read_bytes()
    try:
        return check_examples(
            (data[i : i + 50] for i in range(0, len(data), 50)), template=made, max_length=length, least=1
        )
    except InvalidTrainingFile as error:
        return error.message.partition(" More rows are invalid: ")[0]  # the trainer stops at the first invalid row


def trained(path: Path, made: ChatTemplate, length: int) -> Rows | str:
    try:
        return read_rows(path, made, length)
    except InvalidTrainingFile as error:
        return error.message


@pytest.mark.parametrize("path", sorted(FAULTS.glob("*.jsonl")), ids=lambda path: path.name)
@pytest.mark.parametrize("source", [tiny_models.CHATML, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("length", [60, 90, 2048])
def test_trainer_and_validation_agree(
    path: Path, source: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = template(tmp_path, source)
    learned: list[tuple[list[int], list[int]]] = []

    def measure(summary: Summary, number: int, encoded: Encoded) -> None:
        learned.extend((sequence.input_ids, sequence.labels) for sequence in encoded.sequences)
        plain(summary, number, encoded)

    plain = rules._measure  # wrapped to collect the sequences that the validation counts
    monkeypatch.setattr(rules, "_measure", measure)
    before, then = validated(path, made, length), trained(path, made, length)

    if isinstance(before, str) or isinstance(then, str):
        assert before == then
        return
    assert [(row.input_ids, row.labels) for row in then.rows] == learned
    assert before.tokens == then.tokens
    assert before.trained_tokens == sum(row.labelled for row in then.rows)
    assert before.longest == max(map(len, then.rows))
    assert (before.truncated, before.unlearnable) == (list(then.truncated), list(then.unlearnable))


@pytest.mark.parametrize("name", ["bare_cr", "crcrlf", "bom_middle"])
def test_line_ends_and_marks_change_no_token(name: str, tmp_path: Path) -> None:
    """The tokens equal those of the same rows as Python's json module writes them."""
    made, path, plain = template(tmp_path, tiny_models.CHATML), FAULTS / f"{name}.jsonl", tmp_path / "plain.jsonl"
    lines = path.read_bytes().decode().replace("\ufeff", "").rstrip("\r\n").split("\n")
    plain.write_text("".join(json.dumps(json.loads(line)) + "\n" for line in lines))

    assert len(lines) == 12
    assert read_rows(path, made, 2048) == read_rows(plain, made, 2048)
    assert [number for number, _ in read_parsed(path, "training")] == list(range(1, 13))


def test_a_first_token_is_learned_by_nobody_and_counted_by_nobody(tmp_path: Path) -> None:
    """If a template writes nothing before a row's opening answer, no token precedes the first to predict it."""
    made = template(tmp_path, "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}")
    path = tmp_path / "rows.jsonl"
    opening = {"messages": [{"role": "assistant", "content": "ab"}, {"role": "user", "content": "c"}]}
    path.write_text(json.dumps(opening) + "\n")

    before, then = validated(path, made, 2048), trained(path, made, 2048)

    assert isinstance(before, Summary), before
    assert isinstance(then, Rows), then
    assert then.rows[0].labels[0] == then.rows[0].input_ids[0]
    assert before.trained_tokens == then.examples[0].labelled == 2


CALLED = (
    '<|im_start|>system\n[{"type": "function", "function": {"name": "now"}}]<|im_end|>\n'
    "<|im_start|>user\nWhat time is it now 0[]<|im_end|>\n"
    "<|im_start|>assistant\n"
    '[{"id": "c1", "type": "function", "function": {"name": "now", "arguments": {}}}]<|im_end|>\n'
    "<|im_start|>tool\n12:00[]c1<|im_end|>\n"
    "<|im_start|>assistant\nIt is 12:00[]<|im_end|>\n"
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model_dump", "<|im_start|>user\nSay hi 0[]<|im_end|>\n<|im_start|>assistant\nhi 0[]<|im_end|>\n"),
        ("null_columns", "<|im_start|>user\nHi 0[]<|im_end|>\n<|im_start|>assistant\nHello 0[]<|im_end|>\n"),
        ("empty_arguments", CALLED),
    ],
)
def test_nulls_and_outputs_leave_no_trace(name: str, text: str, tmp_path: Path) -> None:
    made = template(tmp_path, TOOLS)
    rows = read_rows(FAULTS / f"{name}.jsonl", made, 2048).rows

    assert len(rows) == 12
    # Compared as text without the end, because the renderer decides whether a newline follows the last turn.
    assert made.tokenizer.decode(rows[0].input_ids, skip_special_tokens=False).rstrip() == text.rstrip()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"%s\n\n%s\n", "Line 2: is blank"),
        (b"%s\r{}\n%s\n", "Example 1: the object is followed by a CR without LF"),
        (b"%s\n\xff%s\n", "Line 2: is not UTF-8"),
        (b"[%s,\n%s", "Row 2: the array has no end"),
        (b"[\n%s,\n{}\n]", "Example 2 (line 3): Unexpected file format"),
        (b"%s\n%s]", "Example 2: there is text after the JSON object"),
        (b"%s\n{}\n%s\n\xff\n", "Example 2: Unexpected file format"),
    ],
)
def test_a_broken_file_has_one_verdict(data: bytes, reason: str, tmp_path: Path) -> None:
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path, made = tmp_path / "rows.jsonl", template(tmp_path, tiny_models.CHATML)
    path.write_bytes(data.replace(b"%s", json.dumps(row).encode()))

    assert reason in str(trained(path, made, 2048))
    assert trained(path, made, 2048) == validated(path, made, 2048)
