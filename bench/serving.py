"""Measures many adapters on one base in the model server: memory, throughput and loading.

    python -m bench.serving BASE OUT.json [--rank 16] [--tokens 32] [--rounds 5]
    python -m bench.serving --shape 8b OUT.json [--models FOLDER] [--graphs] [--tokens 64] [--stages ...]

BASE is a converted base (SmolLM2-135M). Adapters are random, on all linear layers. Everything runs on the CPU through
the embedded back end as the model server drives it; "switching" is PEFT's `set_adapter`, one request after another.
With `--shape` a random model of that shape is measured on a CUDA device in bf16; its checkpoint is made in FOLDER if it
is missing there. `--shape small --device cpu` tries that out. OUT.json is written after each stage.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench import make_model, service, serving_shape, train_side_by_side
from bench.shop import Shop, Took, answer_all, drive, rates, round_, times_faster, zipf_order
from tunery.artifacts import manifest
from worker.server.backends.embedded import Engine
from worker.server.streams import Alone
from worker.trainer.rope import LengthRope

MIXED, RESIDENT, MANY = 16, 64, 256
REQUESTS = 384
"""Requests of the traffic over MANY adapters: so many that those that are asked for are twice as many as RESIDENT."""
TURNS = 5
QUESTION = "Explain to a new colleague which papers a customer has to bring when a lost card is replaced."


def throughput(shop: Shop, engine: Engine, tokens: int, rounds: int) -> dict[str, Any]:
    """Measures tokens a second of MIXED requests: on the base, on as many adapters, and by PEFT; in alternation."""
    shop.stock(MIXED)
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
    """A PEFT model with MIXED adapters, which answers one request after another."""

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
        """Answers the same rows in one batch by PEFT's own `adapter_names`."""
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
    """Measures resident memory with the base alone, and with RESIDENT adapters beside it."""
    shop.stock(RESIDENT)
    drive(engine, [shop.request(None, 2)], 1)
    base = resident()
    drive(engine, [shop.request(number, 2) for number in range(RESIDENT)], 1)
    drive(engine, [shop.request(number, 2) for number in range(MIXED)], MIXED)
    both = resident()
    over = both / (base + RESIDENT * shop.adapter_bytes) - 1
    return {"base": base, "adapter": shop.adapter_bytes, "both": both, "over_base_and_adapters": round_(over)}


def loading(shop: Shop, engine: Engine) -> dict[str, Any]:
    """Measures the seconds until an adapter that is not in memory can answer: from storage, and from this host."""

    def load(engine: Engine, number: int) -> float:
        begun = time.perf_counter()
        engine.answer(shop.request(number, 1)).close()
        return time.perf_counter() - begun

    shop.stock(RESIDENT + 10)
    numbers = range(RESIDENT, RESIDENT + 10)
    other = shop.engine("models")
    other.answer(shop.request(None, 1)).close()
    found = {"storage": [load(engine, one) for one in numbers], "host": [load(other, one) for one in numbers]}
    return {name: {"median": round_(median(v)), "worst": round_(max(v))} for name, v in found.items()}


def zipf(shop: Shop, tokens: int, rounds: int) -> dict[str, Any]:
    """Measures Zipf traffic over MANY adapters (the k-th in proportion to 1/k), with room for RESIDENT and for all."""
    shop.stock(MANY)
    orders = zipf_order(MANY, REQUESTS, rounds)
    base = AutoModelForCausalLM.from_pretrained(shop.base, dtype=torch.float32)
    base_bytes = sum(parameter.nbytes for parameter in base.parameters())
    few = shop.engine("models", memory_bytes=base_bytes + RESIDENT * shop.adapter_bytes)
    every = shop.engine("models", memory_bytes=base_bytes + 2 * MANY * shop.adapter_bytes)
    for engine in (few, every):
        for number in range(MANY):
            engine.answer(shop.request(number, 1)).close()
    found: dict[str, list[Took]] = {"64 slots": [], "all resident": []}
    for order in orders:
        for name, engine in (("64 slots", few), ("all resident", every)):
            found[name].append(drive(engine, [shop.request(number, tokens) for number in order], MIXED))
    return {
        "requests": REQUESTS,
        "adapters_asked": len(set(orders[0])),
        **rates(found),
        "slots_of_all": times_faster(found["64 slots"], found["all resident"]),
    }


