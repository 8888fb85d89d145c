"""An adapter trained by plain PEFT, from its archive to every use of a job's own adapter."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from run_folders import Ear, chat, lay_out, plan, said
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from workshop import Workshop

from tunery.artifacts import manifest
from tunery.artifacts import model as artifacts
from tunery.jobs import creation
from tunery.jobs.request import JobRequest
from tunery.keys import auth
from tunery.keys.model import Project
from tunery.models import exports, imports, scores
from tunery.models.model import Model
from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate
from tunery.serving import Chosen
from tunery.spec import Columns, Evaluation, Export, General, Lora, Plan
from worker.io import exports as io_exports
from worker.io import imports as io_imports
from worker.io import scores as io_scores
from worker.io import validation
from worker.server.backends.embedded import Engine
from worker.server.schemas import parse
from worker.supervisor.drain import Drain
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

NEVER = tuple(range(6, 260))
SHOUT = "<|im_start|>system\nShout.<|im_end|>\n" + tiny_models.CHATML
ROWS = [chat(i, words=6) for i in range(16)]
CONTENT = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
TABLE = CONTENT.replace(b'"messages"', b'"Verlauf"')
NAMED = Columns(messages="Verlauf")


@pytest.fixture
def base(workshop: Workshop, tmp_path: Path) -> Path:
    """Adds a base named `mother` to the installation."""
    folder = tiny_models.llama(tmp_path / "mother", bf16=True, never_said=NEVER)
    listed, sha256 = manifest.publish(workshop.storage, "models/mother", folder)
    described = listed.model_dump(mode="json")
    with workshop.session() as session:
        rows.base(session, "mother", prefix="models/mother", manifest=described, manifest_sha256=sha256)
    return folder


@pytest.fixture
def foreign(base: Path, tmp_path: Path) -> Path:
    """Trains an adapter with plain PEFT for a few steps, with its own chat template; returns its folder."""
    folder = tmp_path / "foreign"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=".*(q_proj|up_proj)", alpha_pattern={"q_proj": 16})
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=0.05)
    ids = torch.tensor([[1, *range(3, 6), 2]])
    for _ in range(4):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(str(folder))
    tiny_models.tokenizer(folder, SHOUT)
    return folder


def archive(folder: Path) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as made:
        for path in folder.rglob("*"):
            made.write(path, path.relative_to(folder))
    return packed.getvalue()


def bring_in(workshop: Workshop, content: bytes) -> Model:
    """Imports an archive as the API and a worker do; returns its model."""
    prefix = imports.new_prefix()
    workshop.storage.put(imports.archive_key(prefix), content)
    with workshop.session() as session:
        mother = session.get_one(Model, "mother")
        values: dict[str, Any] = {"name": "ft:mother:x::1", "source": "foreign.zip", "technique": "lora"}
        imports.add(session, project_id=workshop.project_id, base=mother, prefix=prefix, **values)
    assert io_imports.import_next(workshop.settings, workshop.storage, Drain())
    assert not io_imports.import_next(workshop.settings, workshop.storage, Drain())
    with workshop.session() as session:
        found: Model = session.get_one(Model, "ft:mother:x::1")
    assert [key for key in workshop.storage.list(f"{prefix}/") if "/import/" in key] == []
    return found


def plain(base: Path, foreign: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), foreign).eval()


@pytest.mark.slow
def test_it_answers_as_plain_peft_does_and_jobs_go_on_from_it(
    workshop: Workshop, base: Path, foreign: Path, tmp_path: Path
) -> None:
    model = bring_in(workshop, archive(foreign))
    assert model.status == "ready", model.status_details
    check_answers(workshop, base, foreign, model)
    check_continuing(workshop, base, foreign, model, tmp_path / "run")


def check_answers(workshop: Workshop, base: Path, foreign: Path, model: Model) -> None:
    """Checks that the model server's greedy answer is that of plain PEFT, to a prompt in the adapter's own template."""
    engine = Engine(workshop.settings.models_dir, workshop.storage)
    with workshop.session() as session:
        mother = session.get_one(Model, "mother")
    files = [{"id": m.id, "prefix": m.prefix, "manifest_sha256": m.manifest_sha256} for m in (mother, model)]
    chosen = Chosen.model_validate({"base": files[0], "tuned": {**files[1], "technique": model.technique}})
    messages = [{"role": "user", "content": "alpha beta"}]
    asked = {
        "model": "m",
        "messages": messages,
        "temperature": 0,
        "max_tokens": 24,
        "tunery_model": chosen.model_dump(),
    }
    answer = engine.answer(parse(json.dumps(asked).encode()))

    ids = torch.tensor([answer.prompt_ids])
    wanted = plain(base, foreign).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    text = "".join(answer)
    decoded = answer.tokenizer.decode(wanted[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    assert text == decoded
    assert "Shout." in answer.tokenizer.decode(answer.prompt_ids)


def check_continuing(workshop: Workshop, base: Path, foreign: Path, model: Model, folder: Path) -> None:
    """Checks that a job on it is validated and continues from its weights, in its own template."""
    file_id = workshop.file(CONTENT)
    with workshop.session() as session:
        _, secret = auth.create_key(session, session.get_one(Project, workshop.project_id), "test")
        caller = auth.authenticate(session, secret)
        job = creation.create(session, caller, JobRequest(model=model.id, training_file=file_id, seed=1))
    assert validation.validate_next(workshop.settings, workshop.storage)
    made = workshop.job(job.id)
    assert made.state == "queued", made.error_message
    technique = Plan.model_validate(made.plan).technique
    assert isinstance(technique, Lora)
    assert (technique.r, technique.alpha, technique.target_modules) == (4, 8.0, ["q_proj", "up_proj"])

    lay_out(folder, base, plan(technique=technique, learning_rate=1e-9, batch_size=16), ROWS)
    listed = manifest.load(workshop.storage, model.prefix, model.manifest_sha256 or "")
    manifest.fetch(workshop.storage, model.prefix, listed, folder / "adapter")
    ear = Ear()
    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    out = folder / "out"
    assert (out / "chat_template.jinja").read_text() == SHOUT
    before, after = (load_file(each / "adapter_model.safetensors") for each in (foreign, out))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert len(said(ear, "step")) == 1
    ear.close()


@pytest.mark.slow
def test_it_is_merged_with_the_proof_of_a_jobs_adapter(workshop: Workshop, base: Path, foreign: Path) -> None:
    model = bring_in(workshop, archive(foreign))
    file_id, asked = workshop.file(TABLE), Export(merged=True, adapter_gguf=True)
    with workshop.session() as session:
        exports.ask(session, session.get_one(Model, model.id), asked, file_id, NAMED)

    assert io_exports.export_next(workshop.settings, workshop.storage, Drain())

    with workshop.session() as session:
        ended = session.get_one(Model, model.id).export
    assert ended is not None
    assert ended["status"] == "succeeded", ended
    record = json.loads(b"".join(workshop.storage.read(f"{model.prefix}/merged/merge.json")))
    assert record["candidates"][0]["proof"]["mean_kl"] <= 1e-3
    assert record["candidates"][0]["proof"]["positions"] > 90
    merged = workshop.folder / "merged"
    merged.mkdir()
    for name in ("model.safetensors", "config.json"):
        (merged / name).write_bytes(b"".join(workshop.storage.read(f"{model.prefix}/merged/{name}")))
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ids = torch.tensor([[1, 3, 4, 5, 3, 2]])
    assert torch.allclose(whole(ids).logits, plain(base, foreign)(ids).logits, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("content", "columns"), [(CONTENT, None), (TABLE, NAMED)])
def test_it_is_scored_beside_its_base_without_a_job(
    workshop: Workshop, base: Path, foreign: Path, content: bytes, columns: Columns | None
) -> None:
    model = bring_in(workshop, archive(foreign))
    file_id = workshop.file(content)
    with workshop.session() as session:
        quick = Evaluation(test_file=file_id, max_new_tokens=4, max_rows=6, general=General(items=4, prompts=2))
        scores.ask(session, session.get_one(Model, model.id), quick, columns)

    assert io_scores.score_next(workshop.settings, workshop.storage, Drain())

    with workshop.session() as session:
        ended = session.get_one(Model, model.id).scoring
        listed = {file.path: file.key for file in artifacts.list_for(session, model.id)}
    assert ended is not None
    assert ended["status"] == "succeeded", ended["error"]
    assert ended["scorecard"]["rows"] == 6
    assert ended["scorecard"]["general"]["items"] == 4
    answers = b"".join(workshop.storage.read(listed[f"scores/{file_id}/answers.jsonl"])).splitlines()
    adapted, template = plain(base, foreign), ChatTemplate.load(foreign)
    for line, row in zip(map(json.loads, answers), ROWS, strict=False):
        ids = torch.tensor([template.encode_prompt([Message.model_validate(row["messages"][0])])])
        wanted = adapted.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert line["tuned"] == template.answer_text(wanted[0, ids.shape[1] :].tolist()).strip()


@pytest.mark.slow
def test_what_cannot_be_used_says_why(workshop: Workshop, base: Path, foreign: Path) -> None:
    path = foreign / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["c_attn"]}))
    model = bring_in(workshop, archive(foreign))
    assert model.status == "error"
    assert str(model.status_details).startswith("The adapter 'foreign.zip' cannot be used: ")
    assert "PEFT cannot load it onto this base" in str(model.status_details)
