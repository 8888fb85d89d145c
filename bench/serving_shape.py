"""A batch of many streams on a random model of a large shape: `bench.serving --shape 8b`."""

import json
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from bench.shop import TEMPLATE, Shop, Took, drive, rates, round_, times_faster, zipf_order
from tunery.artifacts import manifest
from tunery.planning.precision import dense_dtype
from tunery.storage import Directory
from worker.server import folders
from worker.server.backends.embedded import Engine
from worker.server.bank import Bank
from worker.server.batch import Batch, Row
from worker.server.cache_memory import CacheMemory
from worker.server.factors import Factors, Site, split
from worker.server.models import Source, shared
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
SHAPES = {"8b": "llama3-8b", "small": "small"}
"""Names in `make_model.SHAPES`; `small` is for trying this out on a CPU."""
MIXED, RESIDENT, SWITCHED, ROUNDS = 16, 64, 3, 3
MANY, MANY_RANK, REQUESTS = 256, 8, 256
"""Adapters of the Zipf traffic, their rank, and its requests; the first of ROUNDS warms up."""
_WARM = 4
"""Steps before those that are timed: a CUDA graph is recorded in the third."""
PROMPT, VOCABULARY = 128, 600
"""Tokens of a prompt, and how many different ones there are."""

Stages = dict[str, Callable[[], dict[str, Any]]]


