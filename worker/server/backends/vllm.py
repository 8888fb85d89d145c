"""Answers through vLLM servers: prompts are rendered and text is decoded here, tokens are chosen there.

They receive and return token ids, so the prompt is the same as in training, whichever template the base comes with.
"""

import asyncio
import json
import logging
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Condition, Thread
from typing import Any, TypeVar

import httpx2

from tunery.errors import TuneryError, Unavailable, Unsupported
from tunery.planning import servable
from tunery.planning.servable import AdapterTraits, Limits
from tunery.serving import Chosen, Files
from tunery.storage import Storage
from worker.server import folders, grammar, prompting
from worker.server.answer import Answer
from worker.server.fleet import Fleet, Target
from worker.server.prompting import Prepared
from worker.server.remote import Reader, RemoteAnswer, Tokens
from worker.server.rendering import Renderings
from worker.server.replica import Adapter, CannotServe
from worker.server.schemas import ChatRequest

log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.05
"""The longest time until a client's disconnection is noticed."""

Result = TypeVar("Result")


class VllmBackend:
    """A back end that uses a fleet of vLLM servers. `served_dir`: the path of `models_dir` on those servers."""

    def __init__(
        self, fleet: Fleet, models_dir: Path, storage: Storage, *, served_dir: Path, limits: Limits, streams: int
    ) -> None:
        self.fleet = fleet
        self.streams = streams
        self.loaded: str | None = None
        self.device = "vllm"
        self._models_dir = models_dir
        self._served_dir = served_dir
        self._storage = storage
        self._limits = limits
        self._renderings = Renderings()
        self._arrived = Condition()
        self._open: set[RemoteAnswer] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        self._start(fleet.watch())

    def answer(self, request: ChatRequest) -> RemoteAnswer:
        """Returns the answer to a request; the servers have loaded its adapter when this returns.

        Raises CannotRender, PromptTooLong, Unsupported and InvalidValue (the request's fault), CannotServe, NoReplica,
        StorageFailed, ObjectMissing, ChecksumMismatch.
        """
        kept_to = _kept_to(request)
        target = self._target(request.chosen)
        length = self._start(self.fleet.length(target)).result()
        prepared = prompting.prepare(request, self._renderings.of(self._template_folder(request.chosen)), length)
        tokens = Tokens(self._arrived)
        reader = Reader(tokens, prepared.rendering.template.tokenizer, prepared.top_logprobs)
        reading = self._begin(target, _body(prepared) | kept_to, reader, tokens)
        self.loaded = request.chosen.template.id
        return self._written(prepared, tokens, reading)

    def load(self, chosen: Chosen) -> None:
        """Has every server that has the base load the adapter. Raises as `answer` does."""
        target = self._target(chosen)
        if target.adapter is not None:
            self._start(self.fleet.load(target)).result()

    def advance(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """Waits for tokens; returns the answers of which a piece can be read now."""
        with self._arrived:
            # For any open answer: one that is about to join must not wait for the others' next tokens.
            self._arrived.wait_for(lambda: any(answer.is_ready for answer in self._open), _WAIT_SECONDS)
        return [answer for answer in answers if isinstance(answer, RemoteAnswer) and answer.is_ready]

    def close(self) -> None:
        """Closes the connections; the servers keep what they have loaded."""
        self._start(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.fleet.end()

    def _target(self, chosen: Chosen) -> Target:
        """Raises CannotServe."""
        base = frozenset({chosen.weights.id, chosen.weights.manifest_sha256})
        adapter = None if chosen.adapter is None else self._adapter(chosen, chosen.adapter, base)
        return Target(chosen.weights.id, base, adapter)

    def _adapter(self, chosen: Chosen, files: Files, base: frozenset[str]) -> Adapter:
        is_known = self.fleet.knows(files.manifest_sha256)
        folder = (folders.fetch if is_known else folders.check)(self._models_dir, self._storage, files)
        if not is_known:
            config = json.loads((folder / "adapter_config.json").read_bytes())
            on_four_bits = chosen.tuned is not None and chosen.tuned.technique == "qlora"
            found = servable.why_not(AdapterTraits.of_config(config, on_four_bits=on_four_bits), self._limits)
            if found is not None:
                raise CannotServe(reason=found[1])
        return Adapter(files.manifest_sha256, str(self._served_dir / files.manifest_sha256), base)

    def _template_folder(self, chosen: Chosen) -> Path:
        return folders.fetch_texts(self._models_dir, self._storage, chosen.template)

    def _begin(self, target: Target, body: dict[str, Any], reader: Reader, tokens: Tokens) -> "Future[None]":
        """Returns the task that reads the answer, once a server has started it."""
        begun: Future[None] = Future()
        reading = self._start(self._read(target, body, reader, tokens, begun))
        begun.result()
        return reading

    async def _read(
        self, target: Target, body: dict[str, Any], reader: Reader, tokens: Tokens, begun: "Future[None]"
    ) -> None:
        try:
            replica, stream = await self.fleet.open(target, body)
        except BaseException as error:
            begun.set_exception(error)
            raise
        begun.set_result(None)
        try:
            await reader.read(stream.aiter_raw())
            tokens.end()
        except httpx2.HTTPError as error:
            replica.lose(error)
        except TuneryError as error:
            tokens.end(error)
        except Exception:  # nobody reads this task's result
            log.exception("an answer of vLLM could not be read")
        finally:
            tokens.end(Unavailable(part="The model server"))  # after any error: a reader must not wait forever
            await self.fleet.close(target, replica, stream)

    def _written(self, prepared: Prepared, tokens: Tokens, reading: "Future[None]") -> RemoteAnswer:
        def stop() -> None:
            reading.cancel()
            with self._arrived:
                self._open.discard(answer)

        answer = RemoteAnswer(
            source=tokens,
            tokenizer=prepared.rendering.template.tokenizer,
            prompt_ids=prepared.ids,
            context=prepared.context,
            eos_ids=prepared.rendering.eos_ids,
            stops=prepared.stops,
            spelling=prepared.spelling,
            on_close=stop,
        )
        with self._arrived:
            self._open.add(answer)
        return answer

    def _start(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def _body(prepared: Prepared) -> dict[str, Any]:
    """Returns the body for vLLM's completions. Every option is set, as a server takes its own defaults from the base's
    folder.
    """
    sampling = prepared.sampling
    body: dict[str, Any] = {
        "prompt": prepared.ids,
        "stream": True,
        "max_tokens": prepared.max_tokens,
        "temperature": 0 if sampling.is_greedy else sampling.temperature,
        "top_p": 1.0 if sampling.is_greedy else sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": sorted(prepared.rendering.eos_ids),
        "return_token_ids": True,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed % 2**63
    if prepared.top_logprobs is not None:
        body |= {"logprobs": prepared.top_logprobs, "return_tokens_as_token_ids": True}
    return body


def _kept_to(request: ChatRequest) -> dict[str, Any]:
    """Returns the constraint on the answer as vLLM's options. Raises Unsupported, and InvalidValue for a schema that
    could stop vLLM for all of its users: it compiles some schemas by the same library.
    """
    if request.must_call:
        raise Unsupported(param="tool_choice", what="A required tool call", instead="Use 'auto'.")
    grammar.of_format(request.response_format)
    schema = grammar.schema_of(request.response_format)
    return {} if schema is None else {"structured_outputs": {"json": schema}}
