"""Runs a whole Tunery, like `make up`, in a temporary home with a tiny random model.

All tests of a run share one stack, and most of them inspect the same job on it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import stacks
import tiny_models
from openai import OpenAI
from stacks import Tuned

from tunery.local.receiver import Receiver
from tunery.local.stack import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stacks.running(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[OpenAI]:
    """The official client with the stack's first key."""
    with stacks.connect(stack) as client:
        yield client


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the base model, as a user has them on disk."""
    return tiny_models.llama(tmp_path_factory.mktemp("hub") / "tiny", seed=5, bf16=True, max_position_embeddings=8192)


@pytest.fixture(scope="session")
def base(stack: Stack, client: OpenAI, base_folder: Path) -> str:
    """The base's registered name."""
    return stacks.add_base(stack, client, base_folder)


@pytest.fixture(scope="session")
def tuned(stack: Stack, client: OpenAI, base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuned]:
    """A finished LoRA job of two epochs with validation and test file, created through the official client."""
    with Receiver() as receiver:
        endpoint = client.webhooks.create(name="test", url=receiver.url, event_types=[stacks.SUCCEEDED])
        receiver.secret = endpoint.signing_secret
        test_file = stacks.upload(client, "test.jsonl", stacks.rows(6, start=30))
        job = client.fine_tuning.jobs.create(
            model=base,
            training_file=stacks.upload(client, "train.jsonl", stacks.rows(24)),
            validation_file=stacks.upload(client, "valid.jsonl", stacks.rows(6, start=24)),
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}},
            suffix="words",
            seed=3,
            metadata={"team": "tests"},
            extra_body={
                "technique": {"type": "lora", "r": 8, "alpha": 32},
                "learning_rate": 0.01,
                "evaluation": {"test_file": test_file, "max_new_tokens": 8},
            },
        )
        job = stacks.finish(stack, client, job.id)
        folder = tmp_path_factory.mktemp("adapter")
        yield Tuned(job, folder, stacks.download(client, job.id, folder), receiver)
