"""Fixtures of all tests of the trainer: a tiny model, and a reader of the messages that a run sends."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import run_folders
import tiny_models
import torch

collect_ignore_glob = [] if find_spec("gguf") else ["test_gguf*.py"]
"""The gguf package is not installed on a host that only trains."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a random two-layer Llama with a ChatML template."""
    return tiny_models.llama(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def ear() -> Iterator[run_folders.Ear]:
    made = run_folders.Ear()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
