"""The metrics of a task: which of them apply, their values and their confidence intervals."""

import math
import random
from typing import Any

import pytest

from worker.trainer.scoring import intervals, matching, metrics, text
from worker.trainer.scoring.answers import Question
from worker.trainer.scoring.intervals import bootstrap_interval, mcnemar, paired_interval
from worker.trainer.scoring.matching import matches
from worker.trainer.scoring.scorecard import score

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "g", "arguments": {"a": 1}}\n</tool_call>'


def asking(*wanted: str, is_call: bool = False) -> list[Question]:
    return [Question([1], text, [{"role": "user", "content": "q"}], is_call) for text in wanted]


def card_of(asked: list[Question], base: list[str], tuned: list[str]) -> Any:
    return score(asked, base, tuned)[0]


@pytest.mark.parametrize(
    ("wanted", "answer", "correct"),
    [
        ('{"x": 10}', '{"x": 10.0}', True),
        ('{"x": 10}', '{"x": 1e1}', True),
        ('{"x": [0, {"y": -0.0}]}', '{"x": [0.0, {"y": 0}]}', True),
        ('{"x": 10}', '{"x": "10"}', False),
        ('{"x": 1}', '{"x": true}', False),
        ('{"x": 0}', '{"x": null}', False),
        ('{"x": 10.5}', '{"x": 10}', False),
        ('{"x": 9007199254740993}', '{"x": 9007199254740992.0}', False),
        ("[]", "[" * 3000, False),
        ('{"x": 1}', '{"a":' * 3000, False),
        ('{"x": 1}', "[" * 900 + "]" * 900, False),
        ("[" * 950 + "]" * 950, "[" * 950 + "]" * 950, True),
        ('{"x": 1}', '{"x": 1' + "0" * 5000 + "}", False),
        ('{"x": 1}', '{"x": NaN}', False),
        ('{"x": 1}', '{"x": 1e999}', False),
    ],
)
@pytest.mark.parametrize("is_call", [False, True])
def test_numbers_are_compared_by_value_and_no_answer_breaks_it(
    wanted: str, answer: str, correct: bool, is_call: bool
) -> None:
    assert matches(wanted, answer, is_call=is_call) is correct


@pytest.mark.parametrize("answer", ["[" * 3000, "[" * 990 + "]" * 990, '{"a":' * 3000, "", "\ud800", "```", "<think>"])
@pytest.mark.parametrize("wanted", ['{"x": 1}', CALL, "yes", "A whole sentence, freely put."])
def test_every_metric_takes_every_answer(wanted: str, answer: str) -> None:
    asked = asking(wanted, wanted, is_call=wanted == CALL)
    for chosen in metrics.METRICS.values():
        for metric in chosen:
            part, whole = metric.rate(asked[0], answer)
            assert 0 <= part <= max(whole, 1) < math.inf, metric.name


@pytest.mark.parametrize(
    ("asked", "task", "primary"),
    [
        (asking('{"a": 1}', '{"a": 2}', "[1]"), "json", "field_f1"),
        (asking('<think>\n\n</think>\n\n{"a": 1}'), "json", "field_f1"),
        (asking('```json\n{"a": 1}\n```'), "json", "field_f1"),
        (asking('{"a": 1}', "no"), "text", "chrf"),
        (asking("refund", "card lost", "refund", "card lost", "refund"), "labels", "label_accuracy"),
        (asking("<think>x</think>yes", "<think>y</think>yes", "<think>z</think>no"), "labels", "label_accuracy"),
        (asking("refund", "card lost", "pin"), "text", "chrf"),
        (asking("one\ntwo", "one\ntwo"), "text", "chrf"),
        (asking("x" * 61, "x" * 61), "text", "chrf"),
        (asking(CALL, is_call=True) + asking("No tool does that."), "calls", "tool_calls"),
        (asking("<function=f><parameter=a>1</parameter></function>", is_call=True), "other", "exact"),
    ],
)
def test_metrics_are_chosen_by_what_the_rows_want(asked: list[Question], task: str, primary: str) -> None:
    wanted = [question.wanted for question in asked]

    card = card_of(asked, wanted, wanted)

    assert (card.task, card.primary) == (task, primary)
    assert {"exact", primary} <= card.metrics.keys()
    assert all((found.base, found.tuned, found.gain) == (1, 1, 0) for found in card.metrics.values())


def test_field_f1_counts_paths_and_values_over_all_rows() -> None:
    asked = asking('{"a": {"b": 1, "c": [1, 2]}, "d": []}', '{"a": 3}')
    base = ["no JSON", '{"a": 4}']
    tuned = ['{"a": {"c": [1.0, 3], "b": 1}, "e": 1}', '{"a": 3.0}']

    card = card_of(asked, base, tuned)

    # Wanted 4 + 1 and given 4 + 1 fields; a.b, a.c[0] and a are right.
    found = card.metrics["field_f1"]
    assert (found.base, found.tuned) == (0, pytest.approx(2 * 3 / 10))
    assert found.low <= found.gain <= found.high
    assert found.p is None
    assert (card.metrics["json_valid"].base, card.metrics["json_valid"].tuned) == (0.5, 1)
    assert (card.metrics["exact"].tuned, card.tuned_exact) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("answer", "valid"),
    [('{"a": 2}', 1), ('```json\n{"a": 2}\n```', 0), ('{"a": NaN}', 0), ("5", 0), ('{"a": 2} ok', 0), ("[1]", 1)],
)
def test_json_is_valid_where_a_program_could_read_it(answer: str, valid: int) -> None:
    assert card_of(asking('{"a": 1}'), [answer], [""]).metrics["json_valid"].base == valid


