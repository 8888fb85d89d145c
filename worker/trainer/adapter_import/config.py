"""Decides which of PEFT's adapters are accepted, and translates their settings to the service's."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftType
from pydantic import ValidationError

from tunery.spec import Lora, Qlora
from worker.trainer.adapter_import.archive import CONFIG
from worker.trainer.adapter_import.errors import UnusableAdapter

_CHANGES_BASE = (
    "this initialisation changes the base's own weights, so that the adapter fits only the changed base. Save it again "
    "with PEFT's path_initial_model_for_weight_conversion, which converts it to a plain LoRA"
)
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that do not change the base's weights."""
_REFUSED: dict[str, tuple[Any, str]] = {
    "bias": ("none", "the base's biases were trained too, and a model server shares one base among adapters"),
    "lora_bias": (False, "biases of the factors cannot be merged into layers without biases"),
    "layer_replication": (None, "it repeats layers of the base, which makes it a different base"),
    "alora_invocation_tokens": (
        None,
        "an activated LoRA applies only after its invocation tokens",
    ),
    "arrow_config": (None, "a router chooses among several adapters, and this is only one of them"),
    "use_qalora": (False, "its factors belong to the groups of a quantised base"),
    "use_bdlora": (None, "its factors are split into blocks for several GPUs"),
    "kasa_config": (None, "it changes the base's own weights"),
    "velora_config": (None, "it was trained with compressed activations, which are not supported"),
    "monteclora_config": (None, "it samples its factors at random"),
    "megatron_config": (None, "its layers belong to Megatron"),
}
"""Options of PEFT's LoRA that are not supported: the only accepted value, and why."""
_LEFT_OUT = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "runtime_config"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
"""Options about an adapter's initialisation or origin, which loading it does not need."""
_PLAIN = re.compile(r"[\w.]+")


def read(source: str, folder: Path) -> LoraConfig:
    """Returns the adapter's configuration. Raises UnusableAdapter if it is not supported."""
    found = _read_json(source, folder / CONFIG)
    if found.get("peft_type") != PeftType.LORA.value:
        what = f"its peft_type is {found.get('peft_type')!r}"
        raise UnusableAdapter(
            source=source, reason=f"{what}, and only LORA is supported. Merge it into its base with PEFT instead."
        )
    if found.get("task_type") not in (None, "CAUSAL_LM"):
        reason = (
            f"its task_type is {found['task_type']!r}, and only CAUSAL_LM adapters generate text. Import an adapter of "
            "that type."
        )
        raise UnusableAdapter(source=source, reason=reason)
    _refuse_options(source, found)
    known = {field.name for field in dataclasses.fields(LoraConfig)} - _LEFT_OUT
    try:
        return LoraConfig(**{name: value for name, value in found.items() if name in known}, inference_mode=True)
    except (TypeError, ValueError) as error:
        raise UnusableAdapter(
            source=source, reason=f"PEFT rejects its {CONFIG} ({_first_line(error)}). Correct the file."
        ) from error


def _read_json(source: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnusableAdapter(source=source, reason=f"{CONFIG} is not valid JSON ({error}). Copy it again.") from error
    if not isinstance(found, dict):
        raise UnusableAdapter(source=source, reason=f"{CONFIG} is not a JSON object. Copy it again.")
    return found


def _refuse_options(source: str, found: dict[str, Any]) -> None:
    for name, (taken, why) in _REFUSED.items():
        value = found.get(name, taken)
        if value != taken and value not in (None, False, [], {}):
            raise UnusableAdapter(
                source=source,
                reason=f"its option {name} ({value!r}) is not supported: {why}. Merge it into its base with PEFT "
                "instead.",
            )
    if (init := found.get("init_lora_weights", True)) not in _INITS:
        raise UnusableAdapter(
            source=source, reason=f"its init_lora_weights {init!r} is not supported: {_CHANGES_BASE}."
        )
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for name in sorted(found.keys() - known):
        if found[name] not in (None, False, [], {}):
            reason = (
                f"the installed PEFT does not know its option {name} ({found[name]!r}). Save it without this option."
            )
            raise UnusableAdapter(source=source, reason=reason)


def technique(source: str, config: LoraConfig, modules: list[str], kind: str) -> Lora:
    """Returns the technique by which such an adapter is trained here; `modules`: those that it adapts."""
    tokens = config.trainable_token_indices
    listed = sorted({token for each in tokens.values() for token in each}) if isinstance(tokens, dict) else tokens
    saved = None if config.modules_to_save is None else sorted(config.modules_to_save)
    try:
        return (Qlora if kind == "qlora" else Lora)(
            r=config.r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=sorted({name.rpartition(".")[2] for name in modules}),
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            modules_to_save=saved or None,
            trainable_token_indices=listed or None,
        )
    except ValidationError as error:
        fault = error.errors()[0]
        reason = f"its {'.'.join(map(str, fault['loc']))} is not supported here: {fault['msg']}."
        raise UnusableAdapter(source=source, reason=reason) from error


def spell_out(config: LoraConfig, scales: dict[str, tuple[int, float]]) -> None:
    """Replaces regular expressions with the names that they match; `scales` has the rank and alpha of each module.

    Why not keep them: every program that loads the adapter would run an untrusted expression, which may never end.
    """
    if isinstance(config.target_modules, str) or config.layers_pattern or isinstance(config.exclude_modules, str):
        config.target_modules = sorted(scales)
        config.exclude_modules = config.layers_pattern = config.layers_to_transform = None
    if not all(_PLAIN.fullmatch(key) for key in [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]):
        config.rank_pattern = {name: r for name, (r, _) in scales.items() if r != config.r}
        config.alpha_pattern = cast(Any, {n: alpha for n, (_, alpha) in scales.items() if alpha != config.lora_alpha})


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
