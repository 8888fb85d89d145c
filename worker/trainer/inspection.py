"""Inspects a converted base: its model info for planning, and faults of its files that `from_pretrained` ignores."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tunery.errors import UnusableModel
from tunery.rows.template import ChatTemplate
from tunery.rows.trials import render_trials
from worker.trainer import chat_templates


def skeleton(source: str, out: Path) -> Any:
    """Returns the model that `out/config.json` describes, without weights. Raises UnusableModel."""
    try:
        config = AutoConfig.from_pretrained(out, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise _unusable(source, error) from error


def load(source: str, out: Path) -> Any:
    """Returns the model as `from_pretrained` builds it, on the meta device, where weights take no memory.

    Raises UnusableModel if the files, the config and the tokenizer do not belong together.
    """
    try:
        template = ChatTemplate.load(out)
        render_trials(template)
        model, report = _load_on_meta(out)
    except Exception as error:
        raise _unusable(source, error) from error
    _refuse_mismatched_weights(source, report)
    _refuse_unknown_tokens(source, template, (out / chat_templates.FILE).read_text(), model)
    return model


def model_info(source: str, model: Any, template: ChatTemplate) -> dict[str, Any]:
    """Returns what planning needs to know of a model, which may be on the meta device. Raises UnusableModel."""
    try:
        return _model_info(model, template)
    except AttributeError as error:  # the config is not a decoder's
        raise _unusable(source, error) from error


def _model_info(model: Any, template: ChatTemplate) -> dict[str, Any]:
    config = model.config
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    return {
        "model_type": config.model_type,
        "architecture": type(model).__name__,
        "params": sum(p.numel() for p in model.parameters()),
        "hidden_size": text.hidden_size,
        "intermediate_size": getattr(text, "intermediate_size", None),
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", heads),
        "head_dim": getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None),
        "vocab_size": text.vocab_size,
        "tie_word_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
        "context_length": getattr(text, "max_position_embeddings", None),
        "eos_token_ids": sorted(template.eos_ids),
        "chat_template_sha256": template.sha256,
        "linear_modules": linear_modules(model),
    }


def linear_modules(model: Any) -> list[str]:
    """Returns the names of the linear modules that adapters can target, layer numbers replaced by `*`, such as
    `model.layers.*.mlp.up_proj`. The head is left out.
    """
    head = model.get_output_embeddings()
    names = {
        re.sub(r"\.\d+(?=\.|$)", ".*", name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    return sorted(names)


def refuse_missing_weights(source: Any, missing: Iterable[str]) -> None:
    """Raises UnusableModel if weights are missing: `from_pretrained` would silently initialise them at random."""
    if names := _listed(missing):
        raise UnusableModel(
            source=source,
            reason=f"its files lack weights for {names}. Copy every shard, and the config.json that belongs to them.",
        )


def _unusable(source: str, error: Exception) -> UnusableModel:
    return UnusableModel(
        source=source, reason=f"transformers cannot load it ({str(error).strip().splitlines()[0]}). Check its files."
    )


def _load_on_meta(out: Path) -> tuple[Any, dict[str, Any]]:
    """Loads the model on the meta device; also returns the report of missing, unexpected and misshapen weights."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        out, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
    )
    model, report = loaded
    return model, report


def _refuse_mismatched_weights(source: str, report: dict[str, Any]) -> None:
    """Raises UnusableModel if weights are missing, unexpected, or of another shape than the config describes."""
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise UnusableModel(
            source=source,
            reason=f"{name} is {_size(found)} in its files, but {_size(wanted)} according to its config. Copy the "
            "config.json that was saved with the weights.",
        )
    refuse_missing_weights(source, report["missing_keys"])
    if names := _listed(report["unexpected_keys"]):
        raise UnusableModel(
            source=source,
            reason=f"its files have weights that its architecture does not have: {names}. They would be ignored. Copy "
            "the config.json that was saved with the weights.",
        )


def _size(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return f"{', '.join(ordered[:3])}{' and more' if len(ordered) > 3 else ''}"


def _refuse_unknown_tokens(source: str, template: ChatTemplate, source_text: str, model: Any) -> None:
    """Raises UnusableModel for tokens that the embedding has no row for.

    Special tokens that are never used are accepted: Gemma 3's text models have no row for the image token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    added = template.tokenizer.get_added_tokens_decoder()
    beyond = {
        id: token
        for token, id in template.tokenizer.get_vocab(with_added_tokens=True).items()
        if id >= rows and (id in template.eos_ids or token in source_text or id not in added or not added[id].special)
    }
    if beyond:
        id = min(beyond)
        raise UnusableModel(
            source=source,
            reason=f"its tokenizer has '{beyond[id]}' as token {id}, but its embedding has only {rows} rows. Copy the "
            "tokenizer that was saved with the weights, or enlarge the embedding.",
        )