def latency(shop: Shop, engine: Engine) -> dict[str, Any]:
    """Measures the seconds between two tokens of one stream: on the base, with an adapter, and with it merged."""
    shop.stock(1)
    merged = shop.publish_merged(0)
    requests = {
        "base": shop.request(None, 24),
        "adapter": shop.request(0, 24),
        "merged": shop.request(None, 24, merged=merged),
    }
    for request in requests.values():
        drive(engine, [request], 1)
    gaps: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(3):
        for name, request in requests.items():
            times = [time.perf_counter() for _ in engine.answer(request)]
            gaps[name] += [later - earlier for earlier, later in pairwise(times)]
    return {name: round_(median(found)) for name, found in gaps.items()}


def chats(shop: Shop, engine: Engine, tokens: int) -> dict[str, Any]:
    """Measures processor seconds of each turn of four chats, with keys reused (within a project) and computed again."""
    shop.stock(4)
    found: dict[str, Any] = {}
    for name, project_id in (("computed", None), ("reused", "p")):
        said: list[list[dict[str, str]]] = [[] for _ in range(4)]
        found[name], cached, prompts = [], 0, 0
        for turn in range(TURNS):
            for number, chat in enumerate(said):
                chat.append({"role": "user", "content": f"{number}.{turn}: {QUESTION}"})
            requests = [shop.request(i, tokens, messages=chat, project_id=project_id) for i, chat in enumerate(said)]
            begun = time.process_time()
            answers = answer_all(engine, requests, len(requests))
            found[name].append(round_(time.process_time() - begun))
            for chat, (answer, text) in zip(said, answers, strict=True):
                chat.append({"role": "assistant", "content": text})
                cached, prompts = cached + answer.cached_tokens, prompts + answer.prompt_tokens
    found |= {"cached_of_prompt_tokens": round_(cached / prompts), "prompt_tokens_at_last": answers[0][0].prompt_tokens}
    return {**found, "last_turn_faster": round_(found["computed"][-1] / found["reused"][-1])}


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("out", type=Path)
    parser.add_argument("--stages", help="run only these, comma-separated: memory, throughput, ...")
    parser.add_argument("--shape", choices=serving_shape.SHAPES)
    parser.add_argument("--models", type=Path, help="with --shape: the folder of random checkpoints")
    parser.add_argument("--device", default="cuda", help="with --shape")
    parser.add_argument("--streams", type=int, default=32, help="with --shape: streams of the batch")
    parser.add_argument("--graphs", action="store_true", help="with --shape: use CUDA graphs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    if asked.base is None and asked.shape is None:
        parser.error("BASE is missing")
    with tempfile.TemporaryDirectory() as root:
        if asked.shape:
            stages, found = of_shape(asked, Path(root))
        else:
            stages = stages_of(Shop(Path(root), asked.base, asked.rank), asked.tokens, asked.rounds)
            found = {"rank": asked.rank, "tokens": asked.tokens, "threads": torch.get_num_threads()}
            found = service.hardware() | found
        names = asked.stages.split(",") if asked.stages else stages
        measure({name: stages[name] for name in names}, asked.out, found)


def of_shape(asked: argparse.Namespace, root: Path) -> tuple[serving_shape.Stages, dict[str, Any]]:
    """Returns the stages of a shape, and what is known before them."""
    options = {name: getattr(asked, name) for name in ("device", "rank", "graphs", "streams", "tokens")}
    name = serving_shape.SHAPES[asked.shape]
    stages = serving_shape.stages_of(lambda: make_model.ready(asked.models or root, name), root, **options)
    return stages, train_side_by_side.hardware() | {"shape": name} | options


def stages_of(shop: Shop, tokens: int, rounds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns the measurements by name, in the order in which they run."""
    engine = shop.engine("models")
    return {
        "memory": lambda: memory(shop, engine),
        "loading_seconds": lambda: loading(shop, engine),
        "throughput": lambda: throughput(shop, engine, tokens, rounds),
        "chat_turns_cpu_seconds": lambda: chats(shop, engine, tokens),
        "seconds_a_token": lambda: latency(shop, engine),
        "zipf": lambda: zipf(shop, tokens // 2, max(rounds // 2, 1)),
    }


def measure(stages: dict[str, Callable[[], dict[str, Any]]], out: Path, found: dict[str, Any]) -> None:
    """Runs the stages; as each ends, its result is printed, added to `found` and written."""
    for name, stage in stages.items():
        begun = time.perf_counter()
        found[name] = stage()
        found["load"] = [round_(value) for value in os.getloadavg()]
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({name: found[name]}), f"after {time.perf_counter() - begun:.0f} s", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
