"""Many clients of the model server at once: none affects another's answer, whatever its request or its model."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import tiny_models
import torch
from openai import OpenAI
from safetensors.torch import load_file, save_file
from served import serving

from tunery import digests, processes
from tunery.artifacts import manifest
from tunery.serving import Rates
from tunery.storage import Directory
from worker.server.backends.embedded import Engine
from worker.server.generation import Generation
from worker.server.schemas import parse
from worker.server.slots import Slots

ASK: list[Any] = [{"role": "user", "content": "Where is my card?"}]


class SlowDirectory(Directory):
    """A storage that holds back the objects under a prefix until they may be read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.slow, self.asked, self.may_go = "none/", threading.Event(), threading.Event()

    def read(self, key: str, *args: Any, **options: Any) -> Iterator[bytes]:
        if key.startswith(self.slow):
            self.asked.set()
            assert self.may_go.wait(30)
        return super().read(key, *args, **options)


class Shop:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.storage = SlowDirectory(root / "objects")
        base = tiny_models.llama(root / "base", seed=1, never_said=(0, 1, 2), max_position_embeddings=60_000)
        self.files = {"base": self._publish(base)}
        for seed, name in enumerate(("a", "b", "c"), 2):
            self.files[name] = self._publish(tiny_models.lora(root / name, base, seed=seed))

    def _publish(self, folder: Path) -> dict[str, str]:
        prefix = f"models/{folder.name}"
        _, sha256 = manifest.publish(self.storage, prefix, folder)
        return {"id": folder.name, "prefix": prefix, "manifest_sha256": sha256}

    def body(self, adapter: str | None = None, project_id: str | None = None) -> dict[str, Any]:
        tuned = None if adapter is None else {**self.files[adapter], "technique": "lora"}
        return {"tunery_model": {"base": self.files["base"], "tuned": tuned, "project_id": project_id}}


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


@pytest.fixture
def engine(shop: Shop) -> Engine:
    return Engine(shop.root / "models", shop.storage)


@pytest.fixture
def ask(shop: Shop, engine: Engine) -> Iterator[Any]:
    with serving(engine, places=8) as port, client_of(port) as client:
        yield asker(client, shop)


def client_of(port: int) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def asker(client: OpenAI, shop: Shop) -> Any:
    def ask(adapter: str | None = None, project_id: str | None = None, **asked: Any) -> Any:
        plain = {"model": "m", "messages": ASK, "temperature": 0, "max_tokens": 8}
        return client.chat.completions.create(**plain | asked, extra_body=shop.body(adapter, project_id))

    return ask


def text(reply: Any) -> Any:
    return reply.choices[0].message.content


def test_streams_go_on_while_an_adapter_is_fetched(ask: Any, shop: Shop) -> None:
    ask("a")
    shop.storage.slow = "models/b/"
    with ask(stream=True, max_tokens=50_000) as stream, ThreadPoolExecutor(1) as pool:
        next(stream)
        waits = pool.submit(ask, "b")
        assert shop.storage.asked.wait(20)
        assert len([next(stream) for _ in range(5)]) == 5
        assert text(ask("a"))
        assert not waits.done()
        shop.storage.may_go.set()
        assert text(waits.result(timeout=20)) not in (text(ask()), text(ask("a")))


def test_answers_share_every_pass(shop: Shop, engine: Engine) -> None:
    body = {"model": "m", "messages": ASK, "temperature": 0, "max_tokens": 8} | shop.body()
    answers = [engine.answer(parse(json.dumps(body).encode())) for _ in range(4)]
    passes: list[int] = []
    answers[0].stream.batch._model.register_forward_pre_hook(
        lambda _, args, fields: passes.append(len(fields["input_ids"])), with_kwargs=True
    )
    running = {id(answer): iter(answer) for answer in answers}
    texts = dict.fromkeys(running, "")
    while running:
        for answer in engine.advance([one for one in answers if id(one) in running]):
            if (piece := next(running[id(answer)], None)) is None:
                del running[id(answer)]
            else:
                texts[id(answer)] += piece

    assert passes == [4] * 8, "the first of eight tokens is chosen by the prompts' pass"
    assert len(set(texts.values())) == 1


