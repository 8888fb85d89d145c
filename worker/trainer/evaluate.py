"""What a model is worth: its loss on a validation file, and its answers on test rows beside the base's."""

import itertools
import json
import math
import re
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig

from tunery.rows import messages
from tunery.rows.encoding import encode_answer
from tunery.rows.template import ChatTemplate
from tunery.wire import Phase, Score
from worker.trainer import rope
from worker.trainer.data import Example, MicroBatch, collate, micro_batches
from worker.trainer.memory import next_after
from worker.trainer.methods.method import Shown
from worker.trainer.objective import Objective
from worker.trainer.stepper import Stepper
from worker.trainer.training import Training

ANSWER_BATCH = {"cpu": 16, "cuda": 96}
"""Rows answered at once. More would be faster on a large GPU, were it not for the slowest row of each batch."""

_JSON = re.compile(r"[{\[]")
_DECODER = json.JSONDecoder()


def loss(stepper: Stepper, examples: list[Example]) -> Shown:
    """The method's loss and accuracy over all examples."""
    ranks, method = stepper.ranks, stepper.objective.method
    mine = list(range(len(examples)))[ranks.index :: ranks.count]
    lengths = [len(example) for example in examples]
    groups, shapes = [stepper.group_of(each) for each in examples], [each.shape for each in examples]
    while True:
        packed = stepper.memory.packed_tokens if stepper.objective.knows_borders else None
        parts = micro_batches(
            mine, lengths, stepper.memory.max_tokens, packed_tokens=packed, groups=groups, shapes=shapes
        )
        try:
            sums = _sums(stepper.objective, examples, parts, stepper.device)
            break
        except torch.OutOfMemoryError:
            plan = next_after(stepper.memory, parts)
            if plan is None or plan.max_tokens == stepper.memory.max_tokens:
                raise
        stepper.adopt(plan)
    weight = sum(map(method.weight, examples))
    totals = zip(method.sums, ranks.sum(sums).tolist(), strict=True)
    return method.shown({name: total / weight for name, total in totals})


def _sums(objective: Objective, examples: list[Example], parts: list[MicroBatch], device: torch.device) -> torch.Tensor:
    """The method's sums of this rank."""
    names = objective.method.sums
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    objective.eval()
    with torch.no_grad():
        for part in parts:
            found = objective.sums(collate(examples, part, device, borders=objective.knows_borders), 1.0)
            sums += torch.stack([found[name].double() for name in names])
    objective.train()
    return sums


@dataclass(frozen=True)
class Question:
    """A test row: the prompt's tokens, the wanted answer, and the messages for people to read.

    `is_call`: the answer makes tool calls, which are compared by name and arguments.
    """

    prompt_ids: list[int]
    wanted: str
    messages: list[dict[str, Any]]
    is_call: bool = False


def questions(template: ChatTemplate, examples: list[messages.Example]) -> list[Question]:
    """One question a row: its last message is the wanted answer, as the template makes the model say it.

    Rows whose wanted answer is empty are left out; their validation has named them. Raises InvalidTrainingFile.
    """
    found = []
    for number, example in enumerate(examples, start=1):
        prompt, answer = encode_answer(template, example, number)
        wanted = template.answer_text(answer)
        if wanted.strip():
            *before, last = example.messages
            shown = [message.model_dump(exclude_none=True) for message in before]
            found.append(Question(prompt, wanted, shown, bool(last.tool_calls or last.function_call)))
    return found


def answers(t: Training, asked: list[Question], *, base: bool) -> list[str]:
    """Greedy answers of the tuned model, or of the base under its adapter. Raises Stopped between batches."""
    model: Any = t.objective.model
    without_adapter = model.disable_adapter() if base and isinstance(model, PeftModel) else nullcontext()
    mine = list(range(len(asked)))[t.ranks.index :: t.ranks.count]
    mine.sort(key=lambda i: len(asked[i].prompt_ids))  # like lengths together: the padding of a batch costs time
    given: list[tuple[int, str]] = []
    t.objective.eval()
    with torch.no_grad(), without_adapter, t.objective.autocast():
        size = ANSWER_BATCH[t.device.type]
        for _ in t.ranks.turns(t.wish, lambda: len(given) < len(mine)):
            if len(given) == len(mine):
                continue  # the others are not done
            chosen = _alike(t, asked, mine[len(given) : len(given) + size])
            try:
                with t.pace.measure("answer", len(chosen)):
                    given.extend(zip(chosen, _generate(t, [asked[i].prompt_ids for i in chosen]), strict=True))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
            t.voice.say(Phase(phase="evaluating", seconds_left=t.pace.left()))
    t.objective.train()
    return [text for _, text in sorted(itertools.chain(*t.ranks.gather(given)))]


def _alike(t: Training, asked: list[Question], candidates: list[int]) -> list[int]:
    """The first of the candidates that can share a batch: one alone where its answer may change the model's RoPE."""
    lengths = rope.of(t.objective.causal)
    sizes = [len(asked[i].prompt_ids) for i in candidates]
    if lengths.changes(sizes[0], sizes[0] + t.plan.evaluation.max_new_tokens):
        return candidates[:1]
    last = [size + t.plan.evaluation.max_new_tokens for size in sizes]
    return [i for i, size in zip(candidates, last, strict=True) if not lengths.changes(sizes[0], size)]


