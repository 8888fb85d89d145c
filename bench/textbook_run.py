"""Measures the textbook's case on one GPU: QLoRA 7B, 1,000 instruction rows, 3 epochs, with everything that a job does.

`python -m bench.textbook_run OUT.json [--lengths real full] [--models FOLDER] [--shape llama2-7b] [--rows 1000]`. The
request leaves everything but QLoRA and the files to the server: files are checked and the plan is made as of a job, the
trainer is a preloaded process as a worker keeps one, and the served model is checked at the end, by a process that has
waited for it. 125 validation and 125 test rows are added, the usual 80/10/10 split. `real`: rows as long as those of
instruction data, log-normal with a median of 190 tokens, at most 2,048; `full`: 2,048 tokens. A third of a row is its
prompt. Nothing is kept on the host from earlier jobs. The weights are random, so that neither model ends its answers:
both generate the most tokens that the plan allows, for every test row. OUT.json is written after each of the lengths.
Takes a GPU, or a CPU with a small shape and few rows.
"""

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import make_model
from bench.job_speed import DeviceMemory, Trainer, await_imports
from bench.train_rows import TEMPLATE_TOKENS, lengths
from bench.train_side_by_side import hardware
from tunery import digests
from tunery.artifacts import manifest
from tunery.artifacts.manifest import Manifest, ManifestFile
from tunery.datasets.model import File
from tunery.jobs import creation
from tunery.jobs.leases import Lease
from tunery.jobs.model import HostDevice
from tunery.jobs.request import JobRequest
from tunery.models.model import Model
from tunery.rows.messages import FileRole
from tunery.rows.template import ChatTemplate
from tunery.settings import Settings
from tunery.spec import Run, TrainingOptions, TrainingSpec
from tunery.storage import Directory
from worker.io import checks
from worker.supervisor import served, staging
from worker.supervisor.drain import Drain
from worker.supervisor.lease import LeaseKeeper
from worker.supervisor.staging import Needs, StoredFile, StoredFolder
from worker.trainer import coverage, inspection

GOALS = {"real": 150, "full": 480}
"""Seconds that the whole may take."""
HELD_OUT = 8
"""Training rows for each row of the validation and of the test file."""
_PROMPT = 3
"""One of so many tokens of a row is in its prompt."""
_TIMED = re.compile(r"\d{4}-\d{2}-\d{2} ")
"""What a line begins with that the trainer itself has logged."""
_NAMES: dict[FileRole, str] = {"training": "train", "validation": "valid", "test": "test"}