def test_usage_counts_the_tokens_that_were_not_computed(ask: Any) -> None:
    def cached(reply: Any) -> int:
        return int(reply.usage.prompt_tokens_details.cached_tokens)

    first = ask(project_id="p")
    chat = [*ASK, {"role": "assistant", "content": text(first)}, *ASK]
    second, plain = ask(project_id="p", messages=chat), ask(messages=chat)
    *_, streamed = ask(project_id="p", messages=chat, stream=True, stream_options={"include_usage": True})

    assert [cached(first), cached(plain), cached(ask(project_id="q"))] == [0, 0, 0]
    assert first.usage.prompt_tokens <= cached(second) < second.usage.prompt_tokens
    assert cached(streamed) == streamed.usage.prompt_tokens - 1
    assert text(second) == text(plain)


@pytest.mark.parametrize("stream", [True, False])
def test_answers_to_one_prompt_run_beside_each_other(ask: Any, engine: Engine, stream: bool) -> None:
    ask()
    assert engine._ready is not None
    assert engine._ready.base.batch is not None
    passes: list[int] = []
    engine._ready.base.model.register_forward_pre_hook(
        lambda _, args, fields: passes.append(len(fields["input_ids"])), with_kwargs=True
    )
    made = ask(project_id="p", n=4, temperature=1, seed=5, max_tokens=200, stream=stream)
    texts, order = dict.fromkeys(range(4), ""), []
    for chunk in made if stream else [made]:
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
            order.append(choice.index)

    assert max(passes) == 4
    assert len(set(texts.values())) == 4
    assert (order == sorted(order)) is not stream  # pieces of a stream come as they are computed
    assert texts[2] == text(ask(temperature=1, seed=7, max_tokens=200))


def test_adapters_beyond_the_memory_come_and_go_with_the_same_answers(shop: Shop) -> None:
    whole = Engine(shop.root / "models", shop.storage)
    with serving(whole) as port, client_of(port) as client:
        asker(client, shop)("a")
    engine = Engine(shop.root / "models", shop.storage, memory_bytes=whole._residents.nbytes)
    with serving(engine) as port, client_of(port) as client:
        ask = asker(client, shop)
        first = [text(ask(name)) for name in "abc"]
        assert processes.wait_until(lambda: engine._residents.names == ["c", "base"], seconds=20, alive=lambda: True)
        assert [text(ask(name)) for name in "abc"] == first
        assert len(set(first)) == 3


def test_adapter_that_is_corrupt_in_storage_is_an_error_of_its_own(ask: Any, shop: Shop) -> None:
    file = shop.root / "objects" / "models" / "b" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with ask(stream=True, max_tokens=50_000) as stream:
        next(stream)
        with pytest.raises(openai.InternalServerError, match="is damaged: its sha256 is") as refused:
            ask("b")
        assert refused.value.code == "checksum_mismatch"
        assert next(stream)
    assert text(ask("a"))


