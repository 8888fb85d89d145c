"""Writes an adapter's tokenizer and chat template: its own if it came with them, else its base's."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tunery.errors import UnusableModel
from tunery.rows import template_files
from tunery.rows.errors import CannotRender
from tunery.rows.template import ChatTemplate
from worker.trainer import chat_templates
from worker.trainer.adapter_import.errors import UnusableAdapter
from worker.trainer.checkpoints import TOKENIZER_FILES

_STOPS = "generation_config.json"


def write(source: str, base: Path, came: Path, out: Path) -> ChatTemplate:
    """Writes tokenizer, chat templates and stop tokens into `out`; `came` has the adapter's own files.

    Raises UnusableAdapter if the tokenizer has another vocabulary or the template does not fit.
    """
    _check_vocabulary(source, base, came)
    own = (came / "tokenizer.json").exists()
    for name in TOKENIZER_FILES:
        _copy((came if own else base) / name, out / name)
    try:
        _write_templates(source, base, came, out)
        template = ChatTemplate.load(out)
    except (CannotRender, UnusableModel, ValueError) as error:
        reason = f"its tokenizer and chat template cannot be used ({error}). Remove them to use the base's."
        raise UnusableAdapter(source=source, reason=reason) from error
    settings = template_files.read_json(base / _STOPS)
    settings.pop("_from_model_config", None)
    stops = sorted({*ChatTemplate.load(base).eos_ids, *template.eos_ids})
    (out / _STOPS).write_text(json.dumps(settings | {"eos_token_id": stops}, indent=2) + "\n")
    return template


def _copy(path: Path, to: Path) -> None:
    if path.exists():
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, to)


def _check_vocabulary(source: str, base: Path, came: Path) -> None:
    """Raises UnusableAdapter if a token's id differs from the base's, or has no row in the base."""
    if not (came / "tokenizer.json").exists():
        return
    try:
        own = template_files.load_tokenizer(came / "tokenizer.json").get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise UnusableAdapter(
            source=source, reason=f"its tokenizer.json cannot be read ({error}). Copy it again."
        ) from error
    bases = template_files.load_tokenizer(base / "tokenizer.json").get_vocab(with_added_tokens=True)
    rows = AutoConfig.from_pretrained(base).get_text_config().vocab_size
    other = [token for token, id in bases.items() if own.get(token) != id]
    beyond = [token for token, id in own.items() if id >= rows and token not in bases]
    if other or beyond:
        token = min(other or beyond)
        has = "another id or none" if other else f"id {own[token]}, and the base's embedding has {rows} rows"
        reason = (
            f"'{token}' has {has} in its tokenizer: it was trained with another vocabulary. Name the base that it was "
            "trained on."
        )
        raise UnusableAdapter(source=source, reason=reason)


def _write_templates(source: str, base: Path, came: Path, out: Path) -> None:
    """Writes the adapter's own templates, or the base's. An own template is tried with the tokenizer."""
    given = _own_template(came)
    if given is not None:
        for name in template_files.additional_names(came):
            _copy(came / name, out / name)
        (out / chat_templates.FILE).write_text(given, encoding="utf-8")
        chat_templates.check_fits(source, out)
        return
    for name in (chat_templates.FILE, *template_files.additional_names(base)):
        _copy(base / name, out / name)


def _own_template(came: Path) -> str | None:
    if (came / chat_templates.FILE).exists():
        return (came / chat_templates.FILE).read_text(encoding="utf-8")
    config: dict[str, Any] = template_files.read_json(came / "tokenizer_config.json")
    if not config.get("chat_template"):
        return None
    return template_files.load_templates(came, config)["default"]
