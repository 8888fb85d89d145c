"""Many adapters on one base in the model server: memory, throughput and loading.

    python -m bench.serving BASE OUT.json [--rank 16] [--tokens 32] [--rounds 5]

BASE is a converted base (SmolLM2-135M). Adapters are random, on all linear layers. Everything runs on the CPU through
the embedded back end as the model server drives it; "switching" is PEFT's `set_adapter`, one request after another.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bench import service
from tunery.artifacts import manifest
from tunery.storage import Directory
from worker.server.backends.embedded import Engine
from worker.server.generation import Generation
from worker.server.schemas import ChatRequest, parse
from worker.server.streams import Alone
from worker.trainer.rope import LengthRope

MIXED, RESIDENT, MANY = 16, 64, 256
REQUESTS = 96
"""Of the traffic over MANY adapters."""


@dataclass(frozen=True)
class Took:
    """Tokens that were written, in the time of the clock and of the processor, which a busy machine blurs less."""

    tokens: int
    seconds: float
    cpu_seconds: float


def rates(runs: Mapping[str, Sequence[Took]]) -> dict[str, Any]:
    """Median tokens a second of each kind of run, by the clock and by the processor."""
    return {
        name: {
            "tokens_per_second": round_(median(run.tokens / run.seconds for run in took)),
            "tokens_per_cpu_second": round_(median(run.tokens / run.cpu_seconds for run in took)),
        }
        for name, took in runs.items()
    }


def times_faster(one: Sequence[Took], other: Sequence[Took]) -> dict[str, float]:
    """How many times the other's tokens a second a kind of run writes: the median of pairs, by both times."""
    pairs = [(a, b) for a, b in zip(one, other, strict=False)]
    return {
        "clock": round_(median(a.tokens / a.seconds / (b.tokens / b.seconds) for a, b in pairs)),
        "processor": round_(median(a.tokens / a.cpu_seconds / (b.tokens / b.cpu_seconds) for a, b in pairs)),
    }


class Shop:
    """A base and adapters in storage, as the API would name them."""

    def __init__(self, root: Path, base: Path, rank: int) -> None:
        self.root, self.base = root, base
        self.storage = Directory(root / "objects")
        self.rank = rank
        self.base_files = self._publish("base", base)
        self.adapters = list(self._make(MANY))

    @property
    def adapter_bytes(self) -> int:
        return (self.root / "adapter" / "adapter_model.safetensors").stat().st_size

    def _make(self, count: int) -> Iterator[dict[str, str]]:
        folder = self.root / "adapter"
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(self.base), config).save_pretrained(str(folder))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            shutil.copy(self.base / name, folder)
        weights = load_file(folder / "adapter_model.safetensors")
        torch.manual_seed(1)
        noise = {key: torch.randn_like(value) * 0.02 for key, value in weights.items()}
        for number in range(count):
            made = {key: value * (1 + number / 1000) for key, value in noise.items()}
            save_file(made, folder / "adapter_model.safetensors", {"format": "pt"})
            yield self._publish(f"adapter{number}", folder)

    def _publish(self, name: str, folder: Path) -> dict[str, str]:
        _, sha256 = manifest.publish(self.storage, f"models/{name}", folder)
        return {"id": name, "prefix": f"models/{name}", "manifest_sha256": sha256}

    def request(self, adapter: int | None, tokens: int) -> ChatRequest:
        tuned = None if adapter is None else {**self.adapters[adapter], "technique": "lora"}
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": "Name three rivers."}],
            "temperature": 0,
            "max_tokens": tokens,
            "tunery_model": {"base": self.base_files, "tuned": tuned},
        }
        return parse(json.dumps(body).encode())

    def engine(self, name: str, **options: Any) -> Engine:
        return Engine(self.root / name, self.storage, **options)


def drive(engine: Engine, requests: Sequence[ChatRequest], at_once: int) -> "Took":
    """Answers all requests as `Desk` drives a back end, loading in other threads."""
    begun, tokens = (time.perf_counter(), time.process_time()), 0
    waiting = list(reversed(requests))
    running: list[tuple[Generation, Iterator[str]]] = []
    with ThreadPoolExecutor(4) as loaders:
        loading: list[Any] = []
        while waiting or loading or running:
            while waiting and len(loading) + len(running) < at_once:
                loading.append(loaders.submit(engine.answer, waiting.pop()))
            for one in [one for one in loading if one.done() or not running]:
                loading.remove(one)
                running.append((one.result(), iter(one.result())))
            ready = {id(answer) for answer in engine.advance([answer for answer, _ in running])}
            for answer, pieces in list(running):
                if id(answer) in ready and next(pieces, None) is None:
                    running.remove((answer, pieces))
                    tokens += answer.completion_tokens
    return Took(tokens, time.perf_counter() - begun[0], time.process_time() - begun[1])


