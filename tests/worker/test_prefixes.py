"""A row reuses the keys and values of an equal prefix, and answers as if it had computed them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from streamed import PROMPTS, TOKENS, alone, by_peft, greedy, make, read

from worker.server import slots
from worker.server.backends.embedded import ready_of
from worker.server.batch import Batch, Row
from worker.server.cache_memory import CacheMemory, Owner, common
from worker.server.models import Base, Source
from worker.server.streams import Alone, Stream
from worker.trainer.rope import LengthRope

LONG, MORE = PROMPTS[4], PROMPTS[1]
A_POSITION = 2 * 2 * 2 * 24 * 4
"""Bytes of one position's keys and values: 2 layers with 2 heads of 24 numbers in fp32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.make("Llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture
def llama(folder: Path) -> Any:
    return read(folder)


def say(row: Row) -> list[int]:
    said = [greedy(row) for _ in range(TOKENS)]
    row.close()
    return said


def passes_of(model: Any) -> list[tuple[int, ...]]:
    """Returns a list to which each later pass adds its shape: rows x tokens."""
    passes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, fields: passes.append(tuple(fields["input_ids"].shape)), with_kwargs=True
    )
    return passes


def test_next_turn_of_a_chat_computes_only_what_is_new(llama: Any) -> None:
    batch = Batch(llama)
    answer = say(batch.join(LONG, project_id="p"))
    chat = [*LONG, *answer, *MORE]
    passes = passes_of(llama)
    row = batch.join(chat, project_id="p")

    assert say(row) == alone(llama, chat)
    assert row.cached_tokens == len(LONG) + TOKENS - 1, "the answer's last token was chosen and never read"
    assert passes[0] == (1, len(MORE) + 1)


@pytest.mark.parametrize("family", ["Gemma 2", "Mistral", pytest.param("GPT-OSS", marks=pytest.mark.slow)])
def test_layers_with_a_window_take_over_beginnings_too(family: str, tmp_path: Path) -> None:
    model = read(zoo.make(family, tmp_path / "base"))
    batch = Batch(model)
    say(batch.join(LONG, project_id="p"))
    row = batch.join([*LONG[:40], *MORE], project_id="p")
    assert say(row) == alone(model, [*LONG[:40], *MORE])
    assert row.cached_tokens == 40


def test_answers_to_one_prompt_read_it_once_and_run_beside_each_other(llama: Any) -> None:
    batch = Batch(llama)
    passes = passes_of(llama)
    rows = [batch.join(LONG, project_id="p") for _ in range(3)]
    said: list[list[int]] = [[], [], []]
    for _ in range(TOKENS):
        batch.step()
        for row, one in zip(rows, said, strict=True):
            one.append(greedy(row))

    assert passes == [(1, len(LONG)), (2, 1), *[(3, 1)] * (TOKENS - 1)]
    assert said == [alone(llama, LONG)] * 3
    assert [row.cached_tokens for row in rows] == [0, len(LONG) - 1, len(LONG) - 1]


def test_prompt_that_is_read_is_waited_for_where_it_begins_alike(llama: Any) -> None:
    batch = Batch(llama)
    other = [*LONG[:50], *MORE]
    rows = [batch.join(prompt, project_id="p") for prompt in (LONG, other)]
    assert [say(row) for row in rows] == [alone(llama, prompt) for prompt in (LONG, other)]
    assert [row.cached_tokens for row in rows] == [0, 50]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run this on a host with a GPU")
def test_device_writes_the_answers_of_the_cpu_for_rows_of_all_kinds(folder: Path, tmp_path: Path) -> None:
    """In fp32: prompts together, a reused prefix, adapters beside the base, greedy rows beside one with logits."""
    adapters = [make(tmp_path / str(seed), folder, seed, r=8 * seed) for seed in (1, 2)]
    base = Base(Source(folder, None, "cuda", torch.float32), CacheMemory(2**26))
    one, other = map(base.lay_on, adapters)
    asked = [(base, None, LONG), (one, adapters[0], LONG), (other, adapters[1], MORE), (one, adapters[0], LONG[:50])]
    for is_greedy in (True, False):
        rows = [model.stream(prompt, "p", is_greedy=is_greedy) for model, _, prompt in asked]
        said: list[list[int]] = [[] for _ in rows]
        for _ in range(TOKENS):
            for row, tokens in zip(rows, said, strict=True):
                tokens.append(row.likeliest())
                row.push(tokens[-1])
        assert said == [by_peft(folder, adapter, prompt) for _, adapter, prompt in asked]
        for row in rows:
            row.close()
    assert rows[0].cached_tokens == len(LONG) - 1


