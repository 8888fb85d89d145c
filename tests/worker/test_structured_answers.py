"""JSON, tool calls, several answers and log probabilities of a served model, requested by the official client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import tiny_models
import torch
from openai import OpenAI
from pydantic import BaseModel
from served import serving
from transformers import AutoModelForCausalLM

from tunery.artifacts import manifest
from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate
from tunery.storage import Directory
from worker.server.backends.embedded import Engine
from worker.server.replies import Reply, StreamedChoice
from worker.server.schemas import parse

ASK: list[Any] = [{"role": "user", "content": "Where is my card?"}]
CARD: Any = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "lost": {"type": "boolean"}},
    "required": ["colour", "lost"],
    "additionalProperties": False,
}
FIND: Any = {"type": "function", "function": {"name": "find_card", "parameters": CARD}}
STOP: Any = {"type": "function", "function": {"name": "stop_card", "parameters": CARD}}


class Card(BaseModel):
    colour: Literal["red", "blue"]
    lost: bool


def _format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def _intersected(count: int) -> dict[str, Any]:
    """Returns a schema of a text to which many patterns apply, which takes hours and all memory to compile."""
    patterns = [{"type": "string", "pattern": f".*{'a' * 20}.{{{number}}}$"} for number in range(10, 10 + count)]
    return {"type": "object", "properties": {"text": {"allOf": patterns}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(
        tmp_path_factory.mktemp("base") / "one", seed=1, template=tiny_models.CALLS, max_position_embeddings=4096
    )


@pytest.fixture(scope="module")
def body(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Yields what the API adds to a request, and under "port" the server's port."""
    storage = Directory(tmp_path_factory.mktemp("objects"))
    _, sha256 = manifest.publish(storage, "models/one", folder)
    files = {"id": "one", "prefix": "models/one", "manifest_sha256": sha256}
    with serving(Engine(tmp_path_factory.mktemp("models"), storage)) as port:
        yield {"tunery_model": {"base": files, "tuned": None}, "port": port}


@pytest.fixture(scope="module")
def ask(body: dict[str, Any]) -> Any:
    port = body.pop("port")
    client = OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    )

    def ask(**asked: Any) -> Any:
        return client.chat.completions.create(
            **{"model": "one", "messages": ASK, "extra_body": body, "max_tokens": 400, "seed": 3} | asked
        )

    ask.parse = lambda **asked: client.chat.completions.parse(  # type: ignore[attr-defined]
        **{"model": "one", "messages": ASK, "extra_body": body, "max_tokens": 400, "seed": 3} | asked
    )
    return ask


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_keeps_to_a_schema(ask: Any, seed: int, temperature: float) -> None:
    """A model of random weights writes anything if nothing constrains it."""
    wanted = {"type": "json_schema", "json_schema": {"name": "card", "schema": CARD, "strict": True}}

    choice = ask(response_format=wanted, seed=seed, temperature=temperature).choices[0]

    assert choice.finish_reason == "stop"
    found = json.loads(choice.message.content)
    assert found.keys() == {"colour", "lost"}
    assert found["colour"] in ("red", "blue")
    assert isinstance(found["lost"], bool)


def test_a_class_is_read_from_an_answer(ask: Any) -> None:
    assert isinstance(ask.parse(response_format=Card).choices[0].message.parsed, Card)


@pytest.mark.parametrize("inner", [False, True])
def test_an_object_has_no_properties_but_those_of_the_schema(ask: Any, inner: bool) -> None:
    schema: Any = {name: CARD[name] for name in ("type", "properties", "required")}
    wanted = {"type": "object", "properties": {"card": schema}, "required": ["card"]} if inner else schema

    choice = ask(response_format={"type": "json_schema", "json_schema": {"name": "card", "schema": wanted}}).choices[0]

    found = json.loads(choice.message.content)
    assert (found["card"] if inner else found).keys() == {"colour", "lost"}


