"""A base with many adapters in storage, and the embedded back end, driven as the model server drives it."""

import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tunery.artifacts import manifest
from tunery.storage import Directory
from worker.server.backends.embedded import Engine
from worker.server.generation import Generation
from worker.server.schemas import ChatRequest, parse

RIVERS = ({"role": "user", "content": "Name three rivers."},)
TEMPLATE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Took:
    """The number of tokens written, the wall-clock time and the processor time, which a busy machine blurs less."""

    tokens: int
    seconds: float
    cpu_seconds: float


def rates(runs: Mapping[str, Sequence[Took]]) -> dict[str, Any]:
    """Returns the median tokens a second of each kind of run, by wall-clock and by processor time."""
    return {
        name: {
            "tokens_per_second": round_(median(run.tokens / run.seconds for run in took)),
            "tokens_per_cpu_second": round_(median(run.tokens / run.cpu_seconds for run in took)),
        }
        for name, took in runs.items()
    }


def times_faster(one: Sequence[Took], other: Sequence[Took]) -> dict[str, float]:
    """Returns the ratio of two kinds' tokens a second: the median over pairs, by both times."""
    pairs = [(a, b) for a, b in zip(one, other, strict=False)]
    return {
        "clock": round_(median(a.tokens / a.seconds / (b.tokens / b.seconds) for a, b in pairs)),
        "processor": round_(median(a.tokens / a.cpu_seconds / (b.tokens / b.cpu_seconds) for a, b in pairs)),
    }


def zipf_order(adapters: int, requests: int, rounds: int) -> list[list[int]]:
    """Returns the adapters asked for in each round, the k-th in proportion to 1/k: the same ones in other orders."""
    dice = random.Random(1)
    order = dice.choices(range(adapters), [1 / (k + 1) for k in range(adapters)], k=requests)
    return [dice.sample(order, requests) for _ in range(rounds)]


class Shop:
    """A base and adapters in storage, described as in the API's requests."""

    def __init__(self, root: Path, base: Path, rank: int) -> None:
        self.root, self.base = root, base
        self.storage = Directory(root / "objects")
        self.rank = rank
        self.base_files = self._publish("base", base)
        self.adapters: list[dict[str, str]] = []

    @property
    def adapter_bytes(self) -> int:
        return (self.root / "adapter" / "adapter_model.safetensors").stat().st_size

    def stock(self, count: int) -> None:
        """Makes adapters until there are `count`."""
        self.adapters += self._make(range(len(self.adapters), count))

    def _make(self, numbers: range) -> Iterator[dict[str, str]]:
        if not numbers:
            return
        folder = self.root / "adapter"
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(self.base), config).save_pretrained(str(folder))
        for name in TEMPLATE:
            shutil.copy(self.base / name, folder)
        weights = load_file(folder / "adapter_model.safetensors")
        torch.manual_seed(1)
        noise = {key: torch.randn_like(value) * 0.02 for key, value in weights.items()}
        for number in numbers:
            made = {key: value * (1 + number / 1000) for key, value in noise.items()}
            save_file(made, folder / "adapter_model.safetensors", {"format": "pt"})
            yield self._publish(f"adapter{number}", folder)

    def _publish(self, name: str, folder: Path) -> dict[str, str]:
        _, sha256 = manifest.publish(self.storage, f"models/{name}", folder)
        return {"id": name, "prefix": f"models/{name}", "manifest_sha256": sha256}

    def publish_merged(self, number: int) -> dict[str, str]:
        """Publishes a whole model: the base with an adapter merged into its weights."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        folder, adapter = self.root / "merged", self.adapters[number]
        prefix = adapter["prefix"]
        listed = manifest.load(self.storage, prefix, adapter["manifest_sha256"])
        manifest.fetch(self.storage, prefix, listed, self.root / "plain" / str(number))
        PeftModel.from_pretrained(model, self.root / "plain" / str(number)).merge_and_unload().save_pretrained(folder)
        for name in TEMPLATE:
            shutil.copy(self.base / name, folder)
        return self._publish("merged", folder)

    def request(
        self,
        adapter: int | None,
        tokens: int,
        *,
        merged: dict[str, str] | None = None,
        messages: Sequence[dict[str, str]] = RIVERS,
        project_id: str | None = None,
    ) -> ChatRequest:
        """Returns a chat request to the base, an adapter on it, or a merged model."""
        tuned = None if adapter is None else {**self.adapters[adapter], "technique": "lora"}
        if merged is not None:
            tuned = {**merged, "technique": "full"}
        body = {
            "model": "m",
            "messages": messages,
            "temperature": 0,
            "max_tokens": tokens,
            "tunery_model": {"base": self.base_files, "tuned": tuned, "project_id": project_id},
        }
        return parse(json.dumps(body).encode())

    def engine(self, name: str, **options: Any) -> Engine:
        return Engine(self.root / name, self.storage, **options)


def answer_all(engine: Engine, requests: Sequence[ChatRequest], at_once: int) -> list[tuple[Generation, str]]:
    """Returns each request's answer and text, as `RequestQueue` drives a back end, loading in other threads."""
    ended: dict[int, tuple[Generation, str]] = {}
    waiting = list(reversed(list(enumerate(requests))))
    running: list[_Writing] = []
    with ThreadPoolExecutor(4) as loaders:
        loading: list[tuple[int, Future[Generation]]] = []
        while waiting or loading or running:
            while waiting and len(loading) + len(running) < at_once:
                number, request = waiting.pop()
                loading.append((number, loaders.submit(engine.answer, request)))
            for one in [one for one in loading if one[1].done() or not running]:
                loading.remove(one)
                running.append(_Writing(one[0], one[1].result()))
            ready = {id(answer) for answer in engine.advance([one.answer for one in running])}
            for writing in [one for one in running if id(one.answer) in ready]:
                if writing.ends():
                    running.remove(writing)
                    ended[writing.number] = writing.answer, "".join(writing.text)
    return [ended[number] for number in range(len(requests))]


class _Writing:
    """An answer that is being read."""

    def __init__(self, number: int, answer: Generation) -> None:
        self.number, self.answer = number, answer
        self.text: list[str] = []
        self._pieces = iter(answer)

    def ends(self) -> bool:
        """Reads a piece; returns whether there was none."""
        piece = next(self._pieces, None)
        self.text += [] if piece is None else [piece]
        return piece is None


def drive(engine: Engine, requests: Sequence[ChatRequest], at_once: int) -> Took:
    """Answers all requests, at most `at_once` together."""
    begun = time.perf_counter(), time.process_time()
    tokens = sum(answer.completion_tokens for answer, _ in answer_all(engine, requests, at_once))
    return Took(tokens, time.perf_counter() - begun[0], time.process_time() - begun[1])


def round_(value: float) -> float:
    return float(f"{value:.3g}")
