"""A job runs, and its model answers, with all objects in a bucket, as in production."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import stacks
from openai import OpenAI
from seaweed import BUCKET, Seaweed

from tunery.local.stack import Stack

PREFIX = "acceptance"


@pytest.fixture(scope="module")
def s3_stack(seaweed: Seaweed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stacks.running(tmp_path_factory.mktemp("s3"), **seaweed.environment(PREFIX)) as stack:
        yield stack


@pytest.mark.slow
def test_an_adapter_comes_straight_from_the_bucket(
    s3_stack: Stack, seaweed: Seaweed, base_folder: Path, tmp_path: Path
) -> None:
    with stacks.connect(s3_stack) as client:
        base = stacks.add_base(s3_stack, client, base_folder)
        job = client.fine_tuning.jobs.create(
            model=base,
            training_file=stacks.upload(client, "train.jsonl", stacks.rows(12)),
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        )
        job = stacks.finish(s3_stack, client, job.id)
        listed = stacks.download(client, job.id, tmp_path)
        address = _presigned(client, f"/fine_tuning/jobs/{job.id}/artifacts/adapter_model.safetensors")
        reply = client.chat.completions.create(
            model=job.fine_tuned_model or "", messages=[{"role": "user", "content": "x"}], max_tokens=2
        )
    assert reply.choices[0].message.content is not None
    # The client followed the API's redirects; here the URL is fetched without the client and without a key.
    assert address.startswith(f"{seaweed.endpoint}/{BUCKET}/{PREFIX}/jobs/")
    content = httpx2.get(address, trust_env=False).raise_for_status().content
    assert hashlib.sha256(content).hexdigest() == listed["adapter_model.safetensors"]["sha256"]
    for path, said in listed.items():
        assert hashlib.sha256((tmp_path / path).read_bytes()).hexdigest() == said["sha256"], path
    assert not list((s3_stack.home / "objects").iterdir()), "something went to the directory storage"


def _presigned(client: OpenAI, path: str) -> str:
    answer = httpx2.get(
        f"{str(client.base_url).rstrip('/')}{path}",
        headers={"authorization": f"Bearer {client.api_key}"},
        follow_redirects=False,
        trust_env=False,
    )
    assert answer.status_code == 302
    return answer.headers["location"]
