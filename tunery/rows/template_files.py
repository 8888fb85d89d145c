"""Reads tokenizer, chat templates and special tokens from a model's directory."""

import hashlib
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tunery.rows.errors import CannotRender

ADDITIONAL = "additional_chat_templates"
"""The folder of templates besides the default; each file has its template's name."""
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WRITTEN_DATE = re.compile(r"strftime_now\(\s*(['\"])([^'\"\\]*)\1\s*\)")
_ASKED_FOR = re.compile(r"strftime_now is (?:not )?defined")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads a tokenizer. Raises CannotRender if the file is missing."""
    if not path.exists():
        raise CannotRender(reason="The model has no tokenizer.json. Save it with a fast tokenizer and add it again.")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    # Without its post-processor, which could add a BOS that the template did not write.
    return Tokenizer.from_str(json.dumps({**tokenizer, "post_processor": None, "truncation": None, "padding": None}))


def additional_names(root: Path) -> list[str]:
    """Returns the paths inside `root` of templates besides the default."""
    return sorted(f"{ADDITIONAL}/{path.name}" for path in (root / ADDITIONAL).glob("*.jinja"))


def load_templates(root: Path, config: dict[str, Any]) -> dict[str, str]:
    """Returns Jinja sources by name, "default" among them. Raises CannotRender if there is no default."""
    in_config = config.get("chat_template") or {}
    if isinstance(in_config, str):
        templates = {"default": in_config}
    else:
        listed = in_config if isinstance(in_config, list) else []
        templates = {item["name"]: item["template"] for item in listed}
    for name in additional_names(root):
        templates[Path(name).stem] = (root / name).read_text(encoding="utf-8")
    if (root / "chat_template.jinja").exists():
        templates["default"] = (root / "chat_template.jinja").read_text(encoding="utf-8")
    if "default" not in templates:
        raise CannotRender(
            reason="The model has no chat template: neither chat_template.jinja nor 'chat_template' in "
            "tokenizer_config.json. Add one to its directory, or use the model's instruct version."
        )
    return templates


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Returns the named special tokens (`bos_token`, ...) for templates."""

    def text(value: Any) -> Any:
        return value.get("content") if isinstance(value, dict) else value

    return {name: text(config[name]) for name in _SPECIAL_TOKENS if isinstance(text(config.get(name)), str)}


def configured_eos_ids(root: Path, tokenizer: Tokenizer, special: dict[str, str]) -> list[int]:
    """Returns the ids at which generation stops by the model's configs and its tokenizer's `eos_token`."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = read_json(root / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    named = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return ids if named is None else [*ids, named]


def digest(templates: dict[str, str]) -> str:
    """Returns a sha256 of the templates; for a single template it is that of its file, as sha256sum prints it."""
    named = templates["default"] if len(templates) == 1 else json.dumps(templates, sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()


def dates(templates: dict[str, str], now: datetime | None) -> list[str] | None:
    """Returns the parts of `now` that the templates write, or all of it if their sources do not show which. None if
    they may write the time and `now` is not fixed."""
    source = "\n".join(templates.values())
    forms = {form for _, form in _WRITTEN_DATE.findall(source)}
    if "strftime_now" not in source:
        return []
    if now is None:
        return None
    if "strftime_now" in _ASKED_FOR.sub("", _WRITTEN_DATE.sub("", source)):
        return [now.isoformat()]
    return [now.strftime(form) for form in sorted(forms)]
