"""Tensors that are copied ahead of the one that is being quantised."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import core_model_loading

from tunery.planning.precision import decide
from tunery.spec import Qlora
from worker.trainer.recipes import ahead
from worker.trainer.recipes.qlora import load_quantised

SIZES = [8, 16, 200, 8, 8, 8, 40, 8]
"""Numbers of each tensor, 4 bytes each."""


class Copies:
    """A copy function that counts the bytes which are copied and not taken."""

    def __init__(self) -> None:
        self.held = self.most = 0
        self.names: list[int] = []
        self._lock = threading.Lock()

    def __call__(self, source: Tensor, device: torch.device) -> Tensor:
        assert device.type == "meta"
        with self._lock:
            self.held += source.nbytes
            self.most = max(self.most, self.held)
            self.names.append(int(source[0]))
        return source.clone()


@pytest.fixture
def slices(tmp_path: Path) -> list[Any]:
    save_file({f"{i}": torch.full((size,), float(i)) for i, size in enumerate(SIZES)}, tmp_path / "a.safetensors")
    file = safe_open(tmp_path / "a.safetensors", framework="pt")
    return [file.get_slice(f"{i}") for i in range(len(SIZES))]


def plain(*_: Any, **__: Any) -> Any:
    raise AssertionError("loaded by transformers")


@pytest.mark.parametrize("order", [range(8), [3, 0, 1, 2, 7, 6, 5, 4]])
def test_tensors_are_copied_ahead_within_the_bytes(slices: list[Any], order: list[int]) -> None:
    copies = Copies()
    with ThreadPoolExecutor(2) as pool:
        queue = ahead.Queue(plain, pool, copies, ahead=100)
        jobs = [queue.spawn(None, each, "meta", torch.float16) for each in slices]
        assert copies.names == []
        for i in order:
            found = jobs[i]()
            assert (found.dtype, found.tolist()) == (torch.float16, [float(i)] * SIZES[i])
            copies.held -= 4 * SIZES[i]
    assert sorted(copies.names) == list(range(8))
    assert copies.most <= 4 * 200 + 100
    assert copies.held == 0


def test_an_error_of_a_copy_is_that_of_its_tensor(slices: list[Any]) -> None:
    def fail(source: Tensor, device: torch.device) -> Tensor:
        if source[0] == 1:
            raise RuntimeError("no room")
        return source

    with ThreadPoolExecutor(2) as pool:
        jobs = [ahead.Queue(plain, pool, fail).spawn(None, each, "meta") for each in slices[:2]]
        assert jobs[0]().tolist() == [0.0] * 8
        with pytest.raises(RuntimeError, match="no room"):
            jobs[1]()


def test_what_transformers_loads_itself_is_left_to_it(slices: list[Any]) -> None:
    seen: list[Any] = []
    with ThreadPoolExecutor(1) as pool:
        queue = ahead.Queue(lambda *given, **options: seen.append((given, options)), pool, Copies())
        queue.spawn(pool, slices[0], "meta")
        queue.spawn(None, slices[0], "cpu")
        queue.spawn(None, slices[0], "meta", sharding_op=len, tensor_idx=0)
        queue.spawn(None, torch.ones(3), "meta")
    assert len(seen) == 4


def test_transformers_asks_where_tensors_are_copied_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function is not a public one: this fails where a release has renamed it."""
    asked: list[Any] = []
    spawn = core_model_loading.spawn_materialize

    def watched(thread_pool: Any, tensor: Any, *rest: Any, **options: Any) -> Any:
        asked.append((thread_pool, hasattr(tensor, "get_shape"), options))
        return spawn(thread_pool, tensor, *rest, **options)

    monkeypatch.setattr(core_model_loading, ahead._SPAWN, watched)
    load_quantised(tiny_models.llama(tmp_path / "base"), decide(Qlora(), "cpu"), torch.device("cpu"))
    assert {(pool, has_shape) for pool, has_shape, _ in asked} == {(None, True)}
    assert all(value is None for _, _, options in asked for value in options.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_BUFFER", 4096)
    base, precision, device = tiny_models.llama(tmp_path / "base", bf16=True), decide(Qlora(), "cuda"), "cuda:0"
    copied: list[Tensor] = []
    staged = ahead.staged
    monkeypatch.setattr(ahead, "staged", lambda *given: copied.append(given[0]) or staged(*given))
    found = load_quantised(base, precision, torch.device(device)).state_dict()
    assert copied
    monkeypatch.setattr(ahead, "_SPAWN", "no_such_function")
    wanted = load_quantised(base, precision, torch.device(device)).state_dict()
    assert found.keys() == wanted.keys()
    for name, part in found.items():
        assert torch.equal(part, wanted[name]), name
