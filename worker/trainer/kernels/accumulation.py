"""Adds the gradients of adapters to those of earlier passes together, by a few launches.

autograd adds each one by itself, which is a small kernel for each A and B of each layer. A recorded pass always adds,
as its gradients stay where they are; others do from a step's second micro-batch on.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TOGETHER = 2**25
"""Bytes of gradients from which they are added: until then they are in memory beside the sums."""


class _Waiting:
    """Gradients that are not yet added, each with its parameter."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Tensor, Tensor]] = {}
        self._nbytes = 0

    def take(self, parameter: Tensor, grad: Tensor) -> None:
        if (before := self._of.get(id(parameter))) is not None:  # used twice: autograd sums these first, too
            self._of[id(parameter)] = (parameter, before[1] + grad)
            return
        self._of[id(parameter)] = (parameter, grad)
        self._nbytes += grad.nbytes
        if self._nbytes >= TOGETHER:
            self.add()

    @torch.no_grad()
    def add(self) -> None:
        pairs = [(parameter.grad, grad) for parameter, grad in self._of.values() if parameter.grad is not None]
        if pairs:
            torch._foreach_add_([total for total, _ in pairs], [grad for _, grad in pairs])
        self._of, self._nbytes = {}, 0


_waiting: _Waiting | None = None


@contextmanager
def together() -> Iterator[None]:
    """Returns the context of a backward pass, in which `of` may put gradients off."""
    global _waiting
    _waiting = _Waiting()
    try:
        yield
        _waiting.add()
    finally:
        _waiting = None


def of(parameter: Tensor, grad: Tensor) -> Tensor | None:
    """Returns the gradient that a function gives to autograd: None if it is added with others instead.

    Not where a hook has to see it, or the sum, as on several ranks, which then send it; and not without `together`,
    where `torch.autograd.grad` may have asked for it.
    """
    adds = parameter.is_leaf and parameter.requires_grad and parameter.grad is not None
    if _waiting is None or not adds or parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return grad
    _waiting.take(parameter, grad)
    return None
