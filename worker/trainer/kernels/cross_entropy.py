"""Computes the cross entropy of a linear head in chunks of rows, so that the whole logits never exist at once.

8,192 positions of a 128k vocabulary are 4 GB of logits in fp32. The gradient of the loss is known as soon as a chunk's
logits are, so the forward pass computes it at once and drops the chunk; the backward pass only scales it. `plain` is
the textbook form, for models whose head is more than one product and for the tests.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tunery.planning import activations


def scaled(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns `scale` times the sum of the losses (nats, fp32), and the number of correct predictions.

    `hidden` [rows, width], `weight` [vocabulary, width] (the head, no bias), `targets` [rows], -100 for no target. The
    head gets a gradient only if it requires one: for a frozen head that product, as large as the forward one, is not
    computed.
    Why the scale is an argument: bf16 gradients times 1 / (number of labels) in bf16 would be off by up to 0.4 %,
    all in one direction; inside the matrix product it is applied in fp32.
    """
    rows = activations.chunk_rows(weight.shape[0])
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        both = _ChunkedCrossEntropy.apply(hidden, weight, targets, scale, rows)  # type: ignore[no-untyped-call]
        return cast(tuple[Tensor, Tensor], both)
    loss, correct = _zeros(hidden)
    for chunk, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        _, loss_sum, correct_sum = _loss_and_gradient(chunk @ weight.t(), wanted, writes=False)
        loss += loss_sum
        correct += correct_sum
    return loss * scale, correct


def each(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss of every row (nats, fp32), 0 without a target, for objectives that are not their plain sum.

    The backward pass recomputes a chunk's logits instead of keeping them.
    """
    rows = activations.chunk_rows(weight.shape[0])
    pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(_each, part, weight, wanted, use_reentrant=False) for part, wanted in pairs])


def _each(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")


def plain(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the same two numbers from whole logits [rows, vocabulary]."""
    loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
    return loss * scale, (logits.argmax(-1) == targets).sum()


def _zeros(like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_zeros((), dtype=torch.float32), like.new_zeros((), dtype=torch.int64)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, rows: int
    ) -> tuple[Tensor, Tensor]:
        loss, correct = _zeros(hidden)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # fp32: a sum of hundreds of chunks in bf16 would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], rows):
            chunk, wanted = hidden[start : start + rows], targets[start : start + rows]
            grad_logits, loss_sum, correct_sum = _loss_and_gradient(chunk @ weight.t(), wanted, writes=True)
            loss += loss_sum
            correct += correct_sum
            if grad_hidden is not None:
                out = grad_hidden[start : start + rows]
                torch.addmm(out, grad_logits, weight, beta=0, alpha=scale, out=out)
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.t(), chunk, scale)
        # Rounded here, once: in fp32 it would stay beside all activations until the backward pass begins.
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(correct)
        return loss * scale, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grads[0].to(grad_hidden.dtype)
        if grad_weight is not None:  # in place, as it may be a gigabyte: a second backward pass would scale it again
            grad_weight = grad_weight.mul_(grads[0])
        return grad_hidden, grad_weight, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Adds `scale` times left @ right to `total`, which is fp32."""
    if total.is_cuda and left.dtype != total.dtype:
        # The product is never rounded, and its sum needs no pass of its own over a head of a gigabyte.
        torch.addmm(total, left, right, torch.float32, alpha=scale, out=total)
    else:
        total.add_(left @ right, alpha=scale)


def _loss_and_gradient(logits: Tensor, wanted: Tensor, *, writes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns d loss / d logits in the logits' type (if it `writes`, in place), the sum of losses, and the number
    correct.
    """
    if logits.is_cuda:
        from worker.trainer.kernels import triton_ops  # a CPU build of torch has no Triton

        losses, correct = triton_ops.cross_entropy(logits, wanted, writes=writes)
        return logits, losses.sum(), correct.sum()
    wide = logits.float()
    correct = (wide.argmax(-1) == wanted).sum()
    if not writes:
        return logits, functional.cross_entropy(wide, wanted, reduction="sum"), correct
    counts = (wanted >= 0)[:, None]
    place = wanted.clamp(min=0)[:, None]
    norms = wide.logsumexp(-1, keepdim=True)
    loss = ((norms - wide.gather(1, place)) * counts).sum()
    norms = norms.masked_fill(~counts, torch.inf)  # exp(-inf): no gradient without a target
    grad_logits = (wide - norms).exp_()
    return grad_logits.scatter_add_(1, place, -counts.float()).to(logits.dtype), loss, correct
