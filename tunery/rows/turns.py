"""Renderings of a conversation up to each of its turns."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from tunery.rows.messages import Example

View = tuple[int, bool]
"""The first n messages, and whether the generation prompt follows."""


class Views:
    """Renders each view of a conversation once. `messages` and `tools` are a template's input."""

    def __init__(
        self,
        render: Callable[[list[dict[str, Any]], Any, Sequence[View]], list[str]],
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
    ) -> None:
        self.messages = messages
        self.tools = tools
        self._render = render
        self._texts: dict[View, str] = {}

    def prepare(self, views: Iterable[View]) -> None:
        """Renders the views that are still missing, all in one call."""
        missing = [view for view in views if view not in self._texts]
        if missing:
            self.fill(dict(zip(missing, self._render(self.messages, self.tools, missing), strict=True)))

    def fill(self, texts: dict[View, str]) -> None:
        """Stores renderings that were made elsewhere."""
        self._texts.update(texts)

    def text(self, count: int, prompting: bool = False) -> str:
        view = count, prompting
        if view not in self._texts:
            self.prepare([view])
        return self._texts[view]


@lru_cache(256)  # most rows have the same few sequences of turns
def views_of(trained: tuple[int, ...], count: int) -> tuple[View, ...]:
    """Returns the views that separate the trained turns of `count` messages from the rest."""
    wanted = [(count, False), *((k, True) for k in trained if k), *((k + 1, False) for k in trained)]
    return tuple(dict.fromkeys(wanted))


def trained_turns(example: Example) -> tuple[int, ...]:
    """Returns the indexes of the messages to learn."""
    return tuple([index for index, message in enumerate(example.messages) if message.is_trained])


def ending_with(example: Example, index: int) -> Example:
    """Returns the row up to message `index`, the only one to learn in it."""
    earlier = [
        message.model_copy(update={"weight": 0}) if message.role == "assistant" else message
        for message in example.messages[:index]
    ]
    last = example.messages[index].model_copy(update={"weight": None})
    return example.model_copy(update={"messages": [*earlier, last]})


def common_length(left: str, right: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