def stages_of(
    checkpoint: Callable[[], Path], root: Path, *, device: str, rank: int, graphs: bool, streams: int, tokens: int
) -> Stages:
    """Returns the stages in their order; a model is loaded by the first stage that needs it.

    `checkpoint`: makes it, if it is missing. `root`: a folder for adapters. Raises ValueError for more streams than
    there are adapters.
    """
    if streams > RESIDENT:
        raise ValueError(f"At most {RESIDENT} streams: each has an adapter.")
    folder = cache(checkpoint)
    large = cache(lambda: Large(folder(), device, rank=rank, graphs=graphs))
    zipf = cache(lambda: Zipf(folder(), root, tokens // 2, device=device, graphs=graphs))
    return {
        "checkpoint": lambda: _seconds(folder),
        "loaded": lambda: _seconds(large),
        "tokens_per_second": lambda: large().rates(streams, tokens),
        "memory": lambda: large().memory(),
        "loading_seconds": lambda: large().loading(),
        "switching": lambda: large().switching(tokens),
        "seconds_a_token": lambda: large().latency(tokens),
        "zipf_all_resident": lambda: zipf().all_resident(),
        "zipf_64_slots": lambda: zipf().slots(),
        "traffic": lambda: large().traffic(tokens),
        "in_turn": lambda: large().in_turn(tokens),
    }


def _seconds(work: Callable[[], Any]) -> dict[str, Any]:
    begun = time.perf_counter()
    work()
    return {"seconds": round_(time.perf_counter() - begun)}


class Large:
    """A model of a large shape with RESIDENT adapters, and what is measured of it."""

    def __init__(self, folder: Path, device: str, *, rank: int = 16, graphs: bool = False) -> None:
        dtype = getattr(torch, dense_dtype(device))
        self.model = Source(folder, None, device, dtype).read().eval()
        self.unhooked = shared(self.model)
        recorder = recorder_for(self.model) if graphs else None
        self.recorded = 0
        self.device, self.rank = device, rank
        self.bank = Bank(self.model)
        self.cache = CacheMemory(32 * 2**30)
        self.batch = Batch(self.model, self.bank, self.cache, recorder=recorder and self._counted(recorder))
        self.base_bytes = _allocated(device)
        sites = sites_of(self.model, rank)
        self.adapters = [_random(sites, device) for _ in range(RESIDENT)]
        for adapter in self.adapters:
            self.bank.add(adapter)
        self.found: dict[str, float] = {}

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
        """Bytes allocated with the base alone, and with RESIDENT adapters that have answered; `reserved`: what the
        process takes of the device for them, with the allocator's free blocks.
        """
        adapter, both = self.adapters[0].nbytes, _allocated(self.device)
        wanted = self.base_bytes + RESIDENT * adapter
        reserved = torch.cuda.memory_reserved() if self.base_bytes else 0
        over = {"over_base_and_adapters": both, "reserved_over_base_and_adapters": reserved}
        base = {"base": self.base_bytes, "adapter": adapter, "both": both, "reserved": reserved}
        graphs = self.cache.nbytes  # no row is left: the graphs, and the slots that they read
        ratios = {name: round_(nbytes / wanted - 1) if self.base_bytes else None for name, nbytes in over.items()}
        return base | {"graphs": graphs} | ratios

    def loading(self) -> dict[str, float]:
        return _load(self.model, self.bank, self.adapters[0].sites, self.rank)

    def switching(self, tokens: int) -> dict[str, float]:
        """Tokens a second of one request after another, each with an adapter of its own by PEFT's `set_adapter`."""
        rate, mixed = _switch(self.unhooked, self.rank, tokens), self.found.get("mixed_adapters")
        return {"tokens_per_second": round_(rate)} | ({"mixed_of_switching": round_(mixed / rate)} if mixed else {})

    def latency(self, tokens: int) -> dict[str, float]:
        """Seconds a token of one stream on the base, with an adapter, and with one merged: the weights stay changed."""
        found = {"base": self._seconds_a_token(None, tokens), "adapter": self._seconds_a_token(self.adapters, tokens)}
        _merge(self.model, _random(self.adapters[0].sites, self.device))
        return found | {"merged": self._seconds_a_token(None, tokens)}

    def _seconds_a_token(self, adapters: list[Factors] | None, tokens: int) -> float:
        return round_(1 / median(_write(self.batch, 1, adapters, tokens) for _ in range(ROUNDS)))


class Zipf:
    """Traffic over MANY adapters of one base, the k-th in proportion to 1/k, in the model server's back end.

    Those that are asked for are made, and lie on this host.
    """

    def __init__(self, base: Path, root: Path, tokens: int, *, device: str, graphs: bool) -> None:
        self.options: dict[str, Any] = {"device": device, "graphs": graphs}
        self.tokens = tokens
        self.shop = ShopOnHost(root, base, MANY_RANK)
        self.orders = zipf_order(MANY, REQUESTS, ROUNDS)
        self.shop.make(set(self.orders[0]))
        dtype = getattr(torch, dense_dtype(device))
        self.base_bytes = sum(one.numel() for one in self.shop.model.parameters()) * dtype.itemsize
        self.all: list[Took] = []

    def all_resident(self) -> dict[str, Any]:
        found = self._run(2 * MANY)
        self.all = found.pop("runs")
        return found

    def slots(self) -> dict[str, Any]:
        """The same with room for RESIDENT adapters."""
        found = self._run(RESIDENT)
        runs = found.pop("runs")
        return found | ({"slots_of_all": times_faster(runs, self.all)["clock"]} if self.all else {})

    def _run(self, slots: int) -> dict[str, Any]:
        shop = self.shop
        room = self.base_bytes + slots * shop.adapter_bytes + 2**20  # the last for the base's buffers
        engine = shop.engine("models", memory_bytes=room, **self.options)
        engine.answer(shop.request(None, 1)).close()
        loading = [self._load(engine, number) for number in sorted(set(self.orders[0]))]
        warm, *runs = [drive(engine, [shop.request(n, self.tokens) for n in order], MIXED) for order in self.orders]
        return {
            "requests": REQUESTS,
            "tokens": self.tokens,
            "rank": shop.rank,
            "adapters_asked": len(loading),
            "loading_median": round_(median(loading)),
            "loading_worst": round_(max(loading)),
            "warm_tokens_per_second": round_(warm.tokens / warm.seconds),
            "tokens_per_second": rates({"runs": runs})["runs"]["tokens_per_second"],
            "runs": runs,
        }

    def _load(self, engine: Engine, number: int) -> float:
        begun = time.perf_counter()
        engine.answer(self.shop.request(number, 1)).close()
        return time.perf_counter() - begun


class ShopOnHost(Shop):
    """A shop whose base and adapters are in the model server's folder already: they are large."""

    def __init__(self, root: Path, base: Path, rank: int) -> None:
        super().__init__(root, base, rank)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        self.sites = sites_of(self.model, rank)
        self.adapters = [{}] * MANY

    @property
    def adapter_bytes(self) -> int:
        return 4 * sum(site.numel for site in self.sites)

    def make(self, numbers: set[int]) -> None:
        """Makes these adapters, several at once."""
        noise = weights_of(self.sites)
        with ThreadPoolExecutor() as makers:
            made = makers.map(partial(self._make_one, noise), sorted(numbers))
            for number, adapter in zip(sorted(numbers), made, strict=True):
                self.adapters[number] = adapter

    def _make_one(self, noise: dict[str, torch.Tensor], number: int) -> dict[str, str]:
        folder = self.root / f"adapter{number}"
        save_adapter({key: value * (1 + number / 1000) for key, value in noise.items()}, folder, self.rank)
        for name in TEMPLATE:
            if (self.base / name).exists():
                shutil.copy(self.base / name, folder)
        return self._lay(f"adapter{number}", folder)

    def _publish(self, name: str, folder: Path) -> dict[str, str]:
        """Links the base's files; its weights are not hashed, as nothing checks them."""
        links = self.root / name
        links.mkdir()
        weights = list(folder.glob("*.safetensors"))
        for file in set(folder.iterdir()) - set(weights):
            (links / file.name).symlink_to(file.resolve())
        laid = self._lay(name, links)
        for file in weights:
            (self.root / "models" / laid["manifest_sha256"] / file.name).symlink_to(file.resolve())
        return laid

    def _lay(self, name: str, folder: Path) -> dict[str, str]:
        """Moves a folder to where the model server looks for it."""
        listed = manifest.describe(folder)
        (folder / manifest.NAME).write_bytes(listed.encode())
        (self.root / "models").mkdir(exist_ok=True)
        folder.rename(self.root / "models" / listed.sha256)
        return {"id": name, "prefix": f"models/{name}", "manifest_sha256": listed.sha256}


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


@torch.inference_mode()
def _merge(model: Any, adapter: Factors) -> None:
    """Adds an adapter to the weights."""
    assert adapter.flat is not None
    for site, (a, b) in zip(adapter.sites, split(adapter.flat[None], adapter.sites), strict=True):
        weight = model.get_submodule(site.name).weight
        weight += (b[0].T @ a[0]).to(weight.dtype)


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
        save_adapter(weights_of(sites), folder, rank)
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


def weights_of(sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """Returns random A and B by the names that PEFT gives them."""
    weights = {}
    for site in sites:
        weights[f"base_model.model.{site.name}.lora_A.weight"] = torch.randn(site.rank, site.inputs) * 0.02
        weights[f"base_model.model.{site.name}.lora_B.weight"] = torch.randn(site.outputs, site.rank) * 0.02
    return weights


def save_adapter(weights: dict[str, torch.Tensor], folder: Path, rank: int) -> None:
    """Writes an adapter into a new folder."""
    folder.mkdir()
    save_file(weights, folder / folders.WEIGHTS, {"format": "pt"})
    targets = sorted({key.split(".")[-3] for key in weights})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def sites_of(model: nn.Module, rank: int) -> tuple[Site, ...]:
    """Returns all linear layers but the head."""
    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if name.endswith("_proj")}
    return tuple(Site(name, rank, one.in_features, one.out_features) for name, one in sorted(layers.items()))


def _random(sites: tuple[Site, ...], device: str) -> Factors:
    return Factors(sites, torch.randn(sum(site.numel for site in sites), device=device) * 0.01)


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
