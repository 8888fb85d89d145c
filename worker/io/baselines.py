"""Measures baselines: makes prompts, has models answer them in separate processes, and stores the table's figures."""

import json
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from tunery import db
from tunery.baselines import external as endpoint
from tunery.baselines import ledger, table
from tunery.baselines.duration import MODEL_SECONDS
from tunery.baselines.model import Baseline
from tunery.baselines.order import External, Order
from tunery.datasets import progress
from tunery.datasets.model import File
from tunery.errors import NotFound, TuneryError
from tunery.models.model import Model
from tunery.planning.prompting import AnswerOrder, Prompts, PromptScore, ShotsOrder, Variant
from tunery.settings import Settings
from tunery.spec import Evaluation
from tunery.storage import Storage
from worker.io import external, programs, scores
from worker.io.claims import take_one
from worker.supervisor import staging
from worker.supervisor.drain import Drain
from worker.supervisor.process import environment

log = logging.getLogger(__name__)
PROMPT_SECONDS = 1800
"""Time limit for making prompts, the same as a report's."""
_PROMPTS = 0.02
"""Fraction of the work that is done once the prompts are made."""


def measure_next(settings: Settings, storage: Storage, drain: Drain) -> bool:
    """Measures one baseline; returns whether there was one."""
    return take_one("baseline", _waiting, lambda baseline_id: _measure(baseline_id, settings, storage, drain))


def _waiting() -> list[str]:
    with db.transaction() as session:
        return ledger.waiting(session)


class _Watch(Drain):
    """Ends the work if the worker shuts down or the baseline is no longer wanted."""

    def __init__(self, drain: Drain, baseline_id: str) -> None:
        self._drain, self._id = drain, baseline_id
        self.is_wanted = True

    @property
    def begun(self) -> bool:
        return self._drain.begun or not self.is_wanted

    def look(self, fraction: float) -> None:
        """Records the fraction done, and reads whether the baseline was cancelled meanwhile."""
        with db.transaction() as session:
            self.is_wanted = ledger.show_progress(session, self._id, fraction)


class _Ended(Exception):
    """The baseline cannot be measured; the text is for its owner."""


def _measure(baseline_id: str, settings: Settings, storage: Storage, drain: Drain) -> None:
    with db.transaction() as session:
        baseline = ledger.begin(session, baseline_id)
    if baseline is None:
        return
    watch = _Watch(drain, baseline_id)

    def fail(error: Exception) -> None:
        said = error.message if isinstance(error, TuneryError) else str(error)
        _finish(baseline_id, error=said if isinstance(error, _Ended | TuneryError) else f"It failed: {said}")

    with programs.workplace(settings.runs_dir, "baseline", baseline_id, fail, partial(_release, baseline_id)) as folder:
        prompts = _make_prompts(baseline, folder, settings, storage, watch)
        found = list(_models(baseline, prompts, folder, settings, storage, watch))
        if not watch.begun and baseline.order["external"] is not None:
            found.append(_ask_external(baseline, prompts, folder, settings, storage, watch))
        if watch.begun:
            _release(baseline_id)
        else:
            _store(baseline, prompts, found, folder, storage)


def _release(baseline_id: str) -> None:
    with db.transaction() as session:
        ledger.release(session, baseline_id)


def _finish(baseline_id: str, *, result: dict[str, Any] | None = None, error: str | None = None) -> bool:
    with db.transaction() as session:
        return ledger.finish(session, baseline_id, result=result, error=error)


# --- prompts ------------------------------------------------------------------------------------------------------


def _make_prompts(baseline: Baseline, folder: Path, settings: Settings, storage: Storage, watch: _Watch) -> Prompts:
    """Makes the prompts of each variant in `folder`/prompts. Raises NotFound, _Ended."""
    order = Order.model_validate(baseline.order)
    with db.transaction() as session:
        model = session.get_one(Model, baseline.model)
        names = {"rows": baseline.eval_file, "examples": baseline.examples_file}
        files = {name: session.get_one(File, id) for name, id in names.items() if id is not None}
    for name, file in files.items():
        if file.purged_at is not None:
            raise NotFound(kind="file", id=file.id)
        storage.fetch(file.key, folder / name, file.sha256)
    (folder / "base").symlink_to(staging.text_folder(settings.models_dir, storage, model).absolute())
    asked = ShotsOrder(
        **order.model_dump(include={"shots", "retrieval", "seed", "max_rows", "max_new_tokens", "columns"}),
        context=model.model_info.get("context_length"),
    )
    (folder / "shots_order.json").write_text(asked.model_dump_json())
    reason = programs.run(
        ["tunery.datasets.shots", str(folder)], folder, watch, what="prompt construction", seconds=PROMPT_SECONDS,
        watch=partial(watch.look, 0.0),
    )  # fmt: skip
    if reason is not None and not watch.begun:
        raise _Ended(reason)
    watch.look(_PROMPTS)
    return Prompts(variants=[], examples=0, left_out=0, limit=1) if watch.begun else _read_prompts(folder)


def _read_prompts(folder: Path) -> Prompts:
    return Prompts.model_validate_json((folder / "shots.json").read_text())


# --- answers ------------------------------------------------------------------------------------------------------


