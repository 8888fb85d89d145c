"""A batch of many streams on a CUDA device, on a random model of a large shape: `bench.serving --shape 8b`."""

import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.shop import round_
from tunery.artifacts import manifest
from tunery.storage import Directory
from worker.server import folders
from worker.server.bank import Bank
from worker.server.batch import Batch, Row
from worker.server.cache_memory import CacheMemory
from worker.server.factors import Factors, Site
from worker.server.streams import Alone
from worker.trainer.decoding.graphs import Recorder, recorder_for
from worker.trainer.rope import LengthRope

LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)
MIXED, RESIDENT, SWITCHED, ROUNDS = 16, 64, 3, 3
_WARM = 4
"""Steps before those that are timed: a CUDA graph is recorded in the third."""
PROMPT, VOCABULARY = 128, 1000
"""Tokens of a prompt, and how many different ones there are."""


class Large:
    """A random model of a large shape with RESIDENT adapters, and what is measured of it."""

    def __init__(
        self,
        config: Any = LLAMA_8B,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        *,
        rank: int = 16,
        graphs: bool = False,
    ) -> None:
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        recorder = recorder_for(self.model) if graphs else None
        self.recorded = 0
        self.device, self.rank = device, rank
        self.bank = Bank(self.model)
        self.cache = CacheMemory(32 * 2**30)
        self.batch = Batch(self.model, self.bank, self.cache, recorder=recorder and self._counted(recorder))
        self.base_bytes = _allocated(device)
        self.adapters = [_adapter(self.model, rank) for _ in range(RESIDENT)]
        for adapter in self.adapters:
            self.bank.add(adapter)
        self.found: dict[str, float] = {}

    def stages(self, streams: int, tokens: int) -> dict[str, Callable[[], dict[str, Any]]]:
        """Returns the stages in their order: the first one's figures are used by the last, which changes the model.

        Raises ValueError for more streams than there are adapters.
        """
        if streams > RESIDENT:
            raise ValueError(f"At most {RESIDENT} streams: each has an adapter.")
        return {
            "tokens_per_second": lambda: self.rates(streams, tokens),
            "in_turn": lambda: self.in_turn(tokens),
            "traffic": lambda: self.traffic(tokens),
            "memory": self.memory,
            "loading_seconds": lambda: _load(self.model, self.bank, self.adapters[0].sites, self.rank),
            "switching": lambda: self.switching(tokens),
        }

    def rates(self, streams: int, tokens: int) -> dict[str, Any]:
        """Tokens a second of one stream, MIXED and `streams`, on the base and with an adapter each."""
        found = self.found
        for name, count in {"one": 1, "mixed": MIXED, "many": streams}.items():
            for suffix, laid in (("", None), ("_adapters", self.adapters)):
                _write(self.batch, count, laid, 4)
                taken = [_write(self.batch, count, laid, tokens) for _ in range(ROUNDS)]
                found[name + suffix] = round_(median(taken))
        return {
            **found,
            "many_of_one": round_(found["many"] / found["one"]),
            "many_adapters_of_one": round_(found["many_adapters"] / found["one_adapters"]),
            "mixed_of_base": round_(found["mixed_adapters"] / found["mixed"]),
        }

    def in_turn(self, tokens: int) -> dict[str, Any]:
        """Tokens a second of requests one after another, each with its prompt, and the steps recorded meanwhile."""
        return self._recording({
            "base": lambda: _turnover(self.batch, 1, None, tokens),
            "adapters": lambda: _turnover(self.batch, 1, self.adapters, tokens),
        })  # fmt: skip

    def traffic(self, tokens: int) -> dict[str, Any]:
        """Tokens a second of MIXED requests at a time, where one ends another joins, with prompts: on the base, with
        an adapter each, and while other adapters are loaded and evicted besides.
        """
        return self._recording({
            "base": lambda: _turnover(self.batch, MIXED, None, tokens),
            "adapters": lambda: _turnover(self.batch, MIXED, self.adapters, tokens),
            "adapters_that_change": lambda: _turnover(self.batch, MIXED, self.adapters, tokens, self._reload),
        })  # fmt: skip

    def _recording(self, stages: dict[str, Callable[[], float]]) -> dict[str, Any]:
        found = {}
        for name, stage in stages.items():
            before = self.recorded
            found[name] = {"tokens_per_second": round_(stage()), "recorded": self.recorded - before}
        return found

    def _reload(self) -> None:
        """Evicts the last adapter, which has no rows, and loads it again."""
        gone = self.adapters[-1]
        flat = torch.randn(gone.nbytes // 4, device=self.device) * 0.01
        self.bank.remove(gone)
        self.adapters[-1] = Factors(gone.sites, flat)
        self.bank.add(self.adapters[-1])

    def _counted(self, make: Callable[[], Recorder]) -> Callable[[], Recorder]:
        """Returns `make` with recorders whose recordings are counted."""

        def made() -> Recorder:
            recorder = make()
            record = recorder.record

            def counted(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
                self.recorded += 1
                return record(work)

            recorder.record = counted  # type: ignore[method-assign]
            return recorder

        return made

    def memory(self) -> dict[str, Any]:
        """Bytes allocated with the base alone, and with RESIDENT adapters that have answered."""
        adapter, both = self.adapters[0].nbytes, _allocated(self.device)
        over = both / (self.base_bytes + RESIDENT * adapter) - 1 if self.base_bytes else None
        base = {"base": self.base_bytes, "adapter": adapter, "both": both}
        graphs = self.cache.nbytes  # no row is left: the graphs, and the slots that they read
        return base | {"graphs": graphs, "over_base_and_adapters": over and round_(over)}

    def switching(self, tokens: int) -> dict[str, float]:
        """Tokens a second of one request after another, each with an adapter of its own by PEFT's `set_adapter`."""
        rate = _switch(self.model, self.rank, tokens)
        return {"tokens_per_second": round_(rate), "mixed_of_switching": round_(self.found["mixed_adapters"] / rate)}


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _switch(model: Any, rank: int, tokens: int) -> float:
    """Tokens a second of SWITCHED requests, each with an adapter of its own, one after another by PEFT."""
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned: Any = get_peft_model(model, lora, adapter_name="0")
    for number in range(1, SWITCHED):
        tuned.add_adapter(str(number), lora)
    tuned.eval()
    seconds = 0.0
    for number in range(SWITCHED):
        tuned.set_adapter(str(number))
        stream = Alone(tuned, prompt(number), LengthRope())
        for _ in range(_WARM):
            stream.push(int(stream.logits().argmax()))
        begun = time.perf_counter()
        for _ in range(tokens):
            stream.push(int(stream.logits().argmax()))
        seconds += time.perf_counter() - begun
    tuned.unload()
    return SWITCHED * tokens / seconds


def _load(model: Any, bank: Bank, sites: Sequence[Site], rank: int) -> dict[str, float]:
    """Returns seconds to fetch an adapter from local storage, check its hashes and add it to the device's; `on_host`:
    the same for one whose files are on this host, which are hashed meanwhile.
    """
    with tempfile.TemporaryDirectory() as root:
        folder, storage = Path(root) / "adapter", Directory(Path(root) / "objects")
        folder.mkdir()
        weights = {}
        for site in sites:
            weights[f"base_model.model.{site.name}.lora_A.weight"] = torch.randn(rank, site.inputs)
            weights[f"base_model.model.{site.name}.lora_B.weight"] = torch.randn(site.outputs, rank)
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
        _, sha256 = manifest.publish(storage, "models/one", folder)

        def add(there: Path) -> float:
            """Returns when it was added."""
            factors = Factors.read(there, model)
            assert factors is not None
            bank.add(factors)
            factors.flat[:1].tolist()  # type: ignore[index]  # waits until it is on the device
            ended = time.perf_counter()
            bank.remove(factors)
            return ended

        fetching, fetched, on_host = [], [], []
        for number in range(5):
            begun, there = time.perf_counter(), Path(root) / str(number)
            manifest.fetch(storage, "models/one", manifest.load(storage, "models/one", sha256), there)
            fetching.append(time.perf_counter() - begun)
            fetched.append(add(there) - begun)
            begun = time.perf_counter()
            with ThreadPoolExecutor(1) as checker:
                checking = checker.submit(folders.is_intact, there)
                add(there)
                assert checking.result()
                on_host.append(time.perf_counter() - begun)
        return {
            "median": round_(median(fetched)),
            "worst": round_(max(fetched)),
            "fetch_median": round_(median(fetching)),
            "on_host_median": round_(median(on_host)),
            "on_host_worst": round_(max(on_host)),
        }


def _adapter(model: Any, rank: int) -> Factors:
    layers = {name: layer for name, layer in model.named_modules() if name.endswith("_proj")}
    sites = tuple(Site(name, rank, one.in_features, one.out_features) for name, one in sorted(layers.items()))
    return Factors(sites, torch.randn(sum(site.numel for site in sites), device=model.device) * 0.01)


def _write(batch: Batch, streams: int, adapters: list[Factors] | None, tokens: int) -> float:
    """Returns tokens a second of greedy decoding, without the prompts and the first steps."""
    rows = [batch.join(prompt(i), adapters and adapters[i], is_greedy=True) for i in range(streams)]
    for row in rows:
        row.likeliest()  # an answer on the host: the device has ended
    for _ in range(_WARM):
        step(batch, rows)
    begun = time.perf_counter()
    for _ in range(tokens):
        step(batch, rows)
    seconds = time.perf_counter() - begun
    for row in rows:
        row.close()
    return streams * tokens / seconds


def _turnover(
    batch: Batch, streams: int, adapters: list[Factors] | None, tokens: int, between: Callable[[], None] | None = None
) -> float:
    """Returns tokens a second of 4 * `streams` requests, at most `streams` at a time; `between` is called as each ends.

    They write `tokens` tokens and some more, so that they end one by one.
    """
    waiting, rows, written = deque(range(4 * streams)), dict[Row, int](), 0
    begun = time.perf_counter()
    while rows or waiting:
        while waiting and len(rows) < streams:
            number = waiting.popleft()
            adapter = adapters and adapters[number % (RESIDENT - 1)]
            rows[batch.join(prompt(number), adapter, is_greedy=True)] = tokens + number % 8
        batch.step()
        for row in [row for row in rows if row.is_ready]:
            row.push(row.likeliest())
            rows[row], written = rows[row] - 1, written + 1
            if not rows[row]:
                row.close()
                del rows[row]
                if between is not None:
                    between()
    return written / (time.perf_counter() - begun)


def prompt(number: int, length: int = PROMPT) -> list[int]:
    """Returns the token ids of a prompt; another number starts with another token."""
    return [(131 * number + n) % VOCABULARY for n in range(length)]


def step(batch: Batch, rows: list[Row]) -> None:
    """Writes a greedy token of each row."""
    for row in rows:
        row.push(row.likeliest())
    batch.step()
