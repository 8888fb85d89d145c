"""A downloaded adapter works without Tunery: plain peft computes the logits that the trainer recorded."""

import json
import math
import statistics
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from stacks import Tuned

SCRIPT = """
import importlib.util, json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base_dir, adapter_dir = sys.argv[1:]
found = [name for name in ("tunery", "worker", "api") if importlib.util.find_spec(name)]
record = json.load(open(f"{adapter_dir}/parity.json"))
base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=record["dtype"])
model = PeftModel.from_pretrained(base, adapter_dir).eval()
with torch.no_grad():
    logits = [model(torch.tensor([prompt["input_ids"]])).logits[0, -1].tolist() for prompt in record["prompts"]]
    with model.disable_adapter():
        bare = [model(torch.tensor([prompt["input_ids"]])).logits[0, -1].tolist() for prompt in record["prompts"]]
print(json.dumps({"found": found, "logits": logits, "bare": bare}))
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment that has this one's packages, but not Tunery."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    packages = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"]
    # Python does not process the .pth files in a folder that a .pth file adds, and one of those installs Tunery.
    (Path(packages) / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin/python"


def _off(found: list[float], recorded: list[float]) -> float:
    """Returns the root mean square difference, relative to the standard deviation of the recorded logits."""
    return math.dist(found, recorded) / (statistics.pstdev(recorded) * len(recorded) ** 0.5)


def test_plain_peft_gives_the_logits_that_the_model_had_in_memory(
    tuned: Tuned, base_folder: Path, bare_python: Path, tmp_path: Path
) -> None:
    ran = subprocess.run(
        [bare_python, "-I", "-c", SCRIPT, base_folder, tuned.folder],
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    got = json.loads(ran.stdout.splitlines()[-1])
    assert got["found"] == [], "Tunery was importable there, so this proves nothing"
    record = json.loads((tuned.folder / "parity.json").read_text())
    assert (record["dtype"], record["base"], record["quantisation"]) == ("float32", "float32", None)
    assert record["difference"] < 1e-4
    assert len(record["prompts"]) == 3
    for prompt, logits, bare in zip(record["prompts"], got["logits"], got["bare"], strict=True):
        assert _off(logits, prompt["logits"]) < record["tolerance"]
        # Without the adapter, the same check fails.
        assert _off(bare, prompt["logits"]) > 10 * record["tolerance"]


def test_the_adapter_names_its_base_as_it_was_registered(tuned: Tuned, base: str) -> None:
    config = json.loads((tuned.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    text = " ".join(path.read_text() for path in tuned.folder.rglob("*.json"))
    assert "/runs/" not in text, "a run's path has got into the artifact"


def test_the_adapter_is_what_was_asked_for(tuned: Tuned) -> None:
    config = json.loads((tuned.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 32)
    # all-linear: every projection of a Llama block, never the head
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
