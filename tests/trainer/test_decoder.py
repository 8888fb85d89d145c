"""The decoder answers as a model that reads each whole row alone, without a cache."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from op_recorder import OpRecorder
from peft import LoraConfig, get_peft_model
from run_folders import chat, lay_out, plan
from torch import Tensor
from transformers import AutoModelForCausalLM

from tunery.rows.messages import Example
from tunery.rows.template import ChatTemplate
from tunery.spec import Evaluation, Full, Lora, Qlora, Technique
from worker.trainer import generation, kernels
from worker.trainer.decoding import decoder
from worker.trainer.decoding import graphs as decode_graphs
from worker.trainer.decoding.cache import Cache
from worker.trainer.decoding.decoder import Decoder
from worker.trainer.decoding.passes import Passes
from worker.trainer.decoding.ties import tie
from worker.trainer.kernels import attention, cached_attention, projections
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.scoring import answers
from worker.trainer.stop_signal import Stopped, StopSignal

KNOWN = ("Llama", "Qwen2", "Qwen3", "Gemma 3", "Mistral", "Phi", "Phi-3", "Granite", "Cohere2", "SmolLM3")
IN_EVERY_RUN = ("Llama", "Gemma 3", "Qwen3")
"""One without windows, one with a mask for each kind of layer, one with norms of queries and keys."""
LIMIT = 40
STOPS = frozenset((2, 7, 33, 54, 77, 84, 101, 120, 162, 178, 200))
"""So many that answers of all lengths end in them."""
PROMPTS = [[3 + (length * i * 7) % 250 for i in range(length)] for length in (3, 7, 12, 20, 21, 35, 50)]
TOGETHER = [[5, 6, 7] + [9] * 20 + prompt for prompt in PROMPTS]


def read(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


def alone(model: Any, prompt: list[int], limit: int = LIMIT) -> list[int]:
    """Returns the answer of passes over whole rows."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + limit and (ids == prompt or ids[-1] not in STOPS):
            logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def answer(model: Any, prompts: list[list[int]], limit: int = LIMIT, **options: Any) -> list[list[int]]:
    with torch.no_grad():
        return Decoder(model, STOPS, limit, **options).answer(prompts)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read(zoo.make("Llama", tmp_path_factory.mktemp("llama") / "base"))


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=() if each in IN_EVERY_RUN else pytest.mark.slow) for each in KNOWN]
)
def test_answers_of_a_batch_are_those_of_each_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In passes of all sizes: over several prompts, over one, over those that begin alike, and with fewer rows."""
    monkeypatch.setattr(decoder, "PROMPT_TOKENS", {"cpu": 40})
    model = read(zoo.make(family, tmp_path / "base"))
    assert decoder.reason_against(model) is None
    for prompts in (PROMPTS, TOGETHER, PROMPTS[:1]):
        assert answer(model, prompts) == [alone(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_fast_layers_answer_as_the_familys_own(
    family: str, adapted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "PROMPT_TOKENS", {"cpu": 40})
    base = zoo.make(family, tmp_path / "base")
    model = read(base)
    if adapted:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
        kernels.adapters.install(model)
        wanted = copy.deepcopy(model).merge_and_unload()
    else:
        wanted = read(base)
    assert kernels.decoder.install(model) == model.config.num_hidden_layers
    causal = model.get_base_model() if adapted else model
    for prompts in (PROMPTS, TOGETHER):
        assert answer(causal, prompts) == [alone(wanted, prompt) for prompt in prompts]


@pytest.mark.parametrize("family", sorted(set(zoo.FAMILIES) - set(KNOWN)))
def test_other_models_are_left_to_transformers(family: str, tmp_path: Path) -> None:
    model = read(zoo.make(family, tmp_path / "base"))
    assert decoder.reason_against(model)
    assert generation.rows_at_once(model) == generation.PLAIN_BATCH["cpu"]


@pytest.mark.parametrize("every", [1, 4, 8])
@pytest.mark.parametrize("limit", [1, 2, 18, LIMIT])
def test_tokens_after_the_stop_token_are_left_out(
    llama: Any, monkeypatch: pytest.MonkeyPatch, limit: int, every: int
) -> None:
    monkeypatch.setattr(decoder, "UNREAD", {"cpu": every})
    assert answer(llama, PROMPTS, limit) == [alone(llama, prompt, limit) for prompt in PROMPTS]


@pytest.mark.parametrize("reach", [8, 32, 256])
def test_recorded_steps_answer_as_others_do(llama: Any, monkeypatch: pytest.MonkeyPatch, reach: int) -> None:
    """Also when the part of the cache that is read grows, and when rows that have ended leave."""
    monkeypatch.setattr(decoder, "REACH", {"cpu": reach})
    monkeypatch.setattr(decoder, "_SHRINK", 1)
    recorder = OpRecorder()
    assert answer(llama, PROMPTS, recorder=lambda: recorder) == [alone(llama, prompt) for prompt in PROMPTS]
    assert recorder.recorded > 1
    assert recorder.replayed > recorder.recorded


@pytest.mark.parametrize(("own_keys", "kinds"), [(False, 5), (True, 3)])
def test_steps_that_read_own_keys_are_recorded_a_few_times(
    llama: Any, monkeypatch: pytest.MonkeyPatch, own_keys: bool, kinds: int
) -> None:
    monkeypatch.setattr(decoder, "REACH", {"cpu": 4})
    monkeypatch.setattr(Passes, "reads_own_keys", own_keys)
    recorder = OpRecorder()
    made = Decoder(llama, (), 20, recorder=lambda: recorder)
    with torch.no_grad():
        made.prepare(PROMPTS[1], len(PROMPTS[1]))
        assert recorder.recorded == kinds  # of 4, 8, 12, 16 and 20 positions behind the prompt, or of 4, 16 and all
        [found] = made.answer([PROMPTS[1]])
    assert recorder.recorded == kinds
    with torch.no_grad():
        assert Decoder(llama, (), 20).answer([PROMPTS[1]]) == [found]


@pytest.mark.parametrize("own_keys", [False, True])
def test_batches_with_room_for_the_same_prompts_share_what_is_recorded(
    llama: Any, monkeypatch: pytest.MonkeyPatch, own_keys: bool
) -> None:
    monkeypatch.setattr(Passes, "reads_own_keys", own_keys)
    monkeypatch.setattr(decoder, "REACH", {"cpu": 16})
    wanted = [alone(llama, prompt) for prompt in PROMPTS]
    recorder = OpRecorder()
    made = Decoder(llama, STOPS, LIMIT, recorder=lambda: recorder)
    longest = max(map(len, PROMPTS))
    with torch.no_grad():
        made.prepare(PROMPTS[0], longest)
        recorded = recorder.recorded
        assert [made.answer([prompt], longest)[0] for prompt in PROMPTS] == wanted
        assert recorder.recorded == recorded > 1
        made.answer([PROMPTS[0]])
        assert recorder.recorded > recorded


def test_few_steps_are_not_recorded(llama: Any) -> None:
    recorder = OpRecorder()
    assert answer(llama, PROMPTS, 16, recorder=lambda: recorder) == [alone(llama, prompt, 16) for prompt in PROMPTS]
    assert recorder.recorded == 0


def test_steps_that_cannot_be_recorded_run_without(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    recorder = OpRecorder()

    def record(_work: Callable[[], Tensor]) -> Any:
        raise TypeError("a fault of any kind")

    recorder.record = record  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        assert answer(llama, PROMPTS, recorder=lambda: recorder) == [alone(llama, prompt) for prompt in PROMPTS]
    said = [record.getMessage() for record in caplog.records if record.name == decode_graphs.__name__]
    assert said == ["decoding steps are not recorded as CUDA graphs: a fault of any kind"]


def test_rows_that_have_ended_leave_the_batch(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    step = decoder.Passes.step

    def counted(passes: Any, tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        counts.append(len(tokens))
        return step(passes, tokens, *args, **options)

    monkeypatch.setattr(decoder.Passes, "step", counted)
    lengths = sorted(len(alone(llama, prompt)) for prompt in PROMPTS)
    answer(llama, PROMPTS)
    assert counts[0] == len(PROMPTS)
    assert counts[-1] <= len(PROMPTS) // 2
    assert len(counts) == lengths[-1] - 1


def test_prompts_that_are_one_the_beginning_of_the_other(llama: Any) -> None:
    prompts = [TOGETHER[3][: 20 + i] for i in (0, 3, 3, 9)]
    assert answer(llama, prompts) == [alone(llama, prompt) for prompt in prompts]


def test_what_all_prompts_begin_with_is_read_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read_tokens = 0
    place = Cache.place_packed

    def counted(cache: Cache, first: int, lengths: list[int], prefix: int) -> Any:
        nonlocal read_tokens
        read_tokens += sum(lengths)
        return place(cache, first, lengths, prefix)

    monkeypatch.setattr(Cache, "place_packed", counted)
    answer(llama, TOGETHER, 1)
    assert read_tokens == 24 + sum(len(prompt) - 1 for prompt in PROMPTS)


def test_a_batch_is_as_large_as_memory_allows(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Decoder(llama, STOPS, 8)
    position = made._cache.bytes_a_position
    assert made.batch_size([10] * 40) == decoder.MOST_ROWS["cpu"]
    monkeypatch.setattr(made, "_room", lambda: 3 * 24 * position)
    assert made.batch_size([10] * 40) == 3
    assert made.batch_size([100, 100]) == 1  # a row alone is tried whatever the room


@pytest.mark.parametrize("fault", ["lengths", "positions", "raises"])
def test_a_model_that_differs_is_left_to_transformers(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    model, template = read(tiny), ChatTemplate.load(tiny)
    wanted = generation.Greedy(model, template, 12, "by transformers").answer(PROMPTS)
    attend, place = cached_attention.attend, Cache.place_packed

    def wrong_lengths(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *rest: Any) -> Tensor:
        if fault == "raises":
            raise ValueError("a fault of any kind\nmore")
        return attend(query, keys, values, lengths - 2, *rest)

    def wrong_positions(cache: Cache, *args: Any) -> Any:
        positions, borders = place(cache, *args)
        return positions + torch.arange(positions.shape[1]), borders

    monkeypatch.setattr(
        *(
            (Cache, "place_packed", wrong_positions)
            if fault == "positions"
            else (cached_attention, "attend", wrong_lengths)
        )
    )
    greedy = generation.Greedy(model, template, 12)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        assert greedy.answer(PROMPTS) == wanted
    assert greedy.against is not None
    assert ("a fault of any kind" if fault == "raises" else "differ from those of a plain pass") in greedy.against
    assert "answers are generated by transformers" in caplog.text
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("technique", [Lora(), Qlora(), Full()], ids=["lora", "qlora", "full"])
def test_every_technique_is_answered_by_the_decoder(tmp_path: Path, tiny: Path, technique: Technique) -> None:
    settled = plan(technique=technique, evaluation=Evaluation(max_new_tokens=20))
    rows = [chat(i, words=1 + i) for i in range(6)]
    t = prepare(lay_out(tmp_path / "run", tiny, settled, rows), MessageWriter(None), StopSignal())
    for name, parameter in t.parameters.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    asked = answers.questions(t.template, [Example.model_validate(row) for row in rows])
    for base in (True, False):
        together = answers.generate_ids(t, asked, base=base)
        assert together == [answers.generate_ids(t, [one], base=base)[0] for one in asked]  # by transformers
    assert t.objective.against_decoder is None
    assert t.objective.training


@pytest.mark.parametrize(("most", "timed"), [(60.0, 4), (0.0, 1)])
def test_answers_are_timed_one_by_one_until_they_have_taken_long(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, most: float, timed: int
) -> None:
    """What their steps need is recorded before."""
    rows = [chat(i) for i in range(4)]
    t = prepare(
        lay_out(tmp_path / "run", tiny, plan(evaluation=Evaluation(max_new_tokens=20)), rows),
        MessageWriter(None),
        StopSignal(),
    )
    asked = answers.questions(t.template, [Example.model_validate(row) for row in rows])
    done: list[tuple[str, list[int], int]] = []
    answer = Decoder.answer

    def noted(made: Decoder, prompts: list[list[int]], longest: int = 0) -> list[list[int]]:
        assert len(prompts) == 1
        done.append(("answer", prompts[0], longest))
        return answer(made, prompts, longest)

    monkeypatch.setattr(Decoder, "answer", noted)
    monkeypatch.setattr(Decoder, "prepare", lambda _, prompt, longest: done.append(("prepare", prompt, longest)))
    seconds = answers.seconds_alone(t, asked, 20, base=False, most=most)
    assert len(seconds) == timed
    assert min(seconds) > 0
    longest = max(len(question.prompt_ids) for question in asked)
    prompts = [question.prompt_ids for question in asked]
    assert done == [("prepare", prompts[0], longest), *(("answer", prompt, longest) for prompt in prompts[:timed])]
    assert t.objective.training


@pytest.mark.parametrize("limit", [1, 2, 20])
def test_logits_are_verified_before_answers_are_timed(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Of one token, there is nothing to verify."""
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), [chat(i) for i in range(2)]), MessageWriter(None), StopSignal())
    asked = answers.questions(t.template, [Example.model_validate(chat(i)) for i in range(2)])
    done, verify, answer = list[str](), Decoder._verify, Decoder.answer

    def verify_and_note(made: Decoder, *given: Any) -> None:
        done.append("verified")
        verify(made, *given)

    def answer_and_note(made: Decoder, *given: Any) -> list[list[int]]:
        done.append("asked")
        return answer(made, *given)

    monkeypatch.setattr(Decoder, "_verify", verify_and_note)
    monkeypatch.setattr(Decoder, "answer", answer_and_note)
    answers.seconds_alone(t, asked, limit, base=False, most=60.0)
    assert done == ["verified"] * (limit > 1) + ["asked", "asked"]


