"""Sends every prompt of a baseline to an external endpoint, a few at a time."""

import json
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from pydantic import SecretStr

from tunery.baselines import external
from tunery.baselines.external import NoAnswer, Said
from tunery.baselines.order import External
from tunery.planning.prompting import Variant
from tunery.settings import Settings

AT_ONCE = 4
"""Concurrent requests: more would wait in the endpoint's queue, which their times would then include."""


class Watch(Protocol):
    """Says whether the work has to end, and is shown the fraction done."""

    @property
    def begun(self) -> bool: ...

    def look(self, fraction: float) -> None: ...


def answer(
    folder: Path,
    variants: Sequence[Variant],
    asked: External,
    key: SecretStr | None,
    limit: int,
    settings: Settings,
    watch: Watch,
) -> list[Variant]:
    """Writes the answers to `folder`/prompts into `folder`/given; returns each variant, with its error if it failed.

    The first request that fails finally ends its variant and all later ones.
    """
    (folder / "given").mkdir()
    found: list[Variant] = []
    error: str | None = None
    for variant in variants:
        if error is None and not watch.begun:
            try:
                chats = _chats(folder / "prompts" / f"{variant.name}.jsonl")
                said = _ask_all(chats, asked, key, limit, settings, watch)
                (folder / "given" / f"{variant.name}.json").write_text(json.dumps([asdict(one) for one in said]))
            except NoAnswer as failure:
                error = f"{failure}."
        found.append(variant.model_copy(update={"error": error}))
    return found


def _chats(path: Path) -> list[dict[str, Any]]:
    """Returns the prompts as requests, without the wanted answer and what only training reads."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = [{k: v for k, v in one.items() if k != "weight"} for one in row["messages"][:-1]]
        found.append({"messages": messages} | ({"tools": row["tools"]} if row.get("tools") else {}))
    return found


def _ask_all(
    chats: Sequence[dict[str, Any]],
    asked: External,
    key: SecretStr | None,
    limit: int,
    settings: Settings,
    watch: Watch,
) -> list[Said]:
    """Returns the answers in order. Raises NoAnswer."""
    with ThreadPoolExecutor(AT_ONCE, "tunery-external") as pool:
        flying: list[Future[Said]] = [
            pool.submit(external.ask, asked, key, chat, limit=limit, allow=settings.external_allow) for chat in chats
        ]
        while not all(one.done() for one in flying):
            done, _ = wait(flying, timeout=0.5, return_when=FIRST_EXCEPTION)
            watch.look(0.9)
            if watch.begun or any(not one.cancelled() and one.exception() for one in done):
                pool.shutdown(wait=False, cancel_futures=True)
                break
    for one in flying:
        if one.done() and not one.cancelled() and (failure := one.exception()) is not None:
            raise failure
    if watch.begun:
        raise NoAnswer("It was ended")
    return [one.result() for one in flying]
