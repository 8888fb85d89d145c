"""Sums gradients over the ranks, each as soon as the step's last backward pass has computed it.

Why not DistributedDataParallel: it requires equally many backward passes on each rank, and takes means. Here a rank may
have fewer micro-batches than another, or none in an epoch's last step, or need a second attempt.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from worker.trainer.parallel import Ranks

log = logging.getLogger(__name__)

ALONE, TOGETHER, COPIES = 2**22, 2**25, 3
"""Bytes from which a gradient is sent alone, in place; those up to which smaller ones, as adapters have, are copied and
sent together, as the host has the same work for each transfer; and how many such copies there are at most.
"""


@dataclass(frozen=True)
class _Sent:
    """A transfer under way. `flat`: what is sent in place of the gradients themselves. `rows`: which rows of the one
    gradient that is; None: all of them.
    """

    parameters: list[nn.Parameter]
    flat: Tensor | None
    work: distributed.Work
    rows: Tensor | None


class Reducer:
    """Sums the gradients of one step after another. Every rank sends the same gradients in the same order."""

    def __init__(self, ranks: Ranks, parameters: Sequence[nn.Parameter], embedding: nn.Parameter | None = None) -> None:
        """`parameters`: those that are whole on every rank. `embedding`: the one of which `expect` knows the rows."""
        self._ranks, self._parameters = ranks, list(parameters)
        self._buckets = buckets(self._parameters) if ranks.count > 1 else []
        self._bucket_of = {id(p): number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._listens = self._overlaps = False
        self._sent: list[_Sent] = []
        self._kept: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._lacking: set[int] = set()
        self._embedding = embedding
        self._rows: Tensor | None = None
        self._suffice: bool | None = None
        self._next = 0
        self._awaited = [0] * len(self._buckets)
        self._all = torch.ones(len(self._parameters), device=ranks.device)

    def expect(self, rows: Tensor | None) -> None:
        """Sets the rows of the embedding that can have a gradient in this step, the same on every rank; None: all."""
        self._rows = rows

    @contextmanager
    def overlapping(self) -> Iterator[None]:
        """Returns the context of a step's last backward pass, in which gradients are sent while others are computed."""
        self._listen()
        self._awaited = [len(bucket) for bucket in self._buckets]
        self._overlaps = True
        try:
            yield
        finally:
            self._overlaps = False

    def set_aside(self) -> None:
        """Keeps the sums of what was sent before a pass failed: the other ranks do not send it again."""
        self._receive()
        for parameter in (each for bucket in self._buckets[: self._next] for each in bucket):
            if id(parameter) not in self._kept:
                assert parameter.grad is not None
                self._kept[id(parameter)] = (parameter, parameter.grad)
            parameter.grad = None

    def finish(self) -> None:
        """Sends what is left and waits for all. A parameter that has a gradient on no rank gets none."""
        if not self._buckets:
            return
        for parameter, gradient in self._kept.values():
            parameter.grad = gradient
        while self._next < len(self._buckets):
            self._send()
        self._receive()
        self._drop_unused()
        self._kept, self._next, self._lacking = {}, 0, set()

    def _listen(self) -> None:
        """Hooks the gradients. Not before a pass overlaps: those of recorded passes are added together
        (`accumulation`), which a gradient with a hook is not.
        """
        if self._listens or not self._buckets:
            return
        self._listens = True
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._computed)

    def _computed(self, parameter: Tensor) -> None:
        if id(parameter) in self._kept:  # computed once more, but its sum is there
            parameter.grad = None
        if not self._overlaps:
            return
        self._awaited[self._bucket_of[id(parameter)]] -= 1
        while self._next < len(self._buckets) and not self._awaited[self._next]:
            self._send()

    def _send(self) -> None:
        """Sends the next bucket; its missing gradients count as 0. If it runs out of memory, nothing was sent."""
        bucket = self._buckets[self._next]
        for parameter in bucket:
            if parameter.grad is None:
                self._lacking.add(id(parameter))
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in bucket if p.grad is not None]
        rows, flat = self._rows_of(bucket), None
        if rows is not None or len(gradients) > 1 or not gradients[0].is_contiguous():
            self._receive(COPIES - 1)
            if rows is not None:
                flat = gradients[0].index_select(0, rows)
            else:
                flat = torch.cat([each.reshape(-1) for each in gradients])
        work = distributed.all_reduce(gradients[0] if flat is None else flat, async_op=True)
        assert work is not None
        self._sent.append(_Sent(bucket, flat, work, rows))
        self._next += 1

    def _rows_of(self, bucket: list[nn.Parameter]) -> Tensor | None:
        """Returns the rows of the bucket that are sent; None for all.

        The first time, the ranks check that no other row has a gradient: a model's modules do not tell what its forward
        pass does with the weight of its embedding.
        """
        if self._rows is None or len(bucket) > 1 or bucket[0] is not self._embedding:
            return None
        if self._suffice is None:
            assert bucket[0].grad is not None
            others = torch.linalg.vector_norm(bucket[0].grad, torch.inf, dim=1).index_fill(0, self._rows, 0)
            self._suffice = not self._ranks.any(bool(others.any()))
            if not self._suffice:
                log.info("the embedding has gradients in rows that were not looked up: all are sent")
        return self._rows if self._suffice else None

    def _receive(self, copies: int = 0) -> None:
        """Waits for transfers, the first ones first, until so many copies are left; for all if none may be."""
        while self._sent and (not copies or sum(sent.flat is not None for sent in self._sent) > copies):
            sent = self._sent.pop(0)
            sent.work.wait()
            if sent.flat is None:
                continue
            gradients = [p.grad for p in sent.parameters if p.grad is not None]
            if sent.rows is not None:
                gradients[0].index_copy_(0, sent.rows, sent.flat)
            else:
                parts = sent.flat.split([each.numel() for each in gradients])
                torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def _drop_unused(self) -> None:
        """Drops the gradients that no rank had. A rank that had all of its own need not look, nor wait for the GPU."""
        if not self._lacking:
            self._ranks.sum(self._all)
            return
        by = self._ranks.sum(self._all.new_tensor([id(p) not in self._lacking for p in self._parameters]))
        for parameter, ranks in zip(self._parameters, by.tolist(), strict=True):
            if not ranks:
                parameter.grad = None


def buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Returns which gradients are sent together, in about the order in which a backward pass completes them."""
    places = {id(parameter): place for place, parameter in enumerate(reversed(parameters))}
    found: list[list[nn.Parameter]] = []
    open_ones: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in reversed(parameters):
        if parameter.nbytes >= ALONE:
            found.append([parameter])
            continue
        bucket = open_ones.get(parameter.dtype)
        if bucket is None or sum(p.nbytes for p in bucket) + parameter.nbytes > TOGETHER:
            found.append(bucket := [])
            open_ones[parameter.dtype] = bucket
        bucket.append(parameter)
    return sorted(found, key=lambda bucket: places[id(bucket[-1])])
