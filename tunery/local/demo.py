"""`tunery demo`: one fine-tune from start to end, through the official client, with proof that the model improved."""

import hashlib
import json
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

from openai import DefaultHttpxClient, OpenAI, OpenAIError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunery import processes
from tunery.errors import TuneryError
from tunery.local import lock, paths
from tunery.local.bases import PackagedBase
from tunery.local.postgres import Postgres
from tunery.local.receiver import Receiver
from tunery.local.signals import ends_on_signals, undisturbed
from tunery.local.stack import Stack
from tunery.local.terminal import JobProgress, Reporter, duration, loss_curve, print_whole, size

HOMES = Path(".tunery")
LEAST_ACCURACY = 0.70
LEAST_ROWS = 100
REPEATED = 20
MAX_NEW_TOKENS = 20
"""Token limit: the longest label with its end has 16. The base never stops, so a higher limit costs time."""
_SUCCEEDED: Final = "fine_tuning.job.succeeded"


class DemoFailed(TuneryError):
    """{reason}"""

    code = "demo_failed"


@dataclass
class Proof:
    """The results of the checks that exit status 0 requires."""

    points: list[tuple[str, bool]] = field(default_factory=list)

    def add(self, text: str, holds: bool) -> None:
        self.points.append((text, holds))

    @property
    def holds(self) -> bool:
        return bool(self.points) and all(holds for _, holds in self.points)


def run(base: PackagedBase, *, rows: int, test_rows: int) -> int:
    """Returns the exit status: 0 when everything was proved, 1 when something was not, 130 after Ctrl-C."""
    console = Console(highlight=False, emoji=False)
    started = time.monotonic()
    _remove_old_homes(keep=1)
    home = HOMES / f"demo-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    proof = Proof()
    with ends_on_signals():
        try:
            job = _with_stack(base, home, console, proof, rows, test_rows)
            _repeat_with_plain_peft(home, console, proof)
        except KeyboardInterrupt:
            console.print("\nStopped; nothing is left running.", style="yellow")
            return 130
        except OpenAIError as error:
            raise DemoFailed(reason=f"{error} The logs are in {home}/logs.") from error
    _verdict(console, proof)
    _how_to_go_on(console, home, job)
    console.print(f"All of it took {duration(time.monotonic() - started)}.", style="dim")
    return 0 if proof.holds else 1


def _with_stack(
    base: PackagedBase, home: Path, console: Console, proof: Proof, rows: int, test_rows: int
) -> dict[str, Any]:
    console.print(f"[bold]Starting everything on this machine[/]  [dim]{home}[/]")
    environment = {"TUNERY_WEBHOOK_ALLOW": paths.LOOPBACK, "TUNERY_STOP_GRACE_SECONDS": "20"}
    stack = Stack(home, port=0, environment=environment, report=Reporter(console))
    with ExitStack() as open:
        open.callback(_stop, stack)
        stack.start()
        receiver = open.enter_context(Receiver())
        return _Story(_connect(stack), base, receiver, home, console, proof).run(rows, test_rows)


def _connect(stack: Stack) -> OpenAI:
    client = DefaultHttpxClient(mounts=paths.UNPROXIED)
    return OpenAI(base_url=f"{stack.api_url}/v1", api_key=stack.first_key, http_client=client)


def _stop(stack: Stack) -> None:
    with undisturbed():
        stack.stop()


