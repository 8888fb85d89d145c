"""Decides every "auto" of a spec, and warns about the settings of a plan. Pure functions."""

import math
import re
from collections.abc import Mapping
from typing import Any

from tunery.errors import InvalidValue
from tunery.spec import LEARNING_RATES, Evaluation, Full, Lora, Plan, Qlora, Technique, TrainingSpec

BATCH_SIZE = 8
_EPOCHS = 3
_LEAST_SEEN, _MOST_SEEN, _MOST_EPOCHS = 100, 25_000, 25
_BAND = (0.2, 2.0)
_FEW_EXAMPLES = 50
_LARGE_LORA_BATCH = 32
_HIGH_DROPOUT = 0.3
ALPHA_BAND = (2, 4)
"""The usual range of alpha, in multiples of the rank."""
LARGE_RANK, MANY_EXAMPLES = 16, 1000
"""A rank above the first needs at least as many examples as the second."""
_MOST_ANSWER_TOKENS, _LEAST_SPARE = 1024, 16


def default_learning_rate(hidden_size: int, technique: Technique) -> float:
    """Returns for LoRA 5e-4 * (2000 / hidden)^0.78: 1.3e-3 at 576 and 2.9e-4 at 4096, at every rank (alpha is fixed).

    A full fine-tune gets a tenth, as every weight moves. Rank-stabilised LoRA gets a quarter at every rank: at rank
    16, where the rule comes from, its scale is four times LoRA's. LoRA+ keeps the geometric mean of its two rates.
    """
    rate: float = 5e-4 * (2000 / hidden_size) ** 0.78
    if isinstance(technique, Full):
        return rate / 10
    return rate / math.sqrt((Lora().r if technique.use_rslora else 1) * technique.lora_plus_ratio)


