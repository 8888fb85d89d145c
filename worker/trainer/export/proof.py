"""How far the predictions of two models are apart, on the tokens that rows teach."""

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
    """The most that a model's predictions may be apart from those of another; see Divergence."""

    mean_kl: float
    top1: float


EQUAL = Bounds(mean_kl=1e-3, top1=0.995)
"""Of the same weights, added and rounded once to 16 bits."""
FP8 = Bounds(mean_kl=0.1, top1=0.7)
"""Of weights and inputs of three bits of mantissa: see docs/decisions/0037-bounds-of-narrow-exports.md."""
TIE = 0.02
"""Nats between two tokens of the reference, of which either may be the likeliest: 2 % of probability, which rounding
weights to bf16 turns. Open-ended text has such a pair at every 300th token or so."""
POSITIONS = 2048
_BYTES = 2**29
_CHUNK = 64


@dataclass(frozen=True)
class Divergence:
    """Of a model from a reference, over labelled tokens: the mean of KL(reference || model) in nats, and the share of
    tokens for which both have the same likeliest one, or one that ties with it in the reference.

    `identical`: that share without the ties.
    """

    positions: int
    mean_kl: float
    top1: float
    identical: float

    def keeps(self, bounds: Bounds) -> bool:
        """Whether both bounds hold; a NaN holds none. However few tokens there are, one may differ."""
        different = round((1 - self.top1) * self.positions)
        return self.mean_kl <= bounds.mean_kl and different <= max(1, (1 - bounds.top1) * self.positions)

    def describe(self, reference: str) -> str:
        """Returns the numbers as a part of a sentence."""
        return (
            f"on {self.positions} labelled tokens the mean KL divergence from {reference} is {self.mean_kl:.2g}, and "
            f"the likeliest token is the same for {self.top1:.2%}"
        )

    @property
    def order(self) -> float:
        """A key that puts the smallest first and a NaN last."""
        return math.inf if math.isnan(self.mean_kl) else self.mean_kl

    def check(self, bounds: Bounds, refusal: type[ExportRefused], **said: str) -> None:
        """Raises `refusal`, with what else it says, where a bound does not hold."""
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
    """How many rows a model would answer with the wanted text, before and after it was narrowed.

    `low`, `high`: the paired 95 % interval of the difference of the two shares.
    """

    rows: int
    before: float
    after: float
    low: float
    high: float

    @property
    def is_loss(self) -> bool:
        """Whether the whole interval is."""
        return self.high < 0

    def check(self, format: str) -> None:
        """Raises FormatAnswersWorse for a loss."""
        if self.is_loss:
            raise FormatAnswersWorse(format=format, **asdict(self))


def choose(rows: Iterable[Row], vocabulary: int) -> list[Row]:
    """Returns the first rows, up to POSITIONS labelled tokens or what half a GiB of log-probabilities holds."""
    most = min(POSITIONS, _BYTES // (4 * vocabulary))
    chosen: list[Row] = []
    for row in rows:
        if sum(each.labelled for each in chosen) + row.labelled > most and chosen:
            break
        chosen.append(row)
    return chosen


@torch.no_grad()
def log_probs(model: Any, rows: list[Row]) -> Tensor:
    """Returns what the model expects in place of each labelled token, [tokens, vocabulary], in fp32 on the CPU.

    A row a pass, so that no row can change another's.
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
    """Returns of each row whether the likeliest token is the wanted one everywhere. Then the model, answering greedily,
    says just what the row wants."""
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
