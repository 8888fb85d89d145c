"""Measures how far two models' predictions differ on the tokens that rows teach."""

import inspect
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tunery.rows.template import IGNORED
from worker.trainer.data import Row
from worker.trainer.export.errors import ExportRefused, FormatAnswersWorse
from worker.trainer.scoring.intervals import paired_interval


@dataclass(frozen=True)
class Bounds:
    """The most by which a model's predictions may differ from another's; see Divergence."""

    mean_kl: float
    top1: float


EQUAL = Bounds(mean_kl=1e-3, top1=0.995)
"""Bounds for the same weights, added and rounded once to 16 bits."""
FP8 = Bounds(mean_kl=0.1, top1=0.7)
"""Bounds for weights and inputs with three bits of mantissa: see docs/decisions/0037-bounds-of-narrow-exports.md."""
TIE = 0.02
"""Gap in nats between two tokens of the reference within which either may be the likeliest: 2 % of probability, a
change that rounding weights to bf16 can make. Open-ended text has such a pair at about every 300th token.
"""
POSITIONS = 2048
_BYTES = 2**29
_CHUNK = 64


@dataclass(frozen=True)
class Divergence:
    """A model's divergence from a reference over labelled tokens.

    `mean_kl`: the mean of KL(reference || model) in nats. `top1`: the fraction of tokens for which both have the same
    likeliest one, or one that ties with it in the reference. `identical`: that fraction without ties.
    """

    positions: int
    mean_kl: float
    top1: float
    identical: float

    def keeps(self, bounds: Bounds) -> bool:
        """Whether both bounds hold, which they do not for a NaN. However few tokens there are, one may differ."""
        different = round((1 - self.top1) * self.positions)
        return self.mean_kl <= bounds.mean_kl and different <= max(1, (1 - bounds.top1) * self.positions)

    def describe(self, reference: str) -> str:
        """Returns the figures as part of a sentence."""
        return (
            f"on {self.positions:,} labelled tokens the mean KL divergence from {reference} is {self.mean_kl:.2g}, and "
            f"the likeliest token is the same for {self.top1:.2%}"
        )

    @property
    def order(self) -> float:
        """A sort key: the smallest divergence first, NaN last."""
        return math.inf if math.isnan(self.mean_kl) else self.mean_kl

    def check(self, bounds: Bounds, refusal: type[ExportRefused], **said: str) -> None:
        """Raises `refusal`, with `said` as further fields, if a bound does not hold."""
        if not self.keeps(bounds):
            raise refusal(
                positions=self.positions,
                mean_kl=self.mean_kl,
                most_kl=bounds.mean_kl,
                top1=self.top1,
                least_top1=bounds.top1,
                **said,
            )


@dataclass(frozen=True)
class Answered:
    """The fractions of rows that a model would answer with the wanted text, before and after its weights were rounded.

    `low`, `high`: the paired 95 % interval of the two fractions' difference.
    """

    rows: int
    before: float
    after: float
    low: float
    high: float

    @property
    def is_loss(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.high < 0

    def check(self, format: str) -> None:
        """Raises FormatAnswersWorse if the model answers worse."""
        if self.is_loss:
            raise FormatAnswersWorse(format=format, **asdict(self))


def choose(rows: Iterable[Row], vocabulary: int) -> list[Row]:
    """Returns the first rows, up to POSITIONS labelled tokens or half a GiB of log-probabilities."""
    most = min(POSITIONS, _BYTES // (4 * vocabulary))
    chosen: list[Row] = []
    for row in rows:
        if sum(each.labelled for each in chosen) + row.labelled > most and chosen:
            break
        chosen.append(row)
    return chosen


@torch.no_grad()
def log_probs(model: Any, rows: list[Row]) -> Tensor:
    """Returns the model's log-probabilities at each labelled token, [tokens, vocabulary], in fp32 on the CPU.

    One row per pass, so that no row can affect another.
    """
    return torch.cat([_of_row(model, row) for row in rows])


def _of_row(model: Any, row: Row) -> Tensor:
    places = (torch.tensor(row.labels[1:]) != IGNORED).nonzero().flatten().to(model.device)
    ids = torch.tensor([row.input_ids], device=model.device)
    if "logits_to_keep" in inspect.signature(type(_plain(model)).forward).parameters:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]
    else:
        logits = model(input_ids=ids, use_cache=False).logits[0, places]
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def correct(predictions: Tensor, rows: list[Row]) -> list[bool]:
    """Returns for each row whether every likeliest token is the wanted one. If so, the model's greedy answer is exactly
    the wanted text.
    """
    wanted = [torch.tensor(row.labels[1:]) for row in rows]
    labels = [each[each != IGNORED] for each in wanted]
    chosen = predictions.argmax(dim=-1).split([len(each) for each in labels])
    return [bool(found.equal(each)) for found, each in zip(chosen, labels, strict=True)]


def compare_answers(reference: Tensor, found: Tensor, rows: list[Row]) -> Answered:
    """Returns both, as `log_probs` does."""
    before, after = correct(reference, rows), correct(found, rows)
    both = sum(old and new for old, new in zip(before, after, strict=True))
    low, high = paired_interval(both, sum(after) - both, sum(before) - both, len(rows))
    return Answered(len(rows), sum(before) / len(rows), sum(after) / len(rows), low, high)


def compare(reference: Tensor, found: Tensor) -> Divergence:
    """Returns both, as `log_probs` does."""
    kl = [
        (old.exp() * (old - new)).sum(dim=-1)
        for old, new in zip(reference.split(_CHUNK), found.split(_CHUNK), strict=True)
    ]
    chosen = found.argmax(dim=-1, keepdim=True)
    best = reference.max(dim=-1).values
    lost = best - reference.gather(-1, chosen).squeeze(-1)
    return Divergence(
        positions=len(reference),
        mean_kl=float(torch.cat(kl).double().mean()),
        top1=float((lost <= TIE).double().mean()),
        identical=float((reference.argmax(dim=-1, keepdim=True) == chosen).double().mean()),
    )