def test_projects_share_nothing(llama: Any) -> None:
    batch = Batch(llama)
    rows = [batch.join(LONG, project_id=name) for name in ("p", "q", None, None)]
    for row in rows:
        say(row)
    late = [batch.join(LONG, project_id=name) for name in ("r", None, "q")]
    for row in late:
        say(row)
    assert [row.cached_tokens for row in (*rows, *late)] == [0, 0, 0, 0, 0, 0, len(LONG) - 1]


def test_adapters_share_nothing_and_one_that_leaves_is_forgotten(folder: Path, tmp_path: Path) -> None:
    memory = CacheMemory(2**24)
    base = Base(Source(folder, None, "cpu", torch.float32), memory)
    folders = [make(tmp_path / str(seed), folder, seed) for seed in (1, 2)]
    one, other = map(base.lay_on, folders)
    rows = [model.stream(LONG, "p") for model in (base, one, other)]
    answers = [say(row) for row in rows]  # type: ignore[arg-type]  these are rows of a batch
    again = one.stream(LONG, "p")

    assert answers == [by_peft(folder, adapter, LONG) for adapter in (None, *folders)]
    assert say(again) == answers[1]  # type: ignore[arg-type]
    assert [row.cached_tokens for row in (*rows, again)] == [0, 0, 0, len(LONG) - 1]

    one.leave()
    kept = memory.nbytes
    assert kept == 2 * A_POSITION * (len(LONG) + TOKENS - 1)
    newer = base.lay_on(folders[0])
    row = newer.stream(LONG, "p")
    assert say(row) == answers[1]  # type: ignore[arg-type]
    assert row.cached_tokens == 0
    base.leave()
    assert memory.nbytes == 0


def test_memory_of_what_is_kept_is_bounded_and_the_oldest_leaves_first(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_STEP", 16)
    a_row = (30 + TOKENS - 1) * A_POSITION
    memory = CacheMemory(limit=6 * a_row)
    batch = Batch(llama, memory=memory)
    prompts = [[3 + (start + n) % 250 for n in range(30)] for start in (0, 50, 100, 150)]
    for prompt in prompts[:3]:
        say(batch.join(prompt, project_id="p"))
    assert memory.nbytes == 3 * a_row
    assert say(batch.join(prompts[0], project_id="p")) == alone(
        llama, prompts[0]
    )  # it is used again, so the second is the oldest
    say(batch.join(prompts[3], project_id="p"))

    assert memory.nbytes == 3 * a_row
    assert [memory.find(Owner(batch, None, "p"), prompt)[1] for prompt in prompts] == [30, 0, 30, 30]


def test_what_is_kept_leaves_for_rows_that_run(llama: Any) -> None:
    memory = CacheMemory(limit=1024 * A_POSITION)
    batch = Batch(llama, memory=memory)
    say(batch.join(LONG, project_id="p"))
    assert memory.nbytes > 0
    rows = [batch.join(prompt, project_id="p") for prompt in (MORE, *PROMPTS[2:4], PROMPTS[5])]
    for row in rows:
        row.logits()
    assert memory.nbytes == 1024 * A_POSITION == batch.nbytes
    assert [row.cached_tokens for row in rows] == [0] * 4


def test_streams_with_passes_of_their_own_share_the_memory(llama: Any) -> None:
    limit = 2 * (len(LONG) + TOKENS) * A_POSITION
    memory = CacheMemory(limit)
    streams: list[Stream] = [Alone(llama, LONG[i:], LengthRope(), memory) for i in range(4)]
    said: list[list[int]] = [[] for _ in streams]
    held = []
    while streams_left := [stream for stream, one in zip(streams, said, strict=True) if len(one) < TOKENS]:
        for stream in ready_of(streams_left):
            said[streams.index(stream)].append(greedy(stream))
            held.append(memory.nbytes)
            if len(said[streams.index(stream)]) == TOKENS:
                stream.close()

    assert said == [alone(llama, LONG[i:]) for i in range(4)]
    assert max(held) <= limit + len(LONG) * A_POSITION, "the one whose prompt did not fit any more"
    assert memory.nbytes == 0


@pytest.mark.parametrize(
    ("one", "other", "length"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2, 4], 2), ([5], [6], 0)]
)
def test_common_counts_the_first_equal_tokens(one: list[int], other: list[int], length: int) -> None:
    assert common(one, other) == length
    assert common([*range(9, 999), *one], [*range(9, 999), *other]) == 990 + length
