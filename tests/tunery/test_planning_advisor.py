"""Whether to fine-tune and how: a case for every rule and boundary, with numbers that were worked out by hand."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from known_models import LLAMA_8B

from tunery.jobs.request import JobRequest
from tunery.planning import advice, advisor, capacity, suggestions
from tunery.planning.advisor import Advice, advise
from tunery.planning.recommendation import RULES, Aim, Choice, Rows
from tunery.spec import Full, Lora, Plan, Qlora, Replay, Technique, TrainingSpec


def plan(examples: int, **fields: Any) -> Plan:
    return advice.resolve(TrainingSpec(seed=7, **fields), examples=examples, model_info=LLAMA_8B, bf16_fits=True)


def rows(usable: int, total: int | None = None, tokens: int = 500_000, **left_out: int) -> Rows:
    return Rows(total=total or usable, usable=usable, left_out=left_out, answer_tokens=tokens)


@pytest.mark.parametrize(
    ("usable", "aim", "choice", "rule"),
    [
        (0, "general_accuracy", "prompt", "fewer_than_100"),
        (99, "general_accuracy", "prompt", "fewer_than_100"),
        (100, "general_accuracy", "evaluate_both", "from_100_to_1000"),
        (1000, "general_accuracy", "evaluate_both", "from_100_to_1000"),
        (1001, "general_accuracy", "fine_tune", "more_than_1000"),
        (99, "domain_language", "prompt", "fewer_than_100"),
        (1000, "domain_language", "evaluate_both", "from_100_to_1000"),
        (1001, "domain_language", "fine_tune", "more_than_1000"),
        (99, "output_format", "prompt", "fewer_than_100"),
        (100, "output_format", "fine_tune", "behaviour_is_learned"),
        (99, "style", "prompt", "fewer_than_100"),
        (100, "style", "fine_tune", "behaviour_is_learned"),
        (100, "latency", "fine_tune", "behaviour_is_learned"),
        (5, "new_facts", "retrieval", "facts_by_retrieval"),
        (100_000, "new_facts", "retrieval", "facts_by_retrieval"),
    ],
)
def test_the_rule_that_decides(usable: int, aim: Aim, choice: Choice, rule: str) -> None:
    made = advise(rows(usable), aim)
    assert (made.recommendation, made.reasons[0].rule) == (choice, rule)
    assert aim == "new_facts" or f"{usable:,}" in made.reasons[0].text


def test_every_rule_of_the_table_is_tried_above() -> None:
    tried = {values[3] for values in test_the_rule_that_decides.pytestmark[0].args[1]}  # type: ignore[attr-defined]
    assert tried == {rule.name for rule in RULES}


def test_every_rule_is_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "when-to-fine-tune.md").read_text()
    given = {rule.name: rule.choice for rule in RULES}
    assert dict(re.findall(r"^\| `(\w+)` \| [^|]* \| `(\w+)`", page, flags=re.MULTILINE)) == given
    aims, techniques = get_args(Aim), (None, Full(), Qlora())
    used = {
        rule for aim in aims for kind in techniques for rule in rules(advise(rows(500), aim, technique=kind)).values()
    }
    assert used - {"technique_as_asked", "rank_as_asked"} <= set(re.findall(r"`(\w+)`", page))


def test_rows_count_and_not_lines() -> None:
    """1,200 lines, of which 1,101 are not usable, count as 99 rows."""
    made = advise(rows(99, 1200, exact_duplicate=1000, near_duplicate=50, refusal=30, pii=11, mislabelled=10), "style")
    assert made.recommendation == "prompt"
    said = {reason.rule: reason.text for reason in made.reasons}["rows_that_do_not_count"]
    assert said.startswith(
        "1,101 of 1,200 rows are not usable: 1,000 exact_duplicate, 50 near_duplicate, 30 refusal, 11 "
    )
    assert said.endswith("10 others. Clean the file before you train on it.")


@pytest.mark.parametrize(
    ("usable", "aim", "rules"),
    [
        (50, "style", ["fewer_than_100"]),
        (500, "style", ["behaviour_is_learned", "prompt_first"]),
        (500, "latency", ["behaviour_is_learned", "prompt_first", "merge_for_latency"]),
        (99, "new_facts", ["facts_by_retrieval"]),
        (100, "new_facts", ["facts_by_retrieval", "form_beside_retrieval"]),
    ],
)
def test_what_is_said_besides(usable: int, aim: Aim, rules: list[str]) -> None:
    assert [reason.rule for reason in advise(rows(usable), aim).reasons] == rules


def test_facts_are_sent_to_retrieval_in_plain_words() -> None:
    said = advise(rows(5000), "new_facts").reasons[0].text
    assert said.startswith("Do not fine-tune to teach facts: it is unreliable.")
    assert said.endswith("(retrieval, RAG).")


def test_a_file_that_no_job_takes() -> None:
    refused = rows(500).model_copy(update={"refused": "Line 3 has no messages."})
    said = {reason.rule: reason.text for reason in advise(refused, "style").reasons}
    assert said["refused_as_it_is"] == "The file cannot be used for a job as it is: Line 3 has no messages."


def values(made: Advice) -> dict[str, Any]:
    return {one.field: one.value for one in made.suggestions}


def rules(made: Advice) -> dict[str, str]:
    return {one.field: one.rule for one in made.suggestions}


@pytest.mark.parametrize(
    ("usable", "aim", "rank", "rule"),
    [
        (50_000, "output_format", 4, "rank_of_form"),
        (50_000, "style", 4, "rank_of_form"),
        (1000, "domain_language", 16, "rank_of_domain"),
        (1001, "domain_language", 32, "rank_of_domain"),
        (10_000, "domain_language", 32, "rank_of_domain"),
        (10_001, "domain_language", 64, "rank_of_domain"),
        (50_000, "latency", 16, "rank_by_default"),
        (50_000, "general_accuracy", 16, "rank_by_default"),
        (50_000, "new_facts", 16, "rank_by_default"),
    ],
)
def test_rank(usable: int, aim: Aim, rank: int, rule: str) -> None:
    made = advise(rows(usable), aim, model_info=LLAMA_8B)
    assert (values(made)["technique.r"], rules(made)["technique.r"]) == (rank, rule)


@pytest.mark.parametrize(
    ("aim", "tokens", "rank"),
    [
        # Each unit of rank is 2,621,440 parameters for Llama 3 8B.
        ("latency", 41_944, 16),
        ("latency", 41_943, 8),
        ("latency", 1, 4),
        ("style", 1, 4),
        ("latency", 41_943_040, 16),
        ("latency", 41_943_041, 32),
        ("style", 10**9, 64),
    ],
)
def test_rank_follows_the_tokens(aim: Aim, tokens: int, rank: int) -> None:
    made = advise(rows(5000, tokens=tokens), aim, model_info=LLAMA_8B)
    assert values(made)["technique.r"] == rank
    by_aim = 4 if aim == "style" else 16
    assert (rules(made)["technique.r"] == "rank_by_capacity") == (rank != by_aim)


@pytest.mark.parametrize(
    ("fits", "model_info", "kind", "rule"),
    [
        (True, {}, "lora", "lora_first"),
        (None, {}, "lora", "lora_first"),
        (False, {}, "qlora", "qlora_where_it_must_be"),
        (True, {"techniques": {"lora": "no"}}, "qlora", "qlora_where_it_must_be"),
    ],
)
def test_technique(fits: bool | None, model_info: dict[str, Any], kind: str, rule: str) -> None:
    made = advise(rows(5000), "latency", model_info=LLAMA_8B | model_info, bf16_fits=fits)
    assert (values(made)["technique.type"], rules(made)["technique.type"]) == (kind, rule)


def test_lora_is_recommended_with_what_it_spares() -> None:
    [reason] = [one.text for one in advise(rows(5000), "latency").suggestions if one.field == "technique.type"]
    for said in ("forgets less than a full fine-tune", "adds no cost at run time", "one for each tenant"):
        assert said in reason


def test_the_readme_asks_first_whether_to_fine_tune() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert re.findall(r"\]\(([^)]+)\)", readme)[0] == "docs/when-to-fine-tune.md"


@pytest.mark.parametrize("usable", [99, 1001, 20_000])
@pytest.mark.parametrize("technique", [None, Lora(r=64), Full(), Qlora()])
def test_numbers_are_those_that_a_job_would_get(usable: int, technique: Technique | None) -> None:
    made = advise(rows(usable), "domain_language", model_info=LLAMA_8B, technique=technique, has_held_out=True)
    chosen = technique or Lora()
    assert values(made)["n_epochs"] == advice.default_epochs(usable)
    assert values(made)["batch_size"] == advice.BATCH_SIZE
    assert values(made)["learning_rate"] == pytest.approx(advice.default_learning_rate(4096, chosen), rel=1e-2)


def test_rows_that_are_held_out_are_not_trained_on() -> None:
    """Of 34 rows 11 are held out: 23 are trained for 100 // 23 = 4 epochs, all 34 for three."""
    assert values(advise(rows(34), "style"))["n_epochs"] == 4
    assert values(advise(rows(34), "style", has_held_out=True))["n_epochs"] == 3
    assert "held_out.share" not in values(advise(rows(34), "style", has_held_out=True))


