"""One run, from its directory to its artifact: the story in order."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from tunery.failures import InvalidTrainingFile
from tunery.planning.precision import decide
from tunery.rows.encoding import find_encoder
from tunery.rows.preferences import Pair
from tunery.rows.template import ChatTemplate
from tunery.spec import Run
from tunery.wire import Finished, Gated, GeneralScore, Paused, Phase, Score, Started
from worker.trainer import (
    checkpoints,
    coverage,
    eight_bits,
    event_files,
    gate,
    hardware,
    layout,
    packing,
    parallel,
    parity,
    paths,
    pieces,
    preflight,
    previews,
    reference,
    report,
    rope,
    sharding,
    whole_folders,
)
from worker.trainer.data import Rows, collate, read_parsed, read_rows, singles
from worker.trainer.export import job as export
from worker.trainer.general import measure as general
from worker.trainer.loop import train
from worker.trainer.methods import registry
from worker.trainer.objective import Objective, all_and_trainable
from worker.trainer.parallel import Ranks
from worker.trainer.recipes.full import FULL
from worker.trainer.recipes.lora import LORA
from worker.trainer.recipes.qlora import QLORA
from worker.trainer.recipes.recipe import Weights
from worker.trainer.replay import mixing, own
from worker.trainer.replay import rows as replay
from worker.trainer.report import Voice
from worker.trainer.scoring import answers, preferences, sampled, scorecard, unquantised
from worker.trainer.scoring.preferences import Pairs
from worker.trainer.sharding import Shards
from worker.trainer.stepper import Stepper
from worker.trainer.training import Progress, Training
from worker.trainer.wish import Stopped, Wish

log = logging.getLogger(__name__)

RECIPES = {"full": FULL, "lora": LORA, "qlora": QLORA}
Asked = list[answers.Question] | Pairs
"""What the scorecard asks of both models."""
Scored = tuple[Score, list[dict[str, Any]]]
"""The scorecard and every row's answers."""


def carry_out(folder: Path, voice: Voice, wish: Wish) -> bool:
    """Trains what `folder/spec.json` says. False when it was asked to stop: come again, nothing is lost.

    Raises JobFailure for what the user can mend, anything else for what went wrong.
    """
    began = time.monotonic()
    voice.say(Phase(phase="loading"))
    t = prepare(folder, voice, wish)
    progress = Progress()
    try:
        t.pace.check_bytes = parity.bytes_to_read(t)
        export.expect(t)
        asked = _questions(t)
        probe = general.prepare(t) if asked else None
        base_answers = _answers_before_training(t, asked)
        base_general = _general_before_training(t, probe)
        reference.attach(t)
        progress = _resume(t)
        _announce(t, progress)
        voice.say(Phase(phase="training"))
        done = train(t, progress)
        if done:
            scored = _score(t, asked, base_answers, lambda: _compare_general(t, probe, base_general))
            _write_together(t, progress, scored)
    except Stopped:
        done = False
        _save_for_later(t, progress)
    if done:
        voice.say(_finished(t, progress, began))
    else:
        voice.say(_paused(folder, progress))
    return done


def score(folder: Path, voice: Voice, wish: Wish) -> Scored | None:
    """Compares the adapter in `folder` with its base on the test rows, as after a training. Raises JobFailure."""
    t = prepare(folder, voice, wish)
    asked = _questions(t)
    probe = general.prepare(t) if asked else None
    return _score(t, asked, None, lambda: _compare_general(t, probe, None))