@dataclass
class _Story:
    client: OpenAI
    base: PackagedBase
    receiver: Receiver
    home: Path
    console: Console
    proof: Proof

    def run(self, rows: int, test_rows: int) -> dict[str, Any]:
        """Does what a user of the API does, in order; returns the finished job."""
        self._add_base()
        self._ask_for_webhooks()
        files = self._upload(rows)
        self.console.print(f"\n[bold]Fine-tuning {self.base.id}[/]  [dim]LoRA, one pass over {rows} rows[/]")
        job, curves = self._train(files, test_rows)
        self._await_webhook(job)
        self._show_score(job)
        self._show_samples(job)
        unicode = "utf" in self.console.encoding
        self.console.print("\n[bold]Loss[/]  [dim]cyan: training, diamond: whole validation file[/]")
        self.console.print(loss_curve(curves.losses, curves.valid_losses, unicode=unicode))
        self._download(job)
        return job

    def _add_base(self) -> None:
        report = Reporter(self.console)
        with self.console.status(f"a worker converts {self.base.id}"):
            model = self._post("/models", self.base.registration())
            while model["status"] == "processing":
                time.sleep(0.5)
                model = self._get(f"/models/{self.base.id}")
        if model["status"] != "ready":
            raise DemoFailed(reason=f"{self.base.id} could not be added: {model.get('status_details')}")
        report("Base model", self.base.id)
        if self.base.terms:
            self.console.print(f"    {self.base.terms}", style="dim", soft_wrap=True)

    def _ask_for_webhooks(self) -> None:
        endpoint = self.client.webhooks.create(name="demo", url=self.receiver.url, event_types=[_SUCCEEDED])
        self.receiver.secret = endpoint.signing_secret
        Reporter(self.console)("Webhooks", self.receiver.url)

    def _upload(self, rows: int) -> dict[str, str]:
        report = Reporter(self.console)
        examples = paths.root() / "examples"
        train = self.home / "banking_train.jsonl"
        train.write_text("".join((examples / "banking_train.jsonl").read_text().splitlines(keepends=True)[:rows]))
        uploads = {"train": train, "valid": examples / "banking_valid.jsonl", "test": examples / "banking_test.jsonl"}
        files = {}
        for role, path in uploads.items():
            with path.open("rb") as content:
                files[role] = self.client.files.create(file=content, purpose="fine-tune").id
        report("Files", "  ".join(path.name for path in uploads.values()))
        return files

    def _train(self, files: dict[str, str], test_rows: int) -> tuple[dict[str, Any], JobProgress]:
        """Shows one live line until the job has ended. Raises DemoFailed unless it succeeded."""
        job_id = self.client.fine_tuning.jobs.create(
            model=self.base.id,
            training_file=files["train"],
            validation_file=files["valid"],
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
            suffix="banking",
            seed=7,
            extra_body={
                "technique": {"type": "lora"},
                "evaluation": {
                    "test_file": files["test"],
                    "max_rows": test_rows,
                    "max_new_tokens": MAX_NEW_TOKENS,
                },
            },
        ).id
        seen: set[str] = set()
        with JobProgress(self.console) as progress:
            while True:
                job = self.client.fine_tuning.jobs.retrieve(job_id).model_dump()
                progress.update(job, self._new_events(job_id, seen))
                if job["status"] in ("succeeded", "failed", "cancelled"):
                    break
                time.sleep(0.5)
        self.proof.add(f"the job {job['status']}", job["status"] == "succeeded")
        if job["status"] != "succeeded":
            why = (job.get("error") or {}).get("message", "")
            raise DemoFailed(reason=f"{job_id} {job['status']}. {why} The logs are in {self.home}/logs.")
        return job, progress

    def _new_events(self, job_id: str, seen: set[str]) -> list[dict[str, Any]]:
        """Returns the new events, oldest first; the API lists them newest first, so it reads back to a known one."""
        new = []
        for event in self.client.fine_tuning.jobs.list_events(job_id, limit=50):
            if event.id in seen:
                break
            seen.add(event.id)
            new.append(event.model_dump())
        return new[::-1]

    def _await_webhook(self, job: dict[str, Any]) -> None:
        arrived = self.receiver.wait_for(_SUCCEEDED, job["id"], seconds=60)
        refused = (
            f" ({len(self.receiver.refused)} refused: {self.receiver.refused[0]})" if self.receiver.refused else ""
        )
        self.proof.add(f"the webhook arrived with a valid signature{refused}", arrived)

    def _show_score(self, job: dict[str, Any]) -> None:
        score = job.get("scorecard")
        if not score:
            raise DemoFailed(reason=f"{job['id']} has no scorecard. Its log is in {self.home}/logs/worker-train.log.")
        low, high = score["gain_low"], score["gain_high"]
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("", "base", "tuned", "gain", "95 % interval"):
            table.add_column(column, justify="left" if not column else "right")
        table.add_row(
            f"right intent, {score['rows']} held-out rows",
            f"{score['base_exact']:.1%}",
            Text(f"{score['tuned_exact']:.1%}", style="bold green"),
            f"{score['gain']:+.1%}",
            f"{low:+.1%} .. {high:+.1%}",
        )
        self.console.print("\n[bold]Base versus tuned[/]  [dim]same rows, same prompt, greedy[/]")
        self.console.print(table)
        self.proof.add(f"at least {LEAST_ROWS} held-out rows ({score['rows']})", score["rows"] >= LEAST_ROWS)
        enough = score["tuned_exact"] >= LEAST_ACCURACY
        self.proof.add(f"intent accuracy {score['tuned_exact']:.1%}, at least {LEAST_ACCURACY:.0%}", enough)
        self.proof.add(f"the gain's 95 % interval lies above 0 ({low:+.1%} .. {high:+.1%})", low > 0)

    def _show_samples(self, job: dict[str, Any]) -> None:
        """Prints answers requested through the API, as in real use, not those of the scorecard."""
        lines = (paths.root() / "examples/banking_test.jsonl").read_text().splitlines()
        rows = [json.loads(line)["messages"] for line in lines[::150][:3]]
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("question", "base", "tuned"):
            table.add_column(column, overflow="fold", ratio=1)
        with self.console.status("asking both models"):
            given = {name: [self._ask(name, row) for row in rows] for name in (self.base.id, job["fine_tuned_model"])}
        for number, row in enumerate(rows):
            correct = given[job["fine_tuned_model"]][number] == row[-1]["content"]
            tuned = Text(given[job["fine_tuned_model"]][number], style="green" if correct else "red")
            table.add_row(row[-2]["content"], Text(given[self.base.id][number], style="dim"), tuned)
        self.console.print("\n[bold]Three answers[/]  [dim]/v1/chat/completions[/]")
        self.console.print(table)

    def _ask(self, model: str, row: list[dict[str, str]]) -> str:
        answer = self.client.chat.completions.create(
            model=model, messages=cast(Any, row[:-1]), temperature=0, max_completion_tokens=MAX_NEW_TOKENS
        )
        return answer.choices[0].message.content or ""

    def _download(self, job: dict[str, Any]) -> None:
        """Downloads every file of the artifact and checks its sha256."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("file", "size", "sha256"):
            table.add_column(column, no_wrap=True, justify="right" if column == "size" else "left")
        folder, all_equal = self.home / "adapter", True
        for file in self._get(f"/fine_tuning/jobs/{job['id']}/artifacts")["data"]:
            found = self._fetch(job["id"], file["path"], folder)
            all_equal = all_equal and found == file["sha256"]
            table.add_row(file["path"], size(file["bytes"]), found)
        self.console.print(f"\n[bold]The artifact[/]  [dim]downloaded to {folder}[/]")
        print_whole(self.console, table)
        self.proof.add("every downloaded file has the sha256 of the manifest", all_equal and table.row_count > 0)

    def _fetch(self, job_id: str, path: str, folder: Path) -> str:
        relative = PurePosixPath(path)
        if relative.is_absolute() or ".." in relative.parts:
            raise DemoFailed(reason=f"The server listed a file outside the folder: {path}")
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        content = self.client.get(f"/fine_tuning/jobs/{job_id}/artifacts/{path}", cast_to=bytes)
        target.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def _get(self, path: str) -> dict[str, Any]:
        return cast(dict[str, Any], self.client.get(path, cast_to=object))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return cast(dict[str, Any], self.client.post(path, body=body, cast_to=object))


# --- afterwards, with everything stopped ---------------------------------------------------------------------------


def _repeat_with_plain_peft(home: Path, console: Console, proof: Proof) -> None:
    """Answers some scored rows again from the downloaded files, in a process without any of our code."""
    scored = [json.loads(line) for line in (home / "adapter/answers.jsonl").read_text().splitlines()][:REPEATED]
    questions = "".join(json.dumps({"messages": row["messages"]}) + "\n" for row in scored)
    bases = [path.parent for path in (home / "models").glob("*/config.json")]
    if len(bases) != 1:
        raise DemoFailed(reason=f"{home}/models should contain one base model, but contains {len(bases)}.")
    with console.status(f"plain peft answers {len(scored)} of the rows again"):
        answers = _answers_of_plain_peft(bases[0], home, questions)
    equal = sum(row["tuned"] == answer for row, answer in zip(scored, answers, strict=False))
    text = f"plain peft, in a process of its own, gives the same answers ({equal} of {REPEATED} rows)"
    proof.add(text, equal == len(scored) == REPEATED)


def _answers_of_plain_peft(base: Path, home: Path, questions: str) -> list[str]:
    (home / "questions.jsonl").write_text(questions)
    log = home / "logs/plain-peft.log"
    with (home / "questions.jsonl").open() as asked, log.open("wb") as errors:
        child = subprocess.Popen(
            [sys.executable, paths.root() / "examples/plain_peft.py", base, home / "adapter", str(MAX_NEW_TOKENS)],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            preexec_fn=processes.dies_with_parent(signal.SIGKILL),
        )
        try:
            output, _ = child.communicate()
        finally:
            processes.stop(child)
    if child.returncode != 0:
        raise DemoFailed(reason=f"Plain peft could not use the adapter. {log} ends with: {processes.tail(log, 3)}")
    return [json.loads(line) for line in output.decode().splitlines()]


def _verdict(console: Console, proof: Proof) -> None:
    console.print("\n[bold]Proved[/]" if proof.holds else "\n[bold red]Not proved[/]")
    for text, holds in proof.points:
        console.print(Text.assemble(("  ✓ ", "green") if holds else ("  ✗ ", "bold red"), text), soft_wrap=True)


def _how_to_go_on(console: Console, home: Path, job: dict[str, Any]) -> None:
    """Prints the next commands: `tunery up` starts the demo's stack again, with its job and model."""
    question = home / "question.json"
    question.write_text(json.dumps({"model": job["fine_tuned_model"], "messages": _question("I lost my card")}))
    console.print("\n[bold]Continue by hand[/]")
    for line in (
        f".venv/bin/tunery up --home {home}",
        "# then, in another terminal",
        f"export TUNERY_API_KEY=$(.venv/bin/tunery --home {home} keys create)",
        f".venv/bin/tunery jobs show {job['id']}",
        "curl -s http://127.0.0.1:8000/v1/chat/completions \\",
        '  -H "Authorization: Bearer $TUNERY_API_KEY" -H "Content-Type: application/json" \\',
        f"  -d @{question}",
    ):
        console.print(Text(f"  {line}"), soft_wrap=True)


def _question(text: str) -> list[dict[str, str]]:
    """Returns the messages of a question, with the system message of the training rows."""
    with (paths.root() / "examples/banking_test.jsonl").open() as rows:
        system = json.loads(rows.readline())["messages"][0]
    return [system, {"role": "user", "content": text}]


def _remove_old_homes(*, keep: int) -> None:
    """Removes the data of earlier demos, some 700 MB each, except the newest and those that still run."""
    idle = [home for home in sorted(HOMES.glob("demo-*")) if not lock.is_held(home)]
    for home in idle[: len(idle) - keep]:
        Postgres(home / "postgres").remove()
        shutil.rmtree(home, ignore_errors=True)
