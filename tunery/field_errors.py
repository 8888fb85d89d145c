"""Explains pydantic's errors about a request: names the field and says what to change."""

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from tunery import field_reasons
from tunery.errors import InvalidValue

_SHOWN = 80
_EXPLAINED = 100
_CLOSE = 0.75
"""Similarity, as in `difflib`, from which a name is suggested for an unknown one."""
_PLACES = {"body", "query", "path", "header"}
_MISSING = ("missing", "union_tag_not_found")
_NOT_OBJECTS = ("dict_type", "model_type", "model_attributes_type")
_REASONS = {
    "string_too_short": "should have at least {min_length} character(s)",
    "string_too_long": "should have at most {max_length} characters",
    "string_pattern_mismatch": "should match the pattern {pattern}",
    "literal_error": "should be {expected}",
    "too_short": "should have at least {min_length} entries",
    "too_long": "should have at most {max_length} entries",
    "ip_v4_network": "should be an IPv4 network, as in 10.0.0.0/8",
    "ip_v6_network": "should be an IPv6 network, as in fd00::/8",
    "value_error": "{error}",
}
_OTHER_REASON = "is not valid for this field (see /docs)"
_LORA_OPTIONS = {"dora": "use_dora", "rslora": "use_rslora"}
"""Other tools' techniques that are options of LoRA here."""
_OTHER_NAMES = {
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "epochs": "n_epochs",
    "num_epochs": "n_epochs",
    "num_train_epochs": "n_epochs",
    "per_device_train_batch_size": "batch_size",
    "lr": "learning_rate",
    "max_length": "max_seq_length",
    "lr_scheduler_type": "schedule",
    "train_file": "training_file",
    "valid_file": "validation_file",
}
"""Other tools' names of options."""

Fault = dict[str, Any]


def explain(faults: Sequence[Fault], body: Any, known: Any = None) -> InvalidValue:
    """Returns the error for the first invalid field, with all reasons.

    `faults` are pydantic's, each `loc` beginning with its place ("body", "query"). For an unknown name, a field of
    `known`, the type of the request's body, is suggested.
    """
    faults = faults[:_EXPLAINED]
    paths = [_path(fault, body) for fault in faults]
    # A value that is of one of several types, but with a fault inside, has the faults of the other types too.
    path = next((path for path in paths if path.startswith(f"{paths[0]}.")), paths[0])
    same = [fault for fault, its in zip(faults, paths, strict=True) if its == path]
    return InvalidValue(param=path or None, reason=_reason(same, path, body, known))


def unrecognized(param: str, known: Iterable[str] = ()) -> InvalidValue:
    """Returns the error for an unknown field of a chat, in OpenAI's words; suggests one of `known`."""
    close = _closest(param, sorted(known))
    meant = f". Did you mean '{close}'?" if close else ""
    return InvalidValue(param=param, reason=f"Unrecognized request argument supplied: {param}{meant}")


def _path(fault: Fault, body: Any) -> str:
    """Returns the dotted path of a fault's field, without the union branches that pydantic adds to it."""
    place, *steps = fault["loc"] if fault["loc"][0] in _PLACES else ("", *fault["loc"])
    if place != "body":
        return ".".join(str(step) for step in steps[:1])
    if fault["type"] in ("union_tag_not_found", "union_tag_invalid"):
        steps.append("type")  # what is at fault; pydantic's path ends at the union
    path, here = [], body
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if isinstance(here, dict) and (step in here or (last and fault["type"] in _MISSING)):
            path.append(str(step))
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            path.append(str(step))
            here = here[step]
    return ".".join(path)


def _reason(faults: Sequence[Fault], path: str, body: Any, known: Any) -> str:
    kind = faults[0]["type"]
    if kind in _MISSING and not path:
        return "The request has no JSON body. Send one, with 'Content-Type: application/json'."
    if kind in _MISSING:
        choice = " (full, lora or qlora)" if path == "technique.type" else ""
        return f"Missing required parameter: '{path}'{choice}."
    if kind == "extra_forbidden":
        return _unknown(path, body, known)
    said = dict.fromkeys(_words(fault) for fault in faults)
    value = faults[0]["ctx"]["tag"] if kind == "union_tag_invalid" else faults[0]["input"]
    return f"Invalid value for '{path or 'body'}' ({_shown(value)}): {', or '.join(said)}."


