"""Defaults, estimates and advice: numbers that users will see, as literals."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_models import LLAMA_8B, MIXTURE
from pydantic import ValidationError

from tunery.errors import InvalidValue
from tunery.failures import DoesNotFit
from tunery.planning import advice, changes, expected, memory, peak, shape
from tunery.planning.peak import Setting
from tunery.spec import Full, Hyperparameters, Lora, Plan, Qlora, Technique, TrainingSpec

LLAMA_2_7B = LLAMA_8B | {
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "params": 6_738_415_616,
}
TWENTY_B = LLAMA_8B | {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 48,
    "params": 21_470_000_000,
}


def spec(**fields: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({"seed": 7} | fields)


def plan(examples: int = 1000, model_info: dict[str, Any] = LLAMA_8B, bf16_fits: bool = True, **fields: Any) -> Plan:
    return advice.resolve(spec(**fields), examples=examples, model_info=model_info, bf16_fits=bf16_fits)


@pytest.mark.parametrize(("longest", "limit"), [(1, 17), (64, 80), (100, 125), (820, 1024), (5000, 1024)])
def test_answers_may_be_a_quarter_longer_than_those_wanted(longest: int, limit: int) -> None:
    made = advice.resolve(spec(), examples=9, model_info=LLAMA_8B, bf16_fits=True, longest_answer=longest)
    by_hand = spec(evaluation={"max_new_tokens": 7})

    assert made.evaluation.max_new_tokens == limit
    assert plan().evaluation.max_new_tokens == "auto"  # no rows to answer
    given = advice.resolve(by_hand, examples=9, model_info=LLAMA_8B, bf16_fits=True, longest_answer=longest)
    assert given.evaluation.max_new_tokens == 7


def test_learning_rates_follow_the_width() -> None:
    assert advice.default_learning_rate(576, Lora()) == pytest.approx(1.3e-3, rel=0.03)
    assert advice.default_learning_rate(4096, Lora()) == pytest.approx(2.9e-4, rel=0.03)
    assert advice.default_learning_rate(4096, Qlora(r=64)) == advice.default_learning_rate(4096, Lora(r=8))
    assert advice.default_learning_rate(4096, Full()) == pytest.approx(2.9e-5, rel=0.03)


def test_rates_follow_the_scale_of_the_update() -> None:
    plain = advice.default_learning_rate(576, Lora())

    assert plain == pytest.approx(1.32e-3, rel=0.01)
    assert advice.default_learning_rate(576, Lora(use_rslora=True, r=256)) == pytest.approx(3.3e-4, rel=0.01)
    assert advice.default_learning_rate(576, Qlora(lora_plus_ratio=16)) == pytest.approx(3.3e-4, rel=0.01)
    assert advice.default_learning_rate(576, Lora(use_dora=True)) == plain


@pytest.mark.parametrize(
    ("examples", "epochs"),
    [(10, 10), (4, 25), (1, 25), (33, 3), (34, 3), (1000, 3), (8333, 3), (8334, 2), (20_000, 1), (100_000, 1)],
)
def test_epochs_follow_the_file(examples: int, epochs: int) -> None:
    assert advice.default_epochs(examples) == epochs


@settings(deadline=None)
@given(st.integers(1, 10**7))
def test_epochs_are_always_possible(examples: int) -> None:
    assert 1 <= advice.default_epochs(examples) <= 25


def test_preference_tuning_takes_a_thirtieth_of_the_rate_and_a_beta() -> None:
    assert plan(method={"type": "dpo"}).learning_rate == pytest.approx(1e-5, rel=0.05)
    assert plan(method={"type": "dpo"}, technique=Full()).learning_rate == pytest.approx(1e-6, rel=0.05)
    asked: list[dict[str, Any]] = [{}, {"loss": "ipo"}, {"loss": "dpo_norm"}, {"loss": "dpo_norm", "beta": 2}]
    made = [plan(method={"type": "dpo", **knobs}) for knobs in asked]
    assert [each.method.model_dump()["beta"] for each in made] == [0.1, 0.1, 5.0, 2.0]
    assert advice.warnings(made[0], examples=1000, model_info=LLAMA_8B) == []


def test_pairs_need_the_memory_of_both_rows() -> None:
    one, two = (memory.estimate(LLAMA_8B, Qlora(), max_seq_length=2048, rows=rows) for rows in (1, 2))
    assert two == memory.estimate(LLAMA_8B, Qlora(), max_seq_length=4096)
    assert two.bytes > 1.05 * one.bytes
    with pytest.raises(DoesNotFit, match=r"pairs of rows of 2048 tokens, .*Lower max_seq_length to 512\."):
        changes.check(LLAMA_8B, Qlora(), max_seq_length=2048, rows=2, capacity=one.bytes)
    changes.check(LLAMA_8B, Qlora(), max_seq_length=2048, capacity=one.bytes)


def test_every_auto_gets_a_number() -> None:
    made = plan()

    assert (made.technique, made.n_epochs, made.batch_size) == (Lora(), 3, 8)
    assert made.learning_rate == advice.default_learning_rate(4096, Lora())
    assert (made.learning_rate_multiplier, made.seed, made.max_seq_length) == (1.0, 7, 2048)


def test_what_was_asked_for_stays() -> None:
    knobs = Hyperparameters(n_epochs=5, batch_size=2, learning_rate_multiplier=0.5)
    made = plan(technique=Full(), hyperparameters=knobs, select="best", packing=True, weight_decay=0.1)

    assert (made.technique, made.n_epochs, made.batch_size) == (Full(), 5, 2)
    assert made.learning_rate == pytest.approx(advice.default_learning_rate(4096, Full()) / 2)
    assert (made.select, made.packing, made.weight_decay) == ("best", True, 0.1)


def test_a_multiplier_is_echoed_as_it_was_asked_for() -> None:
    """1.8 times a rate, divided by that rate, is 1.7999999999999998."""
    for asked in (1.8, 0.1, 3.3):
        assert plan(hyperparameters=Hyperparameters(learning_rate_multiplier=asked)).learning_rate_multiplier == asked


def test_a_learning_rate_of_ones_own_is_echoed_as_a_multiplier() -> None:
    made = plan(learning_rate=1e-4)

    assert made.learning_rate == 1e-4
    assert made.learning_rate_multiplier == pytest.approx(1e-4 / advice.default_learning_rate(4096, Lora()))


def test_four_bits_only_where_sixteen_do_not_fit_and_never_full() -> None:
    assert plan(bf16_fits=True).technique == Lora()
    assert plan(bf16_fits=False).technique == Qlora()
    assert plan(bf16_fits=False, technique=Full()).technique == Full()


def test_rows_are_no_longer_than_the_models_context() -> None:
    made = plan(max_seq_length=32_768)

    assert made.max_seq_length == 8192
    warnings = advice.warnings(made, examples=1000, model_info=LLAMA_8B, asked_length=32_768)
    assert warnings == ["max_seq_length 32768 exceeds the model's context of 8192 tokens, which is used instead."]


@pytest.mark.parametrize(
    ("fields", "examples", "start"),
    [
        ({"learning_rate": 2e-3}, 1000, "The learning rate 2.0e-03 is high"),
        ({"learning_rate": 2e-5}, 1000, "The learning rate 2.0e-05 is low"),
        ({}, 20, "20 examples are few"),
        (
            {"hyperparameters": {"batch_size": 64}},
            1000,
            "LoRA learns worse from large batches: use at most 32 rather than 64",
        ),
        ({"hyperparameters": {"n_epochs": 40}}, 1000, "40 epochs are many for 1000 examples"),
        ({"technique": Lora(dropout=0.5)}, 1000, "A dropout of 0.5 is high"),
        ({"technique": Lora(target_modules=["q_proj", "v_proj"])}, 1000, "target_modules leaves out the feed-forward"),
    ],
)
def test_doubtful_choices_are_commented(fields: dict[str, Any], examples: int, start: str) -> None:
    warnings = advice.warnings(plan(examples, **fields), examples=examples, model_info=LLAMA_8B)

    assert len(warnings) == 1
    assert warnings[0].startswith(start)


def test_a_full_fine_tune_has_a_rate_of_its_own() -> None:
    warnings = advice.warnings(plan(learning_rate=2e-4, technique=Full()), examples=1000, model_info=LLAMA_8B)
    assert warnings[0].startswith("The learning rate 2.0e-04 is high")


@pytest.mark.parametrize(
    "technique",
    [
        None,
        Lora(),
        Qlora(),
        Lora(r=64, dropout=0.1),
        Lora(target_modules=["down_proj", "layers.0.mlp.up_proj"]),
    ],
)
def test_usual_choices_pass_without_comment(technique: Technique | None) -> None:
    assert advice.warnings(plan(technique=technique), examples=1000, model_info=LLAMA_8B) == []


def test_counts_are_those_that_peft_prints() -> None:
    """4,194,304 is what PEFT prints for Llama-2 7B with r 8 on q and v; 41,943,040 for Llama-3 8B with r 16 on all."""
    assert shape.trainable_params(LLAMA_2_7B, Lora(r=8, target_modules=["q_proj", "v_proj"])) == 4_194_304
    assert shape.trainable_params(LLAMA_8B, Lora()) == 41_943_040
    assert shape.trainable_params(LLAMA_8B, Lora(use_dora=True)) == 41_943_040 + 32 * (2 * 4096 + 2 * 1024 + 32_768)
    head = Lora(modules_to_save=["lm_head"])
    assert shape.trainable_params(LLAMA_8B, head) == 41_943_040 + 128_256 * 4096
    assert shape.trainable_params(LLAMA_8B, Lora(trainable_token_indices=[7, 8])) == 41_943_040 + 2 * 2 * 4096
    assert shape.trainable_params(LLAMA_8B, Full()) == 8_030_261_248


@pytest.mark.parametrize("tied", [False, True])
def test_modules_that_learn_whole_are_counted_by_their_own_sizes(tied: bool) -> None:
    model_info, head = {**LLAMA_8B, "tie_word_embeddings": tied}, 128_256 * 4096

    def whole(names: list[str], tokens: list[int] | None = None) -> int:
        technique = Lora(modules_to_save=names, trainable_token_indices=tokens)
        return shape.trainable_params(model_info, technique) - shape.trainable_params(model_info, Lora())

    assert whole(["norm"]) == (2 * 32 + 1) * 4096
    assert whole(["layers.0.self_attn.q_proj", "down_proj"]) == 32 * (4096 * 4096 + 14_336 * 4096)
    assert whole(["lm_head", "embed_tokens"]) == (1 if tied else 2) * head
    assert whole(["lm_head", "model.norm"], [7, 8]) == head + (2 * 32 + 1) * 4096 + (0 if tied else 2 * 4096)


def test_base_weights_are_counted_as_they_are_kept() -> None:
    def base(technique: Technique, device: str = "cuda") -> float:
        return peak.at_rest(Setting.of(LLAMA_8B, technique, device, "adamw", 1))["base"] / 1e9

    assert base(Lora()) == pytest.approx(16.06, abs=0.01)
    assert base(Lora(), "cpu") == pytest.approx(32.12, abs=0.01)
    # 3.60 GB of linear layers in NF4, embedding and head of 1.05 GB each in bf16.
    assert base(Qlora()) == pytest.approx(5.70, abs=0.01)
    assert base(Qlora(double_quant=False)) == pytest.approx(6.03, abs=0.01)


def test_whole_estimates_of_an_8b_model() -> None:
    def whole(technique: Technique) -> float:
        return memory.estimate(LLAMA_8B, technique, max_seq_length=2048).bytes / 1e9

    # Without the embedding, 1.05 GB, which is in the host's memory.
    assert whole(Qlora()) == pytest.approx(6.49, abs=0.05)
    # The loaded model, which has it on the GPU, needs as much as a step.
    assert whole(Lora()) == pytest.approx(16.73, abs=0.05)
    assert whole(Full()) == pytest.approx(49.13, abs=0.05)
    # 2,048 x 81,920 x 4 bytes = 0.67 GB of it are the inputs and outputs of one layer in fp32.
    assert whole(Lora(use_dora=True)) - whole(Lora(dropout=0.1)) == pytest.approx(2.45, abs=0.05)


def test_moments_are_counted_as_the_optimizer_keeps_them() -> None:
    def moments(technique: Technique, optimizer: str, device: str = "cuda") -> int:
        options = {"device": device, "optimizer": optimizer}
        return memory.estimate(LLAMA_8B, technique, max_seq_length=8192, **options).parts["optimizer"]

    assert moments(Lora(), "adamw") == 8 * 41_943_040
    scales = 4 / 256  # bytes per moment
    assert moments(Lora(), "adamw_8bit") == moments(Lora(), "paged_adamw_8bit") == 2 * (1 + scales) * 41_943_040
    assert moments(Full(), "adamw") == moments(Full(), "adamw_8bit") == 2 * (1 + scales) * 8_030_261_248
    wide = Full(weights_dtype="float32")
    assert moments(wide, "adamw_8bit") == 2 * (1 + scales) * 8_030_261_248 + 6 * 2 * 128_256 * 4096
    with pytest.raises(DoesNotFit):
        changes.check(LLAMA_8B, wide, max_seq_length=512, capacity=120 * 10**9)
    changes.check(LLAMA_8B, wide, max_seq_length=512, capacity=120 * 10**9, optimizer="adamw_8bit")


def test_loaded_model_has_to_fit() -> None:
    """Before the embedding can move to the host, it has been loaded."""
    found = memory.estimate(LLAMA_8B, Lora(r=8), max_seq_length=512)
    assert found.parts.keys() == {"base", "adapter", "fixed"}
    assert found.bytes == 16_060_522_496 + 4 * 20_971_520 + memory.PROCESS_BYTES["cuda"]
    assert not expected.runs(LLAMA_8B, Lora(r=8), max_seq_length=512, capacity=found.bytes - 1)


def test_casts_of_adapters_are_counted() -> None:
    """Two bytes a weight; none where layers or PEFT cast them, or nothing does."""

    def casts(technique: Technique, model_info: dict[str, Any] = LLAMA_8B, **how: Any) -> int:
        return memory.estimate(model_info, technique, max_seq_length=8192, **how).parts.get("casts", 0)

    assert casts(Lora()) == casts(Qlora()) == casts(Lora(modules_to_save=["lm_head"])) == 2 * 41_943_040
    assert casts(Qlora(), device="cpu") == 2 * 41_943_040
    for uncast in (Lora(dropout=0.1), Lora(use_dora=True), Qlora(compute_dtype="float32"), Full()):
        assert casts(uncast) == 0
    assert casts(Lora(), device="cpu") == casts(Lora(), ranks=2) == 0
    of_attention = 16 * ((2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048))
    assert casts(Lora(), MIXTURE) == 2 * 16 * of_attention
    assert casts(Lora(target_modules=["q_proj", "v_proj"]), MIXTURE) == 2 * 16 * 16 * (2048 + 4096 + 2048 + 512)
    counted = LLAMA_8B | {"counts": {"rank_1": 7_000}}
    assert casts(Lora(r=8), counted) == 2 * 8 * 7_000


@settings(deadline=None)
@given(
    st.sampled_from([Full(), Lora(), Qlora(), Lora(r=256)]),
    st.integers(1024, 100_000),
    st.integers(1, 100_000),
    st.sampled_from(["cuda", "cpu"]),
)
def test_longer_rows_never_need_less(technique: Technique, length: int, more: int, device: str) -> None:
    short = memory.estimate(LLAMA_8B, technique, max_seq_length=length, device=device)
    long = memory.estimate(LLAMA_8B, technique, max_seq_length=length + more, device=device)

    assert 0 < short.bytes <= long.bytes
    assert min(short.parts.values()) >= 0
    assert memory.fits(LLAMA_8B, technique, max_seq_length=length, capacity=short.bytes, device=device)
    assert not memory.fits(LLAMA_8B, technique, max_seq_length=length, capacity=short.bytes - 1, device=device)


def refusal(model_info: dict[str, Any], technique: Technique, gib: int, length: int = 2048) -> str:
    with pytest.raises(DoesNotFit) as caught:
        changes.check(model_info, technique, max_seq_length=length, capacity=gib * 2**30, model="llama-20b")
    assert caught.value.code == "does_not_fit"
    return caught.value.message


def test_a_40_gb_model_on_a_24_gb_card() -> None:
    message = refusal(TWENTY_B, Lora(), 24)

    assert message.startswith("A lora fine-tune of llama-20b (40.0 GiB of weights), rows of 2048 tokens, needs about ")
    assert "the largest GPU here has 24.0 GiB. Use the technique 'qlora', which needs about " in message
    assert changes.check(TWENTY_B, Qlora(), max_seq_length=2048, capacity=24 * 2**30).bytes < 24 * 2**30
    assert not expected.bf16_runs(TWENTY_B, max_seq_length=2048, capacity=24 * 2**30)


def test_every_refusal_says_what_to_change() -> None:
    assert "Use the technique 'lora'" in refusal(LLAMA_8B, Full(), 40)
    assert "Lower max_seq_length to" in refusal(LLAMA_8B, Qlora(), 12, length=65_536)
    assert "Use a smaller base model, or a worker with a larger GPU." in refusal(TWENTY_B, Qlora(), 8)


def test_model_info_of_unusual_families_is_enough() -> None:
    model_info = {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 50257, "intermediate_size": None}

    assert memory.estimate(model_info, Lora(target_modules=["c_attn"]), max_seq_length=1024).bytes > 0
    assert shape.trainable_params(model_info, Lora(r=8, target_modules=["c_attn"])) == 12 * 8 * (768 + 768)


NO_LORA = LLAMA_8B | {"techniques": {"lora": "no adapters on X.", "qlora": None, "full": None}}
FULL_ALONE = LLAMA_8B | {"techniques": {"lora": "no adapters on X.", "qlora": "no four bits.", "full": None}}


def test_automatic_technique_is_one_that_the_base_can() -> None:
    no_four_bits = LLAMA_8B | {"techniques": {"lora": None, "qlora": "no four bits.", "full": None}}

    assert plan(model_info=NO_LORA, bf16_fits=True).technique == Qlora()
    assert plan(model_info=no_four_bits, bf16_fits=False).technique == Lora()
    assert plan(model_info=no_four_bits, bf16_fits=True).technique == Lora()
    assert plan(model_info=LLAMA_8B | {"techniques": None}, bf16_fits=False).technique == Qlora()


@pytest.mark.parametrize(
    ("technique", "model_info", "message"),
    [
        (Lora(), NO_LORA, r"with lora \(no adapters on X\). Use technique 'qlora'"),
        (Lora(), FULL_ALONE, r"with lora \(no adapters on X\). Use technique 'full'"),
        (None, FULL_ALONE, r"with lora or qlora \(no adapters on X\). Use technique 'full'"),
        (
            Lora(dropout=0.1),
            LLAMA_8B | {"dropout": "not on experts."},
            r"not support dropout on all of its layers \(not on experts\). Set dropout to 0",
        ),
        (
            Lora(trainable_token_indices=[5, 128_256]),
            LLAMA_8B,
            "has no token 128256: its tokens are 0 to 128255",
        ),
        (
            Qlora(use_dora=True),
            LLAMA_8B | {"dora": "not on experts."},
            r"not support use_dora on all of its layers \(not on experts\). Set use_dora to false",
        ),
    ],
)
def test_technique_that_the_base_cannot_is_refused_with_the_reason(
    technique: Technique | None, model_info: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidValue, match=message):
        advice.check_technique(technique, model_info)


@pytest.mark.parametrize("technique", [None, Full(), Qlora(), Lora(dropout=0.1, target_modules=["q_proj"])])
def test_technique_that_the_base_can_passes(technique: Technique | None) -> None:
    advice.check_technique(technique, NO_LORA | {"techniques": {}, "dropout": "not on experts."})
    advice.check_technique(None if technique == Lora() else Qlora(), NO_LORA)
    advice.check_technique(technique, LLAMA_8B)


def test_token_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="lists a token twice"):
        Lora(trainable_token_indices=[3, 4, 3])


THIRTEEN_B = LLAMA_2_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "params": 13_015_864_320,
}


def test_pieces_have_a_share_of_weights_gradients_and_moments() -> None:
    whole, half = (memory.estimate(THIRTEEN_B, Full(), max_seq_length=512, ranks=ranks).parts for ranks in (1, 2))

    vocabulary = 2 * 2 * 32_000 * 5120
    for part in ("base", "optimizer"):
        assert half[part] * 2 == whole[part]
    assert half["gradients"] == whole["gradients"] / 2 + vocabulary / 2  # embedding and head are not sharded
    assert half["activations"] == whole["activations"]
    assert half["gathered"] == vocabulary + (2 * 13_015_864_320 - vocabulary) // 40


def test_adapters_stay_whole_on_a_base_in_pieces() -> None:
    whole, half = (memory.estimate(THIRTEEN_B, Lora(), max_seq_length=512, ranks=ranks).parts for ranks in (1, 2))

    embedding = 2 * THIRTEEN_B["vocab_size"] * THIRTEEN_B["hidden_size"]  # one card's may be in the host's memory
    assert half["base"] * 2 == whole["base"] + embedding
    assert all(half[part] == whole[part] for part in ("adapter", "gradients", "optimizer"))


@pytest.mark.parametrize(
    ("gpus", "asked", "capacity", "chosen"),
    [
        (1, "auto", 80, "replicate"),
        (4, "auto", 80, "full_shard"),
        (4, "auto", 141, "replicate"),
        (4, "full_shard", 141, "full_shard"),
        (4, "replicate", 80, "replicate"),
    ],
)
def test_model_is_cut_where_no_gpu_holds_it(gpus: int, asked: Any, capacity: int, chosen: str) -> None:
    found = expected.choose_sharding(
        THIRTEEN_B, Full(), gpus=gpus, asked=asked, capacity=capacity * 10**9, max_seq_length=512
    )

    assert found == chosen


@pytest.mark.parametrize(("technique", "chosen"), [(Qlora(), "full_shard"), (Qlora(use_dora=True), "replicate")])
def test_model_that_cannot_be_cut_is_not(technique: Technique, chosen: str) -> None:
    found = expected.choose_sharding(
        THIRTEEN_B, technique, gpus=4, asked="auto", capacity=5 * 10**9, max_seq_length=512
    )

    assert found == chosen


def test_what_does_not_fit_in_pieces_either_is_refused() -> None:
    asked: dict[str, Any] = {"max_seq_length": 512, "capacity": 40 * 10**9, "model": "m"}
    changes.check(THIRTEEN_B, Full(), **asked, ranks=4)

    with pytest.raises(DoesNotFit, match=r"of weights on each of 2 GPUs\).*Use the technique 'lora'"):
        changes.check(THIRTEEN_B, Full(), **asked, ranks=2)


def test_more_gpus_are_named_where_the_host_has_them() -> None:
    """The fewest that hold the sharded model, with what each then needs, but never more than the host has."""
    asked: dict[str, Any] = {"max_seq_length": 512, "capacity": 40 * 10**9, "model": "m"}
    each = memory.estimate(THIRTEEN_B, Full(), max_seq_length=512, ranks=4).bytes

    with pytest.raises(DoesNotFit) as caught:
        changes.check(THIRTEEN_B, Full(), **asked, gpus=8)
    cut = f"Set resources.gpus to 4 and resources.sharding to 'auto', which needs about {memory.gib(each)} on each."
    assert f"{cut} Or use the technique 'lora', which needs about " in caught.value.message
    with pytest.raises(DoesNotFit) as caught:
        changes.check(THIRTEEN_B, Full(), **asked, gpus=2)
    assert "resources.gpus" not in caught.value.message


def test_more_gpus_are_named_alone_where_nothing_lighter_fits() -> None:
    each = memory.estimate(THIRTEEN_B, Qlora(), max_seq_length=512, ranks=8).bytes + 2**28

    with pytest.raises(DoesNotFit) as caught:
        changes.check(THIRTEEN_B, Qlora(), max_seq_length=512, capacity=each, gpus=8)
    assert "Set resources.gpus to 8 " in caught.value.message
    assert " on each. Set resources.force to true" in caught.value.message
    with pytest.raises(DoesNotFit) as caught:
        changes.check(THIRTEEN_B, Qlora(use_dora=True), max_seq_length=512, capacity=each, gpus=8)
    assert "resources.gpus" not in caught.value.message, "it cannot be sharded"
