"""Makes questions of test rows, and generates a model's greedy answers to them."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from tunery.planning.advice import answer_limit
from tunery.rows import messages
from tunery.rows.encoding import encode_answer
from tunery.rows.template import ChatTemplate
from tunery.spec import Evaluation
from tunery.trainer_protocol import Phase
from worker.trainer import generation
from worker.trainer.decoding import decoder
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Training

Around = Callable[[int], AbstractContextManager[None]]
"""Returns the context in which a batch of so many rows is answered."""


@dataclass(frozen=True)
class Question:
    """A test row: the prompt's tokens, the wanted answer, and the messages in readable form.

    `is_call`: the answer makes tool calls, which are compared by name and arguments. `tokens`: how many the wanted
    answer has, without the stop token. `row`: its place among the rows, from 1. `tools`: those that the row offers.
    """

    prompt_ids: list[int]
    wanted: str
    messages: list[dict[str, Any]]
    is_call: bool = False
    tokens: int = 0
    row: int = 0
    tools: list[dict[str, Any]] | None = None


def questions(template: ChatTemplate, examples: list[messages.Example]) -> list[Question]:
    """Returns one question per row: the last message is the wanted answer, as the template renders it.

    Rows with an empty wanted answer are left out; validation has named them. Raises InvalidTrainingFile.
    """
    found = []
    for number, example in enumerate(examples, start=1):
        prompt, answer = encode_answer(template, example, f"example {number}")
        wanted = template.answer_text(answer)
        if wanted.strip():
            *before, last = example.messages
            shown = [message.model_dump(exclude_none=True) for message in before]
            is_call = bool(last.tool_calls or last.function_call)
            length = template.answer_length(answer)
            tools = [tool.model_dump(exclude_none=True) for tool in example.tools] if example.tools else None
            found.append(Question(prompt, wanted, shown, is_call, length, number, tools))
    return found


def token_limit(evaluation: Evaluation, asked: list[Question]) -> int:
    """Returns how many tokens an answer to any of the questions may have."""
    return answer_limit(evaluation, max((question.tokens for question in asked), default=0))


def texts(t: Training, given: list[list[int]]) -> list[str]:
    """Decodes the ids of answers."""
    return [t.template.answer_text(ids) for ids in given]


def generate(t: Training, asked: list[Question], *, base: bool) -> list[str]:
    """Returns greedy answers of the tuned model, or of the base under its adapter. Raises Stopped between batches."""
    return texts(t, generate_ids(t, asked, base=base))


def generate_ids(t: Training, asked: list[Question], *, base: bool) -> list[list[int]]:
    """Returns the ids of greedy answers of the tuned model, or of the base under its adapter, each with the stop token
    that ended it. Raises Stopped between batches.
    """

    @contextmanager
    def announced(count: int) -> Iterator[None]:
        with t.timer.measure("answer", count):
            yield
        t.writer.write(Phase(phase="evaluating", seconds_left=t.timer.left()))

    return _answer(t, asked, base=base, stop_signal=t.stop_signal, around=announced)


def generate_counted(t: Training, asked: list[Question], limit: int, *, base: bool, around: Around) -> list[str]:
    """Returns greedy answers of at most `limit` tokens. Each batch runs inside `around`, given its number of rows."""
    return texts(t, _answer(t, asked, base=base, stop_signal=t.stop_signal, around=around, limit=limit))


def seconds_alone(t: Training, asked: list[Question], limit: int, *, base: bool, most: float) -> list[float]:
    """Returns the seconds of greedy answers, of at most `limit` tokens, to questions that the main rank asks one after
    the other, until these have taken `most` seconds; nothing on other ranks. Raises Stopped between two.
    """
    mine = [question.prompt_ids for question in asked] if t.ranks.is_main else []
    longest, found = max(map(len, mine), default=0), list[float]()
    with _answering(t, limit, against_decoder(t), base=base) as greedy:
        if mine:
            greedy.prepare(mine[0], longest)
        over = time.perf_counter() + most
        for _ in t.ranks.turns(
            t.stop_signal, lambda: len(found) < len(mine) and (not found or time.perf_counter() < over)
        ):
            if len(found) == len(mine):
                continue  # the main rank is not done
            began = time.perf_counter()
            greedy.answer([mine[len(found)]], longest)
            found.append(time.perf_counter() - began)
    return found


def answer_at_once(t: Training, asked: list[Question]) -> list[str]:
    """Returns greedy answers of the current model, between two steps of its training.

    Why it cannot be stopped: a resumed run would continue without this evaluation.
    """
    return texts(t, _answer(t, asked, base=False, stop_signal=StopSignal(), around=lambda _: nullcontext()))


def _answer(
    t: Training,
    asked: list[Question],
    *,
    base: bool,
    stop_signal: StopSignal,
    around: Around,
    limit: int | None = None,
) -> list[list[int]]:
    """Returns the ids of all ranks' answers. Each batch runs inside `around`, which gets its number of rows.

    `limit`: the most tokens of an answer; None: by the longest wanted one.
    """
    mine = list(range(len(asked)))[t.ranks.index :: t.ranks.count]
    mine.sort(key=lambda i: len(asked[i].prompt_ids))  # similar lengths together: padding costs time
    given: list[tuple[int, list[int]]] = []
    limit = token_limit(t.plan.evaluation, asked) if limit is None else limit
    against = "one answer alone, for which preparing takes longer" if len(mine) <= 1 else against_decoder(t)
    with _answering(t, limit, against, base=base) as greedy:
        for _ in t.ranks.turns(stop_signal, lambda: len(given) < len(mine)):
            if len(given) == len(mine):
                continue  # other ranks are not done
            waiting = mine[len(given) :]
            chosen = waiting[: greedy.batch_size([len(asked[i].prompt_ids) for i in waiting])]
            try:
                with around(len(chosen)):
                    found = greedy.answer([asked[i].prompt_ids for i in chosen])
                    given.extend(zip(chosen, found, strict=True))
            except torch.OutOfMemoryError:
                if t.shards is not None or not greedy.halve(len(chosen)):  # the other ranks wait in this pass
                    raise
        if len(mine) > 1:
            t.objective.against_decoder = greedy.against
    return [ids for _, ids in sorted(itertools.chain(*t.ranks.gather(given)))]


@contextmanager
def _answering(t: Training, limit: int, against: str | None, *, base: bool) -> Iterator[generation.Greedy]:
    """Yields what generates answers of at most `limit` tokens; `against`: why no `Decoder` is used."""
    model: Any = t.objective.model
    without_adapter = model.disable_adapter() if base and isinstance(model, PeftModel) else nullcontext()
    t.objective.eval()
    with (
        torch.no_grad(),
        without_adapter,
        t.objective.computing(),
        closing(generation.Greedy(t.objective.causal, t.template, limit, against)) as greedy,
    ):
        yield greedy
    t.objective.train()


def against_decoder(t: Training) -> str | None:
    """Returns why the model's answers are generated by transformers; None if they are not."""
    if t.shards is not None:
        return "its weights are cut over the ranks"
    return t.objective.against_decoder or decoder.reason_against(t.objective.causal)