def test_answers_are_timed_where_there_is_no_memory_to_prepare(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), [chat(i) for i in range(2)]), MessageWriter(None), StopSignal())
    asked = answers.questions(t.template, [Example.model_validate(chat(i)) for i in range(2)])
    monkeypatch.setattr(Decoder, "_step", raising(torch.OutOfMemoryError("no memory")))
    assert len(answers.seconds_alone(t, asked, 4, base=False, most=60.0)) == 2


def test_four_bit_weights_are_unpacked_once_where_memory_allows(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled = plan(technique=Qlora(), evaluation=Evaluation(max_new_tokens=20))
    rows = [chat(i, words=1 + i) for i in range(6)]
    t = prepare(lay_out(tmp_path / "run", tiny, settled, rows), MessageWriter(None), StopSignal())
    asked = answers.questions(t.template, [Example.model_validate(row) for row in rows])
    unpack, unpacked = projections._unpack, []

    def counted(packed: Tensor, *args: Any) -> Tensor:
        unpacked.append(packed.data_ptr())
        return unpack(packed, *args)

    monkeypatch.setattr(projections, "_unpack", counted)
    wanted = answers.generate_ids(t, asked, base=False)
    assert max(unpacked.count(place) for place in set(unpacked)) == 2  # for the cache's shapes, and to be kept

    monkeypatch.setattr(Decoder, "_room", lambda _: 1)
    unpacked.clear()
    assert answers.generate_ids(t, asked, base=False) == wanted
    assert min(unpacked.count(place) for place in set(unpacked)) > 10  # in each pass

    assert not [module for module in t.objective.modules() if hasattr(module, "unpacked")]


@pytest.mark.parametrize("end", [Stopped, torch.OutOfMemoryError])
def test_nothing_is_kept_of_an_evaluation_that_ends_early(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, end: type[Exception]
) -> None:
    settled = plan(technique=Qlora(), evaluation=Evaluation(max_new_tokens=20))
    t = prepare(
        lay_out(tmp_path / "run", tiny, settled, [chat(i) for i in range(4)]), MessageWriter(None), StopSignal()
    )
    asked = answers.questions(t.template, [Example.model_validate(chat(i)) for i in range(4)])

    def ending(_decoder: Decoder, *_: Any) -> Any:
        raise end

    monkeypatch.setattr(Decoder, "answer", ending)
    if end is Stopped:
        t.stop_signal.received = True
    with pytest.raises(end):
        answers.generate_ids(t, asked, base=False)
    assert not [module for module in t.objective.modules() if hasattr(module, "unpacked")]


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run this on a host with a GPU")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("family", IN_EVERY_RUN)
def test_a_gpu_answers_in_fp32_as_each_row_alone(family: str, tmp_path: Path) -> None:
    model = read(zoo.make(family, tmp_path / "base")).to("cuda")
    for prompts in (PROMPTS, TOGETHER):
        with torch.no_grad():
            made = Decoder(model, STOPS, LIMIT)
            assert made.answer(prompts) == [alone(model, prompt) for prompt in prompts]
        assert made._graphs is not None
        assert made._graphs._recorded
        assert not made._graphs.is_broken


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("technique", [Lora(), Qlora(), Full()], ids=["lora", "qlora", "full"])
def test_a_gpu_answers_in_bf16_as_each_row_alone_but_for_ties(
    tmp_path: Path, technique: Technique, caplog: pytest.LogCaptureFixture
) -> None:
    """With the kernel for rows behind each other, which is for 16 bits alone, and 8 looks at the tokens."""
    base = zoo.make("Llama", tmp_path / "base", hidden_size=128, head_dim=32, intermediate_size=256)
    settled = plan(technique=technique, evaluation=Evaluation(max_new_tokens=60))
    rows = [chat(i, words=1 + i) for i in range(12)]
    t = prepare(lay_out(tmp_path / "run", base, settled, rows), MessageWriter(None), StopSignal())
    asked = answers.questions(t.template, [Example.model_validate(row) for row in rows])
    given = answers.generate_ids(t, asked, base=False)
    assert t.objective.against_decoder is None
    assert "are not recorded" not in caplog.text
    t.objective.eval()
    with torch.no_grad(), t.objective.computing():
        for question, ids in zip(asked, given, strict=True):
            _check(t.objective.causal, question.prompt_ids, ids)


def _check(causal: Any, prompt: list[int], answer: list[int]) -> None:
    """Checks that each token is the likeliest after those before it, or ties with that."""
    ids = torch.tensor([prompt + answer], device=causal.device)
    logits = causal(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    for best, own in zip(logits.max(dim=-1).values.tolist(), chosen.tolist(), strict=True):
        assert best - own <= tie(best, "bfloat16")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("prefix", [0, 20])
def test_the_kernel_lets_rows_see_what_all_begin_with(prefix: int) -> None:
    lengths = [5, 300, 1, 64]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    key_ends = ends + prefix * torch.arange(len(ends))
    query, key, value = (
        torch.randn(int(total), heads, 64, dtype=torch.bfloat16, device="cuda")
        for total, heads in ((ends[-1], 8), (key_ends[-1], 2), (key_ends[-1], 2))
    )
    on_device = [each.to("cuda", torch.int32) for each in (ends, key_ends)]
    borders = attention.Borders(on_device[0], max(lengths), on_device[1], max(lengths) + prefix)
    found = attention.rows_apart(query, key, value, borders, 0.125, None)
    wanted = attention.plain(query.float(), key.float(), value.float(), borders, 0.125, None)
    assert float((found.float() - wanted).norm() / wanted.norm()) < 1e-2
