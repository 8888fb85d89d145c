"""The model server answers the official client as plain transformers and peft do."""

import http.client
import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from openai import OpenAI
from peft import PeftModel
from served import serving
from templates import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tunery import processes
from tunery.artifacts import manifest
from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate
from tunery.settings import Settings
from tunery.storage import Directory, open_storage
from worker.server.__main__ import choose_device
from worker.server.backends.embedded import Engine
from worker.server.generation import choose
from worker.server.sampling import Sampling
from worker.server.schemas import parse
from worker.server.text import Text

SYSTEM = "<|im_start|>system\nShout.<|im_end|>\n"
LOUD = SYSTEM + tiny_models.CHATML
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + tiny_models.CHATML
STERN = "{% if messages[0].role == 'system' %}{{ raise_exception('No orders, please.') }}{% endif %}" + TOOLS
ROOT = Path(__file__).parents[2]
ASK: list[Any] = [{"role": "user", "content": "Where is my card?"}]


@dataclass(frozen=True)
class Shop:
    """Models in storage and as plain folders; `files[name]` describes them as in the API's requests."""

    storage: Directory
    folders: dict[str, Path]
    files: dict[str, dict[str, str]]

    def chosen(self, base: str, tuned: str | None = None, technique: str = "lora") -> dict[str, Any]:
        made = None if tuned is None else {**self.files[tuned], "technique": technique}
        return {"tunery_model": {"base": self.files[base], "tuned": made}}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Returns bases, of which one never stops, and two adapters on the first; the loud one has its own template."""
    root = tmp_path_factory.mktemp("shop")
    storage = Directory(root / "objects")
    folders = {"one": tiny_models.llama(root / "one", seed=1), "two": tiny_models.llama(root / "two", seed=2)}
    folders["endless"] = tiny_models.llama(root / "endless", never_said=(0, 1, 2), max_position_embeddings=60_000)
    folders["stern"] = tiny_models.llama(root / "stern", template=STERN)
    folders["quiet"] = tiny_models.lora(root / "quiet", folders["one"], seed=3)
    folders["loud"] = tiny_models.lora(root / "loud", folders["one"], seed=4, template=LOUD)
    files = {}
    for name, folder in folders.items():
        _, sha256 = manifest.publish(storage, f"models/{name}", folder)
        files[name] = {"id": name, "prefix": f"models/{name}", "manifest_sha256": sha256}
    return Shop(storage, folders, files)


@pytest.fixture(scope="module")
def engine(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tmp_path_factory.mktemp("models"), shop.storage)


@pytest.fixture(scope="module")
def port(engine: Engine) -> Iterator[int]:
    with serving(engine, places=1) as port:
        yield port


def _client(port: int) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[OpenAI]:
    with _client(port) as client:
        yield client


def _plain(shop: Shop, base: str, adapter: str | None, tokens: int, device: str = "cpu") -> str:
    """Returns the greedy answer by transformers and peft alone, to a prompt written by hand."""
    folder = shop.folders[adapter or base]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(shop.folders[base], dtype=dtype).to(device)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, folder)
    tokenizer = ChatTemplate.load(folder).tokenizer
    # The loud adapter's template is longer, which shows whose template was used.
    text = f"{SYSTEM if adapter == 'loud' else ''}<|im_start|>user\n{ASK[0]['content']}<|im_end|>\n"
    prompt = tokenizer.encode(f"{text}<|im_start|>assistant\n").ids
    with torch.inference_mode():
        ids = model.generate(
            input_ids=torch.tensor([prompt], device=device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
            max_new_tokens=tokens,
            do_sample=False,
        )
    return str(tokenizer.decode(ids[0, len(prompt) :].tolist(), skip_special_tokens=True))


def test_greedy_answers_equal_plain_peft_while_models_come_and_go(client: OpenAI, shop: Shop) -> None:
    visits: list[tuple[str, str | None]] = [
        ("one", None),
        ("one", "quiet"),
        ("one", "loud"),
        ("one", None),
        ("two", None),
        ("one", "quiet"),
    ]
    answers = []
    for base, adapter in visits:
        reply = client.chat.completions.create(
            model="m", messages=ASK, temperature=0, max_completion_tokens=24, extra_body=shop.chosen(base, adapter)
        )
        assert reply.choices[0].message.content == _plain(shop, base, adapter, 24)
        answers.append(reply.choices[0].message.content)
    assert answers[0] == answers[3]
    assert answers[1] == answers[5]
    assert len(set(answers)) == 4


def test_a_text_is_gone_on_from_without_the_template(client: OpenAI, shop: Shop) -> None:
    asked: dict[str, Any] = {"model": "one", "temperature": 0, "max_tokens": 16}
    text = {"tunery_text": "Where is <|im_end|> my", **shop.chosen("one", "loud")}
    reply = client.chat.completions.create(**asked, messages=[], extra_body=text)
    tokenizer = ChatTemplate.load(shop.folders["loud"]).tokenizer
    ids = [id for part in ("Where is ", "<", "|im_end|> my") for id in tokenizer.encode(part).ids]
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(shop.folders["one"], dtype=torch.float32), shop.folders["loud"]
    )
    with torch.inference_mode():
        plain = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=16, do_sample=False)
    assert reply.choices[0].message.content == tokenizer.decode(plain[0, len(ids) :].tolist(), skip_special_tokens=True)
    assert reply.usage
    assert reply.usage.prompt_tokens == len(ids)
    with pytest.raises(openai.BadRequestError, match="reserved for the server"):
        client.chat.completions.create(**asked, messages=ASK, extra_body=text)
    with pytest.raises(openai.BadRequestError, match="at least one message"):
        client.chat.completions.create(**asked, messages=[], extra_body=shop.chosen("one"))


def test_answers_at_once_are_those_of_each_model_alone(client: OpenAI, shop: Shop) -> None:
    asked: list[tuple[str, str | None]] = [("one", None), ("one", "quiet"), ("one", "loud"), ("two", None)] * 3

    def answer(base: str, adapter: str | None) -> str | None:
        reply = client.chat.completions.create(
            model="m", messages=ASK, temperature=0, max_completion_tokens=24, extra_body=shop.chosen(base, adapter)
        )
        return reply.choices[0].message.content

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: answer(*one), asked))
    assert answers == [_plain(shop, base, adapter, 24) for base, adapter in asked[:4]] * 3


def test_a_full_fine_tune_answers_as_a_model_of_its_own(client: OpenAI, shop: Shop) -> None:
    reply = client.chat.completions.create(
        model="ft:two",
        messages=ASK,
        temperature=0,
        max_tokens=16,
        extra_body=shop.chosen("one", "two", technique="full"),
    )
    assert reply.choices[0].message.content == _plain(shop, "two", None, 16)
    assert reply.model == "ft:two"


def test_the_reply_has_every_field_of_openais(port: int, shop: Shop) -> None:
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", _strict_response_validation=True) as strict:
        reply = strict.chat.completions.create(
            model="one", messages=ASK, temperature=0, max_tokens=5, extra_body=shop.chosen("one")
        )
    assert reply.id.startswith("chatcmpl-")
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage
    prompt = ChatTemplate.load(shop.folders["one"]).encode_prompt([Message(**ASK[0])])
    assert reply.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 5,
        "total_tokens": len(prompt) + 5,
    }


def test_a_stream_says_the_same_in_pieces(client: OpenAI, shop: Shop) -> None:
    asked: dict[str, Any] = {"model": "one", "messages": ASK, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**asked, extra_body=shop.chosen("one"))
    chunks = list(
        client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, extra_body=shop.chosen("one")
        )
    )
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    assert len([chunk for chunk in pieces if chunk.choices[0].delta.content]) > 2
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in pieces)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI, shop: Shop) -> None:
    asked: dict[str, Any] = {"model": "one", "messages": ASK, "temperature": 0, "max_tokens": 24}
    body = shop.chosen("one")
    whole = client.chat.completions.create(**asked, extra_body=body).choices[0].message.content or ""
    stop = whole[6:9]
    before = whole[: whole.index(stop)]
    cut = client.chat.completions.create(**asked, stop=["never said", stop], extra_body=body)
    assert cut.choices[0].message.content == before
    assert cut.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**asked, stop=stop, stream=True, extra_body=body))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_a_drawn_answer(client: OpenAI, shop: Shop) -> None:
    def drawn(**knobs: Any) -> Any:
        reply = client.chat.completions.create(
            model="one", messages=ASK, max_tokens=24, extra_body=shop.chosen("one"), **knobs
        )
        return reply.choices[0].message.content

    assert drawn(seed=7) == drawn(seed=7)
    assert drawn(seed=7) != drawn(seed=8)
    # A nucleus of the likeliest token alone leaves nothing to chance.
    assert drawn(seed=7, top_p=1e-6) == drawn(temperature=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("top_logprobs", 2),
        ("logit_bias", {"5": 10}),
        ("response_format", {"type": "json_schema"}),
        ("tool_choice", "required"),
        ("presence_penalty", 0.5),
        ("temperature", 3),
        ("max_tokens", 0),
        ("nonsense", 1),
        ("messages", []),
        ("messages", [{"role": "pope", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ],
)
def test_what_is_not_served_is_refused_by_name(client: OpenAI, shop: Shop, field: str, value: object) -> None:
    body = {**shop.chosen("one"), field: value}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="one", messages=ASK, extra_body=body)
    assert refused.value.type == "invalid_request_error"
    assert str(refused.value.param).startswith(field)
    assert field in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_token", 3, "Unrecognized request argument supplied: max_token. Did you mean 'max_tokens'?"),
        ("metdata", {}, "Did you mean 'metadata'?"),
        ("texts", "x", "Unrecognized request argument supplied: texts"),  # not `text`, which the API alone may send
        ("store", True, "'store' is not supported. Leave it out, or send false."),
        ("function_call", {"name": "f"}, """Leave it out, or send "auto" or "none"."""),
    ],
)
def test_a_refusal_says_what_to_send(client: OpenAI, shop: Shop, field: str, value: object, said: str) -> None:
    body = {**shop.chosen("one"), field: value}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="one", messages=ASK, extra_body=body)
    assert str(refused.value).endswith(said)


def test_fields_that_ask_for_nothing_pass(client: OpenAI, shop: Shop) -> None:
    neutral = {
        "n": 1,
        "logprobs": None,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "user": "me",
        "max_tokens": 1,
    }
    reply = client.chat.completions.create(model="one", messages=ASK, extra_body={**shop.chosen("one"), **neutral})
    assert reply.usage
    assert reply.usage.completion_tokens == 1


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(client: OpenAI, shop: Shop) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"maximum context length is 256 tokens.* resulted in 4"
    ) as refused:
        client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": "x" * 400}], extra_body=shop.chosen("one")
        )
    assert refused.value.code == "context_length_exceeded"


def test_a_prompt_of_millions_of_words_is_refused_by_its_beginning(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask: list[Any] = [{"role": "user", "content": "word " * 300_000}]
    seen: list[int] = []
    encode = Tokenizer.encode

    class Watched:
        def __init__(self, tokenizer: Tokenizer) -> None:
            self.inner = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def encode(self, text: str, **options: Any) -> Any:
            seen.append(len(text))
            return encode(self.inner, text, **options)

    load = ChatTemplate.load

    def watched(folder: Path | str, now: Any = None) -> ChatTemplate:
        template = load(folder, now)
        template.tokenizer = Watched(template.tokenizer)
        return template

    monkeypatch.setattr(ChatTemplate, "load", watched)
    fresh = serving(Engine(tmp_path, shop.storage))
    with fresh as port, _client(port) as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="two", messages=ask, extra_body=shop.chosen("two"))
    assert refused.value.code == "context_length_exceeded"
    assert "resulted in more than" in str(refused.value)
    assert 0 < max(seen) <= 16 * 256


def test_an_answer_ends_where_the_context_does(client: OpenAI, shop: Shop) -> None:
    long: list[Any] = [{"role": "user", "content": "x" * 200}]
    reply = client.chat.completions.create(
        model="one", messages=long, max_tokens=9999, seed=1, extra_body=shop.chosen("one")
    )
    assert reply.usage
    assert reply.usage.total_tokens <= 256


def test_tools_reach_the_template_unless_none_are_to_be_called(client: OpenAI, shop: Shop) -> None:
    tool: Any = {"type": "function", "function": {"name": "find_card", "parameters": {"type": "object"}}}

    def prompt_tokens(**knobs: Any) -> int:
        reply = client.chat.completions.create(
            model="stern", messages=ASK, max_tokens=1, extra_body=shop.chosen("stern"), **knobs
        )
        assert reply.usage
        return reply.usage.prompt_tokens

    # One token per byte: the prompt grows by the tools' JSON.
    assert prompt_tokens(tools=[tool]) == prompt_tokens() + len(json.dumps([tool]))
    assert prompt_tokens(tools=[tool], tool_choice="none") == prompt_tokens()


def test_what_the_template_refuses_is_refused_in_its_words(client: OpenAI, shop: Shop) -> None:
    with pytest.raises(openai.BadRequestError, match=r"No orders, please\."):
        client.chat.completions.create(
            model="stern", messages=[{"role": "system", "content": "Obey."}, *ASK], extra_body=shop.chosen("stern")
        )


def test_what_the_template_does_not_show_is_refused_with_the_field(client: OpenAI, shop: Shop) -> None:
    tool: Any = {"type": "function", "function": {"name": "find_card", "parameters": {"type": "object"}}}
    thought: Any = {"role": "assistant", "content": "Here.", "reasoning_content": "In a pocket?"}
    for asked, lost in (
        ({"messages": ASK, "tools": [tool]}, r"does not render tools, so 'tools\[0\]\.function\.name'"),
        ({"messages": [*ASK, thought, *ASK]}, "does not render thinking, so 'reasoning_content' of message 2"),
        ({"messages": [{**ASK[0], "name": "Ann"}]}, "does not render names, so 'name' of message 1"),
    ):
        with pytest.raises(openai.BadRequestError, match=lost) as caught:
            client.chat.completions.create(model="one", extra_body=shop.chosen("one"), **asked)
        assert caught.value.code == "cannot_render"


def test_special_tokens_that_a_message_spells_are_text(client: OpenAI, shop: Shop) -> None:
    def prompt_tokens(text: str) -> int:
        reply = client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": text}], max_tokens=1, extra_body=shop.chosen("one")
        )
        assert reply.usage
        return reply.usage.prompt_tokens

    # Text has one token per byte; a special token would be one.
    assert prompt_tokens("<|im_end|>") == prompt_tokens("x" * len("<|im_end|>"))


def test_missing_files_are_an_error_and_the_server_goes_on(client: OpenAI, shop: Shop) -> None:
    gone = {"base": {"id": "gone", "prefix": "models/gone", "manifest_sha256": "0" * 64}, "tuned": None}
    with pytest.raises(openai.InternalServerError, match="models/gone"):
        client.chat.completions.create(model="gone", messages=ASK, extra_body={"tunery_model": gone})
    reply = client.chat.completions.create(model="one", messages=ASK, max_tokens=1, extra_body=shop.chosen("one"))
    assert reply.choices


def test_an_error_in_the_middle_of_a_stream_reaches_the_client(
    client: OpenAI, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = shop.chosen("one")
    stream = client.chat.completions.create(model="one", messages=ASK, stream=True, extra_body=body)
    next(stream)
    # A disk or a GPU that fails, which no request can cause.
    monkeypatch.setattr("worker.server.generation.choose", lambda *_: 1 / 0)
    with pytest.raises(openai.APIError, match="The model server failed"):
        list(stream)


def _health(port: int) -> dict[str, Any]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("HEAD", "/healthz")  # as load balancers do
        assert (answer := connection.getresponse()).status == 200
        assert answer.read() == b""
        connection.request("GET", "/healthz")
        found: dict[str, Any] = json.loads(connection.getresponse().read())
    return found


@contextmanager
def _endless_answer(port: int, shop: Shop, *, stream: bool) -> Iterator[None]:
    """Runs the block while a client waits for 60,000 tokens, and disconnects it at the block's end."""
    body = {"model": "endless", "messages": ASK, "temperature": 0, "stream": stream, **shop.chosen("endless")}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection, ExitStack() as stack:
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        if stream:
            response = stack.enter_context(closing(connection.getresponse()))
            assert [response.readline()[:5] for _ in range(4)] == [b"data:", b"\n"] * 2
        else:
            assert processes.wait_until(lambda: _health(port)["model"] == "endless", seconds=20, alive=lambda: True)
        yield


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_hangs_up(port: int, client: OpenAI, shop: Shop, stream: bool) -> None:
    client.chat.completions.create(model="one", messages=ASK, max_tokens=1, extra_body=shop.chosen("one"))
    with _endless_answer(port, shop, stream=stream):
        assert _health(port)["busy"]
    assert processes.wait_until(lambda: not _health(port)["busy"], seconds=20, alive=lambda: True)