def throughput(shop: Shop, engine: Engine, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of the same batch on the base, over as many adapters, and one at a time; in turns."""
    base = [shop.request(None, tokens) for _ in range(MIXED)]
    mixed = [shop.request(number, tokens) for number in range(MIXED)]
    switch = Switching(shop, engine)
    for requests in (base, mixed):
        drive(engine, requests, MIXED)
    found: dict[str, list[Took]] = {"base": [], "mixed": [], "switching": [], "adapter_names": []}
    for round in range(rounds):
        for name, requests in (("base", base), ("mixed", mixed)):
            found[name].append(drive(engine, requests, MIXED))
        if round < 2:
            found["switching"].append(switch.run(tokens))
            found["adapter_names"].append(switch.mixed_batch(tokens))
    return {
        **rates(found),
        "mixed_of_base": times_faster(found["mixed"], found["base"]),
        "mixed_of_switching": times_faster(found["mixed"], found["switching"]),
        "mixed_of_adapter_names": times_faster(found["mixed"], found["adapter_names"]),
    }


class Switching:
    """One model with MIXED adapters by PEFT, which answers one request after another."""

    def __init__(self, shop: Shop, engine: Engine) -> None:
        answer = engine.answer(shop.request(None, 1))
        self.prompt = answer.prompt_ids
        answer.close()
        model: Any = AutoModelForCausalLM.from_pretrained(shop.base, dtype=torch.float32)
        for number in range(MIXED):
            folder = shop.root / "plain" / str(number)
            prefix, sha256 = f"models/adapter{number}", shop.adapters[number]["manifest_sha256"]
            manifest.fetch(shop.storage, prefix, manifest.load(shop.storage, prefix, sha256), folder)
            if number == 0:
                self.model: Any = PeftModel.from_pretrained(model, folder, adapter_name="0")
            else:
                self.model.load_adapter(folder, adapter_name=str(number))
        self.model.eval()

    def run(self, tokens: int) -> Took:
        begun = time.perf_counter(), time.process_time()
        for number in range(MIXED):
            self.model.set_adapter(str(number))
            stream = Alone(self.model, self.prompt, LengthRope())
            for _ in range(tokens):
                stream.push(int(stream.logits().argmax()))
        return Took(MIXED * tokens, time.perf_counter() - begun[0], time.process_time() - begun[1])

    @torch.inference_mode()
    def mixed_batch(self, tokens: int) -> Took:
        """The same rows together by PEFT's own `adapter_names`."""
        ids = torch.tensor([self.prompt] * MIXED)
        begun = time.perf_counter(), time.process_time()
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=list(map(str, range(MIXED))),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        return Took(MIXED * tokens, time.perf_counter() - begun[0], time.process_time() - begun[1])


def memory(shop: Shop, engine: Engine) -> dict[str, Any]:
    """Resident memory with the base alone, and with RESIDENT adapters beside it."""
    drive(engine, [shop.request(None, 2)], 1)
    base = resident()
    drive(engine, [shop.request(number, 2) for number in range(RESIDENT)], 1)
    drive(engine, [shop.request(number, 2) for number in range(MIXED)], MIXED)
    both = resident()
    over = both / (base + RESIDENT * shop.adapter_bytes) - 1
    return {"base": base, "adapter": shop.adapter_bytes, "both": both, "over_base_and_adapters": round_(over)}


def loading(shop: Shop, engine: Engine) -> dict[str, Any]:
    """Seconds until an adapter that is not in memory is ready to answer: fetched from storage, and from this host."""

    def load(engine: Engine, number: int) -> float:
        begun = time.perf_counter()
        engine.answer(shop.request(number, 1)).close()
        return time.perf_counter() - begun

    numbers = range(RESIDENT, RESIDENT + 10)
    other = shop.engine("models")
    other.answer(shop.request(None, 1)).close()
    found = {"storage": [load(engine, one) for one in numbers], "host": [load(other, one) for one in numbers]}
    return {name: {"median": round_(median(v)), "worst": round_(max(v))} for name, v in found.items()}


def zipf(shop: Shop, tokens: int, rounds: int) -> dict[str, Any]:
    """Traffic over MANY adapters, the k-th as often as 1/k: with room for RESIDENT of them, and for all."""
    dice = random.Random(1)
    order = dice.choices(range(MANY), [1 / (k + 1) for k in range(MANY)], k=REQUESTS)
    base = AutoModelForCausalLM.from_pretrained(shop.base, dtype=torch.float32)
    base_bytes = sum(parameter.nbytes for parameter in base.parameters())
    few = shop.engine("models", memory_bytes=base_bytes + RESIDENT * shop.adapter_bytes)
    every = shop.engine("models", memory_bytes=base_bytes + 2 * MANY * shop.adapter_bytes)
    for engine in (few, every):
        drive(engine, [shop.request(number, 1) for number in range(MANY)], MIXED)
    found: dict[str, list[Took]] = {"64 slots": [], "all resident": []}
    for _ in range(rounds):
        dice.shuffle(order)
        for name, engine in (("64 slots", few), ("all resident", every)):
            found[name].append(drive(engine, [shop.request(number, tokens) for number in order], MIXED))
    return {
        "requests": REQUESTS,
        "adapters_asked": len(set(order)),
        **rates(found),
        "slots_of_all": times_faster(found["64 slots"], found["all resident"]),
    }


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def round_(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        shop = Shop(Path(root), asked.base, asked.rank)
        engine = shop.engine("models")
        found = service.hardware()
        found |= {"rank": asked.rank, "tokens": asked.tokens, "threads": torch.get_num_threads()}
        stages: dict[str, Callable[[], dict[str, Any]]] = {
            "memory": lambda: memory(shop, engine),
            "loading_seconds": lambda: loading(shop, engine),
            "throughput": lambda: throughput(shop, engine, asked.tokens, asked.rounds),
            "zipf": lambda: zipf(shop, asked.tokens // 2, max(asked.rounds // 2, 1)),
        }
        for name, stage in stages.items():
            found[name] = stage()
            found["load"] = [round_(value) for value in os.getloadavg()]
            asked.out.write_text(json.dumps(found, indent=1) + "\n")
            print(json.dumps({name: found[name]}), flush=True)


if __name__ == "__main__":
    main()
