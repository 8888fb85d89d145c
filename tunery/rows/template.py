"""Chat template -> text -> token ids -> labels. The only code that decides which tokens are learned.

Which tokens: those of the trained assistant turns, found by prefix difference. The conversation is rendered up to a
turn with the generation prompt (what the model will be given when it is asked) and up to the turn's end; what lies
between is what the model must say, its end-of-turn token included. `{% generation %}` marks are not used: most
templates have none, and a forgotten mark silently trains on nothing.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Encoding, Tokenizer

from tunery.errors import CannotRender
from tunery.rows.messages import Example, Message, Tool
from tunery.rows.sandbox import Environment

IGNORED = -100
"""The label of a token that is not learned, as torch's cross entropy spells it."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Rendered:
    """One row as the model gets it. `labels[i]` belongs to `input_ids[i]` (not shifted): its id, or IGNORED."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool

    @cached_property
    def trained_tokens(self) -> int:
        """Tokens that are learned; 0 means that the cut has taken the whole answer."""
        return sum(label != IGNORED for label in self.labels)


class ChatTemplate:
    """A model's tokenizer and chat template. Safe to share between threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: dict[str, str],
        special_tokens: dict[str, str],
        eos_ids: Sequence[int] = (),
        now: datetime | None = None,
    ) -> None:
        """`templates`: name -> jinja source, "default" among them; "tool_use", if there, is used for rows with tools.
        `eos_ids`: ids at which generation stops, besides the template's own end of turn, which is found by a trial.
        `now`: what templates that write the date take for today; None: the clock's.
        Raises CannotRender where a source is not a template.
        """
        self.tokenizer = tokenizer
        self.special_tokens = special_tokens
        self._fixed_now = now
        self._environment = Environment()
        try:
            self._templates = {name: self._environment.from_string(text) for name, text in templates.items()}
        except TemplateError as error:
            raise CannotRender(reason=f"The model's chat template is not valid: {error}") from error
        self.sha256 = _digest(templates)
        self.eos_ids = self._all_stop_ids(eos_ids)

    @classmethod
    def load(cls, directory: Path | str, now: datetime | None = None) -> "ChatTemplate":
        """From a model's directory: tokenizer.json, and the template beside it or in tokenizer_config.json.

        Raises CannotRender where one of them is missing.
        """
        root = Path(directory)
        config = _read_json(root / "tokenizer_config.json")
        tokenizer = _load_tokenizer(root / "tokenizer.json")
        special = _special_tokens({**_read_json(root / "special_tokens_map.json"), **config})
        eos_ids = _configured_eos_ids(root, tokenizer, special)
        return cls(tokenizer, _load_templates(root, config), special, eos_ids, now)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation's text. Raises CannotRender with the template's own reason where it refuses the messages."""
        return self._render(messages, tools, add_generation_prompt, self._now())

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """What the model is given when it is asked for the next message. Raises CannotRender."""
        return self._tokenize(self.render(messages, tools, add_generation_prompt=True)).ids

    def encode(self, example: Example, max_length: int) -> Rendered:
        """One row's ids and labels, cut at the end after `max_length` tokens.

        Raises CannotRender where the template loses part of the row, gives its turns no end that could be learned, or
        writes a trained turn differently once others follow it: `split` such rows first.
        """
        now = self._now()  # once: the renderings of a row must agree though midnight passes between them
        text = self._render(example.messages, example.tools, False, now)
        self._refuse_losses(example, text)
        encoding = self._tokenize(text)
        labels = [IGNORED] * len(encoding.ids)
        for index, message in enumerate(example.messages):
            if message.is_trained:
                start, end = self._turn(example, index, text, now)
                self._label(labels, encoding, start, end)
        ids = encoding.ids
        return Rendered(ids[:max_length], labels[:max_length], truncated=len(ids) > max_length)

    def split(self, example: Example) -> list[Example]:
        """The rows to encode for this one: itself, or one for each trained turn, ending with it.

        Some templates show a turn's thinking only while it is the last. A turn is then learned from the text that the
        model is given when it has to write that turn, which no single text holds for all of them.
        """
        trained = [index for index, message in enumerate(example.messages) if message.is_trained]
        if len(trained) == 1 and trained[0] == len(example.messages) - 1:
            return [example]
        now = self._now()
        text = self._render(example.messages, example.tools, False, now)
        if all(text.startswith(self._up_to(example, index + 1, False, now).rstrip()) for index in trained):
            return [example]
        return [_ending_with(example, index) for index in trained]

    def _now(self) -> datetime:
        return self._fixed_now or datetime.now().astimezone()

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, add_generation_prompt: bool, now: datetime
    ) -> str:
        variables = {
            **self.special_tokens,
            "messages": [message.for_template() for message in messages],
            "tools": [tool.for_template() for tool in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]
        try:
            return self._environment.render(template, variables, now)
        except Exception as error:  # a template is a program: it can fail in any way that Python can
            raise CannotRender(reason=f"The model's chat template refuses the messages: {error}") from error

    def _up_to(self, example: Example, count: int, add_generation_prompt: bool, now: datetime) -> str:
        return self._render(example.messages[:count], example.tools, add_generation_prompt, now)

    def _tokenize(self, text: str) -> Encoding:
        # The template writes the special tokens itself; asking for them again would double the BOS.
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _turn(self, example: Example, index: int, text: str, now: datetime) -> tuple[int, int]:
        """Where in `text` the trained turn starts (after the generation prompt) and ends, in characters."""
        after = self._up_to(example, index + 1, False, now).rstrip()
        if not text.startswith(after):
            raise CannotRender(
                reason=f"The model's chat template writes message {index + 1} differently once others follow it, so it "
                "cannot be learned together with them. Give one row for each answer, ending with it."
            )
        if index == 0:
            return self._start_of_opening_turn(example, after, now), len(after)
        before = self._up_to(example, index, True, now)
        if not after.startswith(before):
            raise CannotRender(
                reason=f"The model's chat template does not begin message {index + 1} as its generation prompt does, "
                "so what the model would learn is not what it will be asked. Use a model with another template."
            )
        return len(before), len(after)

    def _start_of_opening_turn(self, example: Example, after: str, now: datetime) -> int:
        # Nothing can be rendered before the first message, so the turn is compared with one that says something else.
        text = example.messages[0].content or ""
        other = example.messages[0].model_copy(update={"content": ("b" if text[:1] == "a" else "a") + text})
        return _common_length(after, self._render([other], example.tools, False, now))

    def _label(self, labels: list[int], encoding: Encoding, start: int, end: int) -> None:
        """Labels the tokens that lie wholly in the turn, up to its last stop token.

        A token across the turn's start is not labelled: asked for the turn, the model is given another token there.
        """
        inside = [i for i, (first, last) in enumerate(encoding.offsets) if start <= first and last <= end]
        stops = [i for i in inside if encoding.ids[i] in self.eos_ids and encoding.offsets[i][1] > start]
        if not stops:
            raise CannotRender(
                reason="The model's chat template ends an assistant message with no stop token, so the model would "
                "never learn to stop. Use a template that writes the end-of-turn token after each answer."
            )
        for i in inside:
            if i <= stops[-1]:
                labels[i] = encoding.ids[i]

    def _refuse_losses(self, example: Example, text: str) -> None:
        names = [call.function.name for message in example.messages for call in message.tool_calls or ()]
        names += [message.function_call.name for message in example.messages if message.function_call]
        names += [tool.function.name for tool in example.tools or ()]
        lost = next((name for name in names if name not in text), None)
        if lost is not None:
            raise CannotRender(
                reason=f"The model's chat template does not show tools, so '{lost}' would be lost. Use a model whose "
                "template knows tools, or write the calls as plain content."
            )

    def _all_stop_ids(self, configured: Sequence[int]) -> frozenset[int]:
        """The configured stop tokens and the special token that the template writes right after an answer."""
        question, answer = Message(role="user", content="question"), Message(role="assistant", content="answer")
        try:
            after = self.render([question, answer]).rpartition("answer")[2]
        except CannotRender:
            return frozenset(configured)
        special = {id for id, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        ends = [id for id in self._tokenize(after).ids if id in special]
        return frozenset(configured) | frozenset(ends[:1])


def _ending_with(example: Example, index: int) -> Example:
    earlier = [
        message.model_copy(update={"weight": 0}) if message.role == "assistant" else message
        for message in example.messages[:index]
    ]
    return example.model_copy(update={"messages": [*earlier, example.messages[index]]})


def _common_length(left: str, right: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _digest(templates: dict[str, str]) -> str:
    # One template's digest is that of its file, so that anybody can check it with sha256sum.
    named = templates["default"] if len(templates) == 1 else json.dumps(templates, sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        raise CannotRender(reason="The model has no tokenizer.json. Save it with a fast tokenizer and add it again.")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    # Without its post-processor nothing can add a BOS behind the template's back, and offsets keep their blanks.
    return Tokenizer.from_str(json.dumps({**tokenizer, "post_processor": None, "truncation": None, "padding": None}))


def _load_templates(root: Path, config: dict[str, Any]) -> dict[str, str]:
    in_config = config.get("chat_template") or {}
    if isinstance(in_config, str):
        templates = {"default": in_config}
    else:
        listed = in_config if isinstance(in_config, list) else []
        templates = {item["name"]: item["template"] for item in listed}
    for path in sorted((root / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if (root / "chat_template.jinja").exists():
        templates["default"] = (root / "chat_template.jinja").read_text(encoding="utf-8")
    if "default" not in templates:
        raise CannotRender(
            reason="The model has no chat template: neither chat_template.jinja nor 'chat_template' in "
            "tokenizer_config.json. Add one to its directory, or use the model's instruct version."
        )
    return templates


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    def text(value: Any) -> Any:
        return value.get("content") if isinstance(value, dict) else value

    return {name: text(config[name]) for name in _SPECIAL_TOKENS if isinstance(text(config.get(name)), str)}


def _configured_eos_ids(root: Path, tokenizer: Tokenizer, special: dict[str, str]) -> list[int]:
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(root / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    named = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return ids if named is None else [*ids, named]