def test_the_line_is_served_in_turn_and_no_longer_than_its_places(shop: Shop, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"model": "one", "messages": ASK, "max_tokens": 1, "extra_body": shop.chosen("one")}
    one_at_a_time = serving(Engine(tmp_path, shop.storage, streams=1), places=1)
    with ThreadPoolExecutor(1) as pool, one_at_a_time as port, _client(port) as client:
        with _endless_answer(port, shop, stream=True):
            waits = pool.submit(lambda: client.chat.completions.create(**asked))
            assert processes.wait_until(lambda: _health(port)["waiting"] == 1, seconds=20, alive=lambda: True)
            with pytest.raises(openai.RateLimitError) as refused:
                client.chat.completions.create(**asked)
            assert (refused.value.code, refused.value.response.headers["retry-after"]) == ("overloaded", "2")
            assert not waits.done()
        assert waits.result(timeout=30).choices


def test_other_paths_and_methods_get_openais_envelope(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    for method, path, status in [("GET", "/v1/chat/completions", 405), ("POST", "/v1/nothing", 404)]:
        connection.request(method, path)
        response = connection.getresponse()
        assert response.status == status
        assert json.loads(response.read())["error"]["type"] == "invalid_request_error"
    connection.close()


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_tokenizer(shop: Shop) -> Tokenizer:
    return ChatTemplate.load(shop.folders["one"]).tokenizer


@given(text=st.text("aäb€🎈 ", max_size=30), stop=st.text("aäb€", min_size=1, max_size=4))
@examples(max_examples=200, deadline=None)
def test_text_leaves_in_whole_characters_and_up_to_the_first_stop(
    bytes_tokenizer: Tokenizer, text: str, stop: str
) -> None:
    out, pieces = Text(bytes_tokenizer, [stop]), []
    for token in bytes_tokenizer.encode(text).ids:
        pieces.append(out.add(token))
        assert text.split(stop)[0].startswith("".join(pieces))
        if out.stopped:
            break
    pieces.append(out.finish())
    assert "".join(pieces) == text.split(stop)[0]
    assert out.stopped == (stop in text)


def test_a_cut_off_character_is_shown_as_such_at_the_end(bytes_tokenizer: Tokenizer) -> None:
    out = Text(bytes_tokenizer, [])
    assert [out.add(token) for token in bytes_tokenizer.encode("a€").ids[:3]] == ["a", "", ""]
    assert out.finish() == "\N{REPLACEMENT CHARACTER}"


def test_an_answers_first_blank_is_shown() -> None:
    """A SentencePiece answer that is decoded alone loses it."""
    made = sentencepiece()
    prompt = made.encode("assistant:\n", add_special_tokens=False).ids
    answer = made.encode("assistant:\n  yes", add_special_tokens=False).ids[len(prompt) :]
    out = Text(made, [], prompt)

    assert "".join([*map(out.add, answer), out.finish()]) == "  yes"
    assert made.decode(answer) == " yes"


# --- choosing -----------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_by_their_probability_within_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    dice = torch.Generator().manual_seed(1)
    drawn = [choose(logits, Sampling(top_p=0.9), dice) for _ in range(4000)]
    fractions = [drawn.count(token) / len(drawn) for token in range(4)]
    # 0.5 + 0.3 < 0.9, so the third token is included and the fourth is not; the rest is scaled to 1.
    assert fractions == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=0.03)
    cold = [choose(logits, Sampling(temperature=0.5), dice) for _ in range(4000)]
    squares = [0.25, 0.09, 0.0225, 0.0025]
    assert cold.count(0) / 4000 == pytest.approx(squares[0] / sum(squares), abs=0.03)


