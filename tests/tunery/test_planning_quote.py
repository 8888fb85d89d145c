"""The quote of a run: its work, the speed of similar runs or of a card, and a range."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from known_models import LLAMA_8B

from tunery.planning import cards, quote, speed, workload
from tunery.planning.quote import Quote, Range
from tunery.planning.shape import Shape
from tunery.planning.speed import Record
from tunery.planning.workload import Counts, Workload
from tunery.settings import Settings
from tunery.spec import Full, Lora, Plan, Qlora, Technique
from tunery.trainer_protocol import Spent, StepTimes

LLAMA_1B = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "params": 1_498_482_688,
}
TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260,
    "params": 40_000,
}  # fmt: skip
SETTINGS = Settings(gpu_hour_prices={"H200": 3.6, "CPU": 0.36})


def make_plan(**changes: Any) -> Plan:
    asked: dict[str, Any] = {
        "technique": Lora(r=8), "learning_rate": 1e-3, "learning_rate_multiplier": 1.0, "seed": 1, "n_epochs": 3,
        "batch_size": 4,
    }  # fmt: skip
    return Plan.model_validate(asked | changes)


# --- work -----------------------------------------------------------------------------------------------------------

ROWS = Counts(examples=10, tokens=1000, source="rows", valid_tokens=200, test_rows=6, test_tokens=90)


@pytest.mark.parametrize(
    ("changes", "device", "wanted"),
    [
        ({}, "cuda", {"steps": 9, "tokens": 3000, "valid_tokens": 600, "answers": 12, "checkpoints": 3}),
        ({"n_epochs": 1, "batch_size": 10}, "cuda", {"steps": 1, "tokens": 1000, "valid_tokens": 200}),
        ({"evaluation": {"every_steps": 4}}, "cuda", {"valid_tokens": 3 * 200}),  # after steps 4, 8 and the last
        ({"evaluation": {"task_rows": 5}}, "cuda", {"answers": 12 + 3 * 5}),
        ({"evaluation": {"max_rows": 2}}, "cuda", {"answers": 4}),
        ({"technique": Qlora(), "evaluation": {"unquantised": True}}, "cuda", {"answers": 24}),
        ({}, "cuda", {"row_tokens": 1200, "method": "supervised", "pair_tokens": 0, "replay_answers": 0}),
        ({"n_epochs": 1}, "cuda", {"row_tokens": 1200}),
        ({"method": {"type": "dpo"}}, "cuda", {"answers": 0, "reference_tokens": 1200, "pair_tokens": 2 * 90}),
        ({"method": {"type": "dpo"}, "evaluation": {"max_rows": 2}}, "cuda", {"method": "dpo", "pair_tokens": 2 * 30}),
        ({}, "cuda", {"scored": True, "reference_tokens": 0}),
        ({"evaluation": {"max_new_tokens": 32}}, "cuda", {"answer_tokens": 32}),
        ({}, "cuda", {"item_tokens": 800 * 46, "prompt_tokens": 100 * 106}),
        ({}, "cpu", {"item_tokens": 100 * 46, "prompt_tokens": 20 * 106}),
        ({"evaluation": {"general": {"items": 10, "prompts": 0}}}, "cpu", {"item_tokens": 460, "prompt_tokens": 0}),
        (
            {"evaluation": {"general": {"items": 10**9, "prompts": 10**9}}},
            "cpu",
            {"item_tokens": 800 * 46, "prompt_tokens": 100 * 106},  # there are no more
        ),
        (
            {"evaluation": {"general": {"items": 1500, "benchmark": "lm_eval:hellaswag"}}},
            "cpu",
            {"item_tokens": 1500 * 46},
        ),
        ({"evaluation": {"general": {"enabled": False}}}, "cpu", {"item_tokens": 0, "prompt_tokens": 0}),
        ({"keep_checkpoints": 0}, "cuda", {"checkpoints": 0}),
        ({"replay": {"share": 0.5}}, "cuda", {"tokens": 6000, "answers": 12, "replay_answers": 12}),  # 10 of 12 end
        ({"replay": {"share": 0.5, "max_new_tokens": 20}}, "cuda", {"replay_answers": 12, "replay_answer_tokens": 20}),
        ({"replay": {"share": 0.5, "source": "file-1"}}, "cuda", {"tokens": 6000, "answers": 12, "replay_answers": 0}),
        ({"export": {"gguf": ["q8_0"]}}, "cuda", {"exports": 5}),
        ({"technique": Full(), "export": {"gguf": ["q8_0"]}}, "cuda", {"exports": 2}),
        ({"resources": {"gpus": 4, "sharding": "full_shard"}}, "cuda", {"gpus": 4, "sharded": True}),
    ],
)
def test_work_is_counted_from_plan_and_files(changes: dict[str, Any], device: str, wanted: dict[str, Any]) -> None:
    found = workload.of_job(make_plan(**changes), TINY, ROWS, device)
    assert {name: getattr(found, name) for name in wanted} == wanted


def test_a_job_without_held_out_rows_measures_nothing() -> None:
    found = workload.of_job(make_plan(), TINY, replace(ROWS, valid_tokens=0, test_rows=0), "cuda")
    assert (found.valid_tokens, found.answers, found.item_tokens, found.prompt_tokens) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("size", "examples", "max_length", "rows", "tokens"),
    [(6000, None, 2048, 10, 1500), (6000, 20, 2048, 20, 1500), (6000, 20, 16, 20, 320), (1, None, 2048, 1, 1)],
)
def test_tokens_are_guessed_from_bytes(
    size: int, examples: int | None, max_length: int, rows: int, tokens: int
) -> None:
    assert Counts.of_bytes(size, examples, max_length) == Counts(rows, tokens, "bytes")


# --- speed ----------------------------------------------------------------------------------------------------------


def make_work(technique: Technique | None = None, model_info: dict[str, Any] = TINY, **changes: Any) -> Workload:
    work = Workload(technique or Lora(r=8), Shape.of(model_info), steps=100, tokens=10_000, saved_bytes=1000)
    return replace(work, **changes)


def make_record(job: str = "ftjob-1", *, work: Workload | None = None, **changes: Any) -> Record:
    """Makes a record of 100 steps at 0.1 s plus 1 ms per token: 20 s in all, and 5 s more for the first step."""
    times = StepTimes()
    for step in range(99):
        tokens = 50 + step
        times = times.add(0.1 + 0.001 * tokens, tokens)
    spent = {
        "prepare": Spent(seconds=3, units=1),
        "step": Spent(seconds=25, units=100),
        "answer": Spent(seconds=6.4, units=10),
        "general": Spent(seconds=2, units=1000),
        "checkpoint": Spent(seconds=0.5, units=1),
    }
    record = Record(
        job=job, model="tiny", device="CPU", work=work or make_work(answer_tokens=64), around=4, trainer_seconds=38.9,
        spent=spent, step_times=times,
    )  # fmt: skip
    return replace(record, **changes)


def test_a_runs_parts_are_told_apart() -> None:
    found = speed.of_record(make_record())
    assert (found.step, found.token) == (pytest.approx(0.1), pytest.approx(0.001))
    assert found.start == pytest.approx(4 + 3 + 5)
    assert found.answer_token == pytest.approx(6.4 / 10 / 64)
    assert found.general_token == pytest.approx(0.002)
    assert found.checkpoint == 0.5
    assert found.save == pytest.approx(38.9 - 3 - 25 - 6.4 - 2 - 0.5)
    assert found.valid_token == pytest.approx(0.001 / 2)  # a frozen base: forward is half of a step


def test_a_scorecards_time_is_none_of_saving() -> None:
    """Saving and the scorecard took 2 s of the run, of which the scores were 1.5 s."""
    took = make_record()
    spent = {**took.spent, "scores": Spent(seconds=1.5, units=2)}
    found = speed.of_record(replace(took, spent=spent, work=replace(took.work, scored=True)))
    assert (found.scores, found.save) == (1.5, pytest.approx(0.5))
    plain = quote.seconds_of(make_work(), found)
    scored = quote.seconds_of(make_work(scored=True), found)
    assert (plain["saving"], scored["saving"]) == (found.save, found.save)
    assert scored["evaluation"] - plain["evaluation"] == pytest.approx(1.5)


def test_the_reference_of_preference_tuning_is_measured_by_its_tokens() -> None:
    """300 tokens took 3 s, so 1,000 take 10 s, before the first step."""
    took = make_record()
    spent = {**took.spent, "reference": Spent(seconds=3, units=300)}
    found = speed.of_record(replace(took, spent=spent, trainer_seconds=took.trainer_seconds + 3))
    assert (found.reference_token, found.start) == (pytest.approx(0.01), pytest.approx(4 + 3 + 5))
    plain = quote.seconds_of(make_work(), found)["start"]
    assert quote.seconds_of(make_work(reference_tokens=1000), found)["start"] - plain == pytest.approx(10)
    assert speed.of_record(took).reference_token == found.valid_token  # a forward pass


@pytest.mark.parametrize(
    ("part", "spent", "grows", "of_unit"),
    [
        ("start", {"rows": Spent(seconds=2, units=1000)}, {"row_tokens": 3000}, 2 / 1000 * 3000),
        ("start", {"rows": Spent(seconds=0, units=0)}, {"row_tokens": 3000}, speed._ROW_TOKEN * 3000),  # were prepared
        ("start", {}, {"row_tokens": 3000}, 0),  # an earlier release: part of the preparation
        ("start", {"replay": Spent(seconds=4, units=10)}, {"replay_answers": 40}, 4 / 10 * 40),
        ("start", {}, {"replay_answers": 40}, 6.4 / 10 * 40),  # at the speed of a scorecard's answers
        ("evaluation", {"pairs": Spent(seconds=5, units=500)}, {"pair_tokens": 2000}, 5 / 500 * 2000),
        ("evaluation", {}, {"pair_tokens": 2000}, 0.001 / 2 * 2000),  # a forward pass
        ("export", {"exports": Spent(seconds=12, units=1)}, {"exports": 6}, 12 / 3 * 6),
        ("export", {}, {"exports": 6}, 2 * 40_000 / 200e6 * 6),
    ],
)
def test_parts_that_grow_are_quoted_by_what_they_grow_with(
    part: quote.Part, spent: dict[str, Spent], grows: dict[str, Any], of_unit: float
) -> None:
    took = make_record(work=make_work(exports=3))
    more = sum(each.seconds for each in spent.values())
    found = speed.of_record(replace(took, spent={**took.spent, **spent}, trainer_seconds=took.trainer_seconds + more))
    plain, grown = (quote.seconds_of(make_work(**work), found) for work in ({}, grows))
    assert {name: grown[name] - plain[name] for name in plain} == pytest.approx(
        dict.fromkeys(plain, 0) | {part: of_unit}
    )
    assert plain["saving"] == pytest.approx(2, abs=0.01)


def test_runs_of_an_earlier_release_have_their_scores_taken_from_saving() -> None:
    took = make_record()
    found = speed.of_record(replace(took, work=replace(took.work, scored=True)))
    assert (found.scores, found.save) == (speed._SCORE_SECONDS, pytest.approx(2 - speed._SCORE_SECONDS))
    assert speed.of_record(took).save == pytest.approx(2)  # it had no scorecard


def test_steps_of_like_length_are_all_tokens() -> None:
    times = StepTimes()
    for _ in range(20):
        times = times.add(0.5, 100)
    assert speed.fit(times, None, make_work()) == (0.0, pytest.approx(0.005))
    assert speed.fit(None, Spent(seconds=20, units=100), make_work()) == (0.0, pytest.approx(0.002))
    shrinking = StepTimes()
    for tokens in range(10, 30):
        shrinking = shrinking.add(1 / tokens, tokens)
    step, token = speed.fit(shrinking, None, make_work())
    assert (step > 0, token) == (True, 0.0)


def test_other_bases_and_techniques_are_scaled() -> None:
    of_run, tiny = speed.of_record(make_record()), make_work()
    assert speed.scaled(of_run, tiny, tiny) == of_run
    full = speed.scaled(of_run, tiny, make_work(Full()))
    assert (full.basis, full.token, full.step) == ("other_technique", pytest.approx(0.0015), pytest.approx(0.1))
    large = speed.scaled(of_run, tiny, make_work(model_info={**TINY, "num_hidden_layers": 4, "params": 80_000}))
    assert large.basis == "other_base"
    assert large.step == pytest.approx(0.2)
    assert 0.0015 < large.token < 0.003
    assert (of_run.knows_base, full.knows_base, large.knows_base) == (True, True, False)


@pytest.mark.parametrize(
    ("technique", "method", "device", "basis", "token"),
    [
        (Lora(r=2), "supervised", "CPU", "same", 1.0),
        (Lora(r=8), "dpo", "CPU", "other_method", 1.0),  # a token of a pair is trained like any other
        (Qlora(), "supervised", "CPU", "other_technique", 1.1),
        (Qlora(), "dpo", "CPU", "other_technique", 1.1),
        (Lora(use_dora=True), "supervised", "CPU", "other_technique", 1.4),
        (Full(), "supervised", "CPU", "other_technique", 1.5),  # six operations per weight instead of four
        (Qlora(), "supervised", "NVIDIA H200", "other_technique", 0.52 / 0.51),
        (Lora(precision="fp8"), "supervised", "NVIDIA H200", "other_technique", 1 / 1.4),
        (Full(), "supervised", "NVIDIA H200", "other_technique", 1.5),
    ],
)
def test_techniques_and_methods_are_scaled_by_a_stated_rule(
    technique: Technique, method: str, device: str, basis: speed.Basis, token: float
) -> None:
    of_run, plain = speed.of_record(make_record()), make_work()
    found = speed.scaled(of_run, plain, make_work(technique, method=method), device)
    assert (found.basis, found.token / of_run.token) == (basis, pytest.approx(token))
    assert found.valid_token == of_run.valid_token  # a forward pass depends on the base alone
    back = speed.scaled(found, make_work(technique, method=method), plain, device)
    assert back.token == pytest.approx(of_run.token)


def test_the_rule_repeats_what_was_recorded_on_a_cpu() -> None:
    """The recorded figures are medians of three rounds; the rule may differ by 15 %."""
    recorded = json.loads((RECORDS / "technique_costs_cpu.json").read_text())["ratios"]
    plain, of_run = make_work(), speed.of_record(make_record())
    works = {
        "lora": plain, "qlora": make_work(Qlora()), "full": make_work(Full()), "dora": make_work(Lora(use_dora=True)),
        "lora, pairs": make_work(method="dpo"),
    }  # fmt: skip
    found = {name: speed.scaled(of_run, plain, work).token / of_run.token for name, work in works.items()}
    assert found == pytest.approx(recorded, rel=0.15)


def test_another_techniques_weights_are_saved_and_uploaded_by_their_bytes() -> None:
    of_run, plain = speed.of_record(make_record()), make_work()
    found = speed.scaled(of_run, plain, make_work(Full(), saved_bytes=400_001_000))
    assert (found.start, found.checkpoint) == (pytest.approx(of_run.start + 2), pytest.approx(0.5 * 400_001))


@pytest.mark.parametrize(
    ("work", "wanted"),
    [
        (make_work(), ["lora again", "lora"]),
        (make_work(Lora(r=64)), ["lora again", "lora"]),
        (make_work(method="dpo"), ["lora dpo"]),
        (make_work(Qlora(), method="dpo"), ["qlora"]),  # the technique decides before the method
        (make_work(Full(), method="dpo"), ["full"]),
        (make_work(Lora(use_dora=True)), ["dora"]),
        (make_work(Lora(precision="fp8")), ["lora again", "dora", "full", "qlora", "lora dpo"]),  # any other technique
    ],
)
def test_runs_of_the_technique_and_the_method_are_taken_first(work: Workload, wanted: list[str]) -> None:
    ran = {
        "lora again": make_work(Lora(r=2)),
        "dora": make_work(Lora(use_dora=True)),
        "full": make_work(Full()),
        "qlora": make_work(Qlora()),
        "lora dpo": make_work(method="dpo"),
        "lora": make_work(),
    }
    records = [make_record(name, work=each) for name, each in ran.items()]
    assert [record.job for record in speed.choose(records, work)] == wanted


def test_the_run_most_alike_is_taken() -> None:
    def named(job: str, technique: Technique, model_info: dict[str, Any]) -> Record:
        return make_record(job, work=make_work(technique, model_info))

    eight, one, tiny = (named(name, Lora(), model_info) for name, model_info in
                        [("8b", LLAMA_8B), ("1b", LLAMA_1B), ("tiny", TINY)])  # fmt: skip
    full = named("full", Full(), LLAMA_1B)
    found = speed.choose([full, eight, one, tiny], make_work(Lora(r=2), LLAMA_1B))
    assert [record.job for record in found] == ["1b"]
    assert [record.job for record in speed.choose([eight, full, tiny], make_work(Lora(), LLAMA_1B))] == ["full"]
    assert [record.job for record in speed.choose([tiny, eight], make_work(Lora(), LLAMA_1B))] == ["8b"]
    many = [make_record(f"{n}") for n in range(9)]
    assert [record.job for record in speed.choose(many, make_work())] == ["0", "1", "2", "3", "4"]
    assert speed.choose([], make_work()) == []


RECORDS = Path(__file__).parents[2] / "bench/results"


def _recorded(name: str) -> list[dict[str, Any]]:
    found = json.loads((RECORDS / name).read_text())
    return [{**found, **each} for each in found.get("runs") or []]


def _speed_of(technique: Technique, model_info: dict[str, Any], tokens: int, *, recompute: bool = False) -> float:
    """Tokens per second on an H200, in steps of `tokens` tokens."""
    card = cards.find("NVIDIA H200")
    assert card is not None
    learns = 41_943_040 if isinstance(technique, Lora) else model_info["params"]
    work = make_work(technique, model_info, saved_bytes=learns * (4 if isinstance(technique, Lora) else 2))
    found = speed.of_card(card, work, recompute=recompute)
    return tokens / (found.step + tokens * found.token)


@pytest.mark.parametrize(
    ("technique", "model_info", "tokens", "measured"),
    [
        (Lora(), LLAMA_8B, 7605, 16398),  # fp8_job_llama8b_h200.json
        (Lora(precision="fp8"), LLAMA_8B, 7605, 22614),  # fp8_job_llama8b_h200.json
        (Qlora(), LLAMA_8B, 7605, 16125),  # job_speed_h200.json
        (Full(), LLAMA_1B, 7605, 43955),  # job_speed_h200.json
    ],
)
def test_the_table_repeats_what_was_recorded(
    technique: Technique, model_info: dict[str, Any], tokens: int, measured: int
) -> None:
    recorded = [run["tok_s"] for run in _recorded("fp8_job_llama8b_h200.json")]
    for measurement in json.loads((RECORDS / "job_speed_h200.json").read_text())["measurements"]:
        recorded += [run["tok_s"] for run in measurement["runs"]]
    assert measured in recorded
    assert _speed_of(technique, model_info, tokens) == pytest.approx(measured, rel=0.1)


# --- quotes ---------------------------------------------------------------------------------------------------------


def make_quote(work: Workload, device: str = "CPU", *records: Record) -> Quote:
    found = quote.make(work, device, records, SETTINGS)
    assert found is not None
    return found


def test_a_run_like_an_earlier_one_is_quoted_as_it_was() -> None:
    found = make_quote(make_work(answers=10, answer_tokens=64, checkpoints=1), "CPU", make_record())
    start, steps, answers, saving = 12, 20, 6.4, 0.5 + 2
    assert found.parts == {"start": 12, "training": 20, "evaluation": 6.4, "saving": 2.5, "export": 0}
    total = start + steps + answers + saving
    assert found.seconds.expected == pytest.approx(total, abs=0.1)
    assert (found.seconds.low, found.seconds.high) == (
        pytest.approx(total * 0.85, 0.01),
        pytest.approx(total * 1.2, 0.01),
    )
    assert (found.speed_from, found.measured, found.tokens_from) == ("same", ["ftjob-1"], "rows")
    assert (found.gpus, found.gpu_hours.expected, found.currency) == (0, 0.0, "USD")
    assert found.cost is not None
    assert found.cost.expected == pytest.approx(0.36 * total / 3600, abs=1e-4)
    assert "the last run here of this base, technique and method on CPU" in found.basis


def test_twice_the_work_takes_twice_the_steps() -> None:
    once, twice = (make_quote(make_work(steps=100 * n, tokens=10_000 * n), "CPU", make_record()) for n in (1, 2))
    assert twice.parts["training"] == pytest.approx(2 * once.parts["training"])
    assert twice.parts["start"] == once.parts["start"]


def test_several_runs_widen_the_range_to_all_of_them() -> None:
    runs = [make_record(f"{n}", around=around) for n, around in enumerate((4, 10, 40))]
    found = make_quote(make_work(), "CPU", *runs)
    assert found.parts["start"] == 18  # the median
    assert found.seconds.high >= 48 * 1.2
    assert found.measured == ["0", "1", "2"]


def test_a_known_base_is_measured_once() -> None:
    work = make_work(item_tokens=100, prompt_tokens=50)
    known = make_quote(work, "CPU", make_record()).parts["evaluation"]
    assert known == pytest.approx(0.002 * (100 + 2 * 50))
    other = make_record(work=make_work(model_info={**TINY, "vocab_size": 261}))
    assert make_quote(work, "CPU", other).parts["evaluation"] == pytest.approx(0.002 * (200 + 2 * 50), rel=0.02)


@pytest.mark.parametrize(("source", "low", "high"), [("rows", 1, 1), ("report", 0.95, 1.1), ("bytes", 0.6, 1.4)])
def test_guessed_tokens_widen_the_range(source: workload.Source, low: float, high: float) -> None:
    found = make_quote(make_work(source=source, steps=1000, tokens=100_000), "CPU", make_record())
    steps, rest = 200, 12 + 2
    assert found.parts["training"] == pytest.approx(steps)
    assert found.seconds.low == pytest.approx(0.85 * (low * steps + rest), abs=0.1)
    assert found.seconds.expected == pytest.approx(steps + rest, abs=0.1)
    assert found.seconds.high == pytest.approx(1.2 * (high * steps + rest), abs=0.1)


def test_cards_of_the_table_are_marked_as_estimated() -> None:
    found = make_quote(make_work(Lora(), LLAMA_8B), "NVIDIA H200")
    assert (found.speed_from, found.measured, found.gpus) == ("estimated", [], 1)
    assert "estimated" in found.basis
    assert found.gpu_hours.expected == pytest.approx(found.seconds.expected / 3600, abs=1e-4)
    assert quote.make(make_work(), "NVIDIA GeForce GTX 1080", [], SETTINGS) is None
    four = make_quote(make_work(Lora(), LLAMA_8B, gpus=4, tokens=10**7), "NVIDIA H200")
    one = make_quote(make_work(Lora(), LLAMA_8B, tokens=10**7), "NVIDIA H200")
    assert four.seconds.expected < one.seconds.expected / 2
    assert four.gpu_hours.expected > one.gpu_hours.expected
    assert (four.cost and four.cost.expected) == pytest.approx(3.6 * four.gpu_hours.expected, rel=1e-2)


def test_what_is_left_counts_the_steps_that_are_done() -> None:
    whole = make_quote(make_work(), "CPU", make_record())
    half = quote.left(whole, 0.5)
    assert half.seconds.expected == pytest.approx(whole.seconds.expected - 10, abs=0.1)
    assert quote.left(whole, 0).seconds.expected == pytest.approx(whole.seconds.expected)


@pytest.mark.parametrize(
    ("seconds", "of_quoted", "in_range", "words"),
    [(100, 1.0, True, "as expected"), (110, 1.1, True, "10% longer"), (60, 0.6, False, "40% shorter")],
)
def test_the_actual_stands_beside_the_quote(seconds: float, of_quoted: float, in_range: bool, words: str) -> None:
    quoted = make_quote(make_work(), "CPU", make_record()).model_copy(
        update={"seconds": Range(low=80, expected=100, high=120)}
    )
    actual = quote.compare(quoted, "CPU", 0, seconds, SETTINGS)
    assert (actual.of_quoted, actual.in_range, actual.gpu_hours) == (of_quoted, in_range, 0)
    assert actual.cost == pytest.approx(0.36 * seconds / 3600, abs=1e-4)
    assert quote.say(quoted, actual).endswith(f"quoted were 100 s (80 to 120): {words}")
    alone = quote.compare(None, "NVIDIA H200", 2, 1800, SETTINGS)
    assert (alone.of_quoted, alone.in_range, alone.gpu_hours, alone.cost) == (None, None, 1.0, 3.6)
    assert quote.say(None, alone) == "The run took 1800 s (1.00 GPU hours, 3.60 USD)"
    short = quote.compare(None, "CPU", 0, 0.4, SETTINGS)
    assert (short.cost, quote.say(None, short)) == (4e-05, "The run took 0 s (0.00004 USD)")
    free = short.model_copy(update={"cost": None})
    assert quote.say(None, free) == "The run took 0 s", "a CPU has no GPU hours"