def _unknown(path: str, body: Any, known: Any) -> str:
    suggestion = _suggestion(path, known)
    if path.startswith("technique.") and isinstance(body, dict):
        kind = body["technique"].get("type")
        knob = path.partition(".")[2]
        of_another = known is not None and path in _paths(known)
        means_another = suggestion.startswith("technique.") and suggestion != "technique.weights_dtype"
        if kind == "full" and (of_another or means_another):
            return f"A full fine-tune has no '{knob}': remove '{path}', or set technique.type to 'lora' or 'qlora'."
        if kind == "lora" and of_another:
            return f"LoRA has no '{knob}': remove '{path}' (see /docs for its settings; 'qlora' has more)."
    if path.startswith("columns.") and (parts := _parts(known)):
        return _unknown_part(path.partition(".")[2], parts)
    if suggestion:
        return f"Unknown parameter: '{path}'. Did you mean '{suggestion}'?"
    return f"Unknown parameter: '{path}'. Remove it, or check its spelling against /docs."


def _parts(known: Any) -> list[str]:
    """Returns the names that `columns` may have."""
    return [path.partition(".")[2] for path in (_paths(known) if known else ()) if path.startswith("columns.")]


def _closest(name: str, names: Iterable[str]) -> str:
    """Returns the name that was probably meant, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=_CLOSE)
    return close[0] if close else ""


def _unknown_part(name: str, parts: Sequence[str]) -> str:
    """Returns the reason for a name in `columns` that is no part of a row."""
    close = _closest(name, parts)
    meant = f"Did you mean '{close}'? " if close else ""
    return (
        f"Unknown parameter: 'columns.{name[:40]}'. 'columns' names the column of each part, as in prompt=Frage. "
        f"{meant}The parts are {', '.join(parts)}."
    )


def _suggestion(path: str, known: Any) -> str:
    """Returns the field that `path` probably means, or nothing. Fields at the same place come first."""
    if known is None:
        return ""
    folder, _, name = path.rpartition(".")
    paths = [other for other in _paths(known) if other != path]
    beside = [other for other in paths if other.rpartition(".")[0] == folder]
    for candidates in (beside, paths):
        names = {other.rpartition(".")[2]: other for other in reversed(candidates)}
        for found in (_OTHER_NAMES.get(name, name), _closest(name, names)):
            if found in names:
                return names[found]
    return ""


@cache
def _paths(known: Any) -> tuple[str, ...]:
    """Returns the dotted paths of all fields; deprecated ones last."""
    found = list(dict.fromkeys(_walk(known)))
    return tuple(sorted(found, key=lambda path: path.startswith("hyperparameters")))


def _walk(kind: Any, folder: str = "") -> Iterator[str]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield f"{folder}{name}"
            yield from _walk(field.annotation, f"{folder}{name}.")
    else:
        for part in get_args(kind):
            yield from _walk(part, folder)


def _words(fault: Fault) -> str:
    if fault["type"] == "union_tag_invalid":
        tags = str(fault["ctx"]["expected_tags"]).replace("'", "").split(", ")
        tag = str(fault["ctx"]["tag"])
        if tag.lower() in _LORA_OPTIONS and "lora" in tags:
            close = [f'{{"type": "lora", "{_LORA_OPTIONS[tag.lower()]}": true}}']
        else:
            close = difflib.get_close_matches(tag, tags, n=1)
        return f"should be {', '.join(tags[:-1])} or {tags[-1]}" + (f" (did you mean {close[0]}?)" if close else "")
    reason, value = of_value(fault), fault["input"]
    if fault["type"] in _NOT_OBJECTS and fault["loc"][-1] == "technique" and isinstance(value, str):
        return f'{reason}, like {{"type": {json.dumps(value)}}}'
    return reason


def of_value(fault: Fault) -> str:
    """Returns what a value should be, without the value."""
    kind, context = fault["type"], fault.get("ctx", {})
    if wanted := field_reasons.wanted(kind, context):
        return f"should be {wanted}"
    return _REASONS.get(kind, _OTHER_REASON).format(**context)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
