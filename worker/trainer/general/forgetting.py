"""Measures how far a model has moved from its base on prompts not trained on: KL(base || tuned) and the loss.

Both are means over the tokens of human answers, in nats. The fraction of right answers to 800 questions cannot show a
change of one point; these measures change with every weight.

The base's distribution at each token is kept as its `LIKELIEST` tokens and one probability for all others, on the host:
the whole one, of 128,000 tokens, takes 4 GB. The KL of the coarser distribution is at most that of the whole one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.trainer.data import Row, collate, singles
from worker.trainer.general import batches
from worker.trainer.training import Training

LIKELIEST = 512
_TINY = 1e-30


@dataclass(frozen=True)
class Reference:
    """The base's distributions on one prompt: the ids [tokens, kept] and log-probabilities of its likeliest tokens, the
    probability of all others [tokens], and the sum of its losses.
    """

    ids: Tensor
    logs: Tensor
    rest: Tensor
    loss: float


@dataclass(frozen=True)
class Moved:
    """A model compared with its base on one prompt: sums over `tokens`."""

    tokens: int
    kl: float
    base_loss: float
    loss: float


def describe(t: Training, rows: Sequence[Row]) -> dict[int, Reference]:
    """Measures the current model on each of this rank's prompts. Raises Stopped between batches."""
    found: dict[int, Reference] = {}

    def work(part: list[int]) -> list[None]:
        for i, logs, targets in _log_probabilities(t, rows, part):
            found[i] = _reference(logs, targets)
        return [None] * len(part)

    batches.run(t, list(map(len, rows)), work)
    return found


def compare(t: Training, rows: Sequence[Row], base: dict[int, Reference]) -> list[Moved]:
    """Compares the current model with the base, prompt by prompt. Raises Stopped between batches."""
    return batches.run(
        t,
        list(map(len, rows)),
        lambda part: [_moved(base[i], logs, targets) for i, logs, targets in _log_probabilities(t, rows, part)],
    )


def _log_probabilities(t: Training, rows: Sequence[Row], part: list[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields each row's index, its log-probabilities [labelled, vocabulary] and its targets, row by row."""
    places = [[place] for place in range(len(part))]
    batch = collate(singles(rows[i] for i in part), places, t.device, t.objective.pad_to)
    targets = batch.targets.split(batch.labelled)
    with torch.no_grad(), t.objective.computing():
        for i, logits, wanted in zip(part, t.objective.row_logits(batch), targets, strict=True):
            yield i, logits.log_softmax(-1), wanted


def _reference(logs: Tensor, targets: Tensor) -> Reference:
    kept, ids = logs.topk(min(LIKELIEST, logs.shape[-1]), dim=-1)
    return Reference(ids.cpu(), kept.cpu(), _others(logs, ids).cpu(), _loss(logs, targets))


def _moved(base: Reference, logs: Tensor, targets: Tensor) -> Moved:
    ids, then, rest = (tensor.to(logs.device) for tensor in (base.ids, base.logs, base.rest))
    kept = (then.exp() * (then - logs.gather(-1, ids))).sum(-1)
    others = rest * (rest.clamp_min(_TINY).log() - _others(logs, ids).clamp_min(_TINY).log())
    return Moved(len(targets), float((kept + others).double().sum()), base.loss, _loss(logs, targets))


def _others(logs: Tensor, ids: Tensor) -> Tensor:
    """Returns the total probability of all other tokens. Why not one minus these: fp32 would lose a small rest."""
    return logs.exp().scatter(-1, ids, 0.0).sum(-1)


def _loss(logs: Tensor, targets: Tensor) -> float:
    return float(-logs.gather(-1, targets[:, None]).double().sum())
