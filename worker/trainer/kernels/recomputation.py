"""Recomputes activations: a decoder layer keeps its input only, and its backward pass computes the others again.

The first layers are recomputed: the last ones, whose activations are kept, are the first to free them in the backward
pass. transformers has the same for all layers, but wraps `forward` of their classes, which the fast forward passes of
`decoder.py` replace.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from worker.trainer.kernels import casts

_running = False


def is_running() -> bool:
    """Whether a layer is being computed again: its output is then of no use, only what it keeps."""
    return _running


@contextmanager
def _again(of_pass: casts.Casts | None) -> Iterator[None]:
    global _running
    _running = True
    try:
        with casts.using(of_pass):
            yield
    finally:
        _running = False


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _again(casts.current())


class Recomputation:
    """Which layers of a model are recomputed: none, until `of`."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.count = 0
        """Number of the first layers that are recomputed."""
        self.offloads = False
        """Whether the inputs of these layers are kept in the host's memory."""
        self.draws = False
        """Whether these layers may draw random numbers."""
        self._host: HostCopies | None = None

    def of(self, count: int, *, offload: bool = False) -> None:
        """Recomputes the first `count` layers from now on, and no others. `offload`: see `offloads`."""
        for layer in self.layers[: self.count]:
            _unwrap(layer)
        self.count, self.offloads = min(count, len(self.layers)), offload
        self._host = (self._host or HostCopies()) if offload else None  # recordings know its buffers
        draws = [_draws(layer) for layer in self.layers[: self.count]]
        self.draws = any(draws)
        for layer, each in zip(self.layers, draws, strict=False):
            layer.forward = _recomputed(layer.forward, self._host, draws=each)

    def abandon(self) -> None:
        """Ends what a pass that has failed has begun."""
        if self._host is not None:
            self._host.join()


def _draws(layer: nn.Module) -> bool:
    """Whether a layer may draw random numbers: a fast one does for dropout only, of others one cannot tell."""
    if "forward" not in vars(layer):
        return True
    name = {True: "p", False: "attention_dropout"}
    return any(getattr(each, name[isinstance(each, nn.Dropout)], 0.0) > 0 for each in layer.modules())


def _unwrap(layer: Any) -> None:
    inner = layer.forward.__wrapped__
    if getattr(inner, "__func__", None) is type(layer).forward:
        del layer.forward
    else:
        layer.forward = inner


def _recomputed(forward: Callable[..., Any], host: "HostCopies | None", *, draws: bool) -> Callable[..., Any]:
    """Returns `forward` with recomputation. `draws`: its random numbers are drawn again, which takes the host time."""

    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with host.keeping() if host is not None else nullcontext():
            run = partial(forward, **kwargs)
            return checkpoint(run, *args, use_reentrant=False, context_fn=_contexts, preserve_rng_state=draws)

    return wrapped


class HostCopies:
    """Keeps tensors in pinned memory of the host between the forward and the backward pass.

    Copies run beside the computation, in one stream of their own: in the backward pass the copy of a layer's input
    begins when the next layer's is used. Passes may be recorded: later ones find their buffers at the same addresses.
    """

    def __init__(self) -> None:
        self._stream: Any = None
        self._buffers: list[Tensor] = []
        self._last: weakref.ref[_Held] | None = None
        self._leaving: Tensor | None = None
        self._is_apart = False

    def keeping(self) -> saved_tensors_hooks:
        """Returns the context in which saved tensors are kept here."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> "Tensor | _Held":
        if not tensor.is_cuda or not tensor.is_floating_point():
            return tensor
        self._stream = self._stream or torch.cuda.Stream(tensor.device)
        held = _Held(tensor, self._buffers, self._last)
        self._last = weakref.ref(held)
        self.join()
        with self._beside():
            held.view.copy_(tensor.detach(), non_blocking=True)
        self._leaving = tensor.detach()
        return held

    def join(self) -> None:
        """Makes the pass wait for the copies that have begun, and frees the tensor that was copied last.

        A pass that fails has to do it, too: it may be recorded, and a recording ends with all its streams joined. Why
        not `record_stream`: what it frees while a pass is recorded cannot be used again in that recording.
        """
        if self._is_apart:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._is_apart, self._leaving = False, None

    def _beside(self) -> Any:
        """Returns the context in which copies run beside the pass, after its work so far."""
        self._stream.wait_stream(torch.cuda.current_stream())
        self._is_apart = True
        return torch.cuda.stream(self._stream)

    def _unpack(self, held: "Tensor | _Held") -> Tensor:
        if isinstance(held, Tensor):
            return held
        self._fetch(held)
        found, held.fetched = held.fetched, None
        self.join()
        if held.previous is not None and (previous := held.previous()) is not None:
            self._fetch(previous)
        return cast(Tensor, found)

    def _fetch(self, held: "_Held") -> None:
        """Begins the copy to the device, if it has not begun."""
        if held.fetched is not None:
            return
        held.fetched = torch.empty(held.view.shape, dtype=held.view.dtype, device=held.device)
        with self._beside():  # after former work, which may still use this memory
            held.fetched.copy_(held.view, non_blocking=True)


class _Held:
    """A copy of a tensor in the host's memory, of which autograd keeps the only reference."""

    def __init__(self, tensor: Tensor, buffers: list[Tensor], previous: "weakref.ref[_Held] | None") -> None:
        self.device, self.previous, self._buffers = tensor.device, previous, buffers
        self._buffer = _take(buffers, tensor.nbytes)
        self.view = self._buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.fetched: Tensor | None = None

    def __del__(self) -> None:
        # All copies from and to buffers are in one stream, so a buffer's next copy waits for its last one, and so does
        # a recording's, which ends after its own.
        self._buffers.append(self._buffer)


def _take(buffers: list[Tensor], size: int) -> Tensor:
    """Takes a buffer of at least `size` bytes from those that are free, or returns a new one.

    Its size is a power of two, which torch takes for pinned memory in any case: buffers of exact sizes would rarely
    serve another pass.
    """
    place = next((place for place, buffer in enumerate(buffers) if buffer.nbytes >= size), None)
    if place is not None:
        return buffers.pop(place)
    return torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8, pin_memory=True)
