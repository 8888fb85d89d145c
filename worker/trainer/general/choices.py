"""Computes log-likelihoods of a question's choices in one pass, with the prefix computed once.

The choices follow the prefix as branches: by a mask each sees the prefix and itself, and its positions continue where
the prefix ends. On the shipped questions that is 2.2 times fewer tokens than one row per choice. Why not a cache of
keys and values: it takes two passes, and models with a recurrent state have caches that cannot be copied from one row
to several. Whether a model keeps branches apart is tested on it; if not, each choice is a row of its own.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tunery.rows.template import IGNORED
from worker.trainer import rope
from worker.trainer.data import Batch, Row, collate, singles
from worker.trainer.general import batches
from worker.trainer.general.benchmark import Tokens
from worker.trainer.objective import Objective
from worker.trainer.training import Training

log = logging.getLogger(__name__)

Likelihoods = list[float]
"""Log-likelihoods of an item's choices: sums over their tokens, in nats."""

_TRIED = 4
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Relative difference allowed between the two ways: bf16 rounds the same product differently in another batch shape."""
_MASKED = ("sdpa", "eager")
"""Attention implementations that accept any mask."""


def score(t: Training, items: Sequence[Tokens]) -> list[Likelihoods]:
    """Returns the log-likelihoods of each item's choices by the current model. Raises Stopped between batches."""
    if keeps_branches_apart(t, items):
        return _in_batches(t, items, by_branches)
    rows = [Tokens(item.prefix, (choice,)) for item in items for choice in item.choices]
    found = iter(_in_batches(t, rows, by_rows))
    return [[next(found)[0] for _ in item.choices] for item in items]


def _in_batches(
    t: Training,
    items: Sequence[Tokens],
    compute: Callable[[Objective, Sequence[Tokens], torch.device], list[Likelihoods]],
) -> list[Likelihoods]:
    with torch.no_grad(), t.objective.computing():
        return batches.run(
            t, list(map(len, items)), lambda part: compute(t.objective, [items[i] for i in part], t.device)
        )


def keeps_branches_apart(t: Training, items: Sequence[Tokens]) -> bool:
    """Whether the model gives a few items the same likelihoods both ways, on every rank."""
    some = sorted(items, key=len, reverse=True)[:: max(1, len(items) // _TRIED)][:_TRIED]  # with the longest
    attention = t.objective.causal.config.get_text_config()._attn_implementation
    apart = attention in _MASKED and not rope.of(t.objective.causal)
    if apart:
        with torch.no_grad(), t.objective.computing():
            plain, found = by_rows(t.objective, some, t.device), _try_branches(t, some)
        apart = found is not None and _are_near(found, plain, _compute_type(t))
    return not t.ranks.any(not apart)


def _try_branches(t: Training, items: Sequence[Tokens]) -> list[Likelihoods] | None:
    """Returns None if the model accepts no such mask: its own code may then raise anything (Bloom: ValueError)."""
    try:
        return by_branches(t.objective, items, t.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (raised by a model's own code, which is no fault of the run)
        log.info("choices are scored a row each: the model takes no mask of branches (%s)", error)
        return None


def _compute_type(t: Training) -> torch.dtype:
    return torch.bfloat16 if t.precision.compute == "bfloat16" else torch.float32


def _are_near(one: list[Likelihoods], other: list[Likelihoods], kind: torch.dtype) -> bool:
    a, b = (torch.tensor([value for each in found for value in each]) for found in (one, other))
    return bool((a - b).norm() <= _TOLERANCE[kind] * b.norm())


def by_rows(objective: Objective, items: Sequence[Tokens], device: torch.device) -> list[Likelihoods]:
    """Scores each choice after its own copy of the prefix: the plain reference."""
    rows = [
        Row(item.prefix + choice, [IGNORED] * len(item.prefix) + choice) for item in items for choice in item.choices
    ]
    losses = objective.row_losses(collate(singles(rows), [[i] for i in range(len(rows))], device, objective.pad_to))
    return _by_item(losses, items)


def by_branches(objective: Objective, items: Sequence[Tokens], device: torch.device) -> list[Likelihoods]:
    """Scores all choices of an item in one row, after one prefix."""
    width = max(map(len, items))
    ids, positions, branches = (torch.zeros(len(items), width, dtype=torch.int64) for _ in range(3))
    label_positions: list[int] = []
    targets: list[int] = []
    for number, item in enumerate(items):
        place = prefix = len(item.prefix)
        ids[number, :prefix] = torch.tensor(item.prefix)
        positions[number, :prefix] = torch.arange(prefix)
        for branch, choice in enumerate(item.choices, start=1):
            end = place + len(choice)
            ids[number, place:end] = torch.tensor(choice)
            positions[number, place:end] = torch.arange(prefix, prefix + len(choice))
            branches[number, place:end] = branch
            label_positions += [number * width + before for before in (prefix - 1, *range(place, end - 1))]
            targets += choice
            place = end
        branches[number, place:] = -1
    batch = Batch(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        label_positions=torch.tensor(label_positions, device=device),
        targets=torch.tensor(targets, device=device),
        tokens=sum(map(len, items)),
        labelled=tuple(len(choice) for item in items for choice in item.choices),
        mask=_mask(branches.to(device), objective),
    )
    return _by_item(objective.row_losses(batch), items)


def _mask(branches: Tensor, objective: Objective) -> Tensor:
    """Returns the mask [rows, 1, width, width]: each position sees the prefix (0) and its own branch, up to itself."""
    width = branches.shape[1]
    before = torch.ones(width, width, dtype=torch.bool, device=branches.device).tril()
    mine, other = branches[:, :, None], branches[:, None, :]
    sees = (before & ((other == 0) | (other == mine)))[:, None]
    if objective.causal.config.get_text_config()._attn_implementation == "sdpa":
        return sees
    hidden = torch.zeros(sees.shape, dtype=objective.causal.dtype, device=branches.device)
    return hidden.masked_fill(~sees, torch.finfo(hidden.dtype).min)


def _by_item(losses: Tensor, items: Sequence[Tokens]) -> list[Likelihoods]:
    sums = iter((-losses.double()).tolist())
    return [[next(sums) for _ in item.choices] for item in items]
