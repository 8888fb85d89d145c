"""Right and wrong answers, intervals, and answers that do not depend on their neighbours in a batch."""

import itertools
import math
from pathlib import Path

import pytest
from run_folders import chat, lay_out, plan

from tunery.rows.messages import Example
from tunery.spec import Evaluation
from worker.trainer import evaluate
from worker.trainer.evaluate import matches, paired_interval, score
from worker.trainer.report import Voice
from worker.trainer.run import prepare
from worker.trainer.wish import Stopped, Wish


@pytest.mark.parametrize(
    ("wanted", "answer", "right"),
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
    ],
)
def test_answer_is_right_when_it_is_equal(wanted: str, answer: str, right: bool) -> None:
    assert matches(wanted, answer) is right


def test_interval_covers_the_true_gain_as_often_as_it_says() -> None:
    """Exact: every possible outcome of 30 pairs, weighed by its probability, for three truths."""
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
    asked = [evaluate.Question([1], "x", [{"role": "user", "content": str(i)}]) for i in range(8)]

    card, rows = score(asked, base=["x"] * 2 + ["y"] * 6, tuned=["y"] + ["x"] * 5 + ["y"] * 2)

    assert (card.base_exact, card.tuned_exact, card.gain) == (2 / 8, 5 / 8, 3 / 8)
    assert card.gain_low < card.gain < card.gain_high
    assert [row["tuned_right"] for row in rows] == [False, True, True, True, True, True, False, False]
    assert [sample["prompt"] for sample in card.samples] == ["0", "1", "3", "4", "6"]


def test_answers_do_not_depend_on_the_batch(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of unlike length, padded at the left: the padding must not be seen."""
    rows = [chat(i, words=1 + 2 * i) for i in range(6)]
    t = prepare(
        lay_out(tmp_path / "run", tiny, plan(evaluation=Evaluation(max_new_tokens=12)), rows), Voice(None), Wish()
    )
    asked = evaluate.questions(t, [Example.model_validate(row) for row in rows])

    together = evaluate.answers(t, asked, base=False)
    monkeypatch.setattr(evaluate, "ANSWER_BATCH", {"cpu": 1})
    alone = evaluate.answers(t, asked, base=False)

    assert together == alone
    assert len(set(alone)) > 1


def test_stop_is_heard_between_batches(tmp_path: Path, tiny: Path) -> None:
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), [chat(0), chat(1)]), Voice(None), Wish())
    asked = evaluate.questions(t, [Example.model_validate(chat(0))])
    t.wish.stop = True

    with pytest.raises(Stopped):
        evaluate.answers(t, asked, base=True)
