"""Chats through the API and the model server to stand-ins that replay what real vLLM servers answered."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import tiny_models
from cloned_databases import Database
from fastapi import FastAPI
from fleets import PublishedModels
from openai import OpenAI
from recorded_vllm import QUESTION, RECORDED, RecordedVllm, steps
from teams import BASE, TRAIN, Team

from tunery import processes
from tunery.errors import WrongSettings
from tunery.rows.template import ChatTemplate
from tunery.serving import Rates
from tunery.storage import open_storage
from worker.io.announcing import Announcer
from worker.server.backends import backend
from worker.server.fleet import Fleet, Target
from worker.server.replica import Adapter, Replica

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}
Ask = Callable[..., OpenAI]
Serve = Callable[[Any], str]


class Recorded:
    """Two stand-ins that replay a recorded vLLM server, and adapters without weights."""

    def __init__(self, database: Database, root: Path) -> None:
        self._root = root
        self.address = ""
        """The address of the latest model server."""
        tiny_models.tokenizer(root / "base")
        (root / "base/config.json").write_text(json.dumps({"eos_token_id": 2}))
        self.files = PublishedModels(database, root / "base", root)
        self.tokenizer = ChatTemplate.load(root / "base").tokenizer
        self.vllms = [RecordedVllm(BASE), RecordedVllm(BASE)]

    def add(self, team: Team, name: str, **config: Any) -> str:
        """Publishes an adapter of the team and returns its id."""
        folder = self._root / name
        tiny_models.tokenizer(folder)
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **config}
        (folder / "adapter_config.json").write_text(json.dumps(options))
        (folder / "adapter_model.safetensors").write_bytes(name.encode())
        return self.files.add(team, folder)

    def text(self, recorded: str) -> str:
        """The text of a recorded answer."""
        ids = [token for step in steps(recorded) for token in step["token_ids"]]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@pytest.fixture
def recorded(database: Database, tmp_path: Path) -> Recorded:
    return Recorded(database, tmp_path)


@pytest.fixture
def ask(recorded: Recorded, make_app: Callable[..., FastAPI], team: Team) -> Iterator[Ask]:
    """Makes a client of the API in front of the vLLM servers at the given addresses."""
    with ExitStack() as stack:

        def make(*urls: str, **options: Any) -> OpenAI:
            recorded.address = stack.enter_context(recorded.files.serving(*urls, **options))
            return team.on(make_app(server_url=recorded.address)).openai(strict=True)

        yield make


def test_base_and_adapter_answer_as_vllm_does(recorded: Recorded, ask: Ask, team: Team, serve: Serve) -> None:
    vllm, tuned = recorded.vllms[0], recorded.add(team, "one")
    client = ask(serve(vllm.app))
    answer = client.chat.completions.create(model=BASE, **ASK)
    assert answer.choices[0].message.content == recorded.text("stream_base")
    assert vllm.asked[-1] == {**RECORDED["stream_base"]["request"], "model": BASE}
    answer = client.chat.completions.create(model=tuned, **ASK)
    assert answer.choices[0].message.content == recorded.text("stream_adapter") != recorded.text("stream_base")
    assert answer.model == tuned
    digest = recorded.files.digest(tuned)
    assert vllm.asked[-1] == {**RECORDED["stream_adapter"]["request"], "model": digest}
    assert vllm.adapters == {digest: str(recorded.files.seen / digest)}
    said = [token for step in steps("stream_adapter") for token in step["token_ids"]]
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(vllm.asked[-1]["prompt"]), len(said))
    day = team.http.get(f"/v1/organization/usage/completions?start_time={int(time.time())}&models[]={tuned}").json()
    [used] = day["data"][0]["results"]
    assert (used["input_tokens"], used["output_tokens"]) == (answer.usage.prompt_tokens, len(said))
    pieces = client.chat.completions.create(model=tuned, stream=True, **ASK)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == recorded.text("stream_adapter")
    assert vllm.loaded == [digest]
    measured = Rates.model_validate_json(httpx2.get(f"{recorded.address}/v1/rates", trust_env=False).content)
    assert measured == Rates(device="vllm", rates=[]), "another host computes, and a wait is no pass"


def _say(client: OpenAI, model: str, **options: Any) -> str | None:
    return client.chat.completions.create(model=model, **ASK, **options).choices[0].message.content


def _soon(holds: Callable[[], bool]) -> bool:
    return processes.wait_until(holds, seconds=20, alive=lambda: True, every=0.02)


def test_every_server_has_the_adapters_and_gets_them_again_after_a_restart(
    recorded: Recorded, ask: Ask, team: Team, serve: Serve
) -> None:
    one, two = recorded.vllms
    tuned = recorded.add(team, "one")
    digest = recorded.files.digest(tuned)
    client = ask(serve(one.app), serve(two.app))
    assert _say(client, tuned) == recorded.text("stream_adapter")
    assert _soon(lambda: digest in one.adapters and digest in two.adapters)
    one.restart()
    two.restart()
    assert _soon(lambda: digest in one.adapters and digest in two.adapters)


def test_an_adapter_is_on_every_server_soon_after_it_is_published(
    recorded: Recorded, database: Database, team: Team, serve: Serve
) -> None:
    one, two = recorded.vllms
    before = recorded.files.digest(recorded.add(team, "before"))
    with recorded.files.serving(serve(one.app), serve(two.app)) as address:
        settings = database.settings.model_copy(update={"server_url": address, "server_backend": "vllm"})
        announcer = Announcer(settings)
        announcer.look()
        published = [recorded.files.digest(recorded.add(team, name)) for name in ("one", "two")]
        recorded.add(team, "dora", use_dora=True)  # which vLLM cannot serve
        announcer.look()
        assert _soon(lambda: all(digest in vllm.adapters for vllm in (one, two) for digest in published))
        announcer.look()
        announced = [*one.loaded, *two.loaded]
        two.restart()
        assert _soon(lambda: all(digest in two.adapters for digest in published))
    assert sorted(announced) == sorted(published * 2)
    assert before not in one.loaded
    assert one.asked == two.asked == []


@pytest.mark.parametrize("base", [BASE, "another"])
def test_published_adapters_are_loaded_only_where_their_base_is_served(
    recorded: Recorded, serve: Serve, base: str
) -> None:
    url, names = serve(recorded.vllms[0].app), frozenset({base})
    target = Target(base, names, Adapter("a" * 64, "/seen/a", names))

    async def knows() -> bool:
        fleet = Fleet([Replica(url)], slots=1)
        await fleet.load(target)
        await fleet.end()
        return fleet.knows("a" * 64)

    assert asyncio.run(knows()) is (base == BASE)


def test_server_that_has_forgotten_an_adapter_gets_it_with_the_next_request(
    recorded: Recorded, ask: Ask, team: Team, serve: Serve
) -> None:
    vllm, tuned = recorded.vllms[0], recorded.add(team, "one")
    client = ask(serve(vllm.app), look_seconds=3600)
    _say(client, tuned)
    vllm.restart()
    assert _say(client, tuned) == recorded.text("stream_adapter")
    assert vllm.loaded == [recorded.files.digest(tuned)] * 2


def test_requests_are_spread_and_a_dead_server_is_left_out_until_it_is_back(
    recorded: Recorded, ask: Ask, team: Team, serve: Serve
) -> None:
    one, two = recorded.vllms
    gone = f"http://127.0.0.1:{processes.free_port()}"
    urls = serve(one.app), serve(two.app), gone
    client = ask(*urls, look_seconds=3600)
    for _ in range(4):
        _say(client, BASE)
    assert len(one.asked) == len(two.asked) == 2
    one.is_down = True  # which only a request finds out
    for _ in range(4):
        assert _say(client, BASE) == recorded.text("stream_base")
    assert (len(one.asked), len(two.asked)) == (2, 6)
    one.is_down = False
    client = ask(*urls)
    assert _soon(lambda: bool(_say(client, BASE)) and len(one.asked) > 2)
    one.is_down = True
    _say(client, BASE)
    asked, one.is_down = len(one.asked), False
    assert _soon(lambda: bool(_say(client, BASE)) and len(one.asked) > asked)
    one.is_down = two.is_down = True
    with pytest.raises(openai.InternalServerError, match=f"--served-model-name '{BASE}'") as refused:
        _say(client, BASE)
    assert (refused.value.status_code, refused.value.code) == (503, "no_replica")


def test_stream_that_breaks_off_says_so_and_one_that_nobody_reads_is_ended(
    recorded: Recorded, ask: Ask, serve: Serve
) -> None:
    vllm = recorded.vllms[0]
    client = ask(serve(vllm.app))
    vllm.breaks = True
    heard: list[str] = []
    chunks = client.chat.completions.create(model=BASE, stream=True, **ASK)
    with pytest.raises(openai.APIError, match="model server does not answer"):
        heard.extend(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert recorded.text("stream_base").startswith("".join(heard))
    vllm.breaks, vllm.stalls = False, True
    vllm.left.clear()
    with client.chat.completions.create(model=BASE, stream=True, **ASK) as stream:
        next(iter(stream))
    assert vllm.left.wait(20)


UNSERVABLE: tuple[tuple[dict[str, Any], str], ...] = (
    ({"use_dora": True}, "not support DoRA"),
    ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ({"trainable_token_indices": [5]}, "trained tokens"),
    ({"r": 16}, "at most 8"),
)


def test_adapter_that_vllm_cannot_serve_is_refused_before_it_is_asked(
    recorded: Recorded, ask: Ask, team: Team, serve: Serve
) -> None:
    vllm = recorded.vllms[0]
    client = ask(serve(vllm.app))
    for number, (config, reason) in enumerate(UNSERVABLE):
        with pytest.raises(openai.BadRequestError, match=reason) as refused:
            _say(client, recorded.add(team, str(number), **config))
        assert refused.value.code == "cannot_serve"
    assert vllm.asked == vllm.loaded == []


def test_what_vllm_itself_refuses_is_said_in_its_words(recorded: Recorded, ask: Ask, team: Team, serve: Serve) -> None:
    vllm, tuned = recorded.vllms[0], recorded.add(team, "one", r=16)
    client = ask(serve(vllm.app), max_rank=64)  # more than the server was started with
    for _ in range(2):
        with pytest.raises(openai.BadRequestError, match="LoRA rank 16 is greater than max_lora_rank 8"):
            _say(client, tuned)
    nonsense = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        _say(client, BASE, response_format=nonsense)
    with pytest.raises(openai.BadRequestError, match="Use 'auto'"):
        _say(client, BASE, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required")
    long = {**ASK, "messages": [{"role": "user", "content": "a" * 300}]}
    with pytest.raises(openai.BadRequestError, match="256") as refused:
        client.chat.completions.create(model=BASE, **long)
    assert refused.value.code == "context_length_exceeded"
    assert _say(client, BASE) == recorded.text("stream_base")


def test_least_recently_used_adapter_leaves_every_server(
    recorded: Recorded, ask: Ask, team: Team, serve: Serve
) -> None:
    one, two = recorded.vllms
    names = [recorded.add(team, name) for name in ("one", "two")]
    first, second = map(recorded.files.digest, names)
    client = ask(serve(one.app), serve(two.app), slots=1)
    _say(client, names[0])
    assert _soon(lambda: first in one.adapters and first in two.adapters)
    _say(client, names[1])
    assert _soon(lambda: [*one.adapters] == [*two.adapters] == [second])


def test_adapter_that_was_in_use_leaves_once_it_is_not(recorded: Recorded, ask: Ask, team: Team, serve: Serve) -> None:
    vllm, names = recorded.vllms[0], [recorded.add(team, name) for name in ("one", "two")]
    first, second = map(recorded.files.digest, names)
    client = ask(serve(vllm.app), slots=1)
    vllm.stalls = True
    with ThreadPoolExecutor(2) as pool:
        saying = [pool.submit(_say, client, names[0])]
        assert _soon(lambda: len(vllm.asked) == 1)
        saying.append(pool.submit(_say, client, names[1]))
        assert _soon(lambda: len(vllm.asked) == 2)
        assert [*vllm.adapters] == [first, second]
        vllm.stalls = False
        assert {one.result() for one in saying} == {recorded.text("stream_adapter")}
    assert _soon(lambda: len(vllm.adapters) == 1), "the one whose answer ended first leaves while the other is in use"


@pytest.mark.parametrize("evicted", [True, False])
def test_adapter_that_leaves_while_it_is_loaded_does_not_stay(
    recorded: Recorded, serve: Serve, tmp_path: Path, evicted: bool
) -> None:
    vllm = recorded.vllms[0]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4}))
    adapter = Adapter("a" * 64, str(tmp_path), frozenset({BASE}))

    async def scene() -> None:
        replica = Replica(serve(vllm.app))
        await replica.look()
        loading = asyncio.create_task(replica.lay(adapter))
        await asyncio.sleep(0)  # the load has begun
        if evicted:
            await replica.remove(adapter.name)
        await loading
        await replica.close()

    asyncio.run(scene())
    assert (adapter.name in vllm.adapters) is not evicted


def test_name_that_comes_to_mean_other_files_is_another_adapter(
    recorded: Recorded, ask: Ask, team: Team, serve: Serve
) -> None:
    vllm, tuned = recorded.vllms[0], recorded.add(team, "one")
    client = ask(serve(vllm.app))
    _say(client, tuned)
    before, other = recorded.files.digest(tuned), recorded.add(team, "two")
    recorded.files.rename(tuned, other)
    _say(client, tuned)
    assert [body["model"] for body in vllm.asked] == [before, recorded.files.digest(other)]


def test_log_probabilities_a_schema_and_the_servers_key(recorded: Recorded, ask: Ask, team: Team, serve: Serve) -> None:
    vllm, tuned = recorded.vllms[0], recorded.add(team, "one")
    vllm.api_key = "k"
    url = serve(vllm.app)
    client = ask(url, api_key="k")
    chances = client.chat.completions.create(model=tuned, logprobs=True, top_logprobs=2, **ASK).choices[0].logprobs
    assert chances
    assert chances.content
    said_there = [step["logprobs"] for step in steps("stream_logprobs")]
    assert [one.logprob for one in chances.content] == [one for step in said_there for one in step["token_logprobs"]]
    assert [len(one.top_logprobs) for one in chances.content] == [2] * len(chances.content)
    schema = RECORDED["stream_schema"]["request"]["structured_outputs"]["json"]
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    [choice] = client.chat.completions.create(model=BASE, response_format=wanted, **ASK).choices
    assert (choice.message.content, choice.finish_reason) == (recorded.text("stream_schema"), "stop")
    assert vllm.asked[-1]["structured_outputs"] == {"json": {**schema, "additionalProperties": False}}
    patterns = [{"type": "string", "pattern": f".*{'a' * 20}.{{{number}}}$"} for number in range(16)]
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"allOf": patterns}}}
    with pytest.raises(openai.BadRequestError, match="patterns are too complex"):
        client.chat.completions.create(model=BASE, response_format=wanted, **ASK)
    with pytest.raises(openai.InternalServerError, match="TUNERY_VLLM_REPLICAS"):
        _say(ask(url, api_key="another"), BASE)


def test_job_whose_adapter_could_not_be_served_is_refused(
    make_app: Callable[..., FastAPI], team: Team, base: str
) -> None:
    strict = team.on(make_app(server_backend="vllm", vllm_max_lora_rank=8)).http
    file = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", TRAIN)}).json()["id"]
    body = {"model": base, "training_file": file, "technique": {"type": "lora", "r": 16}}
    refused = strict.post("/v1/fine_tuning/jobs", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "technique.r")
    assert "at most 8" in refused.json()["error"]["message"]
    made = team.http.post("/v1/fine_tuning/jobs", json=body)
    assert made.status_code == 200
    again = strict.post(f"/v1/fine_tuning/jobs/{made.json()['id']}/rerun", json={})
    assert (again.status_code, again.json()["error"]["param"]) == (400, "technique.r")
    body["technique"]["r"] = 8
    assert strict.post("/v1/fine_tuning/jobs", json=body).status_code == 200


def test_server_without_vllm_servers_does_not_start(database: Database) -> None:
    settings = database.settings.model_copy(update={"server_backend": "vllm"})
    with pytest.raises(WrongSettings, match="TUNERY_VLLM_REPLICAS is empty"):
        backend.make(settings, open_storage(settings), "cpu")
