"""What a back end of the model server is: it loads the model of a request and writes its answer."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tunery.rows.messages import FunctionCall
from tunery.settings import Settings
from tunery.storage import Storage
from worker.server.schemas import ChatRequest

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class TokenChance:
    """A token's natural log probability by the model alone, before temperature, nucleus and grammar; and the same of
    the likeliest tokens."""

    token: str
    logprob: float
    top: "tuple[TokenChance, ...]" = ()


class Answer(Protocol):
    """An answer in the making. Iterate once for its text, in pieces of any length; the counts grow meanwhile."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def completion_tokens(self) -> int: ...

    @property
    def finish_reason(self) -> FinishReason | None:
        """None until the last piece has been read."""

    @property
    def tool_calls(self) -> Sequence[FunctionCall]:
        """The calls that the answer makes, known once the last piece has been read."""

    @property
    def chances(self) -> Sequence[TokenChance]:
        """The tokens of the pieces so far, where their log probabilities are asked for."""

    def __iter__(self) -> Generator[str]: ...


class Backend(Protocol):
    """One model at a time. `Desk` calls it from one thread."""

    @property
    def loaded(self) -> str | None:
        """Id of the model in memory."""

    @property
    def device(self) -> str: ...

    def answer(self, request: ChatRequest) -> Answer:
        """The answer to a request, not begun yet; the model is loaded when this returns.

        Raises Rejected for what the request is to blame for, Unavailable for what another time may mend.
        """


Make = Callable[[Settings, Storage, str], Backend]
"""Makes a back end that computes on a torch device, "cpu" or "cuda"."""


def _embedded(settings: Settings, storage: Storage, device: str) -> Backend:
    from transformers.utils.logging import disable_progress_bar

    from worker.server.backends.embedded import Engine  # imports torch

    disable_progress_bar()
    return Engine(settings.models_dir, storage, device, qlora_base=settings.server_qlora_base)


BACKENDS: dict[str, Make] = {"embedded": _embedded}
"""By the name that TUNERY_SERVER_BACKEND chooses."""


def make(settings: Settings, storage: Storage, device: str) -> Backend:
    """The back end of the settings. Raises ValueError for a name that is not there."""
    name = settings.server_backend
    if name not in BACKENDS:
        raise ValueError(f"TUNERY_SERVER_BACKEND is '{name}'; use {' or '.join(BACKENDS)}")
    return BACKENDS[name](settings, storage, device)