def conversation(length: int, numbers: random.Random) -> dict[str, Any]:
    """Returns a row of `length` tokens, of random letters, a token each."""
    letters = "".join(numbers.choice("JQXZ") for _ in range(length - TEMPLATE_TOKENS))
    prompt, answer = letters[: len(letters) // _PROMPT], letters[len(letters) // _PROMPT :]
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


@dataclass(frozen=True)
class Host:
    """A host whose storage and folder of models hold one base and nothing of earlier jobs."""

    storage: Directory
    settings: Settings
    base: Model

    @classmethod
    def make(cls, scratch: Path, folder: Path) -> "Host":
        """`folder`: the base's."""
        models = scratch / "models"
        models.mkdir(parents=True)
        config = folder / "config.json"
        listed = Manifest(
            files=(ManifestFile(path=config.name, bytes=config.stat().st_size, sha256=digests.sha256(config)),)
        )
        (folder / manifest.NAME).write_bytes(listed.encode())
        (models / listed.sha256).symlink_to(folder.resolve())
        model = inspection.skeleton(str(folder), folder)
        known = inspection.model_info(str(folder), model, ChatTemplate.load(folder))
        known |= coverage.model_info(model.config)
        base = Model(id=folder.name, kind="base", prefix=f"bases/{folder.name}", model_info=known, status="ready")
        base.manifest_sha256 = listed.sha256
        return cls(Directory(scratch / "objects"), Settings(models_dir=models), base)

    def put_file(self, role: FileRole, wanted: list[int]) -> File:
        """Stores a file with rows of these lengths."""
        numbers = random.Random(role)
        text = "".join(json.dumps(conversation(length, numbers)) + "\n" for length in wanted)
        stored = self.storage.put(f"files/{role}", text.encode())
        return File(
            id=f"file-{role}", project_id="bench", purpose="fine-tune", filename=f"{role}.jsonl", bytes=stored.bytes,
            sha256=stored.sha256, key=f"files/{role}", status="processed",
        )  # fmt: skip

    def device(self) -> HostDevice:
        """Returns what a worker here offers."""
        on_gpu = torch.cuda.is_available()
        size = torch.cuda.get_device_properties(0).total_memory if on_gpu else psutil.virtual_memory().total
        name = torch.cuda.get_device_name() if on_gpu else "cpu"
        return HostDevice(id="here", host="here", gpu_index=0 if on_gpu else None, device=name, memory_bytes=size)


def put_files(host: Host, kind: str, rows: int) -> dict[FileRole, File]:
    """Stores `rows` training rows, and the validation and test rows beside them."""
    held_out = max(1, rows // HELD_OUT)
    wanted = lengths(kind, rows + 2 * held_out)
    shares: dict[FileRole, list[int]] = {
        "training": wanted[:rows],
        "validation": wanted[rows : rows + held_out],
        "test": wanted[rows + held_out :],
    }
    return {role: host.put_file(role, share) for role, share in shares.items()}


def request(model: str, files: dict[FileRole, File]) -> JobRequest:
    """Returns what the user sends."""
    return JobRequest.model_validate(
        {
            "model": model,
            "training_file": files["training"].id,
            "validation_file": files["validation"].id,
            "technique": {"type": "qlora"},
            "evaluation": {"test_file": files["test"].id},
            "seed": 7,
        }
    )


def judge(host: Host, asked: JobRequest, files: dict[FileRole, File]) -> checks.Verdict:
    """Checks the files and makes the plan, as for a job of this request."""
    method, hyperparameters = creation.check_fields(asked)
    options = {name: getattr(asked, name) for name in TrainingOptions.model_fields}
    spec = TrainingSpec(**options, seed=asked.seed, method=method, hyperparameters=hyperparameters)
    case = checks.Case(
        job_id="bench", now=datetime.now(UTC), spec=spec, files=files, base=host.base, rendered_by=host.base,
        model=asked.model, devices=[host.device()],
    )  # fmt: skip
    return checks.judge(case, host.settings, host.storage)


def lay_out(host: Host, verdict: checks.Verdict, files: dict[FileRole, File], folder: Path) -> None:
    """Fills the run directory as a worker does."""
    run = Run(job="bench", base_model=host.base.id, plan=verdict.plan, public_checkpoints=verdict.plan.keep_checkpoints)
    assert host.base.manifest_sha256 is not None
    needs = Needs(
        run=run,
        files={_NAMES[role]: StoredFile(file.key, file.sha256) for role, file in files.items()},
        base=StoredFolder(host.base.prefix, host.base.manifest_sha256),
        adapter=None,
        resume=None,
    )
    staging.lay_out(needs, folder, host.settings.models_dir, host.storage, lambda: None)


def check_of(host: Host, folder: Path) -> served.Check:
    """Returns the check of the served model, as a worker makes it."""
    gpu = host.device().gpu_index
    lease = Lease("bench", attempt_id=1, number=1, gpu_indexes=() if gpu is None else (gpu,))
    return served.Check(LeaseKeeper(lease, host.settings, Drain()), folder, host.settings, "bench")


def measure(base: Path, kind: str, rows: int) -> dict[str, Any]:
    """Measures a job from the check of its files to that of the served model."""
    with tempfile.TemporaryDirectory() as holder:
        scratch = Path(holder)
        folder = scratch / "run"
        trainer = Trainer(scratch / "preloading.txt")
        host = Host.make(scratch, base)
        files = put_files(host, kind, rows)
        await_imports(psutil.Process(trainer.process.pid))
        began = time.monotonic()
        verdict = judge(host, request(host.base.id, files), files)
        lay_out(host, verdict, files, folder)
        seconds = {"files": round(time.monotonic() - began, 1)}
        memory = DeviceMemory(trainer.process.pid)
        trainer.begin(folder)
        with check_of(host, folder) as check:
            said, took = trainer.messages(tell=partial(_hear, check))
            process_gib = memory.gib()
            log = (folder / "log.txt").read_text().splitlines()
            print("RUN " + json.dumps(figures(said, log)), flush=True)
            began = time.monotonic()
            is_due = said[-1:] and said[-1]["type"] == "finished" and check.is_due
            found = check.run().model_dump(mode="json") if is_due else {}
        seconds |= {"run": took["whole"], "served_check": round(time.monotonic() - began, 1)}
        size = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    return {
        "lengths": kind,
        "seconds": seconds | {"all": round(sum(seconds.values()), 1), "goal": GOALS[kind]},
        **figures(said, log),
        "process_gib": process_gib,
        "artifact_bytes": size,
        "served": found,
        "warnings": verdict.warnings,
        "plan": verdict.plan.model_dump(mode="json"),
    }


def _hear(check: served.Check, message: dict[str, Any]) -> None:
    """Does at a message what a worker does, and prints it, of steps only some, so that one sees how far a run is."""
    check.make_ready()
    if message["type"] != "step" or message["step"] % 50 in {0, 1}:
        shown = {name: value for name, value in message.items() if isinstance(value, int | float | str)}
        print(json.dumps(shown)[:200], file=sys.stderr, flush=True)


def figures(said: list[dict[str, Any]], log: list[str]) -> dict[str, Any]:
    """Returns a run's figures by its messages. `at`: seconds from the moment at which the process got its run."""
    if not said or said[-1]["type"] != "finished":
        return {"failed": said[-1:], "log": log[-15:]}
    end = said[-1]
    steps = [message for message in said if message["type"] == "step"]
    [started] = (message for message in said if message["type"] == "started")
    score = next((message for message in said if message["type"] == "score"), {})
    training = sum(step["seconds"] for step in steps)
    at = {"started": started, "first_step": steps[0], "last_step": steps[-1], "score": score, "finished": end}
    return {
        "at": {name: message.get("at") for name, message in at.items()},
        "parts": {name: round(part["seconds"], 1) for name, part in end["spent"].items()},
        "units": {name: part["units"] for name, part in end["spent"].items()},
        "steps": len(steps),
        "tok_s": round(steps[-1]["tokens"] / training),
        "step_ms": round(1000 * statistics.median(step["seconds"] for step in steps), 1),
        "tokens": steps[-1]["tokens"],
        "trainable": started["trainable_params"],
        "peak_gib": end["peak_memory_bytes"] and round(end["peak_memory_bytes"] / 2**30, 2),
        "losses": [round(step["train_loss"], 4) for step in steps],
        "grad_norms": [round(step["grad_norm"], 4) for step in steps],
        "valid_losses": [message["loss"] for message in said if message["type"] == "evaluated"],
        "checkpoints": [(m["kind"], m["step"], m["at"]) for m in said if m["type"] == "checkpoint_saved"],
        "score": {name: score.get(name) for name in ("rows", "scored_in", "base_exact", "tuned_exact", "general")},
        "latency": end["latency"],
        "paths": [line.partition("paths: ")[2] for line in log if " paths: " in line][-1:],
        "memory_plan": [line.partition("plan: ")[2] for line in log if "memory plan: " in line][-1:],
        "log": [line for line in log if _TIMED.match(line)],
    }


SHOWN = ("lengths", "failed", "seconds", "at", "parts", "units", "steps", "tok_s", "step_ms", "peak_gib",
         "process_gib", "score", "memory_plan", "warnings")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--lengths", nargs="+", choices=list(GOALS), default=["real"])
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "speed_table")
    parser.add_argument("--shape", choices=list(make_model.SHAPES), default="llama2-7b")
    parser.add_argument("--rows", type=int, default=1000)
    a = parser.parse_args()
    base = make_model.ready(a.models, a.shape)
    runs = []
    for kind in a.lengths:
        runs.append(measure(base, kind, a.rows))
        print("RESULT " + json.dumps({name: runs[-1].get(name) for name in SHOWN}), flush=True)
        about = {**hardware(), "shape": a.shape, "rows": a.rows}
        a.out.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