def test_an_answer_is_any_object_where_no_schema_is_named(ask: Any) -> None:
    text = ask(response_format={"type": "json_object"}, max_tokens=20, temperature=0).choices[0].message.content
    assert text.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (_format({"type": "odd"}), "odd"),
        (_format({"type": "string", "pattern": "^(?=a)b$"}), "regex parse error: look-around, .*not supported"),
        (_format({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "use 'anyOf'"),
        (_format({"properties": {f"property{i}": {"type": "integer"} for i in range(15_000)}}), "too large"),
        (_format(_intersected(16)), "patterns are too complex"),
        pytest.param(
            {
                "tools": [{"type": "function", "function": {"name": "find_card", "parameters": _intersected(16)}}],
                "tool_choice": "required",
            },
            "Invalid 'tools': its patterns are too complex",
            marks=pytest.mark.slow,
        ),
        ({"response_format": {"type": "json_schema"}}, "'json_schema' goes only with"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tool_choice": "required"}, "'tools' is empty"),
        (
            {"tools": [FIND], "tool_choice": {"type": "function", "function": {"name": "stop_card"}}},
            r"not in 'tools' \(find_card\)",
        ),
        ({"top_logprobs": 3}, "needs 'logprobs'"),
    ],
)
def test_what_cannot_be_kept_to_is_refused(ask: Any, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        ask(**asked)
    assert ask(max_tokens=1).choices


def test_a_required_call_is_made_whatever_form_a_text_would_have(ask: Any) -> None:
    """The library instructor asks for both."""
    wanted = {"type": "json_schema", "json_schema": {"name": "card", "schema": CARD, "strict": True}}
    choice = ask(tools=[FIND], tool_choice="required", response_format=wanted).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert [call.function.name for call in choice.message.tool_calls] == [FIND["function"]["name"]]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_required_call_is_one_of_the_tools(ask: Any, seed: int) -> None:
    choice = ask(tools=[FIND, STOP], tool_choice="required", seed=seed).choices[0]

    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert call.function.name in ("find_card", "stop_card")
    assert json.loads(call.function.arguments).keys() == {"colour", "lost"}


def test_a_named_tool_is_the_one_that_is_called_and_its_result_is_sent_back(ask: Any) -> None:
    named = {"type": "function", "function": {"name": "stop_card"}}

    choice = ask(tools=[FIND, STOP], tool_choice=named).choices[0]

    assert choice.finish_reason == "stop"
    [call] = choice.message.tool_calls
    assert call.function.name == "stop_card"
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    assert ask(messages=[*ASK, choice.message.model_dump(exclude_none=True), result], tools=[STOP], max_tokens=2)


def test_a_stream_has_the_call_that_the_whole_answer_has(ask: Any) -> None:
    asked: dict[str, Any] = {"tools": [FIND], "tool_choice": "required", "temperature": 0}
    [whole] = ask(**asked).choices[0].message.tool_calls

    chunks = list(ask(**asked, stream=True))

    called = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.function.arguments for call in called] == [whole.function.arguments]
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_text_stays_text_where_tools_are_offered(ask: Any) -> None:
    asked: dict[str, Any] = {"tools": [FIND], "temperature": 0, "max_tokens": 24}
    choice = ask(**asked).choices[0]
    assert choice.message.tool_calls is None
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(**asked, stream=True))
    assert streamed == choice.message.content


def test_each_of_several_answers_has_a_seed_of_its_own(ask: Any) -> None:
    reply = ask(n=3, max_tokens=12, seed=5)

    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == ask(max_tokens=12, seed=5).choices[0].message.content
    assert reply.usage.completion_tokens == 36
    assert reply.usage.prompt_tokens == ask(max_tokens=1).usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in ask(n=3, max_tokens=12, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_log_probabilities_are_those_of_plain_transformers(ask: Any, folder: Path) -> None:
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_tokens": 8, "temperature": 0}

    content = ask(**asked).choices[0].logprobs.content

    template = ChatTemplate.load(folder)
    prompt = template.encode_prompt([Message(**ASK[0])])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        ids = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
        every = model(input_ids=ids).logits[0].log_softmax(-1)
    answer = ids[0, len(prompt) :].tolist()
    assert [one.token for one in content] == [
        template.tokenizer.decode([id], skip_special_tokens=False) for id in answer
    ]
    for place, (one, id) in enumerate(zip(content, answer, strict=True)):
        row = every[len(prompt) + place - 1]
        assert one.logprob == pytest.approx(float(row[id]), abs=1e-4)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    streamed = [
        one
        for chunk in ask(**asked, stream=True)
        for one in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [one.logprob for one in streamed] == [one.logprob for one in content]


def test_a_slow_client_gets_the_log_probability_of_every_token(folder: Path, tmp_path: Path) -> None:
    storage = Directory(tmp_path / "objects")
    _, sha256 = manifest.publish(storage, "models/one", folder)
    files = {"id": "one", "prefix": "models/one", "manifest_sha256": sha256}
    body = {"model": "one", "messages": ASK, "temperature": 0, "max_tokens": 8, "logprobs": True, "stream": True}
    chat = parse(json.dumps(body | {"tunery_model": {"base": files, "tuned": None}}).encode())
    answer = Engine(tmp_path / "models", storage).answer(chat)
    text = iter(answer)

    choice = StreamedChoice(Reply(chat), 0, answer)
    chunks = choice.chunks(next(piece for piece in text if piece))
    sent = [next(chunks) for _ in ("the role", "the first text")]
    rest = [*text, None]  # the answer is finished while its first text is being sent
    sent += [*chunks, *(chunk for piece in rest for chunk in choice.chunks(piece))]
    choices = [chunk["choices"][0] for chunk in sent]

    assert [one["logprob"] for choice in choices if choice["logprobs"] for one in choice["logprobs"]["content"]] == [
        one.logprob for one in answer.chances
    ]
    assert len(answer.chances) == 8
