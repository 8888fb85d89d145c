"""Splits work on the general benchmark into batches of similar length and over the ranks."""

import itertools
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch

from tunery.trainer_protocol import Phase
from worker.trainer import rope
from worker.trainer.data import micro_batches
from worker.trainer.training import Training

Found = TypeVar("Found")

TOKENS = {"cpu": 512, "cuda": 16384}
"""Tokens of a batch with its padding, which costs a CPU more than small batches do."""


def run(t: Training, lengths: list[int], work: Callable[[list[int]], list[Found]]) -> list[Found]:
    """Returns `work`'s results for each index of `lengths` (in tokens), in order. Raises Stopped."""
    waiting = deque(_cut(t, lengths))
    found: list[tuple[int, Found]] = []
    for _ in t.ranks.turns(t.stop_signal, lambda: bool(waiting)):
        if not waiting:
            continue  # other ranks are not done
        part = waiting.popleft()
        try:
            with t.timer.measure("general", sum(lengths[i] for i in part)):
                found += zip(part, work(part), strict=True)
        except torch.OutOfMemoryError:
            if len(part) == 1 or t.shards is not None:  # the other ranks wait in this pass
                raise
            half = len(part) // 2
            waiting.extendleft((part[half:], part[:half]))
        t.writer.write(Phase(phase="evaluating", seconds_left=t.timer.left()))
    together = itertools.chain(*t.ranks.gather(found))
    return [each for _, each in sorted(together, key=lambda pair: pair[0])]


def _cut(t: Training, lengths: list[int]) -> list[list[int]]:
    """Returns this rank's batches. Rows for which the model's RoPE uses other frequencies are in separate batches."""
    frequencies = rope.of(t.objective.causal)
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    mine = longest_first[t.ranks.index :: t.ranks.count]
    groups = [frequencies.group(length) for length in lengths]
    parts = micro_batches(mine, lengths, TOKENS[t.device.type], groups=groups)
    return [[i for packed in part for i in packed] for part in parts]