def prepare(folder: Path, voice: Voice, wish: Wish) -> Training:
    """Reads the spec, the rows and the model, and settles how the work is cut up."""
    run = Run.model_validate_json((folder / "spec.json").read_text())
    accelerator = parallel.accelerator()
    ranks = Ranks(accelerator)
    torch.manual_seed(run.plan.seed)
    template = ChatTemplate.load(checkpoints.texts(folder), now=run.now)
    encoder = find_encoder(run.plan.method, "training", run.plan.columns, run.plan.cut_answers)
    rows = read_rows(folder / "data" / "train.jsonl", template, run.plan.max_seq_length, encoder=encoder)
    valid = _validation_rows(folder, run, template)
    ranks.check(wish)
    recipe = RECIPES[run.plan.technique.type]
    precision = decide(run.plan.technique, accelerator.device.type, run.plan.optimizer)
    sharded = layout.is_cut(run.plan, folder / "base", template, ranks)
    base = recipe.load_base(folder / "base", precision, torch.device("cpu") if sharded else ranks.device)
    lengths = rope.install(base)
    adapter = folder / "adapter"
    model = recipe.prepare(base, run.plan.technique, adapter if adapter.exists() else None)
    objective = Objective(model, precision, registry.make(run.plan.method))
    shards = Shards(objective, ranks) if sharded else None
    if shards is not None:
        ranks = replace(ranks, lockstep=shards.lockstep)
    objective.settle(collate(singles([min(rows.rows, key=len)]), [[0]], accelerator.device))
    parameters = sharding.parameters_of(objective, shards)
    ranks.share_weights(p for p in parameters.values() if pieces.of(p) is None)
    ranks.check(wish)
    warnings = coverage.warnings(coverage.describe(model, run.plan.technique, quantised=precision.quantised))
    base_now = own.Base(folder, objective, template, precision, ranks, voice, wish)
    rows, replayed = replay.add(rows, run.plan, base_now, warnings)
    narrow = eight_bits.settle(objective, precision, rows.examples, ranks, warnings)
    packs = _packs(run, rows, objective, accelerator.device, warnings)
    objective.add_noise(run.plan.neftune_noise_alpha)
    optimizer = recipe.make_optimizer(parameters, run.plan, precision)
    work = _work(run, rows, valid, packs)
    memory = preflight.settle(objective, optimizer, rows.rows, work, ranks if sharded else None)
    stepper = Stepper(
        objective,
        optimizer,
        list(parameters.values()),
        rows,
        ranks,
        memory,
        lambda each: lengths.group(each.shape[1]),
        shards,
    )
    objective.rest()
    parallel.draw_apart(ranks, run.plan.seed)
    return Training(
        run=run,
        folder=folder,
        recipe=recipe,
        precision=precision,
        accelerator=accelerator,
        objective=objective,
        optimizer=optimizer,
        parameters=parameters,
        template=template,
        rows=rows,
        valid=valid,
        voice=voice,
        wish=wish,
        stepper=stepper,
        warnings=tuple(warnings),
        task_questions=sampled.questions(folder, run.plan, template),
        eight_bits=narrow,
        replayed=replayed,
    )


def _validation_rows(folder: Path, run: Run, template: ChatTemplate) -> Rows | None:
    path = folder / "data" / "valid.jsonl"
    if path.exists():
        encoder = find_encoder(run.plan.method, "validation", run.plan.columns, run.plan.cut_answers)
        return read_rows(path, template, run.plan.max_seq_length, "validation", encoder)
    if run.plan.early_stopping or run.plan.select == "best":
        raise InvalidTrainingFile(
            role="validation", reason="There is none, and early_stopping and select: best need its loss. Add one."
        )
    return None


def _packs(run: Run, rows: Rows, objective: Objective, device: torch.device, warnings: list[str]) -> bool:
    if objective.knows_borders:
        objective.knows_borders = packing.keeps_rows_apart(objective, rows.rows, device)
    if not run.plan.packing or objective.knows_borders or packing.keeps_rows_apart(objective, rows.rows, device):
        return run.plan.packing
    warnings.append("This model lets packed rows see each other, so the rows were not packed.")
    return False


def _work(run: Run, rows: Rows, valid: Rows | None, packs: bool) -> preflight.Work:
    lengths, a_step = sorted(rows.lengths, reverse=True), mixing.most_of_a_step(rows, run.plan.batch_size)
    packed = min(run.plan.max_seq_length, sum(lengths[:a_step]))
    return preflight.Work(
        technique=run.plan.technique,
        rows_a_step=a_step,
        row=lengths[0],
        sequence=max(lengths[0], packed) if packs else lengths[0],
        packs=packs,
        validation=max(valid.examples, key=len) if valid is not None else None,
        rows_an_example=max(len(example.rows) for example in rows.examples),
    )


