"""`tunery chat MODEL`: a conversation with a base, a tuned model or a checkpoint, word by word."""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from tunery.cli import comparing, output
from tunery.cli.client import ApiClient, Refused
from tunery.cli.options import connect


def chat(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A base, an alias, a tuned model or a checkpoint.")],
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Ask this question and exit.", show_default="a conversation")
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", "-s", help="A system message: the one of the training rows, if they had one."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 gives the same answer every time.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Token limit of an answer.")] = 512,
    compare: Annotated[
        bool, typer.Option("--compare", "-c", help="Also ask its base, and show the answers side by side.")
    ] = False,
    against: Annotated[
        list[str] | None, typer.Option(help="Compare with this model instead of the base; repeatable.")
    ] = None,
) -> None:
    """Chat with a model; end with Ctrl-D or Ctrl-C. Compared models answer each question independently."""
    api = connect(context)
    if compare or against:
        body = {"models": [*(against or ()), model], "temperature": temperature, "max_completion_tokens": max_tokens}
        for question in _questions() if message is None else (message,):
            comparing.compare(api, question, body if system is None else {**body, "system": system})
        return
    options = {"model": model, "temperature": temperature, "max_completion_tokens": max_tokens, "stream": True}
    messages = [{"role": "system", "content": system}] if system is not None else []
    for question in _questions() if message is None else (message,):
        messages.append({"role": "user", "content": question})
        answer = ""
        for text in _answer(api, {**options, "messages": messages}):
            answer += text
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        messages.append({"role": "assistant", "content": answer})


def _questions() -> Iterator[str]:
    """Yields the lines that are typed or piped in."""
    import readline  # noqa: F401 (it gives input() its editing keys)

    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        output.note("Ctrl-D ends the conversation.")
    while True:
        try:
            text = input(prompt)
        except EOFError:
            return
        if text.strip():
            yield text


def _answer(api: ApiClient, body: dict[str, Any]) -> Iterator[str]:
    """Yields the parts of an answer as they arrive. Raises Refused, also for an error in the middle of it."""
    for event in _events(api.stream("/chat/completions", body=body)):
        if error := event.get("error"):
            raise Refused(message=error["message"])
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""


def _events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yields the JSON of server-sent events, up to [DONE]."""
    for line in _lines(chunks):
        if line == b"data: [DONE]":
            return
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.rstrip(b"\r") for line in lines)
    yield rest
