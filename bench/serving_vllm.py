"""Measures `vllm serve` with adapters on a random model of a large shape, as `bench.serving --shape` does the server.

    python -m bench.serving_vllm OUT.json [--shape 8b] [--models FOLDER] [--site FOLDER] [--tokens 64] [-- VLLM OPTIONS]

Needs a GPU and vLLM, which may lie in a folder of its own (`--site`, for its process alone). Tokens a second leave the
prompts and the first tokens out: each is of the difference between long and short answers. Every adapter has the same
numbers and a name of its own, so that vLLM holds and computes each.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench import make_model, serving, serving_shape, train_side_by_side
from bench.serving_shape import MIXED, ROUNDS, prompt, save_adapter, sites_of, weights_of
from bench.shop import round_
from tunery import processes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/fixtures"))
import real_vllm

BASE, FIRST = "base", 4
"""The base's name, and tokens of a short answer."""
OPTIONS = ("--max-model-len", "1024", "--dtype", "bfloat16", "--gpu-memory-utilization", "0.8")


class Server:
    """A vLLM server with a base, and adapters that are loaded at run time."""

    def __init__(self, url: str, adapter: Path) -> None:
        self._client = httpx2.Client(base_url=url, timeout=300, trust_env=False, limits=httpx2.Limits())
        self._adapter = adapter

    def load(self, name: str) -> float:
        """Loads the adapter under a name; returns the seconds until it has answered."""
        begun = time.perf_counter()
        path = str(self._adapter)
        self._client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path}).raise_for_status()
        self._answer(0, name, 1)
        return time.perf_counter() - begun

    def rate(self, models: Sequence[str], tokens: int) -> float:
        """Returns tokens a second of answers to as many streams at once, each of a model."""
        self._seconds(models, FIRST + tokens)
        taken = [self._seconds(models, FIRST + tokens) - self._seconds(models, FIRST) for _ in range(ROUNDS)]
        return round_(len(models) * tokens / median(taken))

    def _seconds(self, models: Sequence[str], tokens: int) -> float:
        begun = time.perf_counter()
        with ThreadPoolExecutor(len(models)) as streams:
            list(streams.map(self._answer, range(len(models)), models, [tokens] * len(models)))
        return time.perf_counter() - begun

    def _answer(self, number: int, model: str, tokens: int) -> None:
        asked = {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, "temperature": 0}
        answer = self._client.post("/v1/completions", json={"model": model, "prompt": prompt(number)} | asked)
        wrote = answer.raise_for_status().json()["usage"]["completion_tokens"]
        assert wrote == tokens, f"{wrote} tokens"


def stages_of(server: Server, streams: int, tokens: int) -> serving_shape.Stages:
    """Returns the measurements in their order: the first loads the adapters of the second."""
    names = [f"adapter{number}" for number in range(streams)]

    def loading() -> dict[str, Any]:
        seconds = [server.load(name) for name in names]
        return {"first": round_(seconds[0]), "median": round_(median(seconds)), "worst": round_(max(seconds[1:]))}

    def rates() -> dict[str, Any]:
        found = {}
        for name, count in {"one": 1, "mixed": MIXED, "many": streams}.items():
            found[name] = server.rate([BASE] * count, tokens)
            found[f"{name}_adapters"] = server.rate(names[:count], tokens)
        return {
            **found,
            "many_of_one": round_(found["many"] / found["one"]),
            "mixed_of_base": round_(found["mixed_adapters"] / found["mixed"]),
        }

    return {"loading_seconds": loading, "tokens_per_second": rates}


@contextmanager
def running(base: Path, log: Path, site: Path | None, options: Sequence[str]) -> Iterator[str]:
    """Runs `vllm serve`; yields its address once it is up."""
    port = processes.free_port()
    paths = os.pathsep.join(filter(None, [str(site or ""), os.environ.get("PYTHONPATH", "")]))
    settings = {"PYTHONPATH": paths, "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    program = [sys.executable, "-m", real_vllm.MAIN, "serve", str(base), "--served-model-name", BASE]
    program += ["--host", "127.0.0.1", "--port", str(port), "--enable-lora", *options]
    with real_vllm.started(program, log, port, os.environ | settings) as url:
        yield url


def write_adapter(base: Path, folder: Path, rank: int) -> Path:
    """Writes a random adapter on all linear layers of the base into `folder`."""
    with torch.device("meta"):
        sites = sites_of(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)), rank)
    save_adapter(weights_of(sites), folder, rank)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=serving_shape.SHAPES, default="8b")
    parser.add_argument("--models", type=Path, help="the folder of random checkpoints")
    parser.add_argument("--site", type=Path, help="a folder with vLLM and what it needs")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("options", nargs="*", help="more options of `vllm serve`, after --")
    asked = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as root:
        base = make_model.ready(asked.models or Path(root), serving_shape.SHAPES[asked.shape])
        adapter = write_adapter(base, Path(root) / "adapter", asked.rank)
        slots = ("--max-loras", str(asked.streams), "--max-cpu-loras", str(asked.streams))
        options = [*OPTIONS, *slots, "--max-lora-rank", str(asked.rank), *asked.options]
        known = {"streams": asked.streams, "tokens": asked.tokens, "rank": asked.rank, "options": options}
        print("starting vLLM", flush=True)
        begun = time.perf_counter()
        with running(base, Path(f"{asked.out}.log"), asked.site, options) as url:
            known["seconds_to_start"] = round_(time.perf_counter() - begun)
            known["vllm"] = httpx2.get(f"{url}/version", trust_env=False).json()["version"]
            print(json.dumps(known), flush=True)
            stages = stages_of(Server(url, adapter), asked.streams, asked.tokens)
            serving.measure(stages, asked.out, train_side_by_side.hardware() | known)


if __name__ == "__main__":
    main()