def _resume(t: Training) -> Progress:
    snapshot = checkpoints.find_snapshot(t)
    if snapshot is None:
        return Progress()
    progress = checkpoints.restore(t, snapshot)
    if t.eight_bits is not None:
        t.eight_bits.widen(progress.wide)
    log.info("going on after step %d of %s", progress.step, snapshot)
    return progress


def _announce(t: Training, progress: Progress) -> None:
    everything, trainable = all_and_trainable(t.objective.model)
    log.info(
        "trainable params: %s || all params: %s || trainable: %.2f%%",
        f"{trainable:,}", f"{everything:,}", 100 * trainable / everything,
    )  # fmt: skip
    log.info("memory plan: %s", t.stepper.memory)
    log.info("paths: %s", json.dumps(paths.describe(t)))
    for warning in t.warnings:
        log.warning(warning)
    covered = coverage.of(t)
    log.info("linear weights: %s", json.dumps(covered))
    t.voice.say(
        Started(
            trainable_params=trainable,
            all_params=everything,
            total_steps=t.total_steps,
            first_step=progress.step + 1,
            examples=t.rows.count,
            train_tokens=t.rows.tokens,
            truncated_examples=len(t.rows.truncated),
            device=hardware.device_name(t.device),
            learning_share=covered["learning"],
            quantised_share=covered["quantised"],
            replay=t.replayed,
            warnings=list(t.warnings),
        )
    )


def _questions(t: Training) -> Asked:
    path = t.folder / "data" / "test.jsonl"
    if not path.exists() or t.plan.evaluation.test_file is None:
        return []
    found = read_parsed(path, "test", find_encoder(t.plan.method, "test", t.plan.columns))
    examples = [example for _, example in found][: t.plan.evaluation.max_rows]
    if pairs := [example for example in examples if isinstance(example, Pair)]:
        return preferences.prepare(t, pairs)
    asked = answers.questions(t.template, examples)
    models = 4 if unquantised.is_asked(t) else 2  # the base and the tuned one, maybe in two precisions
    count = models * len(asked[t.ranks.index :: t.ranks.count])
    batch, tokens = answers.ANSWER_BATCH[t.device.type], answers.token_limit(t.plan.evaluation, asked)
    prompt = sum(len(question.prompt_ids) for question in asked) / max(1, len(asked))
    t.pace.expect_answers(count, batch=batch, tokens=tokens, prompt=prompt)
    return asked


def _answer(t: Training, asked: Asked, *, base: bool) -> list[Any]:
    """What a model says to the questions, or how likely it makes the answers of pairs."""
    if isinstance(asked, Pairs):
        return preferences.measure(t, asked, base=base)
    return answers.generate(t, asked, base=base)


def _answers_before_training(t: Training, asked: Asked) -> list[Any] | None:
    """The base's answers, where training overwrites the base; None where an adapter can be switched off later."""
    if isinstance(t.objective.model, PeftModel) or not asked:
        return None
    t.voice.say(Phase(phase="evaluating"))
    return _answer(t, asked, base=True)


def _general_before_training(t: Training, probe: general.Probe | None) -> general.Baseline | None:
    """The base on the general benchmark, where training overwrites the base."""
    if isinstance(t.objective.model, PeftModel) or probe is None:
        return None
    return general.describe_base(t, probe)


def _compare_general(t: Training, probe: general.Probe | None, base: general.Baseline | None) -> GeneralScore | None:
    return None if probe is None else general.compare(t, probe, base or general.describe_base(t, probe))


