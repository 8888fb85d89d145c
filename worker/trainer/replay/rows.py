"""A run's replay rows: general rows beside the task's, so that the model does not forget its abilities."""

from tunery.errors import TuneryError
from tunery.rows.encoding import find_encoder
from tunery.rows.messages import Example as Chat
from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate
from tunery.spec import Plan, Replay
from tunery.trainer_protocol import Replayed
from worker.trainer import rope
from worker.trainer.data import Example, Row, Rows, read_rows
from worker.trainer.replay import mixing, own, prompts
from worker.trainer.replay.kept import Answers
from worker.trainer.replay.prompts import Prompt

EPOCHS = {"cpu": 1}
"""Epochs for which a CPU answers separate prompts, as more would take minutes each. A GPU does so for all."""


def add(rows: Rows, plan: Plan, base: own.Base, warnings: list[str]) -> tuple[Rows, Replayed | None]:
    """Adds the plan's replay; returns the rows and what was added. Raises InvalidTrainingFile, Stopped."""
    replay = plan.replay
    if replay is None:
        return rows, None
    if replay.source == "self":
        epochs = EPOCHS.get(base.device.type, plan.n_epochs)
        enough = mixing.wanted_an_epoch(replay.share, rows.count) * epochs
        found, asked, ended = _own_rows(base, replay, plan.max_seq_length, enough)
    else:
        path, encoder = base.folder / "data" / "replay.jsonl", find_encoder(plan.method, "replay")
        found = read_rows(path, base.template, plan.max_seq_length, "replay", encoder).examples[:]
        asked, ended = len(found), len(found)
    mixed = mixing.mix(rows, found, replay.share)
    said = _said(mixed, plan, asked, ended)
    if said.rows_an_epoch < mixing.wanted_an_epoch(replay.share, rows.count):
        warnings.append(_too_few(said, replay))
    return mixed, said


def _own_rows(base: own.Base, replay: Replay, longest: int, enough: int) -> tuple[list[Example], int, int]:
    """Returns at most `enough` rows of the base's own answers, and how many prompts it was asked and answered to the
    end.
    """
    asked = _that_fit(base, prompts.load(base.template, longest - replay.max_new_tokens), replay.max_new_tokens)
    found: list[list[Example]] = []

    def are_enough(answers: Answers) -> bool:
        new = list(zip(asked, answers, strict=False))[len(found) :]
        found.extend(_encode(base.template, prompt, answer, longest) for prompt, answer in new)
        return sum(map(len, found)) >= enough

    answers = own.answer(base, asked, replay.max_new_tokens, are_enough)
    are_enough(answers)
    return [row for rows in found for row in rows][:enough], len(answers), own.count_ended(answers)


def _that_fit(base: own.Base, asked: list[Prompt], limit: int) -> list[Prompt]:
    """Returns the prompts whose answers fit into the model's positions and that can share a batch."""
    causal = base.objective.causal
    context = getattr(causal.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    lengths = rope.of(causal)
    ends = [(prompt, len(prompt.ids) + limit) for prompt in asked]
    return [prompt for prompt, end in ends if end <= context and not lengths.changes(1, end)]


def _encode(template: ChatTemplate, prompt: Prompt, answer: str | None, longest: int) -> list[Example]:
    """Returns the row of an answer that ended, as from a file; none if it does not fit or teaches nothing.

    Only the answer is trained: earlier answers in a conversation are not the base's.
    """
    if answer is None:
        return []
    try:
        chat = Chat(messages=[*prompt.messages, Message(role="assistant", content=answer)])
        sequences = template.encode_all(chat, longest, "last_assistant")
    except TuneryError:
        return []
    rows = [Row(each.input_ids, each.labels) for each in sequences if not each.truncated]
    return [Example((row,)) for row in rows if row.labelled]


def _said(rows: Rows, plan: Plan, asked: int, ended: int) -> Replayed:
    assert plan.replay is not None
    an_epoch = rows.replayed_an_epoch
    return Replayed(
        source=plan.replay.source,
        prompts=asked,
        ended=ended,
        rows=min(rows.replayed, an_epoch * plan.n_epochs),
        rows_an_epoch=an_epoch,
        share=an_epoch / (an_epoch + rows.count),
    )


def _too_few(said: Replayed, replay: Replay) -> str:
    if said.source == "self":
        where = f"the base completed {said.ended} of {said.prompts} answers, which gives {said.rows_an_epoch} rows"
        instead = "Raise replay.max_new_tokens, lower replay.share, or set replay.source to a file of general rows."
    else:
        where = f"the replay file gives {said.rows_an_epoch} rows"
        instead = "Lower replay.share, or add rows to the file."
    return (
        f"Replay is {said.share:.1%} of the rows, not {replay.share:.1%}: {where}, and an epoch uses each at most "
        f"once. {instead}"
    )
