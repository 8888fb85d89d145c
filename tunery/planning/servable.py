"""Rules for which adapters a vLLM server can load and compute as trained, for new jobs and for stored files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tunery.errors import InvalidValue
from tunery.spec import Full, Lora, Qlora, Technique

_EXPERTS = "it adapts routed experts, whose adapters vLLM reads in another layout. Limit target_modules to attention"
_VOCABULARY = ("lm_head", "embed_tokens")


class ServerSettings(Protocol):
    """The settings on which the limits depend. A protocol, as the trainer imports this module and no settings."""

    @property
    def server_backend(self) -> str: ...

    @property
    def server_qlora_base(self) -> str: ...

    @property
    def vllm_max_lora_rank(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """The limits of an installation's servers: their `--max-lora-rank`, and whether an adapter trained on a 4-bit base
    may be served on the unquantised base."""

    max_rank: int
    four_bits_on_the_base: bool

    @classmethod
    def of(cls, settings: ServerSettings) -> "Limits | None":
        """Returns the limits in the settings; None if models are not served by vLLM."""
        if settings.server_backend != "vllm":
            return None
        return cls(settings.vllm_max_lora_rank, settings.server_qlora_base == "unquantised")


@dataclass(frozen=True)
class AdapterTraits:
    """The properties of an adapter that the rules use. `rank`: the largest of all modules."""

    rank: int
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    trains_tokens: bool = False
    on_experts: bool = False
    on_vocabulary: bool = False
    on_four_bits: bool = False

    @classmethod
    def of_technique(cls, technique: Lora, model_info: Mapping[str, Any]) -> "AdapterTraits":
        """Returns the traits of the adapter that a job will make on this base."""
        everything = technique.target_modules == "all-linear"
        return cls(
            rank=technique.r,
            use_dora=technique.use_dora,
            modules_to_save=tuple(technique.modules_to_save or ()),
            trains_tokens=bool(technique.trainable_token_indices),
            on_experts=everything and bool((model_info.get("counts") or {}).get("experts")),
            on_vocabulary=not everything and _names_vocabulary(technique.target_modules),
            on_four_bits=isinstance(technique, Qlora),
        )

    @classmethod
    def of_config(cls, config: Mapping[str, Any], *, on_four_bits: bool) -> "AdapterTraits":
        """Returns the traits of the adapter with this adapter_config.json."""
        return cls(
            rank=max([config["r"], *(config.get("rank_pattern") or {}).values()]),
            use_dora=bool(config.get("use_dora")),
            modules_to_save=tuple(config.get("modules_to_save") or ()),
            trains_tokens=bool(config.get("trainable_token_indices")),
            on_experts=bool(config.get("target_parameters")),
            on_vocabulary=_names_vocabulary(config["target_modules"]),
            on_four_bits=on_four_bits,
        )


def _names_vocabulary(modules: Any) -> bool:
    return not isinstance(modules, str) and any(name.rpartition(".")[2] in _VOCABULARY for name in modules)


def why_not(adapter: AdapterTraits, limits: Limits) -> tuple[str, str] | None:
    """Returns the offending field and the reason, with what to change, if an adapter cannot be served; else None."""
    rules = (
        (adapter.use_dora, "use_dora", "vLLM does not support DoRA. Set use_dora to false"),
        (
            bool(adapter.modules_to_save),
            "modules_to_save",
            f"vLLM loads no fully trained modules ({', '.join(adapter.modules_to_save)}). Leave modules_to_save out",
        ),
        (
            adapter.trains_tokens,
            "trainable_token_indices",
            "vLLM loads no trained tokens. Leave trainable_token_indices out",
        ),
        (
            adapter.rank > limits.max_rank,
            "r",
            f"rank {adapter.rank} exceeds the servers' limit. Use at most {limits.max_rank}",
        ),
        (adapter.on_experts, "target_modules", _EXPERTS),
        (
            adapter.on_vocabulary,
            "target_modules",
            "vLLM may ignore an adapter on the head or the embedding. Remove it from target_modules",
        ),
        (
            adapter.on_four_bits and not limits.four_bits_on_the_base,
            "type",
            "it is trained on a base in four bits, but the servers have the unquantised base. Use 'lora', or ask the "
            "operator to set TUNERY_SERVER_QLORA_BASE to 'unquantised'",
        ),
    )
    return next(((field, reason) for applies, field, reason in rules if applies), None)


def check(technique: Technique | None, model_info: Mapping[str, Any], limits: Limits | None) -> None:
    """Raises InvalidValue for a job whose adapter could not be served here. `technique` None: the server's choice."""
    if limits is None or isinstance(technique, Full):
        return
    found = why_not(AdapterTraits.of_technique(technique or Lora(), model_info), limits)
    if found is not None:
        field, reason = found
        raise InvalidValue(
            param=f"technique.{field}",
            reason=f"This server serves models with vLLM, which could not serve this adapter: {reason}.",
        )