def _models(
    baseline: Baseline, prompts: Prompts, folder: Path, settings: Settings, storage: Storage, watch: _Watch
) -> Iterator[dict[str, Any]]:
    """Yields each model's scores, the baseline's own model first."""
    ids = [baseline.model, *(id for id in baseline.order["compare"] if id != baseline.model)]
    for number, model_id in enumerate(ids):
        if watch.begun:
            return
        run_dir = folder / f"run-{number}"
        with db.transaction() as session:
            model = session.get_one(Model, model_id)
        variants = _asked(prompts, is_first=number == 0, is_tuned=model.kind != "base")
        _lay_out(baseline, model, variants, run_dir, settings, storage)
        reason = programs.run(
            ["worker.trainer.prompting", str(run_dir)], folder, watch, what="answering", seconds=MODEL_SECONDS,
            variables=environment(() if settings.io_gpu is None else (settings.io_gpu,), str(folder)),
            watch=partial(_show, watch, run_dir, number, len(ids)),
        )  # fmt: skip
        if watch.begun:
            return
        if reason is not None and number == 0:
            raise _Ended(reason)
        yield {
            "model": model_id,
            "place": "here",
            "tuned": model.kind != "base",
            "scores": _scores(run_dir, prompts, variants, reason),
        }


def _asked(prompts: Prompts, *, is_first: bool, is_tuned: bool) -> list[Variant]:
    """Returns the variants that a model is asked with. Apart from the baseline's own model, a tuned one needs no
    examples, and a base gets its best chance: the most of them.
    """
    made = [variant for variant in prompts.variants if variant.error is None]
    if is_first or len(made) < 2:
        return made
    return made[:1] if is_tuned else [made[0], made[-1]]


def _show(watch: _Watch, run_dir: Path, number: int, count: int) -> None:
    fraction = progress.read(run_dir) or 0.0
    watch.look(_PROMPTS + (0.98 - _PROMPTS) * (number + fraction) / count)


def _lay_out(
    baseline: Baseline, model: Model, variants: list[Variant], run_dir: Path, settings: Settings, storage: Storage
) -> None:
    evaluation = Evaluation(
        test_file=baseline.eval_file,
        max_rows=baseline.order["max_rows"],
        max_new_tokens=baseline.order["max_new_tokens"],
    )
    with db.transaction() as session:
        needs = scores.needs_of(session, model, evaluation, Order.model_validate(baseline.order).columns)
    staging.lay_out(needs, run_dir, settings.models_dir, storage, lambda: None)
    shutil.copytree(run_dir.parent / "prompts", run_dir / "prompts")
    order = AnswerOrder(variants=variants, tuned=needs.adapter is not None)
    (run_dir / "answer_order.json").write_text(order.model_dump_json())


def _scores(run_dir: Path, prompts: Prompts, variants: list[Variant], reason: str | None) -> list[dict[str, Any]]:
    """Returns a model's scores, and for variants that it was not asked with the reason."""
    if reason is not None:
        lost = [PromptScore(shots=one.shots, nearest=one.nearest, error=reason) for one in variants]
        return [score.model_dump(mode="json") for score in lost]
    found: list[dict[str, Any]] = json.loads((run_dir / "out" / "scores.json").read_text())
    if run_dir.name == "run-0":
        left = [variant for variant in prompts.variants if variant.error is not None]
        found += [PromptScore(**variant.model_dump()).model_dump(mode="json") for variant in left]
    return found


def _ask_external(
    baseline: Baseline, prompts: Prompts, folder: Path, settings: Settings, storage: Storage, watch: _Watch
) -> dict[str, Any]:
    """Returns the external endpoint's scores."""
    asked = External.model_validate(baseline.order["external"])
    run_dir = folder / f"run-{1 + len([id for id in baseline.order['compare'] if id != baseline.model])}"
    variants = _asked(prompts, is_first=False, is_tuned=False)
    with db.transaction() as session:
        model = session.get_one(Model, baseline.model)
    _lay_out(baseline, model, variants, run_dir, settings, storage)
    answered = external.answer(run_dir, variants, asked, _key(baseline, settings), prompts.limit, settings, watch)
    said = [variant for variant in answered if variant.error is None]
    scores = [PromptScore(**variant.model_dump()).model_dump(mode="json") for variant in answered if variant.error]
    if said and not watch.begun:
        order = AnswerOrder(variants=said, given=True)
        (run_dir / "answer_order.json").write_text(order.model_dump_json())
        reason = programs.run(["worker.trainer.prompting", str(run_dir)], folder, watch, what="scoring")
        scores = _scores(run_dir, prompts, said, reason) + scores
    return {"model": asked.model, "place": table.EXTERNAL, "tuned": False, "scores": scores}


def _key(baseline: Baseline, settings: Settings) -> SecretStr | None:
    """Returns the endpoint's key. Raises _Ended if it cannot be read any more."""
    if baseline.external_key is None:
        return None
    if settings.external_secret is None:
        raise _Ended("The operator has disabled external endpoints since. Create the baseline without one.")
    try:
        return endpoint.unseal(baseline.external_key, settings.external_secret)
    except endpoint.NoAnswer as error:
        raise _Ended(f"{error}.") from None


# --- what is kept -------------------------------------------------------------------------------------------------


def _store(baseline: Baseline, prompts: Prompts, found: list[dict[str, Any]], folder: Path, storage: Storage) -> None:
    """Stores every answer with its prompt, then the figures."""
    kept = folder / "answers.jsonl"
    with kept.open("w", encoding="utf-8") as all_answers:
        for number, measured in enumerate(found):
            path = folder / f"run-{number}" / "out" / "answers.jsonl"
            for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
                all_answers.write(json.dumps({"model": measured["model"], **json.loads(line)}, ensure_ascii=False))
                all_answers.write("\n")
    storage.put_file(f"{baseline.prefix}/answers.jsonl", kept)
    result = {"models": found, "examples": prompts.examples, "left_out": prompts.left_out}
    if not _finish(baseline.id, result=result):
        storage.delete(f"{baseline.prefix}/answers.jsonl")
