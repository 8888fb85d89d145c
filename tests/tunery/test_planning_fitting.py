"""Which cards hold a run, and what the trainer would plan on a device of a given size."""

from dataclasses import replace
from typing import Any

import pytest
from known_models import LLAMA_8B, MIXTURE

from tunery.planning import expected, fitting, memory, peak
from tunery.planning.cards import CARDS
from tunery.planning.expected import Load, Needs, Split, fixed_bytes, split, whole_step
from tunery.planning.peak import Setting
from tunery.spec import Full, Lora, Qlora, Technique

GIB = memory.GIB


def run(
    technique: Technique, gib: float, model_info: dict[str, Any] = LLAMA_8B, **asked: Any
) -> expected.Expected | None:
    return expected.run(model_info, technique, **{"max_seq_length": 2048, **asked}, capacity=int(gib * GIB))


@pytest.mark.parametrize(
    ("technique", "gib", "tokens", "recompute", "offload"),
    [
        (Qlora(), 139.8, 16_384, 0, False),  # all eight rows
        (Qlora(), 44.4, 8_192, 0, False),  # four of them
        (Qlora(), 15.0, 2_048, 0, False),
        (Qlora(), 14.0, 2_048, 0, False),  # with the embedding in the host's memory, as for all that follow
        (Qlora(), 12.0, 2_048, 7, False),  # seven of 32 layers
        (Qlora(), 9.0, 10_240, 30, True),  # each pass unpacks the weights: two large ones are faster
        (Qlora(), 7.5, 8_192, 31, True),
        (Lora(), 139.8, 16_384, 0, False),
        (Lora(), 18.2, 2_048, 23, False),  # recordings take room, too
        (Full(), 79.2, 6_144, 0, False),
        (Full(), 55.0, 2_048, 13, False),
        (Full(), 50.0, 16_384, 28, False),  # all rows at once: gradients are made while activations are freed
    ],
)
def test_plan_follows_the_memory_that_there_is(
    technique: Technique, gib: float, tokens: int, recompute: int, offload: bool
) -> None:
    found = run(technique, gib)
    assert found is not None
    assert (found.step.tokens, found.step.recompute, found.step.offload) == (tokens, recompute, offload)
    assert found.estimate.bytes <= gib * GIB
    assert found.allocated == found.estimate.bytes - expected.PROCESS_BYTES["cuda"]


@pytest.mark.parametrize(
    ("technique", "gib", "changes", "moves"),
    [
        (Qlora(), 44.4, {}, False),  # several micro-batches, but nothing is recomputed
        (Qlora(), 12.0, {}, True),
        (Qlora(), 12.0, {"tie_word_embeddings": True}, False),
        (Qlora(modules_to_save=["embed_tokens"]), 18.0, {}, False),
        (Full(), 55.0, {}, False),
    ],
)
def test_embedding_is_moved_where_activations_would_be_recomputed(
    technique: Technique, gib: float, changes: dict[str, Any], moves: bool
) -> None:
    found = run(technique, gib, LLAMA_8B | changes)
    assert found is not None
    assert found.step.host_embedding == moves
    whole = peak.at_rest(Setting.of(LLAMA_8B | changes, technique, "cuda", "adamw", 1))["base"]
    assert whole - found.estimate.parts["base"] == (2 * 128_256 * 4096 if moves else 0)


NEEDS = Needs(layers=10, none=100, all=19, one=20, layer=80 / 9, inputs=5)
"""Per token: 10 of a layer's activations, 0.5 of its input, and some of the head."""


@pytest.mark.parametrize(
    ("room", "wanted"),
    [
        (100 * 8000, Split(8000)),
        (100 * 4000, Split(4000)),
        (100 * 2000, Split(2000)),
        (100 * 900, Split(1094, 2)),  # two examples instead of one
        (100 * 450, Split(547, 2)),
        (19 * 500, Split(575, 9, offload=True)),  # 20 - 5 * 7 / 10
        (15 * 500, Split(500, 10, offload=True)),
        (14 * 500, None),
    ],
)
def test_split_is_the_fastest_that_fits(room: int, wanted: Split | None) -> None:
    assert split(room, NEEDS, Load(500, 8000), unpacks=False) == wanted


def test_what_does_not_depend_on_the_tokens_is_counted_once() -> None:
    assert fixed_bytes(700 + 500 * 19, 700 + 1000 * 19) == 700
    assert split(700 + 100 * 2000, replace(NEEDS, fixed=700), Load(500, 8000), unpacks=False) == Split(2000)
    assert split(600, replace(NEEDS, fixed=700), Load(500, 8000), unpacks=False) is None


def test_four_bit_weights_are_unpacked_for_each_pass_so_that_large_ones_are_faster() -> None:
    dense, packed = (split(100 * 900, NEEDS, Load(500, 8000), unpacks=unpacks) for unpacks in (False, True))
    assert dense is not None
    assert packed is not None
    assert packed.tokens > 2 * dense.tokens
    assert packed.recompute > dense.recompute


def test_speed_is_judged_by_the_mean_sizes() -> None:
    """Where most examples are short, what is a little too small for two of the longest is nearly as good."""
    assert split(100 * 900, NEEDS, Load(500, 8000), unpacks=False, usual=Load(50, 800)) == Split(900)


def test_a_whole_step_at_once_is_worth_copying_inputs_to_the_host() -> None:
    found = run(Qlora(), 8.4, batch=4)
    assert found is not None
    assert (found.step.tokens, found.step.offload) == (4 * 2048, True)
    assert not found.step.accumulates


