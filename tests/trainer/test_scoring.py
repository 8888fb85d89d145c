"""Tests which answers are right, the confidence intervals, and that answers do not depend on their batch."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from run_folders import chat, lay_out, plan
from templates import QWEN3_LIKE

from tunery.rows.messages import Example
from tunery.spec import Evaluation
from worker.trainer import generation
from worker.trainer.decoding import decoder
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.scoring import answers
from worker.trainer.scoring.intervals import paired_interval
from worker.trainer.scoring.matching import matches
from worker.trainer.scoring.scorecard import score
from worker.trainer.stop_signal import Stopped, StopSignal


@pytest.mark.parametrize(
    ("wanted", "answer", "correct"),
    [
        ('{"intent": "play", "slots": {"a": "1", "b": "2"}}', '{"slots":{"b":"2","a":"1"},"intent":"play"}', True),
        ('{"intent": "play"}', ' {"intent": "play"}\n', True),
        ('{"intent": "play"}', '{"intent": "stop"}', False),
        ('{"intent": "play"}', 'Sure! {"intent": "play"}', False),
        ('{"n": 1}', '{"n": true}', False),
        ('{"n": [1, 2]}', '{"n": [2, 1]}', False),
        ("Berlin", " Berlin ", True),
        ("Berlin", "berlin", False),
        ("", "anything", False),
        ('<think>\n\n</think>\n\n{"a": 1, "b": [1, 2]}', '<think>\n\n</think>\n\n{"b":[1,2],"a":1}\n', True),
        ('<think>\n\n</think>\n\n{"a": 1}', '{"a": 1}', False),
        ('{"name": "x", "arguments": {}, "id": "1"}', '{"name": "x", "arguments": {}, "id": "2"}', False),
        ("[see] {this", "[see] {this", True),
        ("[[" * 2000, "[[" * 2000, True),
    ],
)
def test_answer_is_right_when_it_is_equal(wanted: str, answer: str, correct: bool) -> None:
    assert matches(wanted, answer) is correct


@pytest.mark.parametrize(
    ("wanted", "answer", "correct"),
    [
        (
            '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": 2}}\n</tool_call>',
            '<tool_call>{"arguments":{"b":2,"a":1},"name":"f"}</tool_call>',
            True,
        ),
        ('[{"name": "f", "arguments": {"id": 1, "name": "n"}, "id": "VvvODy9mT"}]',
         '[{"name": "f", "arguments": {"name": "n", "id": 1}, "id": "aaaaaaaaa"}]', True),
        ('[{"name": "f", "arguments": {"id": 1, "name": "n"}}]', '[{"name": "f", "arguments": {"id": 2, "name": "n"}}]',
         False),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"name": "f", "arguments": {"a": 1}}', True),
        ('{"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}',
         '{"id": "2", "function": {"name": "f", "arguments": {}}}', True),
        ('{"name": "f", "parameters": {"a": 1}}', '{"name": "f", "parameters": {"a": 2}}', False),
        ('{"name": "f", "parameters": {}}', '{"name": "g", "parameters": {}}', False),
        ('{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}{"name": "f", "arguments": {}}', False),
        ('{"name": "f", "arguments": {}}', 'I call {"name": "f", "arguments": {}}', False),
    ],
)  # fmt: skip
def test_calls_are_right_when_names_and_arguments_are(wanted: str, answer: str, correct: bool) -> None:
    assert matches(wanted, answer, is_call=True) is correct


def test_interval_covers_the_true_gain_as_often_as_it_says() -> None:
    """The coverage is exact: it sums the probability of every outcome of 30 pairs, for three true gains."""
    n = 30
    for both, tuned, base in ((0.3, 0.4, 0.1), (0.05, 0.8, 0.05), (0.8, 0.1, 0.02)):
        neither = 1 - both - tuned - base
        covered = 0.0
        for b, u, e in itertools.product(range(n + 1), repeat=3):
            if b + u + e <= n:
                low, high = paired_interval(b, u, e, n)
                ways = math.factorial(n) / math.prod(math.factorial(k) for k in (b, u, e, n - b - u - e))
                if low <= tuned - base <= high:
                    covered += ways * both**b * tuned**u * base**e * neither ** (n - b - u - e)
        assert 0.93 < covered < 0.999


def test_interval_has_width_where_all_rows_agree_and_is_mirrored() -> None:
    low, high = paired_interval(0, 20, 0, 20)
    assert 0.7 < low < 0.9
    assert high == 1
    assert paired_interval(5, 7, 2, 20) == pytest.approx([-bound for bound in paired_interval(5, 2, 7, 20)[::-1]])


def test_score_counts_pairs() -> None:
    asked = [answers.Question([1], "x", [{"role": "user", "content": str(i)}]) for i in range(8)]

    card, rows = score(asked, base=["x"] * 2 + ["y"] * 6, tuned=["y"] + ["x"] * 5 + ["y"] * 2)

    assert (card.base_exact, card.tuned_exact, card.gain) == (2 / 8, 5 / 8, 3 / 8)
    assert card.gain_low < card.gain < card.gain_high
    assert [row["tuned_right"] for row in rows] == [False, True, True, True, True, True, False, False]
    assert [sample.prompt for sample in card.samples] == ["0", "1", "3", "4", "6"]


CALLS = (Path(__file__).parents[1] / "data/faults/test_tool_rows.jsonl").read_bytes()
TOOLS = QWEN3_LIKE.replace(
    "message.content.lstrip('\\n') +",
    "(message.content or '').lstrip('\\n') + (message.tool_calls | tojson if message.tool_calls else '') +",
)
"""A template with an empty think block before each answer, and calls after its content."""


def wanting(content: str | None) -> list[dict[str, Any]]:
    """Returns rows that expect calls, with `content` next to each call, and one row that expects a text."""
    rows = [json.loads(line) for line in CALLS.splitlines()]
    for row in rows:
        row["messages"][-1]["content"] = content
    return [*rows, chat(0)]


@pytest.mark.parametrize("content", ["", None])
def test_a_perfect_model_scores_all_rows(tmp_path: Path, content: str | None) -> None:
    base = tiny_models.llama(tmp_path / "base", template=TOOLS)
    rows = wanting(content)
    t = prepare(lay_out(tmp_path / "run", base, plan(max_seq_length=256), rows), MessageWriter(None), StopSignal())

    asked = answers.questions(t.template, [Example.model_validate(row) for row in rows])
    learned = [[label for label in row.labels if label >= 0] for row in t.rows.rows]
    said = [t.template.answer_text(ids).replace('"id": "a"', '"id": "another"') for ids in learned]
    card, _ = score(asked, base=[""] * 5, tuned=said)

    calls = '[{"id": "a", "type": "function", "function": {"name": "ping", "arguments": {"host": 0}}}]'
    assert asked[0].wanted == f"<think>\n\n</think>\n\n{calls}"
    assert asked[-1].wanted == f"<think>\n\n</think>\n\n{rows[-1]['messages'][-1]['content']}"
    assert (card.rows, card.base_exact, card.tuned_exact) == (5, 0, 1)
    for question, row in zip(asked, t.rows.rows, strict=True):
        assert row.input_ids[: len(question.prompt_ids)] == question.prompt_ids


def test_rows_that_want_an_empty_answer_are_left_out(tmp_path: Path, tiny: Path) -> None:
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), [chat(0)]), MessageWriter(None), StopSignal())
    silent = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}
    opening = {"messages": [{"role": "assistant", "content": "Hello!"}]}

    asked = answers.questions(t.template, [Example.model_validate(row) for row in (silent, opening)])

    assert [question.wanted for question in asked] == ["Hello!"]


@pytest.mark.parametrize("against", [None, "by transformers"])
def test_answers_do_not_depend_on_the_batch(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, against: str | None
) -> None:
    """Prompts of different lengths are padded by transformers, and the padding must have no effect."""
    monkeypatch.setattr(decoder, "reason_against", lambda _: against)
    rows = [chat(i, words=1 + 2 * i) for i in range(6)]
    t = prepare(
        lay_out(tmp_path / "run", tiny, plan(evaluation=Evaluation(max_new_tokens=12)), rows),
        MessageWriter(None),
        StopSignal(),
    )
    asked = answers.questions(t.template, [Example.model_validate(row) for row in rows])

    together = answers.generate(t, asked, base=False)
    alone = [answers.generate(t, [one], base=False)[0] for one in asked]

    assert together == alone
    assert t.objective.against_decoder == against
    assert len(set(alone)) > 1


@pytest.mark.parametrize(("asked", "limit"), [("auto", 41), (7, 7), (1, 1)])
@pytest.mark.parametrize("against", [None, "by transformers"])
def test_answers_end_at_the_limit(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, asked: Any, limit: int, against: str | None
) -> None:
    """With one token a character, the longest expected answer has 25 tokens, and 16 are allowed in addition."""
    row = chat(0)
    row["messages"][-1]["content"] = "b" * 25
    settled = plan(evaluation=Evaluation(max_new_tokens=asked))
    t = prepare(lay_out(tmp_path / "run", tiny, settled, [row, chat(1)]), MessageWriter(None), StopSignal())
    questions = answers.questions(t.template, [Example.model_validate(each) for each in (row, chat(1))])
    monkeypatch.setattr(decoder, "reason_against", lambda _: against)

    limits, make = [], generation.Greedy

    def making(causal: Any, template: Any, most: int, *args: Any) -> generation.Greedy:
        limits.append(most)
        return make(causal, template, most, *args)

    monkeypatch.setattr(generation, "Greedy", making)

    assert max(map(len, answers.generate_ids(t, questions, base=False))) <= limit
    assert limits == [limit]
    assert answers.token_limit(settled.evaluation, questions) == limit
    assert t.objective.against_decoder == against


def test_stop_is_heard_between_batches(tmp_path: Path, tiny: Path) -> None:
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), [chat(0), chat(1)]), MessageWriter(None), StopSignal())
    asked = answers.questions(t.template, [Example.model_validate(chat(0))])
    t.stop_signal.received = True

    with pytest.raises(Stopped):
        answers.generate(t, asked, base=True)