@pytest.mark.parametrize(
    ("answer", "call", "name"),
    [
        (CALL, 1, 1),
        (f"I look it up. {CALL}", 1, 1),
        ('[{"id": "9", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1.0}"}}]', 1, 1),
        (CALL.replace("1", "2"), 0, 1),
        (CALL.replace("1", "true"), 0, 1),
        (OTHER, 0, 0),
        (CALL + CALL, 0, 0),
        ("I cannot.", 0, 0),
    ],
)
def test_tool_calls_are_compared_by_name_and_arguments(answer: str, call: int, name: int) -> None:
    card = card_of(asking(CALL, is_call=True), [""], [answer])

    assert (card.metrics["tool_calls"].tuned, card.metrics["tool_names"].tuned) == (call, name)


def test_calls_made_at_once_have_no_order_and_a_needless_call_is_wrong() -> None:
    asked = asking(CALL + OTHER, is_call=True) + asking("No tool does that.")

    card = card_of(asked, ["", CALL], [OTHER + CALL, "Sorry, there is no tool for that."])

    assert (card.metrics["tool_calls"].base, card.metrics["tool_calls"].tuned) == (0, 1)


def test_labels_are_counted_without_case_and_full_stop_and_each_alone() -> None:
    asked = asking("card lost", "refund", "refund", "card lost", "refund")

    card = card_of(asked, ["refund"] * 5, ["Card lost.", " refund", '"refund"', "card", "refund"])

    found = card.metrics["label_accuracy"]
    assert (found.base, found.tuned, card.tuned_exact) == (0.6, 0.8, 0.4)
    assert found.p == mcnemar(2 - 1, 0)
    assert {name: (of.rows, of.base, of.tuned) for name, of in card.labels.items()} == {
        "refund": (3, 1, 1),
        "card lost": (2, 0, 0.5),
    }
    assert list(card.labels) == ["refund", "card lost"]


@pytest.mark.parametrize(
    ("wanted", "answer", "rouge"),
    [
        # The values of rouge-score 0.1.2.
        ("The cat sat on the mat.", "the cat is on the mat", 0.8333333333333334),
        ("a b c d e f", "f e d c b a", 0.16666666666666666),
        ("Refunds take five working days after approval.", "After approval, refunds take about five days.",
         0.5714285714285714),
        ("x", "y", 0.0),
        # rouge-score finds no words in these.
        ("η γάτα κάθεται", "η γάτα κοιμάται", 2 / 3),
        ("猫が好き", "猫が嫌い", 0.5),
        ("...", "...", 1.0),
        ("a", "", 0.0),
    ],
)  # fmt: skip
def test_rouge_l_is_that_of_the_field_in_any_script(wanted: str, answer: str, rouge: float) -> None:
    assert text.rouge_l(wanted, answer) == pytest.approx(rouge, abs=1e-12)


def test_chrf_is_that_of_sacrebleu() -> None:
    # `sacrebleu -m chrf` 2.6.0 prints 52.95 for the first pair: nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no.
    assert text.chrf("The cat sat on the mat.", "the cat is on the mat") == pytest.approx(0.5295245873129409)
    assert text.chrf("Das Haus", "Das Haus") == 1
    assert text.chrf("<think>\n\n</think>\n\nDas Haus", "Das Haus") == 1
    assert text.chrf("Das Haus", "") == 0


def test_free_text_has_a_mean_of_each_rows_figure() -> None:
    asked = asking("The cat sat on the mat.", "A whole sentence.")

    card = card_of(asked, ["", ""], ["the cat is on the mat", "A whole sentence."])

    assert card.metrics["rouge_l"].tuned == pytest.approx((0.8333333333333334 + 1) / 2)
    assert card.metrics["chrf"].tuned == pytest.approx((0.5295245873129409 + 1) / 2)
    assert not card.labels


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"), [(0, 0, 1), (5, 0, 2 / 32), (1, 9, 22 / 1024), (4, 4, 1), (10, 2, 158 / 4096)]
)
def test_mcnemar_is_a_binomial_test(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar(only_first, only_second) == mcnemar(only_second, only_first) == pytest.approx(p)


def test_bootstrap_is_seeded_paired_and_as_wide_as_the_normal_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(5)
    base = [(random.random(), 1.0) for _ in range(400)]
    noise = [random.gauss(0.1, 0.05) for _ in base]
    tuned = [(value + more, 1.0) for (value, _), more in zip(base, noise, strict=True)]

    low, high = bootstrap_interval(tuned, base)

    mean = sum(noise) / 400
    error = math.sqrt(sum((more - mean) ** 2 for more in noise) / 399 / 400)
    # Unpaired, it would be eight times as wide, because rows differ far more than the models do.
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), rel=0.03)
    assert (low, high) == bootstrap_interval(tuned, base)
    assert (low, high) != bootstrap_interval(tuned, base, seed=1)
    monkeypatch.setattr(intervals, "_INDEXES", 7 * len(base))  # however many rows are drawn at once
    assert bootstrap_interval(tuned, base) == pytest.approx((low, high), rel=1e-12)


def test_bootstrap_of_shares_agrees_with_newcombes_interval() -> None:
    tuned, base = [(float(i < 300), 1.0) for i in range(500)], [(float(i % 2), 1.0) for i in range(500)]

    found = bootstrap_interval(tuned, base)

    assert found == pytest.approx(paired_interval(150, 150, 100, 500), abs=0.01)


def test_a_leaf_is_its_path_and_its_value() -> None:
    assert matching.fields({"a": [1, {"b": None}], "c": {}}) == {
        ('."a"[0]', "1"): 1, ('."a"[1]."b"', "null"): 1, ('."c"', "{}"): 1,
    }  # fmt: skip
    assert matching.fields({"a.b": 1}) != matching.fields({"a": {"b": 1}})