def _generate(t: Training, prompts: list[list[int]]) -> list[str]:
    """Greedy continuations of one batch, padded at the left so that every answer starts in the same column."""
    causal = t.objective.causal
    longest = max(map(len, prompts))
    changes = rope.of(causal).changes(longest, longest + t.plan.evaluation.max_new_tokens)
    width = max(map(len, prompts))
    pad = min(t.template.eos_ids)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=t.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=t.device)
    plain, causal.generation_config = causal.generation_config, _greedy(t, pad, use_cache=not changes)
    try:
        # Why the config is exchanged: generate() fills gaps from the model's own, where a repetition penalty may lurk.
        out = causal.generate(input_ids=ids, attention_mask=mask)
    finally:
        causal.generation_config = plain
    return [t.template.answer_text(row) for row in out[:, width:].tolist()]


def _greedy(t: Training, pad: int, *, use_cache: bool) -> GenerationConfig:
    """Keys in a cache were turned by the frequencies of a shorter row: where those change, there can be none."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=t.plan.evaluation.max_new_tokens,
        eos_token_id=sorted(t.template.eos_ids),
        pad_token_id=pad,
        use_cache=use_cache,
    )


def matches(wanted: str, answer: str, *, is_call: bool = False) -> bool:
    """Whether an answer is right: equal text, but for blanks at the ends and the spelling of JSON in it.

    The order of keys and blanks in JSON do not matter. `is_call`: nor do the ids of tool calls, which nobody can guess.
    """
    return _canonical(wanted, is_call) == _canonical(answer, is_call)


def _canonical(text: str, is_call: bool) -> list[str]:
    """The text in pieces, its JSON objects and arrays in one spelling."""
    pieces, start, place = [], 0, 0
    while found := _JSON.search(text, place):
        place = found.start()
        try:
            value, end = _DECODER.raw_decode(text, place)
        except ValueError:
            place += 1
            continue
        except RecursionError:  # brackets without an end, thousands of them: nothing to compare as JSON
            break
        value = _bare_calls(value) if is_call else value
        pieces += [text[start:place].strip(), json.dumps(value, sort_keys=True)]
        start = place = end
    return [*pieces, text[start:].strip()]


def _bare_calls(value: Any) -> Any:
    """Tool calls in a JSON value without their ids, their arguments as objects."""
    if isinstance(value, list):
        return [_bare_calls(item) for item in value]
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("function"), dict):
        return {"function": _bare_calls(value["function"])}
    if "name" not in value or not {"arguments", "parameters"} & value.keys():
        return value
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    return {"name": value["name"], "arguments": arguments}


def score(asked: list[Question], base: list[str], tuned: list[str]) -> tuple[Score, list[dict[str, Any]]]:
    """The scorecard and every row's answers."""
    rows = [
        {"messages": q.messages, "wanted": q.wanted, "base": b, "tuned": u,
         "base_right": matches(q.wanted, b, is_call=q.is_call),
         "tuned_right": matches(q.wanted, u, is_call=q.is_call)}
        for q, b, u in zip(asked, base, tuned, strict=True)
    ]  # fmt: skip
    both, only_tuned, only_base = (
        sum(row["tuned_right"] == tuned_right and row["base_right"] == base_right for row in rows)
        for tuned_right, base_right in ((True, True), (True, False), (False, True))
    )
    low, high = paired_interval(both, only_tuned, only_base, len(rows))
    card = Score(
        rows=len(rows),
        base_exact=(both + only_base) / len(rows),
        tuned_exact=(both + only_tuned) / len(rows),
        gain=(only_tuned - only_base) / len(rows),
        gain_low=low,
        gain_high=high,
        samples=_samples(rows),
    )
    return card, rows


def _samples(rows: list[dict[str, Any]], count: int = 5) -> list[dict[str, Any]]:
    """Rows spread evenly over the file: a pick of the best would tell nothing."""
    chosen = [rows[i * len(rows) // count] for i in range(min(count, len(rows)))] if len(rows) > count else rows
    return [
        {"prompt": row["messages"][-1].get("content", ""), "wanted": row["wanted"],
         "base": row["base"], "tuned": row["tuned"]}
        for row in chosen
    ]  # fmt: skip


def paired_interval(both: int, only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares on the same n rows.

    Newcombe 1998, Statistics in Medicine 17:2635-2650, method 10: Wilson intervals of each share, combined with the
    correlation of the pairs. Holds near 0 and 1 too, where the usual normal interval has no width.
    """
    neither = n - both - only_first - only_second
    first, second = (both + only_first) / n, (both + only_second) / n
    (low_1, high_1), (low_2, high_2) = wilson(both + only_first, n), wilson(both + only_second, n)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    cross = both * neither - only_first * only_second
    phi = 0.0 if margins == 0 else (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(margins)
    down, up = first - low_1, high_2 - second
    below = math.sqrt(max(0.0, down * down - 2 * phi * down * up + up * up))
    down, up = high_1 - first, second - low_2
    above = math.sqrt(max(0.0, down * down - 2 * phi * down * up + up * up))
    return first - second - below, first - second + above


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share, square = right / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