def _score(
    t: Training,
    asked: Asked,
    base_answers: list[Any] | None,
    compare_general: Callable[[], GeneralScore | None],
) -> Scored | None:
    """The scorecard, to which every rank answers its share."""
    if not asked:
        return None
    t.voice.say(Phase(phase="evaluating", seconds_left=t.pace.left()))
    tuned = _answer(t, asked, base=False)
    base = _answer(t, asked, base=True) if base_answers is None else base_answers
    card, rows = _compare(asked, base, tuned)
    card = card.model_copy(update={"general": compare_general(), "scored_in": t.precision.base})
    if unquantised.is_asked(t):
        other = unquantised.measure(
            t, tuned, lambda on, base: _answer(on, asked, base=base), lambda *both: _compare(asked, *both)[0]
        )
        card = card.model_copy(update={"unquantised": other})
    t.voice.say(card)
    return card, rows


def _compare(asked: Asked, base: list[Any], tuned: list[Any]) -> Scored:
    return preferences.score(asked, base, tuned) if isinstance(asked, Pairs) else scorecard.score(asked, base, tuned)


def _write_together(t: Training, progress: Progress, scored: Scored | None) -> None:
    """The artifact, which rank 0 writes, and before it what the gate says of the model. Raises Stopped on all ranks."""
    verdict = None
    if t.plan.gate is not None:
        verdict = gate.judge(t.plan.gate, None if scored is None else scored[0])
        t.voice.say(verdict)
    t.voice.say(Phase(phase="saving", seconds_left=t.pace.left()))
    with t.ranks.lockstep():
        answered = parity.measure(t) if t.ranks.is_main else None
    if t.plan.export.is_asked:
        _save_for_later(t, progress)  # exports free the weights, and may be stopped or killed
    weights = checkpoints.whole_weights(t)
    stopped = False
    if answered is not None:
        try:
            _write(t, progress, scored, verdict, answered, weights)
        except Stopped:
            stopped = True
    t.ranks.wait()
    if t.ranks.any(stopped):
        raise Stopped


def _write(
    t: Training,
    progress: Progress,
    scored: Scored | None,
    verdict: Gated | None,
    answered: parity.Record,
    weights: Weights | None,
) -> None:
    """The artifact, `out/`, which exists only when it is complete."""
    partial = t.folder / ".out.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with whole_folders.room_for("the model", t.folder / "snapshots", partial):
        partial.mkdir()
        write_scored(scored, partial)
        if verdict is not None:
            (partial / "gate.json").write_text(verdict.model_dump_json(indent=2, exclude={"type"}) + "\n")
        checkpoints.write_artifact(t, progress, partial, weights)
        event_files.write(partial, t.voice.metrics)
        previews.write(t, partial)
        parity.write(t, answered, partial)
        export.write(t, partial)
    shutil.rmtree(t.folder / "out", ignore_errors=True)
    partial.rename(t.folder / "out")


def write_scored(scored: Scored | None, folder: Path) -> None:
    """Writes `scorecard.json`, and `answers.jsonl` with every row's answers."""
    if scored is not None:
        card, rows = scored
        (folder / "scorecard.json").write_text(card.model_dump_json(indent=2) + "\n")
        report.write_lines(folder / "answers.jsonl", rows)


def _save_for_later(t: Training, progress: Progress) -> None:
    """A snapshot of the last step, unless there is one: stopped while evaluating, the training itself is done."""
    if progress.step and not t.ranks.any(_snapshot_path(t.folder, progress).exists()):
        checkpoints.save_snapshot(t, progress)


def _snapshot_path(folder: Path, progress: Progress) -> Path:
    return folder / "snapshots" / f"step-{progress.step}"


def _paused(folder: Path, progress: Progress) -> Paused:
    path = _snapshot_path(folder, progress)
    return Paused(step=progress.step, path=str(path.relative_to(folder)) if path.exists() else None)


def _finished(t: Training, progress: Progress, began: float) -> Finished:
    on_gpu = t.device.type == "cuda"
    exported = progress.best_step if t.keeps_best and progress.best_step is not None else progress.step
    return Finished(
        step=exported,
        steps=progress.step,
        trained_tokens=progress.tokens,
        seconds=time.monotonic() - began,
        peak_memory_bytes=max(t.ranks.gather(torch.cuda.max_memory_allocated(t.device))) if on_gpu else None,
        stopped_early=progress.stopped_early,
    )
