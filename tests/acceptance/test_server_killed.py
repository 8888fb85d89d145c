"""The model server of a running stack is killed in the middle of a stream."""

import time
from pathlib import Path
from typing import Any

import openai
import pytest
import stacks
import tiny_models

from tunery import processes

ASK: list[Any] = [{"role": "user", "content": "Where is my card?"}]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stream_ends_with_an_error_and_the_next_call_is_answered(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "base", never_said=(0, 1, 2), max_position_embeddings=60_000)
    with stacks.running(tmp_path / "home") as stack, stacks.connect(stack) as client:
        stacks.add_base(stack, client, base)

        def ask(**more: Any) -> Any:
            return client.chat.completions.create(model="tiny", messages=ASK, temperature=0, **more)

        def answers() -> Any:
            stack.restart_dead()  # as `tunery up` does all the time
            try:
                return ask(max_tokens=8).choices[0].message.content
            except openai.InternalServerError:
                return None

        assert processes.wait_until(lambda: bool(answers()), seconds=120, alive=lambda: True, every=0.2)
        before = ask(max_tokens=8)
        (server,) = [service.process for service in stack._services if service.name == "server"]
        assert server is not None
        with ask(stream=True, max_tokens=50_000) as stream:
            next(stream)
            server.kill()
            killed = time.monotonic()
            with pytest.raises(openai.APIError) as broken:
                list(stream)
        assert broken.value.code == "unavailable"
        assert "model server" in str(broken.value)

        assert processes.wait_until(lambda: bool(answers()), seconds=120, alive=lambda: True, every=0.2)
        print(f"\nanswers again {time.monotonic() - killed:.1f} s after it was killed")
        after = ask(max_tokens=8)
        assert after.choices[0].message.content == before.choices[0].message.content
        (newer,) = [service.process for service in stack._services if service.name == "server"]
        assert newer is not None
        assert newer.pid != server.pid