def default_epochs(examples: int) -> int:
    """Returns 3; for small files as many as make 100 examples (at most 25), for huge ones as few as make 25,000."""
    if examples * _EPOCHS < _LEAST_SEEN:
        return max(1, min(_MOST_EPOCHS, _LEAST_SEEN // max(1, examples)))
    if examples * _EPOCHS > _MOST_SEEN:
        return max(1, _MOST_SEEN // examples)
    return _EPOCHS


def default_technique(bf16_fits: bool, model_info: Mapping[str, Any]) -> Technique:
    """Returns LoRA where bf16 fits, else QLoRA; never full fine-tuning, which forgets and costs the most.

    Returns the other of the two where the base cannot be trained with the first.
    """
    both: list[Technique] = [Lora(), Qlora()] if bf16_fits else [Qlora(), Lora()]
    return next((technique for technique in both if _why_not(technique.type, model_info) is None), both[0])


def max_length(spec: TrainingSpec, model_info: Mapping[str, Any]) -> int:
    """Returns the token limit of a sequence: max_seq_length, or the base's context if that is shorter.

    The base was never trained on positions beyond its context.
    """
    return min(spec.max_seq_length, model_info.get("context_length") or spec.max_seq_length)


def answer_limit(evaluation: Evaluation, longest: int) -> int:
    """Returns the token limit of an answer: as requested, or the `longest` reference answer plus a quarter.

    A higher limit costs nothing with a model that learned to stop; a base that did not generates up to it in every row.
    """
    if evaluation.max_new_tokens != "auto":
        return evaluation.max_new_tokens
    return min(_MOST_ANSWER_TOKENS, longest + max(_LEAST_SPARE, longest // 4))


def resolve(
    spec: TrainingSpec,
    *,
    examples: int,
    model_info: Mapping[str, Any],
    bf16_fits: bool,
    longest_answer: int | None = None,
) -> Plan:
    """Returns the plan of a run on `examples` training rows.

    `model_info`: the base's; `longest_answer`: tokens of the longest wanted answer.
    """
    knobs = spec.hyperparameters
    technique = spec.technique or default_technique(bf16_fits, model_info)
    default_rate = default_learning_rate(model_info["hidden_size"], technique) * spec.method.rate_share
    multiplier = 1.0 if knobs.learning_rate_multiplier == "auto" else knobs.learning_rate_multiplier
    rate = default_rate * multiplier if spec.learning_rate is None else spec.learning_rate
    settled = spec.model_dump(exclude={"technique", "hyperparameters", "learning_rate"})
    settled["max_seq_length"] = max_length(spec, model_info)
    settled["method"] = spec.method.decided()
    if longest_answer is not None:
        settled["evaluation"]["max_new_tokens"] = answer_limit(spec.evaluation, longest_answer)
    return Plan(
        **settled,
        technique=technique,
        n_epochs=default_epochs(examples) if knobs.n_epochs == "auto" else knobs.n_epochs,
        batch_size=BATCH_SIZE if knobs.batch_size == "auto" else knobs.batch_size,
        learning_rate=rate,
        learning_rate_multiplier=multiplier if spec.learning_rate is None else rate / default_rate,
    )


def check_rate(spec: TrainingSpec, model_info: Mapping[str, Any], *, param: str) -> None:
    """Raises InvalidValue for a multiplier, the request's field `param`, that leads to an impossible learning rate."""
    multiplier = spec.hyperparameters.learning_rate_multiplier
    technique = spec.technique or Lora()  # the default rate of QLoRA is the same
    if multiplier == "auto":
        return
    default = default_learning_rate(model_info["hidden_size"], technique) * spec.method.rate_share
    (least, most), rate = LEARNING_RATES, default * multiplier
    if not least <= rate <= most:
        wanted, change = (f"at least {least:g}", "Raise") if rate < least else (f"at most {most:g}", "Lower")
        raise InvalidValue(
            param=param,
            reason=f"Invalid value for '{param}' ({multiplier:g}): the learning rate would be {rate:.2g}, and should "
            f"be {wanted}. {change} it: the default of {technique.type} on this model is {default:.2g}, and "
            f"multipliers are usually {_BAND[0]:g} to {_BAND[1]:g}.",
        )


def check_technique(technique: Technique | None, model_info: Mapping[str, Any]) -> None:
    """Raises InvalidValue for a technique that failed on the base when the base was added.

    Bases that were added before this was tested pass. None: the server chooses LoRA or QLoRA.
    """
    if technique is None:
        reason = _why_not("lora", model_info) if _why_not("qlora", model_info) else None
        wanted = "lora or qlora"
    else:
        reason, wanted = _why_not(technique.type, model_info), technique.type
    if reason is not None:
        can = [name for name in ("lora", "qlora", "full") if _why_not(name, model_info) is None]
        instead = f"Use technique '{can[0]}'." if can else "Choose another base."
        raise InvalidValue(
            param="technique.type",
            reason=f"This base cannot be trained with {wanted} ({reason.rstrip('.')}). {instead}",
        )
    if isinstance(technique, Lora):
        _check_tokens(technique, model_info.get("vocab_size"))
    if isinstance(technique, Lora) and technique.target_modules == "all-linear":
        if technique.dropout:
            _check_option("dropout", "Set dropout to 0", model_info.get("dropout"))
        if technique.use_dora:
            _check_option("use_dora", "Set use_dora to false", model_info.get("dora"))


def _check_tokens(technique: Lora, vocabulary: int | None) -> None:
    beyond = [token for token in technique.trainable_token_indices or () if vocabulary and token >= vocabulary]
    if beyond:
        raise InvalidValue(
            param="technique.trainable_token_indices",
            reason=f"The base has no token {beyond[0]}: its tokens are 0 to {(vocabulary or 0) - 1}. Choose tokens in "
            "this range.",
        )


def _check_option(name: str, instead: str, reason: str | None) -> None:
    if reason:
        raise InvalidValue(
            param=f"technique.{name}",
            reason=f"This base does not support {name} on all of its layers ({reason.rstrip('.')}). {instead}, or list "
            "target_modules.",
        )


def _why_not(technique: str, model_info: Mapping[str, Any]) -> str | None:
    reasons: Mapping[str, str | None] = model_info.get("techniques") or {}
    return reasons.get(technique)


def check_modules(technique: Technique | None, model_info: Mapping[str, Any]) -> None:
    """Raises InvalidValue for a target module that the base does not have; bases of unknown modules pass.

    Names match as in PEFT: a module's whole name, or its end after a dot. PEFT itself raises only when no name
    matches, and ignores single unknown names.
    """
    known = model_info.get("linear_modules")
    if not known or not isinstance(technique, Lora) or technique.target_modules == "all-linear":
        return
    for name in technique.target_modules:
        wanted = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
        if not any(module == wanted or module.endswith(f".{wanted}") for module in known):
            ends = dict.fromkeys(module.rpartition(".")[2] for module in known)
            raise InvalidValue(
                param="technique.target_modules",
                reason=f"The base has no linear layer '{name}'. Use 'all-linear', or choose from: {', '.join(ends)}.",
            )


def warnings(plan: Plan, *, examples: int, model_info: Mapping[str, Any], asked_length: int | None = None) -> list[str]:
    """Returns warnings about a plan, most important first. `asked_length`: the request's max_seq_length."""
    found = [*_of_rate(plan, model_info), *_of_rows(plan, examples)]
    if asked_length is not None and asked_length > plan.max_seq_length:
        found.append(
            f"max_seq_length {asked_length} exceeds the model's context of {plan.max_seq_length} tokens, which is used "
            "instead."
        )
    if isinstance(plan.technique, Lora):
        found += [*_of_adapter(plan, plan.technique), *_of_size(plan.technique, examples)]
    else:
        found.append(_of_full(plan))
    return found


def _of_rate(plan: Plan, model_info: Mapping[str, Any]) -> list[str]:
    default = default_learning_rate(model_info["hidden_size"], plan.technique) * plan.method.rate_share
    low, high = default * _BAND[0], default * _BAND[1]
    usual = f"The default for {plan.technique.type} on this model is {default:.1e}."
    if plan.learning_rate > high:
        return [
            f"The learning rate {plan.learning_rate:.1e} is high: the model may forget what it knew, or the loss may "
            f"diverge. {usual}"
        ]
    if plan.learning_rate < low:
        return [f"The learning rate {plan.learning_rate:.1e} is low: the model may learn little. {usual}"]
    return []


def _of_rows(plan: Plan, examples: int) -> list[str]:
    found = []
    if examples < _FEW_EXAMPLES:
        found.append(
            f"{examples} examples are few: {_FEW_EXAMPLES} to 100 good ones are usually needed for a visible "
            "difference."
        )
    if plan.batch_size > examples:
        found.append(
            f"The batch size {plan.batch_size} exceeds the number of examples ({examples}), so each epoch is a single "
            "step."
        )
    if plan.n_epochs > _EPOCHS and plan.n_epochs * examples > _MOST_SEEN:
        found.append(f"{plan.n_epochs} epochs are many for {examples} examples: {_EPOCHS} are usually enough.")
    return found


def _of_adapter(plan: Plan, technique: Lora) -> list[str]:
    found = []
    if plan.batch_size > _LARGE_LORA_BATCH:
        found.append(
            f"LoRA learns worse from large batches: use at most {_LARGE_LORA_BATCH} rather than {plan.batch_size}."
        )
    if technique.dropout > _HIGH_DROPOUT:
        found.append(f"A dropout of {technique.dropout:g} is high for an adapter: the usual range is 0 to 0.1.")
    if technique.target_modules != "all-linear" and not any("proj" in n and n[0] in "gud" for n in _names(technique)):
        found.append(
            "target_modules leaves out the feed-forward layers, and a higher rank does not compensate for that: "
            "'all-linear' learns better."
        )
    return found


def _of_size(technique: Lora, examples: int) -> list[str]:
    found = []
    if technique.r > LARGE_RANK and examples < MANY_EXAMPLES:
        found.append(
            f"Rank {technique.r} is large for {examples} examples: the adapter can memorise them. Use r {LARGE_RANK} "
            f"or less, or at least {MANY_EXAMPLES} examples."
        )
    low, high = (technique.r * times for times in ALPHA_BAND)
    is_ours = technique.alpha == Lora.model_fields["alpha"].default
    if not is_ours and not technique.use_rslora and not low <= technique.alpha <= high:
        found.append(
            f"alpha {technique.alpha:g} is outside 2 to 4 times the rank ({low} to {high}): it multiplies the update "
            f"by {technique.alpha / technique.r:g}, for which the default learning rate is not tuned. Omit alpha, or "
            "adjust learning_rate too."
        )
    return found


def _of_full(plan: Plan) -> str:
    forgets = (
        "A full fine-tune changes every weight, so the model forgets more of its general abilities than with LoRA."
    )
    if plan.replay is not None:
        return f"{forgets} Replay reduces this; technique 'lora' forgets even less."
    if plan.method.type != "supervised":
        return f"{forgets} Use technique 'lora': replay, which reduces this, is available only for supervised training."
    return f"{forgets} Use technique 'lora', or add replay ('replay': {{}})."


def _names(technique: Lora) -> list[str]:
    return [name.rpartition(".")[2] or name for name in technique.target_modules]