@pytest.mark.parametrize(
    ("usable", "held_out"), [(0, 0), (3, 1), (149, 49), (150, 50), (500, 50), (510, 51), (10_000, 1000), (99_999, 1000)]
)
def test_held_out_rows(usable: int, held_out: int) -> None:
    assert suggestions.held_out_rows(usable) == held_out
    share = values(advise(rows(usable), "style"))["held_out.share"]
    assert share == (round(held_out / usable, 3) if usable else None)


@pytest.mark.parametrize(
    ("aim", "technique", "share", "rule"),
    [
        ("style", None, None, "replay_left_out"),
        ("latency", None, None, "replay_left_out"),
        ("domain_language", None, 0.1, "replay_for_aim"),
        ("general_accuracy", None, 0.1, "replay_for_aim"),
        ("style", Full(), 0.1, "replay_for_full"),
    ],
)
def test_replay(aim: Aim, technique: Technique | None, share: float | None, rule: str) -> None:
    made = advise(rows(5000), aim, technique=technique)
    assert (values(made)["replay.share"], rules(made)["replay.share"]) == (share, rule)


def test_alpha_is_ours_and_the_textbook_s_beside_it() -> None:
    made = advise(rows(5000), "style")
    (said,) = (one for one in made.suggestions if one.field == "technique.alpha")
    assert (said.value, said.rule) == (32, "alpha_stays")
    assert said.text.startswith("The usual 2 to 4 times the rank would be 8 to 16. The default is 32 at every rank")


