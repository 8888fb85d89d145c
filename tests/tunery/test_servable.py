"""Which adapters vLLM can serve: the same rules for a requested job and for an adapter's files."""

from typing import Any

import pytest

from tunery.errors import InvalidValue
from tunery.planning.servable import AdapterTraits, Limits, check, why_not
from tunery.settings import Settings
from tunery.spec import Full, Lora, Qlora, Technique

LIMITS = Limits(max_rank=16, four_bits_on_the_base=False)
EXPERTS = {"counts": {"experts": 1000}}


@pytest.mark.parametrize(
    ("technique", "model_info", "field"),
    [
        (Lora(r=17), {}, "r"),
        (Lora(use_dora=True), {}, "use_dora"),
        (Lora(modules_to_save=["lm_head"]), {}, "modules_to_save"),
        (Lora(trainable_token_indices=[5]), {}, "trainable_token_indices"),
        (Lora(), EXPERTS, "target_modules"),
        (None, EXPERTS, "target_modules"),
        (Lora(target_modules=["q_proj", "model.embed_tokens"]), {}, "target_modules"),
        (Qlora(), {}, "type"),
    ],
)
def test_job_whose_adapter_vllm_cannot_serve_is_refused(
    technique: Technique | None, model_info: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidValue, match="serves models with vLLM") as refused:
        check(technique, model_info, LIMITS)
    assert refused.value.param == f"technique.{field}"
    check(technique, model_info, None)  # served by the embedded back end


@pytest.mark.parametrize(
    ("technique", "model_info", "limits"),
    [
        (None, {}, LIMITS),
        (Lora(r=16, use_rslora=True), {"counts": {"experts": 0}}, LIMITS),
        (Lora(target_modules=["q_proj", "o_proj"]), EXPERTS, LIMITS),
        (Full(), EXPERTS, LIMITS),
        (Qlora(), {}, Limits(max_rank=16, four_bits_on_the_base=True)),
        (Lora(r=64), {}, Limits(max_rank=64, four_bits_on_the_base=False)),
    ],
)
def test_other_jobs_are_taken(technique: Technique | None, model_info: dict[str, Any], limits: Limits) -> None:
    check(technique, model_info, limits)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({}, None),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 16}, "alpha_pattern": {"v_proj": 64}}, None),
        ({"target_modules": "model.layers.[01].q_proj"}, None),
        ({"modules_to_save": []}, None),
        ({"r": 17}, "r"),
        ({"rank_pattern": {"q_proj": 17}}, "r"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules"),
    ],
)
def test_files_are_held_against_the_same_rules(config: dict[str, Any], field: str | None) -> None:
    traits = AdapterTraits.of_config({"r": 8, "target_modules": ["q_proj"], **config}, on_four_bits=False)
    found = why_not(traits, LIMITS)
    assert (found and found[0]) == field


def test_limits_are_those_of_the_settings() -> None:
    assert Limits.of(Settings()) is None
    served = Settings(server_backend="vllm", vllm_max_lora_rank=64, server_qlora_base="unquantised")
    assert Limits.of(served) == Limits(max_rank=64, four_bits_on_the_base=True)
