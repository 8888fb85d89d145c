"""Compares the base and the tuned model on the same test rows: the scorecard, by answers or by preferences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel

from tunery.rows.encoding import find_encoder
from tunery.rows.preferences import Pair
from tunery.trainer_protocol import GeneralScore, Phase, Score
from worker.trainer import generation, report
from worker.trainer.data import read_parsed
from worker.trainer.general import measure as general
from worker.trainer.scoring import answers, greedy, preferences, scorecard, unquantised
from worker.trainer.scoring.preferences import Pairs
from worker.trainer.training import Training

Asked = list[answers.Question] | Pairs
"""The scorecard's questions for both models."""
Scored = tuple[Score, list[dict[str, Any]]]
"""The scorecard and every row's answers."""


def questions(t: Training) -> Asked:
    """Returns the questions for both models; nothing without a test file. Raises InvalidTrainingFile."""
    path = t.folder / "data" / "test.jsonl"
    if not path.exists() or t.plan.evaluation.test_file is None:
        return []
    found = read_parsed(path, "test", find_encoder(t.plan.method, "test", t.plan.columns))
    examples = [example for _, example in found][: t.plan.evaluation.max_rows]
    if pairs := [example for example in examples if isinstance(example, Pair)]:
        return preferences.prepare(t, pairs)
    asked = answers.questions(t.template, examples)
    models = 4 if unquantised.is_asked(t) else 2  # base and tuned model, perhaps in two precisions
    count = models * len(asked[t.ranks.index :: t.ranks.count])
    batch, tokens = generation.rows_at_once(t.objective.causal), answers.token_limit(t.plan.evaluation, asked)
    prompt = sum(len(question.prompt_ids) for question in asked) / max(1, len(asked))
    t.timer.expect_answers(count, batch=batch, tokens=tokens, prompt=prompt)
    return asked


def _answer(t: Training, asked: Asked, *, base: bool) -> list[Any]:
    """Returns a model's answers to the questions, or its log-probabilities of the answers of pairs."""
    if isinstance(asked, Pairs):
        return preferences.measure(t, asked, base=base)
    return answers.generate(t, asked, base=base)


def _answer_tuned(t: Training, asked: Asked) -> list[Any]:
    """Returns the same for the tuned model; its tokens are kept for the check of the served model."""
    if isinstance(asked, Pairs):
        return preferences.measure(t, asked, base=False)
    given = answers.generate_ids(t, asked, base=False)
    greedy.keep(t, asked, given)
    return answers.texts(t, given)


def answers_before_training(t: Training, asked: Asked) -> list[Any] | None:
    """Returns the base's answers if training overwrites the base; None if an adapter can be switched off later."""
    if isinstance(t.objective.model, PeftModel) or not asked:
        return None
    t.writer.write(Phase(phase="evaluating"))
    return _answer(t, asked, base=True)


def general_before_training(t: Training, probe: general.Probe | None) -> general.Baseline | None:
    """Measures the base on the general benchmark if training overwrites the base."""
    if isinstance(t.objective.model, PeftModel) or probe is None:
        return None
    return general.describe_base(t, probe)


def compare_general(t: Training, probe: general.Probe | None, base: general.Baseline | None) -> GeneralScore | None:
    """Compares the tuned model with the base on the general benchmark; measures the base now unless it was before."""
    return None if probe is None else general.compare(t, probe, base or general.describe_base(t, probe))


def score(
    t: Training,
    asked: Asked,
    base_answers: list[Any] | None,
    measure_general: Callable[[], GeneralScore | None],
) -> Scored | None:
    """Returns the scorecard; every rank answers its part."""
    if not asked:
        return None
    with t.timer.measure_rest("scores"):
        return _score(t, asked, base_answers, measure_general)


def _score(
    t: Training,
    asked: Asked,
    base_answers: list[Any] | None,
    measure_general: Callable[[], GeneralScore | None],
) -> Scored:
    t.writer.write(Phase(phase="evaluating", seconds_left=t.timer.left()))
    tuned = _answer_tuned(t, asked)
    base = _answer(t, asked, base=True) if base_answers is None else base_answers
    card, rows = _compare(asked, base, tuned)
    card = card.model_copy(update={"general": measure_general(), "scored_in": t.precision.base})
    if unquantised.is_asked(t):
        other = unquantised.measure(
            t, tuned, lambda on, base: _answer(on, asked, base=base), lambda *both: _compare(asked, *both)[0]
        )
        card = card.model_copy(update={"unquantised": other})
    t.writer.write(card)
    return card, rows


def _compare(asked: Asked, base: list[Any], tuned: list[Any]) -> Scored:
    return preferences.score(asked, base, tuned) if isinstance(asked, Pairs) else scorecard.score(asked, base, tuned)


def write(scored: Scored | None, folder: Path) -> None:
    """Writes `scorecard.json`, and `answers.jsonl` with every row's answers."""
    if scored is not None:
        card, rows = scored
        (folder / "scorecard.json").write_text(card.model_dump_json(indent=2) + "\n")
        report.write_lines(folder / "answers.jsonl", rows)