def test_without_a_base_the_rate_and_the_capacity_are_left_open() -> None:
    made = advise(rows(5000, tokens=1), "style")
    assert values(made)["learning_rate"] is None
    assert made.warnings == []


@pytest.mark.parametrize("technique", [None, Lora(r=8), Qlora(), Full()])
@pytest.mark.parametrize("aim", ["style", "domain_language"])
def test_settings_are_a_request_s(aim: Aim, technique: Technique | None) -> None:
    made = advise(rows(5000), aim, model_info=LLAMA_8B, technique=technique)
    request = JobRequest.model_validate({"model": "m", "training_file": "f", **made.settings})
    expected = technique or Lora(r=4 if aim == "style" else 32)
    assert request.technique == expected
    assert request.replay == (None if aim == "style" and technique != Full() else Replay())


def test_rows_are_read_from_a_report() -> None:
    said = {"rows": 12, "reason": None, "usable": {"rows": 9, "left_out": {"refusal": 3}, "answer_bytes": 83}}
    assert advisor.rows_of(said) == rows(9, 12, tokens=21, refusal=3)


# --- warnings -------------------------------------------------------------------------------------------------------

# Rank 16 on all linear layers of Llama 3 8B is 41,943,040 parameters, as PEFT prints.
HELD = 41_943_040


@pytest.mark.parametrize(
    ("technique", "tokens", "said"),
    [
        (Lora(), HELD, None),
        (Lora(), HELD + 1, "41,943,040 parameters at rank 16, and the answers have about 41,943,041 tokens. Use r"),
        (Lora(), HELD + 1, "Use r 32, which gives one parameter per token."),
        (Lora(), 4 * HELD, "Use r 64, which gives one parameter per token."),
        (Lora(), 33 * HELD, "No rank is large enough: use technique 'full' with replay, or fewer rows."),
        (Lora(), HELD // 1000, "The adapter can memorise the rows"),
        (Lora(), HELD // 1000 + 1, None),
        (Lora(r=1), 2, "Add rows, or watch the validation loss."),
        (Lora(), 0, None),
        (Full(), 2, None),
    ],
)  # fmt: skip
def test_capacity_is_warned_of_both_ways(technique: Technique, tokens: int, said: str | None) -> None:
    found = capacity.warnings(LLAMA_8B, technique, tokens)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_capacity_is_part_of_the_advice() -> None:
    (said,) = advise(rows(5000, tokens=1000), "style", model_info=LLAMA_8B).warnings
    assert "memorise" in said


@pytest.mark.parametrize(
    ("examples", "technique", "start"),
    [
        (999, Lora(r=17), "Rank 17 is large for 999 examples"),
        (1000, Lora(r=64), None),
        (999, Lora(r=16), None),
        (5000, Lora(r=16, alpha=31), "alpha 31 is outside 2 to 4 times the rank (32 to 64)"),
        (5000, Lora(r=8, alpha=16), None),
        (5000, Lora(r=16, alpha=64), None),
        (5000, Qlora(r=16, alpha=65), "alpha 65 is outside"),
        (5000, Lora(r=64, alpha=32), None),  # our default, whatever the rank
        (5000, Lora(r=64, alpha=16, use_rslora=True), None),  # rsLoRA scales differently
    ],
)
def test_rank_and_alpha(examples: int, technique: Technique, start: str | None) -> None:
    found = advice.warnings(plan(examples, technique=technique), examples=examples, model_info=LLAMA_8B)
    assert len(found) == (start is not None)
    assert start is None or found[0].startswith(start)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "Use technique 'lora', or add replay ('replay': {})."),
        ({"replay": {}}, "Replay reduces this; technique 'lora' forgets even less."),
        (
            {"method": {"type": "dpo"}},
            "Use technique 'lora': replay, which reduces this, is available only for supervised",
        ),
    ],
)
def test_every_full_fine_tune_is_warned_of_forgetting(fields: dict[str, Any], said: str) -> None:
    (found,) = advice.warnings(plan(5000, technique=Full(), **fields), examples=5000, model_info=LLAMA_8B)
    assert found.startswith("A full fine-tune changes every weight, so the model forgets more")
    assert said in found