# --- the device ---------------------------------------------------------------------------------------------------


def test_the_process_sees_one_gpu_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert (choose_device(Settings(serve_gpu=2)), os.environ["CUDA_VISIBLE_DEVICES"]) == ("cuda", "2")
    assert (choose_device(Settings(serve_gpu=None)), os.environ["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run this on a host with a GPU")
def test_a_gpu_answers_as_plain_peft_on_a_gpu_does(shop: Shop, tmp_path: Path) -> None:
    engine = Engine(tmp_path, shop.storage, "cuda")
    for base, adapter in [("one", None), ("one", "quiet"), ("two", None)]:
        body = {"model": "m", "messages": ASK, "temperature": 0, "max_tokens": 8, **shop.chosen(base, adapter)}
        assert "".join(engine.answer(parse(json.dumps(body).encode()))) == _plain(shop, base, adapter, 8, "cuda")


# --- the process --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_process_serves_on_the_address_of_the_settings(
    settings: Settings, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = processes.free_port()
    monkeypatch.setenv("TUNERY_SERVER_URL", f"http://127.0.0.1:{port}")
    with (tmp_path / "log").open("wb") as log:
        server = processes.spawn([sys.executable, "-m", "worker.server"], output=log, cwd=ROOT)
    try:
        with _client(port) as client:
            assert processes.wait_until(lambda: _answers(port), seconds=60, alive=lambda: server.poll() is None), (
                processes.tail(tmp_path / "log")
            )
            manifest.publish(open_storage(settings), "models/one", shop.folders["one"])
            reply = client.chat.completions.create(
                model="one", messages=ASK, temperature=0, max_tokens=8, extra_body=shop.chosen("one")
            )
        assert reply.choices[0].message.content == _plain(shop, "one", None, 8)
    finally:
        # uvicorn shuts down and then exits by the signal that it was sent.
        assert processes.stop(server, (signal.SIGTERM, 20)) == -signal.SIGTERM, processes.tail(tmp_path / "log")


def _answers(port: int) -> bool:
    try:
        return bool(_health(port)["status"] == "ok")
    except OSError:
        return False
