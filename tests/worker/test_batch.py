"""Answers that share forward passes equal those computed alone, whichever rows join and leave meanwhile."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from streamed import PROMPTS, TOKENS, alone, greedy, read

from worker.server import batch as batches
from worker.server import slots
from worker.server.batch import Batch, Row
from worker.server.cache_memory import CacheMemory
from worker.trainer.decoding import decoder, passes

IN_EVERY_RUN = ("Llama", "Gemma 2", "Mistral")
"""One model for each kind of mask."""
BATCHED = (
    "Qwen2",
    "Qwen3",
    "Qwen3-MoE",
    "Mixtral",
    "Gemma 3",
    "Phi",
    "Phi-3",
    "Granite",
    "Cohere2",
    "SmolLM3",
    "GPT-OSS",
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read(zoo.make("Llama", tmp_path_factory.mktemp("llama") / "base"))


def together(batch: Batch, prompts: list[list[int]], every: int = 3) -> list[list[int]]:
    """Returns the answers of a batch in which a row joins every few steps and leaves at its end."""
    said: list[list[int]] = [[] for _ in prompts]
    rows: dict[int, Row] = {}
    step = 0
    while any(len(one) < TOKENS for one in said):
        if step % every == 0 and step // every < len(prompts):
            rows[step // every] = batch.join(prompts[step // every])
        step += 1
        batch.step()
        for i, row in list(rows.items()):
            if row.is_ready:
                said[i].append(greedy(row))
            if len(said[i]) == TOKENS:
                rows.pop(i).close()
    return said


@pytest.mark.parametrize("family", [*IN_EVERY_RUN, *(pytest.param(one, marks=pytest.mark.slow) for one in BATCHED)])
def test_answers_of_a_batch_are_those_of_each_alone(family: str, tmp_path: Path) -> None:
    model = read(zoo.make(family, tmp_path / "base"))
    assert passes.are_known(model)

    assert together(Batch(model), PROMPTS) == [alone(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["Phi-3 longrope", "Llama, dynamic", "GPT-2"])
def test_other_models_share_no_passes(family: str, tmp_path: Path) -> None:
    assert not passes.are_known(read(zoo.make(family, tmp_path / "base")))


def test_long_prompt_is_read_between_the_steps_of_others(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PROMPT_TOKENS", 16)
    long, short = PROMPTS[4], PROMPTS[0]
    batch = Batch(llama)
    first = batch.join(short)
    said = [greedy(first)]
    second = batch.join(long)
    while not second.is_ready:
        said.append(greedy(first))
        batch.step()
    meanwhile = len(said) - 1
    said += [greedy(first) for _ in range(TOKENS - len(said))]

    assert meanwhile >= len(long) // 16
    assert said == alone(llama, short)
    assert [greedy(second) for _ in range(TOKENS)] == alone(llama, long)


@pytest.mark.parametrize(("rows", "long_tokens"), [(1, None), (2, None), (4, None), (1, 8), (2, 8)])
def test_rows_beyond_the_memory_wait_or_are_read_anew(
    llama: Any, rows: int, long_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_STEP", 16)
    a_position = 2 * 2 * 2 * 24 * 4  # keys and values of 2 layers with 2 heads of 24 numbers in fp32
    limit = rows * 64 * a_position
    batch = Batch(llama, memory=CacheMemory(limit), long_tokens=long_tokens)
    held: list[tuple[int, int]] = []
    step = batch.step

    def watched() -> None:
        step()
        held.append((len(batch.rows), batch.nbytes))

    batch.step = watched  # type: ignore[method-assign]

    assert together(batch, PROMPTS[:4], every=1) == [alone(llama, prompt) for prompt in PROMPTS[:4]]
    assert all(count == 1 or nbytes <= limit for count, nbytes in held)
    assert max(count for count, _ in held) >= rows, "what there is room for runs together"


def test_prompts_share_passes_and_short_ones_do_not_wait_for_a_long_one(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "PROMPT_TOKENS", 64)
    long = [3 + n % 250 for n in range(200)]
    prompts = [long, PROMPTS[1], PROMPTS[3], PROMPTS[0]]
    batch = Batch(llama)
    passes: list[tuple[int, ...]] = []
    llama.register_forward_pre_hook(
        lambda _, args, fields: passes.append(tuple(fields["input_ids"].shape)), with_kwargs=True
    )
    rows = [batch.join(prompt) for prompt in prompts]

    batch.step()
    assert [row.is_ready for row in rows] == [False, False, False, True], "the long one and the shortest had a pass"
    batch.step()
    assert [row.is_ready for row in rows] == [False, False, True, True]
    said = [[greedy(row) for _ in range(TOKENS)] for row in rows]

    assert passes[0] == (2, 32)
    assert all(count * width <= 64 for count, width in passes)
    assert said == [alone(llama, prompt) for prompt in prompts]


@pytest.mark.parametrize(("most", "wanted"), [(500, [(2, 200), (2, 17)]), (300, [(1, 200), (3, 30)])])
def test_prompts_that_come_first_are_padded_and_no_answer_begins_before(
    llama: Any, most: int, wanted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(decoder.PROMPT_TOKENS, "cpu", most)
    monkeypatch.setattr(batches, "PROMPT_TOKENS", 64)
    long = [3 + n % 250 for n in range(200)]
    prompts = [PROMPTS[0], long, PROMPTS[1], PROMPTS[3]]
    batch = Batch(llama, prompts_first=True)
    passes: list[tuple[int, ...]] = []
    llama.register_forward_pre_hook(
        lambda _, args, fields: passes.append(tuple(fields["input_ids"].shape)), with_kwargs=True
    )
    rows = [batch.join(prompt) for prompt in prompts]

    batch.step()

    assert all(row.is_ready for row in rows)
    assert passes == wanted, "only prompts that share a pass with the long one are as wide as it"
    assert [[greedy(row) for _ in range(TOKENS)] for row in rows] == [alone(llama, prompt) for prompt in prompts]


def test_attention_that_writes_all_scores_reads_few_tokens_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "PROMPT_TOKENS", 64)
    model = read(zoo.make("Llama", tmp_path / "base"))
    model.set_attn_implementation("eager")
    batch = Batch(model, prompts_first=True)
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, fields: widths.append(fields["input_ids"].shape[1]), with_kwargs=True
    )
    long = [3 + n % 250 for n in range(200)]
    said = greedy(batch.join(long))
    assert max(widths) == 64
    assert said == alone(model, long)[0]


@pytest.mark.parametrize("read_first", [True, False])
def test_padding_stays_in_the_room_of_rows_that_are_nearly_read(
    llama: Any, read_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_STEP", 16)
    batch = Batch(llama, prompts_first=True)
    known = [3 + n % 250 for n in range(90)]
    first = batch.join(known, None, "project")
    greedy(first)
    first.close()  # its keys are kept
    prompts = [known, [9, *known[:88]]] if read_first else [[9, *known[:88]], known]
    rows = [batch.join(prompt, None, "project") for prompt in prompts]
    assert [[greedy(row) for _ in range(TOKENS)] for row in rows] == [alone(llama, prompt) for prompt in prompts]
    assert sorted(row.cached_tokens for row in rows) == [0, 89]


def test_memory_is_freed_as_rows_leave(llama: Any) -> None:
    batch = Batch(llama)
    rows = [batch.join(prompt) for prompt in PROMPTS]
    for row in rows:
        greedy(row)
    held = [part.nbytes for part in batch._lanes[0].slots.keys]
    assert sum(held)

    for row in rows[1:]:
        row.close()
    greedy(rows[0])
    assert sum(part.nbytes for part in batch._lanes[0].slots.keys) < sum(held) / 2
    rows[0].close()
    assert batch._lanes[0].slots.keys == []


def test_nan_of_a_row_stays_its_own(llama: Any) -> None:
    """Masked values are multiplied by 0, which keeps a NaN."""
    batch = Batch(llama)
    sound, broken = batch.join(PROMPTS[0]), batch.join(PROMPTS[4])
    said = [greedy(sound)]
    broken.logits()
    with torch.inference_mode():
        for part in batch._lanes[0].slots.values:
            part[1] = torch.nan
    broken.close()

    late = batch.join(PROMPTS[2])
    assert [greedy(late) for _ in range(TOKENS)] == alone(llama, PROMPTS[2])
    assert said + [greedy(sound) for _ in range(TOKENS - 1)] == alone(llama, PROMPTS[0])


def test_pass_that_breaks_reaches_every_reader_and_the_next_answer_is_right(llama: Any) -> None:
    batch = Batch(llama)
    rows = [batch.join(prompt) for prompt in PROMPTS[:2]]
    greedy(rows[0])
    batch.fail(RuntimeError("a device that failed"))

    for row in rows:
        with pytest.raises(RuntimeError, match="a device that failed"):
            row.logits()
        row.close()
    assert together(batch, PROMPTS[:1]) == [alone(llama, PROMPTS[0])]


def test_greedy_rows_get_no_logits_and_the_same_tokens(llama: Any) -> None:
    batch = Batch(llama)
    rows = [batch.join(prompt, is_greedy=i % 2 == 0) for i, prompt in enumerate(PROMPTS)]
    said: list[list[int]] = [[] for _ in rows]
    for _ in range(TOKENS):
        batch.step()
        assert [row.found is None for row in rows] == [True, False] * 3
        for row, one in zip(rows, said, strict=True):
            one.append(row.likeliest())
            row.push(one[-1])
    assert said == [alone(llama, prompt) for prompt in PROMPTS]


def test_slow_reader_holds_up_nobody(llama: Any) -> None:
    batch = Batch(llama)
    slow, quick = batch.join(PROMPTS[0]), batch.join(PROMPTS[1])
    first = greedy(slow)
    slow.logits()
    assert [greedy(quick) for _ in range(TOKENS)] == alone(llama, PROMPTS[1])
    assert [first, *(greedy(slow) for _ in range(TOKENS - 1))] == alone(llama, PROMPTS[0])


def test_a_long_row_does_not_lengthen_the_slots_of_the_others(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_STEP", 16)
    batch = Batch(llama, long_tokens=40)
    long = [3 + n % 250 for n in range(200)]
    prompts = [long, *PROMPTS[:3], [*long[:150], 9, 9]]
    passes: list[tuple[int, ...]] = []
    rows = [batch.join(prompt, project_id="p") for prompt in prompts]
    said = [[greedy(row)] for row in rows]
    hook = llama.register_forward_pre_hook(
        lambda _, args, fields: passes.append(tuple(fields["attention_mask"].shape)), with_kwargs=True
    )
    batch.step()
    hook.remove()

    apart = batch.nbytes
    for row, one in zip(rows, said, strict=True):
        one += [greedy(row) for _ in range(TOKENS - 1)]
    assert said == [alone(llama, prompt) for prompt in prompts]
    assert sorted(shape[0] for shape in passes) == [1, 1, 3]
    assert sorted(shape[-1] > 40 for shape in passes) == [False, True, True]
    assert rows[4].cached_tokens == 150, "rows of other lengths reuse keys too"
    together = Batch(llama, long_tokens=1000)
    others = [together.join(prompt, project_id="p") for prompt in prompts]
    for row in others:
        row.likeliest()
    assert apart < together.nbytes / 2
