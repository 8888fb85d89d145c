"""Copies a checkpoint's tensors to the GPU ahead of the one that is being quantised.

transformers copies each tensor when its turn comes if it quantises what it loads: loading all of them ahead would take
the memory of the whole unquantised model. One thread then reads the file's pages and the driver copies them twice, at
2 GB a second on a slow host. Here some threads do that through pinned memory, a bounded number of bytes ahead.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import core_model_loading

AHEAD = 2**28
"""Bytes that may wait to be quantised, besides the tensor that is next."""
_BUFFER = 2**26
"""Bytes of a thread's pinned memory."""
_THREADS = 4
_SPAWN = "spawn_materialize"
"""transformers' function that makes the job of loading a tensor; without it, tensors are loaded as it does."""


@contextmanager
def copied_ahead(device: torch.device) -> Iterator[None]:
    """Makes `from_pretrained` on a GPU copy tensors ahead inside the block, where it would copy one at a time."""
    plain = getattr(core_model_loading, _SPAWN, None)
    if device.type != "cuda" or plain is None:
        yield
        return
    with ThreadPoolExecutor(_THREADS, "copier") as pool:
        setattr(core_model_loading, _SPAWN, Queue(plain, pool, staged).spawn)
        try:
            yield
        finally:
            setattr(core_model_loading, _SPAWN, plain)
            pool.shutdown(cancel_futures=True)


@dataclass(eq=False)
class _Job:
    """A tensor to copy: the slice of its file, and where to. `copied`: its copy, once that has begun."""

    source: Any
    device: Any
    dtype: torch.dtype | None
    nbytes: int
    copied: Future[Tensor] | None = None


class Queue:
    """The tensors of a checkpoint, in the order in which they are wanted."""

    def __init__(
        self,
        plain: Callable[..., Any],
        pool: ThreadPoolExecutor,
        copy: Callable[[Tensor, torch.device], Tensor],
        ahead: int = AHEAD,
    ) -> None:
        self._plain = plain
        self._pool = pool
        self._copy = copy
        self._ahead = ahead
        self._waiting: deque[_Job] = deque()
        self._begun = 0  # bytes that are copied, or being copied, and not taken

    def spawn(self, thread_pool: Any, tensor: Any, device: Any = None, dtype: Any = None, **options: Any) -> Any:
        """Returns what returns the tensor on the device. The signature is transformers'."""
        is_simple = thread_pool is None and not any(value is not None for value in options.values())
        if not is_simple or torch.device(device or "cpu").type == "cpu" or not hasattr(tensor, "get_shape"):
            return self._plain(thread_pool, tensor, device, dtype, **options)
        job = _Job(tensor, device, dtype, _nbytes(tensor))
        self._waiting.append(job)
        return lambda: self._take(job)

    def _take(self, job: _Job) -> Tensor:
        if job.copied is None:
            self._waiting.remove(job)
            self._begin(job)
        while self._waiting and self._begun - job.nbytes + self._waiting[0].nbytes <= self._ahead:
            self._begin(self._waiting.popleft())
        assert job.copied is not None
        found = job.copied.result()
        self._begun -= job.nbytes
        job.copied = None
        return found

    def _begin(self, job: _Job) -> None:
        self._begun += job.nbytes
        job.copied = self._pool.submit(self._load, job)

    def _load(self, job: _Job) -> Tensor:
        copied = self._copy(job.source[...], torch.device(job.device))
        return copied if job.dtype is None else copied.to(job.dtype)


def _nbytes(tensor: Any) -> int:
    """Returns the bytes of a slice of a file, which has at most eight for each number."""
    return int(torch.Size(tensor.get_shape()).numel()) * _ITEM_BYTES.get(tensor.get_dtype(), 8)


_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}
_local = threading.local()


def staged(source: Tensor, device: torch.device) -> Tensor:
    """Returns a copy of `source` on a GPU, made through this thread's pinned memory."""
    with torch.cuda.device(device):  # else a thread of another GPU's rank would also take memory of the first GPU
        return _staged(source, device)


def _staged(source: Tensor, device: torch.device) -> Tensor:
    target = torch.empty_like(source, device=device, memory_format=torch.contiguous_format)
    if not hasattr(_local, "buffer"):
        _local.buffer = torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=True)
    read, written = (part.reshape(-1).view(torch.uint8) for part in (source.contiguous(), target))
    for start in range(0, read.numel(), _BUFFER):
        part = read[start : start + _BUFFER]
        buffer = _local.buffer[: part.numel()]
        buffer.copy_(part)
        written[start : start + _BUFFER].copy_(buffer, non_blocking=True)
        torch.cuda.current_stream(device).synchronize()  # the next part needs the buffer
    return target
