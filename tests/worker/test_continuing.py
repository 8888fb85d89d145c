"""Jobs that continue from models of earlier jobs, through real workers and a real trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from sqlalchemy import select
from transformers import AutoTokenizer, GenerationConfig
from workshop import Workshop, training_rows

from tunery.artifacts import manifest
from tunery.jobs import creation
from tunery.jobs.model import Metric
from tunery.jobs.request import JobRequest
from tunery.keys import auth
from tunery.keys.model import Project
from tunery.models.model import Model
from worker.server.backends.embedded import Engine
from worker.server.schemas import parse


def _losses(workshop: Workshop, job_id: str) -> list[float]:
    with workshop.session() as session:
        measured = session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step)).all()
    return [float(metric.values["train_loss"]) for metric in measured]


@pytest.mark.slow
@pytest.mark.parametrize("technique", [{"type": "full"}, {"type": "qlora", "r": 4}], ids=["full", "qlora"])
def test_a_job_goes_on_from_what_another_made(workshop: Workshop, technique: dict[str, Any]) -> None:
    """The second job's rate is too small to learn: its losses are the first job's last ones, not its first ones."""
    workshop.start("io")
    workshop.start("train")
    training = workshop.file(training_rows(12))
    asked = {"technique": technique, "hyperparameters": {"n_epochs": 30, "batch_size": 12}, "learning_rate": 1e-2}
    first = workshop.until_state(workshop.submit(training, **asked), "succeeded")
    workshop.parent_model = first.tuned_model

    asked |= {"hyperparameters": {"n_epochs": 2, "batch_size": 12}, "learning_rate": 1e-9}
    second = workshop.until_state(workshop.submit(training, **asked), "succeeded")

    before, after = _losses(workshop, first.id), _losses(workshop, second.id)
    assert before[-1] < 0.7 * before[0]
    assert after == pytest.approx([before[-1]] * 2, rel=0.2)
    assert second.tuned_model != first.tuned_model


def _create(workshop: Workshop, training: str, model: str, **asked: Any) -> str:
    """Creates a job as the API does; returns its id."""
    with workshop.session() as session:
        _, secret = auth.create_key(session, session.get_one(Project, workshop.project_id), "test")
        same = {"hyperparameters": {"n_epochs": 2, "batch_size": 12}, "max_seq_length": 128, "seed": 1}
        request = JobRequest.model_validate({"training_file": training, "model": model, **same, **asked})
        return str(creation.create(session, auth.authenticate(session, secret), request).id)


def _folder(workshop: Workshop, model_id: str, folder: Path) -> Path:
    """Fetches a model's own files into `folder`."""
    with workshop.session() as session:
        model = session.get_one(Model, model_id)
        listed = manifest.load(workshop.storage, model.prefix, model.manifest_sha256)
    manifest.fetch(workshop.storage, model.prefix, listed, folder)
    return folder


def _answer(workshop: Workshop, model_id: str, folder: Path, prompt: str) -> str:
    """Returns a model's greedy answer in the model server."""
    with workshop.session() as session:
        tuned = session.get_one(Model, model_id)
        named = {"base": session.get_one(Model, tuned.base_id), "tuned": tuned}
        chosen = {
            name: {"id": row.id, "prefix": row.prefix, "manifest_sha256": row.manifest_sha256}
            for name, row in named.items()
        }
    chosen["tuned"]["technique"] = "lora"
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 12}
    request = parse(json.dumps({**body, "tunery_model": chosen}).encode())
    return "".join(Engine(folder, workshop.storage).answer(request))


@pytest.mark.slow
def test_an_adapter_is_trained_on_a_full_fine_tune(workshop: Workshop, tmp_path: Path) -> None:
    """PEFT, the model server and a following job take the parent as the adapter's base, by its name and content."""
    workshop.start("io")
    workshop.start("train")
    training, rate = workshop.file(training_rows(12)), 1e-2
    many = {"n_epochs": 30, "batch_size": 12}
    full = _create(workshop, training, "tiny", technique={"type": "full"}, hyperparameters=many, learning_rate=rate)
    parent = str(workshop.until_state(full, "succeeded").tuned_model)
    job = workshop.until_state(_create(workshop, training, parent, technique={"type": "lora", "r": 2}), "succeeded")
    adapter = str(job.tuned_model)
    assert adapter.startswith("ft:tiny:")
    before, after = _losses(workshop, full), _losses(workshop, job.id)
    assert after[0] == pytest.approx(before[-1], rel=0.2)
    assert before[-1] < 0.7 * before[0]

    folder, base = _folder(workshop, adapter, tmp_path / "adapter"), _folder(workshop, parent, tmp_path / "parent")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == parent
    with workshop.session() as session:
        sha256 = session.get_one(Model, parent).manifest_sha256
        assert session.get_one(Model, adapter).base_id == parent
    assert f"Trained from `{parent}` (manifest sha256 `{sha256}`)." in (folder / "README.md").read_text()

    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt in json.loads((folder / "parity.json").read_text())["prompts"]:
        logits = _logits(model, prompt["input_ids"])
        assert torch.allclose(logits, torch.tensor(prompt["logits"]), atol=1e-3)
    assert _answer(workshop, adapter, tmp_path / "models", "What comes after 3?") == _plain(model, folder)

    again = workshop.until_state(_create(workshop, training, adapter, learning_rate=1e-9), "succeeded")
    later = _losses(workshop, again.id)
    assert later[0] == pytest.approx(later[1], rel=0.01)
    assert later[0] < after[-1], "it goes on after the adapter's last step"
    assert again.base_model == parent


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0, -1]
    return logits


def _plain(model: Any, folder: Path) -> str:
    """Returns the greedy answer by PEFT and transformers alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What comes after 3?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    model.generation_config = GenerationConfig.from_pretrained(folder)
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