def test_inputs_in_the_hosts_memory_are_limited() -> None:
    huge = replace(NEEDS, inputs=10 * 2**20, all=20 * 2**20, one=21 * 2**20, layer=2**20, none=30 * 2**20)
    assert huge.inputs * 1000 > expected.MOST_OFFLOADED
    found = split(14 * 2**20 * 1500, huge, Load(1000, 10_000), unpacks=True)
    assert found is not None
    assert found.offload
    assert found.tokens * huge.inputs * found.recompute / huge.layers <= expected.MOST_OFFLOADED


@pytest.mark.parametrize("least", [1, 2, 7, 10])
def test_a_whole_step_recomputes_as_few_layers_as_fit(least: int) -> None:
    tried = list[int]()
    found = whole_step(10, 4000, lambda recompute: (tried.append(recompute), recompute >= least)[1])
    assert found == Split(4000, least)
    assert len(tried) <= 5
    assert whole_step(10, 4000, lambda _: False) is None
    assert whole_step(0, 4000, lambda _: True) is None  # layers that are not known cannot be recomputed


def test_evaluation_limits_the_tokens_too() -> None:
    assert split(100 * 8000, replace(NEEDS, evaluation=200), Load(500, 8000), unpacks=False) == Split(4000)


def test_what_no_plan_is_found_for_is_none() -> None:
    assert run(Lora(), 15.5) is None
    assert run(Lora(), 15.5, max_seq_length=256) is None  # fits without its embedding, which is loaded before it moves
    assert run(Lora(), 15.6, max_seq_length=256) is not None
    assert run(Qlora(), 5.9) is None


def test_small_models_are_recorded_and_their_files_compared() -> None:
    """Both cost memory: recorded graphs keep the gradients, and the comparison loads a second model."""
    model_info = LLAMA_8B | {"params": 1_000_000_000, "num_hidden_layers": 4}
    whole = expected.plan(Setting.of(model_info, Full(), "cuda", "adamw", 1), Load(512, 4096), 80 * GIB)
    large = expected.plan(Setting.of(LLAMA_8B, Lora(), "cuda", "adamw", 1), Load(512, 4096), 80 * GIB)
    assert whole is not None
    assert large is not None
    assert (whole.step.graphs, large.step.graphs) == (True, False)
    assert whole.estimate.parts["gradients"] == 2_000_000_000
    small = model_info | {"params": 100_000_000, "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 128_256}
    checked = expected.plan(Setting.of(small, Lora(), "cuda", "adamw", 1), Load(64, 64), 80 * GIB)
    assert checked is not None
    assert checked.estimate.parts["copy"] > 6 * 100_000_000


@pytest.mark.parametrize(("tokens", "recorded"), [(3_000, True), (3_200, False)])
def test_passes_are_recorded_up_to_their_work(tokens: int, recorded: bool) -> None:
    """Beyond it, of 8 billion weights, the GPU takes longer than the host."""
    found = expected.plan(Setting.of(LLAMA_8B, Lora(), "cuda", "adamw", 1), Load(512, tokens), 80 * GIB)
    assert found is not None
    assert found.step.graphs == recorded
    assert expected.most_recorded(1_000_000_000) == 8_192


@pytest.mark.parametrize(
    ("technique", "unmerged", "recorded"),
    [
        (Lora(), True, True),
        (Lora(), False, False),
        (Lora(target_modules=["q_proj"]), True, False),
        (Full(), True, False),
    ],
    ids=["grouped", "of another form", "experts without adapters", "full"],
)
def test_passes_of_a_mixture_are_recorded_by_the_work_of_a_token(
    technique: Technique, unmerged: bool, recorded: bool
) -> None:
    """Of 10.6 billion weights a token passes 1.5 billion."""
    info = MIXTURE | {"counts": MIXTURE["counts"] | ({} if unmerged else {"unmerged": 0})}
    found = expected.plan(Setting.of(info, technique, "cuda", "adamw", 1), Load(2048, 8192), 400 * GIB)
    assert found is not None
    assert found.step.graphs == recorded


def test_every_known_card_has_a_verdict_and_a_way_out() -> None:
    found = {card.name: card for card in fitting.on_cards(LLAMA_8B, Lora(), max_seq_length=2048)}
    assert found.keys() == {card.name for card in CARDS}
    assert found["T4"].verdict == "too_small"
    assert found["T4"].change is not None
    assert found["T4"].change.startswith("Use the technique 'qlora', which needs about 6.0 GiB.")
    assert found["L4"].verdict == "fits"
    assert found["L4"].change is None
    plan = found["H200"].plan
    assert plan is not None
    assert (plan.tokens, plan.recompute) == (16_384, False)
    sizes = [card.bytes for card in fitting.on_cards(LLAMA_8B, Lora(), max_seq_length=2048)]
    assert sizes == sorted(sizes)


def test_a_card_between_the_least_and_a_plan_is_left_to_the_probe() -> None:
    """The rows are the longest whose minimum memory an L40S has."""
    l40s = next(card for card in CARDS if card.name == "L40S")
    lengths = range(8192, 400_000, 8192)
    least = {length: memory.estimate(LLAMA_8B, Lora(), max_seq_length=length).bytes for length in lengths}
    longest = max(length for length in lengths if least[length] <= l40s.usable * GIB)
    found = {card.name: card for card in fitting.on_cards(LLAMA_8B, Lora(), max_seq_length=longest)}
    assert found["L40S"].verdict == "borderline"
    assert found["L40S"].plan is None
    assert found["L40S"].change is not None


def test_cards_are_told_in_a_few_lines() -> None:
    lines = dict(fitting.in_words(fitting.on_cards(LLAMA_8B, Full(), max_seq_length=2048)))
    assert lines["fits on"] == "H100 PCIe, H100, A100, H200, B200"
    assert lines["too small"].startswith("T4, ")
    assert all(lines.values())
