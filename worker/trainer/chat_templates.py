"""Writes a base's chat template: the model's own, or one that its administrator gave."""

import json
import shutil
from pathlib import Path

from tunery.errors import UnusableModel
from tunery.rows.errors import CannotRender
from tunery.rows.messages import Example, Message
from tunery.rows.template import ChatTemplate

FILE = "chat_template.jinja"
_PROBE = Example(messages=[Message(role="user", content="Question"), Message(role="assistant", content="Answer")])


def write(source: str, out: Path, given: str | None = None) -> None:
    """Writes `chat_template.jinja` into `out`, from `given` or from the tokenizer's config.

    Raises UnusableModel if there is none, or if it does not fit the tokenizer.
    """
    text = _own(out) if given is None else given
    if not text:
        raise UnusableModel(
            source=source,
            reason="it has no chat template, so chat rows cannot be rendered for it. Use the instruct version, or pass "
            "a template: `tunery models add NAME SOURCE --chat-template FILE`.",
        )
    if given is not None:
        _remove_own(out)
    (out / FILE).write_text(text)
    if given is not None:
        _write_stops(out, check_fits(source, out))


def in_folder(source: str) -> str | None:
    """Returns the text of `chat_template.jinja` if `source` is a folder that has one."""
    path = Path(source) / FILE
    return path.read_text() if path.is_file() else None


def _own(out: Path) -> str | None:
    if (out / FILE).exists():
        return (out / FILE).read_text()
    config = out / "tokenizer_config.json"
    template = json.loads(config.read_text()).get("chat_template") if config.exists() else None
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _remove_own(out: Path) -> None:
    """Removes the model's other templates: one named "tool_use" would still be used for rows with tools."""
    shutil.rmtree(out / "additional_chat_templates", ignore_errors=True)
    path = out / "tokenizer_config.json"
    if path.exists():
        config = json.loads(path.read_text())
        config.pop("chat_template", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def check_fits(source: str, out: Path) -> ChatTemplate:
    """Returns the template in `out`. Raises UnusableModel if it does not fit the tokenizer beside it.

    Another family's template renders well, but ends turns with what is plain text for this tokenizer.
    """
    try:
        template = ChatTemplate.load(out)
        template.encode(_PROBE, max_length=1024)
    except CannotRender as error:
        raise UnusableModel(
            source=source, reason=f"the chat template does not work with it. {error.message}"
        ) from error
    return template


def _write_stops(out: Path, template: ChatTemplate) -> None:
    """Adds the end of a turn to the stop tokens: the model's own config often has only the end of a text, past which
    plain `generate` would run on.
    """
    path = out / "generation_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | {"eos_token_id": sorted(template.eos_ids)}, indent=2) + "\n")
