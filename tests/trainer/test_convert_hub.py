"""A base is downloaded by its hub id, from the mirror in HF_ENDPOINT."""

import os
import subprocess
import sys
from pathlib import Path

import hub
import pytest
import tiny_models

ROOT = Path(__file__).parents[2]


def _convert(source: str, out: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(out.parent / "cache"), "PATH": os.environ["PATH"]}
    return subprocess.run(
        [sys.executable, "-m", "worker.trainer.convert", source, str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def mirror(tmp_path: Path) -> dict[str, Path]:
    good = tiny_models.llama(tmp_path / "good")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((good / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    return {"team/good": good, "team/pickled": pickled}


@pytest.mark.slow
def test_a_base_comes_from_the_hub_that_hf_endpoint_names(mirror: dict[str, Path], tmp_path: Path) -> None:
    with hub.serve(mirror) as server:
        done = _convert("team/good", tmp_path / "out", server.url)
    assert done.returncode == 0, done.stderr
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "facts.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


@pytest.mark.slow
def test_a_hub_that_is_not_there_is_no_traceback(tmp_path: Path) -> None:
    done = _convert("team/good", tmp_path / "out", "http://127.0.0.1:1")
    assert done.returncode == 65
    said = "the model hub cannot be used: [Errno 111] Connection refused. Check the name; on a closed network, set HF_"
    assert said in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        pytest.param("team/pickled", "pytorch_model.bin", marks=pytest.mark.slow),
        pytest.param("team/none", "the model hub has no such model that is public.", marks=pytest.mark.slow),
        pytest.param("team/gated", "that have its owner's permission. Set HF_TOKEN", marks=pytest.mark.slow),
        pytest.param("team/good@v9", "no such revision of it. Check what follows the '@'.", marks=pytest.mark.slow),
        pytest.param("some/where/else", "cannot be a hub id either. Give a folder with", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    mirror: dict[str, Path], tmp_path: Path, source: str, said: str
) -> None:
    with hub.serve(mirror) as server:
        done = _convert(source, tmp_path / "out", server.url)
    assert done.returncode == 65
    line = done.stderr.strip().splitlines()[-1]
    assert said in line
    assert "Client Error" not in line  # the hub client's own words
    assert not any("pytorch_model.bin" in path and "resolve" in path for path in server.asked)
