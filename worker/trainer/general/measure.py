"""Compares base and tuned model on data that no run trains on: prepared before training, compared after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from tunery.planning.workload import ITEMS, PROMPTS
from tunery.spec import Auto
from tunery.trainer_protocol import Forgetting, GeneralScore
from worker.trainer.data import Row
from worker.trainer.general import choices, forgetting, harness, stored
from worker.trainer.general.benchmark import Item, Tokens, digest, encode, load_items, load_prompts
from worker.trainer.general.choices import Likelihoods
from worker.trainer.general.forgetting import Moved, Reference
from worker.trainer.scoring.intervals import bootstrap_interval, mcnemar, paired_interval
from worker.trainer.training import Training

_LONGEST = 512
"""The most tokens of a prompt with its answer; the rest is cut off."""


@dataclass(frozen=True)
class Probe:
    """The data on which both models are measured. `known`: the base's scores from an earlier run on this host."""

    items: list[Item]
    tokens: list[Tokens]
    prompts: list[Row]
    benchmark: str
    known: list[Likelihoods] | None


@dataclass(frozen=True)
class Baseline:
    """The base's measurements, and its distributions on this rank's prompts."""

    likelihoods: list[Likelihoods]
    references: dict[int, Reference]


def prepare(t: Training) -> Probe | None:
    """Returns the data to measure, added to the run's time estimate; None if nothing is measured."""
    wanted = t.plan.evaluation.general
    if not wanted.enabled:
        return None
    longest = _context(t)
    items = _items(wanted.benchmark, _count(wanted.items, ITEMS[t.device.type]))
    tokens = [encode(t.template.tokenizer, item) for item in items]
    fitting = [i for i, each in enumerate(tokens) if len(each) <= longest and all(each.choices)]
    items, tokens = [items[i] for i in fitting], [tokens[i] for i in fitting]
    if not items:
        return None
    prompts = load_prompts(t.template, _count(wanted.prompts, PROMPTS[t.device.type]), min(longest, _LONGEST))
    benchmark = digest(items)
    known = stored.read(stored.find_place(t, benchmark), len(items))
    known = t.ranks.gather(known)[0]  # each host has one disk, but a file may appear between two reads
    passes = sum(map(len, tokens)) * (1 if known else 2) + 2 * sum(map(len, prompts))
    t.timer.expect_general(passes // t.ranks.count)
    return Probe(items, tokens, prompts, benchmark, known)


def _items(benchmark: str, count: int) -> list[Item]:
    family, _, name = benchmark.partition(":")
    return load_items(count) if family == "default" else harness.load_items(name, count)


def _context(t: Training) -> int:
    """Returns the longest row for which the model has positions."""
    return int(getattr(t.objective.causal.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def _count(wanted: int | Auto, auto: int) -> int:
    return auto if wanted == "auto" else wanted


def describe_base(t: Training, probe: Probe) -> Baseline:
    """Measures the base: the model without its adapter, or before its weights are trained. Raises Stopped."""
    with _as_base(t):
        likelihoods = probe.known or choices.score(t, probe.tokens)
        references = forgetting.describe(t, probe.prompts)
    if probe.known is None and t.ranks.is_main:
        stored.write(stored.find_place(t, probe.benchmark), likelihoods)
    return Baseline(likelihoods, references)


@contextmanager
def _as_base(t: Training) -> Iterator[None]:
    model: Any = t.objective.model
    t.objective.eval()
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield
    t.objective.train()


def compare(t: Training, probe: Probe, base: Baseline) -> GeneralScore:
    """Measures the tuned model and compares it with its base. Raises Stopped."""
    t.objective.eval()
    likelihoods = choices.score(t, probe.tokens)
    moved = forgetting.compare(t, probe.prompts, base.references)
    t.objective.train()
    return _score(t.plan.evaluation.general.benchmark, probe.items, base.likelihoods, likelihoods, moved)


def _score(
    name: str, items: list[Item], base: list[Likelihoods], tuned: list[Likelihoods], moved: list[Moved]
) -> GeneralScore:
    then, now = _right(items, base), _right(items, tuned)
    only_now = sum(b and not a for a, b in zip(then, now, strict=True))
    only_then = sum(a and not b for a, b in zip(then, now, strict=True))
    n = len(items)
    low, high = paired_interval(sum(now) - only_now, only_now, only_then, n)
    return GeneralScore(
        benchmark=name,
        items=n,
        base_accuracy=sum(then) / n,
        tuned_accuracy=sum(now) / n,
        change=(only_now - only_then) / n,
        change_low=low,
        change_high=high,
        p=mcnemar(only_now, only_then),
        base_accuracy_norm=sum(_right(items, _by_character(items, base))) / n,
        tuned_accuracy_norm=sum(_right(items, _by_character(items, tuned))) / n,
        forgetting=_forgetting(moved) if moved else None,
    )


def _by_character(items: list[Item], scores: list[Likelihoods]) -> list[Likelihoods]:
    pairs = zip(items, scores, strict=True)
    return [[each / len(choice) for each, choice in zip(found, item.choices, strict=True)] for item, found in pairs]


def _right(items: list[Item], scores: list[Likelihoods]) -> list[bool]:
    """Returns for each item whether the right choice has the highest value."""
    return [found.index(max(found)) == item.answer for item, found in zip(items, scores, strict=True)]


def _forgetting(moved: list[Moved]) -> Forgetting:
    # Whole prompts are resampled, as the tokens of one are not independent.
    tokens = sum(each.tokens for each in moved)
    then = [(each.base_loss, each.tokens) for each in moved]
    now = [(each.loss, each.tokens) for each in moved]
    kl_low, kl_high = bootstrap_interval([(each.kl, each.tokens) for each in moved], [(0.0, 1.0)] * len(moved))
    low, high = bootstrap_interval(now, then)
    base_nll, tuned_nll = (sum(loss for loss, _ in found) / tokens for found in (then, now))
    return Forgetting(
        prompts=len(moved),
        tokens=tokens,
        kl=sum(each.kl for each in moved) / tokens,
        kl_low=kl_low,
        kl_high=kl_high,
        base_nll=base_nll,
        tuned_nll=tuned_nll,
        nll_change=tuned_nll - base_nll,
        nll_change_low=low,
        nll_change_high=high,
    )
