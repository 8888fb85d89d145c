"""What a back end of the model server has to do: load a request's model and write the answer."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from tunery.errors import WrongSettings
from tunery.planning.servable import Limits
from tunery.serving import Chosen
from tunery.settings import Settings
from tunery.storage import Storage
from worker.server.answer import Answer
from worker.server.schemas import ChatRequest
from worker.trainer import imports


class Backend(Protocol):
    """A back end. `RequestQueue` calls `advance` and reads answers in one thread, and calls `answer` in others.

    With `streams` 1, never at the same time; with more, what the streams share has to be safe for threads.
    """

    @property
    def streams(self) -> int:
        """How many answers may run at once."""

    @property
    def loaded(self) -> str | None:
        """Id of the model that was used last."""

    @property
    def device(self) -> str:
        """The torch device of the passes, or a name of what computes elsewhere."""

    def answer(self, request: ChatRequest) -> Answer:
        """Returns the answer to a request, not started yet; the model is loaded when this returns.

        Raises Rejected for the request's own faults, Unavailable for those that a retry may overcome.
        """

    def advance(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """Computes what the next pieces of these answers need; returns those of which a piece can be read now."""


@runtime_checkable
class Preloading(Protocol):
    """A back end that can load a model before its first request."""

    def load(self, chosen: Chosen) -> None:
        """Begins to load the model, if it can. Raises as `answer` does. Called in other threads than `advance`."""


@runtime_checkable
class Closable(Protocol):
    """A back end with connections or processes to end."""

    def close(self) -> None:
        """Called once, after the last answer."""


Make = Callable[[Settings, Storage, str], Backend]
"""Creates a back end that computes on a torch device, "cpu" or "cuda"."""


def _embedded(settings: Settings, storage: Storage, device: str) -> Backend:
    with imports.quickly():
        import torch
        from transformers.utils.logging import disable_progress_bar

        from worker.server.backends.embedded import Engine

    if device == "cuda" and not torch.cuda.is_available():
        raise WrongSettings(
            lines=f"TUNERY_SERVE_GPU is {settings.serve_gpu}, but CUDA finds no such GPU here: nvidia-smi lists "
            "those of the host. Without this setting the model server uses the CPU."
        )
    disable_progress_bar()
    return Engine(
        settings.models_dir,
        storage,
        device,
        qlora_base=settings.server_qlora_base,
        streams=settings.server_streams,
        memory_bytes=settings.server_memory_bytes,
        cache_bytes=settings.server_cache_bytes,
        pinned=frozenset(settings.server_pinned),
        graphs=settings.server_cuda_graphs,
    )


def _vllm(settings: Settings, storage: Storage, _: str) -> Backend:
    from worker.server.backends.vllm import VllmBackend
    from worker.server.fleet import Fleet
    from worker.server.replica import Replica

    if not settings.vllm_replicas:
        raise WrongSettings(
            lines="TUNERY_VLLM_REPLICAS is empty: set it to the URLs of the vLLM servers, separated by commas."
        )
    limits = Limits.of(settings)
    assert limits is not None, "the settings choose this back end"
    key = None if settings.vllm_api_key is None else settings.vllm_api_key.get_secret_value()
    return VllmBackend(
        Fleet([Replica(url.rstrip("/"), key) for url in settings.vllm_replicas], slots=settings.vllm_adapters),
        settings.models_dir,
        storage,
        served_dir=settings.vllm_models_dir or settings.models_dir,
        limits=limits,
        streams=settings.server_streams,
    )


BACKENDS: dict[str, Make] = {"embedded": _embedded, "vllm": _vllm}
"""By name, as in TUNERY_SERVER_BACKEND."""


def make(settings: Settings, storage: Storage, device: str) -> Backend:
    """Returns the back end that the settings choose. Raises WrongSettings for an unknown name."""
    name = settings.server_backend
    if name not in BACKENDS:
        raise WrongSettings(lines=f"TUNERY_SERVER_BACKEND is '{name}'; use {' or '.join(BACKENDS)}.")
    return BACKENDS[name](settings, storage, device)