@pytest.mark.parametrize("temperature", [0, 1])
def test_adapter_whose_numbers_are_not_finite_is_an_error_of_its_own(ask: Any, shop: Shop, temperature: int) -> None:
    broken = shutil.copytree(shop.root / "b", shop.root / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    save_file({name: part.fill_(torch.nan) for name, part in weights.items()}, broken / "adapter_model.safetensors")
    shop.files["broken"] = shop._publish(broken)
    with ask(stream=True, max_tokens=50_000) as stream:
        next(stream)
        with pytest.raises(openai.InternalServerError, match="not finite") as refused:
            ask("broken", temperature=temperature)
        assert refused.value.code == "no_probabilities"
        assert next(stream)
    assert text(ask("b"))


def test_requests_that_are_refused_leave_a_stream_alone(ask: Any) -> None:
    odd = {"type": "json_schema", "json_schema": {"name": "odd", "schema": {"type": "odd"}}}
    with ask(stream=True, max_tokens=50_000) as stream:
        next(stream)
        with pytest.raises(openai.BadRequestError, match="odd"):
            ask("a", response_format=odd)
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            ask("b", messages=[{"role": "user", "content": "card " * 100_000}])
        assert len([next(stream) for _ in range(5)]) == 5
    assert text(ask("a")) != text(ask("b"))


@pytest.mark.parametrize("change", ["replaced", "cut", "deleted"])
def test_adapter_that_has_changed_on_the_host_is_fetched_again(
    ask: Any, shop: Shop, engine: Engine, change: str
) -> None:
    wanted = text(ask("a"))
    weights = shop.root / "models" / shop.files["a"]["manifest_sha256"] / "adapter_model.safetensors"
    if change == "replaced":
        shutil.copy(shop.root / "b" / "adapter_model.safetensors", weights)
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        weights.unlink()
    fresh = Engine(shop.root / "models", shop.storage)
    with serving(fresh) as port, client_of(port) as client:
        assert text(asker(client, shop)("a")) == wanted


def test_adapter_is_hashed_once(ask: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is downloaded; what a server finds on its host it hashes too."""
    hashed: list[Path] = []
    sha256 = digests.sha256
    monkeypatch.setattr(digests, "sha256", lambda path: (hashed.append(path), sha256(path))[1])  # type: ignore[func-returns-value]
    wanted = text(ask("a"))
    assert not hashed
    with serving(Engine(shop.root / "models", shop.storage)) as port, client_of(port) as client:
        assert text(asker(client, shop)("a")) == wanted
    assert [path.name for path in hashed] == ["adapter_model.safetensors"]


def test_name_that_means_another_model_answers_as_that_one(ask: Any, shop: Shop) -> None:
    before = text(ask("a"))
    folder = tiny_models.lora(shop.root / "newer", shop.root / "base", seed=9)
    shop.files["a"] = {**shop._publish(folder), "id": "a"}
    assert text(ask("a")) != before


@pytest.mark.parametrize("stream", [True, False])
def test_answer_that_takes_too_long_ends_with_an_error(shop: Shop, engine: Engine, stream: bool) -> None:
    with serving(engine) as port, client_of(port) as client:
        asker(client, shop)()
    with serving(engine, seconds=0.5) as port, client_of(port) as client:
        ask = asker(client, shop)
        with pytest.raises(openai.APIError, match=r"not complete after 0\.5 seconds") as ended:
            list(ask(stream=stream, max_tokens=50_000))
        assert ended.value.code == "answer_too_slow"
        if isinstance(ended.value, openai.APIStatusError):
            assert ended.value.status_code == 504
            assert ended.value.response.headers["x-should-retry"] == "false"
        assert len(text(ask(max_tokens=1))) == 1


def test_answer_that_came_too_late_is_closed_by_the_thread_that_steps(shop: Shop, engine: Engine) -> None:
    with serving(engine) as port, client_of(port) as client:
        asker(client, shop)()
    shop.storage.slow = "models/b/"
    closed: list[str] = []
    answer = engine.answer

    def watched(request: Any) -> Any:
        made = answer(request)
        close = made.close
        made.close = lambda: (closed.append(threading.current_thread().name), close())[1]  # type: ignore[method-assign, func-returns-value]
        return made

    engine.answer = watched  # type: ignore[method-assign]
    with serving(engine, seconds=0.5) as port, client_of(port) as client:
        with pytest.raises(openai.APIError, match="not complete after"):
            asker(client, shop)("b")
        shop.storage.may_go.set()
        assert processes.wait_until(lambda: bool(closed), seconds=20, alive=lambda: True)
    assert closed == ["engine"]


def test_client_that_leaves_frees_the_memory_of_its_answer(ask: Any, engine: Engine) -> None:
    with ask(stream=True, max_tokens=50_000) as stream:
        next(stream)
        assert engine._ready is not None
        batch = engine._ready.base.batch
        assert batch is not None
        assert processes.wait_until(lambda: len(batch.rows) == 1, seconds=20, alive=lambda: True)
    assert processes.wait_until(lambda: not batch.rows and not batch.nbytes, seconds=20, alive=lambda: True)
    places = engine._residents._places.values()
    assert processes.wait_until(lambda: not any(place.users for place in places), seconds=20, alive=lambda: True)


def test_keys_that_memory_has_no_room_to_keep_cost_no_answer(
    ask: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room for a copy")

    kept = text(ask(project_id="one"))
    monkeypatch.setattr(Slots, "save", save)
    assert [text(ask(project_id=name)) for name in ("two", "three")] == [kept, kept]
    places = engine._residents._places.values()
    assert processes.wait_until(lambda: not any(place.users for place in places), seconds=20, alive=lambda: True)


def test_an_answer_that_cannot_be_closed_does_not_end_the_others(
    shop: Shop, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, closed, broken = Generation.close, [], []

    def close_and_break(answer: Generation) -> None:
        """Breaks the second close: the answer closes itself at its end, and the loop closes it again."""
        if answer in closed:
            broken.append(answer)
            raise RuntimeError("a fault of the device")
        closed.append(answer)
        close(answer)

    monkeypatch.setattr(Generation, "close", close_and_break)
    with serving(engine, places=8) as port, client_of(port) as client:
        first, second = (text(asker(client, shop)()) for _ in range(2))
    assert first == second
    assert broken


def test_burst_of_long_prompts_waits_for_memory_and_one_beyond_it_is_refused(shop: Shop) -> None:
    plain = Engine(shop.root / "models", shop.storage)
    long = [[{"role": "user", "content": f"{i} " + "card " * 60}] for i in range(8)]
    with serving(plain) as port, client_of(port) as client:
        wanted = [text(asker(client, shop)(messages=messages)) for messages in long]
    assert plain._ready is not None
    assert plain._ready.base.batch is not None
    a_position = plain._ready.base.batch.bytes_a_position
    engine = Engine(shop.root / "models", shop.storage, cache_bytes=2 * 512 * a_position)
    held: list[int] = []
    advance = engine.advance

    def watched(answers: Any) -> Any:
        ready = advance(answers)
        assert engine._ready is not None
        assert engine._ready.base.batch is not None
        held.append(engine._ready.base.batch.nbytes)
        return ready

    engine.advance = watched  # type: ignore[method-assign]
    with serving(engine, places=8) as port, client_of(port) as client, ThreadPoolExecutor(8) as pool:
        ask = asker(client, shop)
        assert list(pool.map(lambda messages: text(ask(messages=messages)), long)) == wanted
        assert max(held) == 2 * 512 * a_position
        with pytest.raises(openai.BadRequestError, match="maximum context length is 992 tokens") as refused:
            ask(messages=[{"role": "user", "content": "card " * 2000}])
        assert refused.value.code == "context_length_exceeded"
        assert text(ask(messages=long[0])) == wanted[0]


def test_more_clients_than_streams_are_all_answered(shop: Shop) -> None:
    with serving(Engine(shop.root / "models", shop.storage, streams=4), places=16) as port, client_of(port) as client:
        ask = asker(client, shop)
        wanted = {name: text(ask(name)) for name in (None, "a", "b", "c")}
        asked = [(None, "a", "b", "c")[i % 4] for i in range(16)]
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(lambda name: text(ask(name)), asked)) == [wanted[name] for name in asked]


def test_what_answers_took_is_measured(shop: Shop, engine: Engine) -> None:
    with serving(engine, places=8) as port, client_of(port) as client:
        ask = asker(client, shop)
        for name in (None, "a", "a"):
            ask(name)
        found = Rates.model_validate_json(httpx2.get(f"http://127.0.0.1:{port}/v1/rates", trust_env=False).content)
    assert found.device == "cpu"
    assert {(rate.base, rate.way): rate.tokens for rate in found.rates} == {
        ("base", "merged"): 8,
        ("base", "adapter"): 16,
    }
    assert all(rate.seconds > 0 and rate.passes >= rate.tokens for rate in found.rates)
