"""The scorecard of held-out pairs: how often base and tuned model find the preferred answer more likely."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from tunery.rows.encoding import encode_pair
from tunery.rows.messages import Message
from tunery.rows.preferences import Pair
from tunery.trainer_protocol import Score
from worker.trainer import reference
from worker.trainer.data import Example, Row
from worker.trainer.scoring.scorecard import Rates, assemble, compare_rates
from worker.trainer.training import Training


@dataclass(frozen=True)
class Pairs:
    """Test pairs: for each, the sequences with both answers, and its readable form."""

    examples: list[Example]
    shown: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.examples)


def prepare(t: Training, found: list[Pair]) -> Pairs:
    """Encodes the pairs. Those without a difference after truncation are left out. Raises InvalidTrainingFile."""
    examples, shown = [], []
    for number, pair in enumerate(found, start=1):
        encoded = encode_pair(t.template, pair, f"example {number}", max_length=t.plan.max_seq_length, role="test")
        for rows in encoded.examples:
            examples.append(Example(tuple(Row(row.input_ids, row.labels) for row in rows)))
            prompt = [message.model_dump(exclude_none=True) for message in pair.messages[:-1]]
            shown.append({"messages": prompt, "wanted": _text(pair.messages[-1]), "other": _text(pair.dispreferred)})
    return Pairs(examples, shown)


def _text(message: Message) -> str:
    return message.content or json.dumps(message.model_dump(exclude_none=True, exclude={"role"}), ensure_ascii=False)


def measure(t: Training, pairs: Pairs, *, base: bool) -> list[list[float]]:
    """Returns the log-probabilities of each pair's answers, by the tuned model or the base under its adapter.

    Raises Stopped.
    """
    model: Any = t.objective.model
    as_base = model.disable_adapter() if base and isinstance(model, PeftModel) else nullcontext()
    with as_base, t.timer.measure("pairs", sum(map(len, pairs.examples))):
        return reference.measure(t, pairs.examples)


def score(pairs: Pairs, base: list[list[float]], tuned: list[list[float]]) -> tuple[Score, list[dict[str, Any]]]:
    """Returns the scorecard and every pair's log-probabilities.

    `preferred` compares whole answers, as DPO does; `preferred_norm` their means per token, which does not favour short
    answers.
    """
    lengths = [[row.labelled for row in example.rows] for example in pairs.examples]
    means = [_divided(found, lengths) for found in (base, tuned)]
    measures = {
        "preferred": compare_rates(_ranked(base), _ranked(tuned), is_binary=True),
        "preferred_norm": compare_rates(_ranked(means[0]), _ranked(means[1]), is_binary=True),
    }
    rows = [
        {**shown, **_judged("base", shown, b), **_judged("tuned", shown, u)}
        for shown, b, u in zip(pairs.shown, base, tuned, strict=True)
    ]
    return assemble(rows, "preferences", measures, primary="preferred", exact=measures["preferred"]), rows


def _judged(model: str, shown: dict[str, Any], found: list[float]) -> dict[str, Any]:
    """Returns the answer that a model finds more likely, and whether it is the preferred one."""
    is_right = found[0] > found[1]
    return {
        model: shown["wanted" if is_right else "other"],
        f"{model}_right": is_right,
        f"{model}_log_probabilities": found,
    }


def _ranked(found: list[list[float]]) -> Rates:
    return [(float(preferred > other), 1.0) for preferred, other in found]


def _divided(found: list[list[float]], lengths: list[list[int]]) -> list[list[float]]:
    return [[n / length for n, length in zip(*both, strict=True)] for both in zip(found, lengths, strict=True)]
