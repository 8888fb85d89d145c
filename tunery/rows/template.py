"""Chat template -> text -> token ids -> labels. The only code that decides which tokens are learned.

Learned are the trained assistant turns, found by prefix difference: the conversation is rendered up to a turn with the
generation prompt (the prompt at inference), and up to the turn's end; the difference is what the model must generate,
including the end-of-turn token. `{% generation %}` marks are not used: most templates have none, and a missing mark
would silently train on nothing.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer

from tunery.errors import Unavailable
from tunery.rows import template_files as files
from tunery.rows.ahead import fill
from tunery.rows.errors import CannotRender
from tunery.rows.masks import ANSWERS, Mask
from tunery.rows.messages import Example, Message, PlainText, Tool
from tunery.rows.pieces import Piece, Pieces, is_trimmed
from tunery.rows.sandbox import Environment, Template
from tunery.rows.sentinels import FieldCheck
from tunery.rows.tokens import Tokens
from tunery.rows.turns import View, Views, common_length, ending_with, trained_turns, views_of
from tunery.spec import LossOn

IGNORED = -100
"""The label of a token that is not learned: `ignore_index` of torch's cross entropy."""
_TOGETHER = 64
"""Renderings of several rows in one request."""


class Rendered(NamedTuple):
    """One row as model input. `labels[i]` belongs to `input_ids[i]` (not shifted): its id, or IGNORED.

    `trained_tokens`: the number of learned tokens, of which the first is none, as nothing precedes it; 0 means that the
    cut has removed the whole answer. `spelled_special`: special tokens that occur in the row's texts, where they stay
    text. `answer_cut`: whether the cut has removed tokens of an answer.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    trained_tokens: int
    spelled_special: tuple[str, ...] = ()
    answer_cut: bool = False


class _Apart(CannotRender):
    """{reason}"""


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
        `eos_ids`: ids at which generation stops, besides the template's end of turn, which a trial rendering finds.
        `now`: the time for templates that write the date; None: the current time.
        Raises CannotRender if a source is not a template.
        """
        self.tokenizer = tokenizer
        self.special_tokens = special_tokens
        self._tokens = Tokens(tokenizer, eos_ids)
        self._made_of = tokenizer, templates, special_tokens, eos_ids, now
        self._fixed_now = now
        self._ahead: dict[int, tuple[Views, tuple[str, ...], Sequence[Message]]] = {}
        """Results of `render_ahead` by the identity of the list of messages, which is kept too, so that its identity
        cannot be reused."""
        self._environment = Environment()
        try:
            self._templates = {name: self._environment.from_string(text) for name, text in templates.items()}
        except TemplateError as error:
            raise CannotRender(reason=f"The model's chat template is not valid: {error}") from error
        self._fields = FieldCheck(
            lambda messages, tools, prompting: self._render(messages, tools, [(len(messages), prompting)])[0]
        )
        self._pieces = Pieces(self._trace)
        self.sha256 = files.digest(templates)
        self.eos_ids = self._all_stop_ids(eos_ids)

    @classmethod
    def load(cls, directory: Path | str, now: datetime | None = None) -> "ChatTemplate":
        """Loads a model directory's tokenizer.json, and the template beside it or in tokenizer_config.json.

        Raises CannotRender if one of them is missing.
        """
        root = Path(directory)
        config = files.read_json(root / "tokenizer_config.json")
        tokenizer = files.load_tokenizer(root / "tokenizer.json")
        special = files.special_tokens({**files.read_json(root / "special_tokens_map.json"), **config})
        eos_ids = files.configured_eos_ids(root, tokenizer, special)
        return cls(tokenizer, files.load_templates(root, config), special, eos_ids, now)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles only the arguments: compiled templates and trial results are made again."""
        return type(self), self._made_of

    def __copy__(self) -> Self:
        """Unlike pickling, shares compiled templates and trial results with the copy."""
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        return made

    def fingerprint(self) -> str | None:
        """Returns the digest of everything that affects a row's tokens; None if the current time does."""
        tokenizer, templates, special_tokens, eos_ids, now = self._made_of
        dates = files.dates(templates, now)
        parts = [tokenizer.to_str(), templates, special_tokens, list(eos_ids), dates]
        return None if dates is None else hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def hasten(self) -> None:
        """Prepares for many rows: takes up to a second, after which the same ids are computed faster."""
        self._tokens.hasten()

    def render_ahead(self, examples: Sequence[Example]) -> Self:
        """Returns a copy that has rendered these examples. Errors of a row are raised later, when it is encoded."""
        now = self._now()
        ahead: dict[int, tuple[Views, tuple[str, ...], Sequence[Message]]] = {}
        left: dict[int, Example] = {}
        for example in examples:
            if isinstance(example, PlainText):
                continue
            messages = example.messages
            if (filled := self._fill_views(example, now)) is not None:
                ahead[id(messages)] = (filled, (), messages)
                continue
            with suppress(CannotRender):
                ahead[id(messages)] = (*self._views(messages, example.tools, False, now), messages)
                left[id(messages)] = example
        made = copy(self)
        made._ahead = ahead
        rows = [(ahead[key][0], views_of(trained_turns(one), len(one.messages))) for key, one in left.items()]
        fill(
            rows,
            lambda views, asked: self._variables(views.messages, views.tools, asked),
            lambda made, tools: self._environment.render_all(self._template(tools), made, now, _TOGETHER),
        )
        return made

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Returns the conversation's text. Raises CannotRender, with the template's own reason if it refuses the
        messages, and if it would drop a part of them."""
        views = self._views(messages, tools, add_generation_prompt)[0]
        return self._tokens.show(views.text(len(messages), add_generation_prompt))

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """Returns the ids of the prompt for the next message. Raises CannotRender as `render` does."""
        views = self._views(messages, tools, True)[0]
        return self._tokens.encode(views.text(len(messages), True))

    def encode(self, example: Example, max_length: int) -> Rendered:
        """Returns a row's ids and labels, cut after `max_length` tokens.

        Raises CannotRender if the template drops a part of the row, gives turns no end that could be learned, or
        renders a trained turn differently once others follow: `split` such rows first.
        """
        views, spelled = self._views(example.messages, example.tools, False)
        return _cut(*self._join(views, trained_turns(example), len(example.messages)), max_length, spelled)

    def encode_all(self, example: Example, max_length: int, loss_on: LossOn = "assistant") -> list[Rendered]:
        """Returns the sequences of a row: one, or one for each trained turn, ending with it. Raises CannotRender.

        Some templates show a turn's thinking only in the last turn. Then each turn is learned from the prompt that the
        model gets for it at inference, and no single text contains all of them.
        """
        mask = Mask.of(example, loss_on)
        views, spelled = self._views(example.messages, example.tools, False)
        try:
            return [_cut(*self._join(views, mask.turns, len(example.messages), mask), max_length, spelled)]
        except _Apart as error:
            if mask.unlearned:
                raise CannotRender(reason=error.message) from error
        if mask.with_prompts:  # everything is learned, so earlier answers are taken as the whole text shows them
            return [_cut(*self._join(views, mask.turns[-1:], len(example.messages), mask), max_length, spelled)]
        return [self._part(example, index, views, max_length, spelled) for index in mask.turns]

    def encode_text(self, text: str, max_length: int) -> Rendered:
        """Encodes plain text, all tokens learned: BOS if the template begins with it, the text, and the end token.

        Raises CannotRender if the tokenizer names no end token.
        """
        end = self.tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        if end is None:
            raise CannotRender(
                reason="The model's tokenizer has no eos_token, which ends plain text. Use a base that has one."
            )
        spelled = self._tokens.hide(text)[1]
        ids = [*self.encode_beginning(text), end]
        cut = _cut(ids, ids, max_length, tuple(dict.fromkeys(map(self._tokens.show, spelled))))
        return cut._replace(answer_cut=False)  # the beginning of a text is still a text

    def encode_beginning(self, text: str) -> list[int]:
        """Returns the ids of plain text to be continued, with the same beginning as in `encode_text`."""
        return [*self._opening_bos, *self._tokens.encode(self._tokens.hide(text)[0])]

    @cached_property
    def _opening_bos(self) -> list[int]:
        """Returns the BOS token if chats begin with it, so that plain text begins the same way."""
        bos = self.special_tokens.get("bos_token", "")
        id = self.tokenizer.token_to_id(bos)
        try:
            chat = self.render([Message(role="user", content="question"), Message(role="assistant", content="answer")])
        except CannotRender:
            return []
        # If each turn begins with it, it marks turns and not the beginning of a text.
        return [id] if id is not None and chat.startswith(bos) and chat.count(bos) == 1 else []

    def encode_answer(self, example: Example) -> tuple[list[int], list[int]]:
        """Returns the ids of the last message's prompt, and those of the message itself. Raises CannotRender."""
        last = len(example.messages) - 1
        views, _ = self._views(example.messages, example.tools, False)
        ids, labels = self._join(views, (last,), last + 1)
        answer = [label for label in labels if label != IGNORED]
        return ids[: labels.index(answer[0])], answer

    def split(self, example: Example) -> list[Example]:
        """Returns the rows that `encode_all` encodes as one sequence each."""
        views = self._views(example.messages, example.tools, False)[0]
        try:
            self._join(views, trained_turns(example), len(example.messages))
        except _Apart:
            return [ending_with(example, index) for index in trained_turns(example)]
        return [example]

    def answer_context(self, prompt_ids: list[int]) -> list[int]:
        """Returns the prompt's last ids, as context in which an answer's ids decode as in the whole text."""
        return self._tokens.context(prompt_ids)

    def answer_length(self, ids: Sequence[int]) -> int:
        """Returns the number of an answer's ids before the first stop token."""
        return next((place for place, token in enumerate(ids) if token in self.eos_ids), len(ids))

    def answer_text(self, ids: Sequence[int]) -> str:
        """Returns the text of an answer's ids up to the first stop token."""
        text: str = self.tokenizer.decode(list(ids[: self.answer_length(ids)]), skip_special_tokens=True)
        return text

    def _views(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, prompting: bool, now: datetime | None = None
    ) -> tuple[Views, tuple[str, ...]]:
        """Returns the conversation as the template's input, and the special tokens that occur in its texts."""
        if not prompting and (known := self._ahead.get(id(messages))):
            return known[0], known[1]
        given = [message.for_template() for message in messages]
        given_tools = [tool.for_template() for tool in tools] if tools else None
        given = self._fields.in_shown_form(given, given_tools, prompting)
        (given, given_tools), spelled = self._tokens.hide([given, given_tools])
        now = now or self._now()  # once, so that all renderings of a row have the same date
        return Views(partial(self._render, now=now), given, given_tools), tuple(dict.fromkeys(spelled))

    def _fill_views(self, example: Example, now: datetime) -> Views | None:
        """Returns a plain conversation as the template's input, with all texts; None if the template must render it, or
        if a special token occurs in it."""
        given = [message.for_template() for message in example.messages]
        texts = self._pieces.render(example, given)
        if texts is None or self._tokens.has_special([message["content"] for message in given]):
            return None
        views = Views(partial(self._render, now=now), given, None)
        views.fill(texts)
        return views

    def _part(self, example: Example, index: int, views: Views, max_length: int, spelled: tuple[str, ...]) -> Rendered:
        own, _ = self._views(example.messages[: index + 1], example.tools, False)
        if own.messages != views.messages[: index + 1]:  # another form of empty content
            views = own
        return _cut(*self._join(views, (index,), index + 1), max_length, spelled)

    def _now(self) -> datetime:
        return self._fixed_now or datetime.now().astimezone()

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        views: Sequence[View],
        now: datetime | None = None,
    ) -> list[str]:
        try:
            return self._environment.render_all(
                self._template(bool(tools)), self._variables(messages, tools, views), now or self._now()
            )
        except Unavailable:
            raise
        except Exception as error:  # a template is a program: it can fail in any way that Python can
            raise CannotRender(reason=f"The model's chat template rejects the messages: {error}") from error

    def _trace(self, given: list[dict[str, Any]], views: Sequence[View]) -> list[list[Piece]] | None:
        try:
            shown = self._fields.in_shown_form(given, None, False)
        except CannotRender:  # it is reported for its row
            return None
        contents = enumerate(message["content"] for message in shown)
        traced = [(number, is_trimmed(content)) for number, content in contents]
        messages = [{**message, "content": content} for message, content in zip(shown, traced, strict=True)]
        variables = self._variables(messages, None, views)
        return self._environment.trace(self._template(False), variables, self._now())

    def _template(self, with_tools: bool) -> Template:
        return self._templates["tool_use" if with_tools and "tool_use" in self._templates else "default"]

    def _variables(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, views: Sequence[View]
    ) -> list[dict[str, Any]]:
        return [
            {
                **self.special_tokens,
                "messages": messages[:count],
                "tools": tools,
                "documents": None,
                "add_generation_prompt": prompting,
            }
            for count, prompting in views
        ]

    def _join(
        self, views: Views, trained: tuple[int, ...], count: int, mask: Mask = ANSWERS
    ) -> tuple[list[int], list[int]]:
        """Returns ids and labels of the first `count` messages. Raises _Apart if one sequence cannot hold all turns."""
        views.prepare(views_of(trained, count))
        whole = views.text(count)
        ids: list[int] = []
        labels: list[int] = []
        rest: list[int] = []
        for index in trained:
            prompt, after = self._turn(views, index, whole)
            given = self._tokens.encode(prompt)
            if given[: len(ids)] != ids:
                raise _Apart(
                    reason=f"The prompt of message {index + 1} tokenises the answers before it differently, so they "
                    "cannot be learned together. Write one row per answer."
                )
            answer, rest = self._answer(given, prompt, after, whole)
            labels += mask.label_prompt(given, IGNORED, start=len(ids))
            labels += mask.label_answer(index, answer, IGNORED)
            ids = given
            ids += answer
        ids += rest
        labels += mask.label_prompt(rest, IGNORED)
        return ids, labels

    def _turn(self, views: Views, index: int, whole: str) -> tuple[str, str]:
        """Returns the text before the trained turn, generation prompt included, and the text up to the turn's end."""
        after = views.text(index + 1).rstrip()
        if not whole.startswith(after):
            raise _Apart(
                reason=f"The model's chat template renders message {index + 1} differently once others follow it, so "
                "it cannot be learned together with them. Write one row per answer, ending with it."
            )
        if index == 0:
            return self._opening_prompt(views, after), after
        before = views.text(index, True)
        if not after.startswith(before):
            raise CannotRender(
                reason=f"The model's chat template does not begin message {index + 1} as its generation prompt does, "
                "so training would not match generation. Use a model with another template."
            )
        return before, after

    def _opening_prompt(self, views: Views, after: str) -> str:
        # Nothing can be rendered before the first message, so the turn is compared with one that has another text.
        first = views.messages[0]
        text = first["content"] or ""
        other = {**first, "content": ("b" if text[:1] == "a" else "a") + text}
        return after[: common_length(after, self._render([other], views.tools, [(1, False)])[0])]

    def _answer(self, given: list[int], prompt: str, after: str, whole: str) -> tuple[list[int], list[int]]:
        """Returns the ids of the answer up to its last stop token, and those that follow in `whole`."""
        is_last = whole.rstrip() == after
        ids = self._tokens.extend(given, prompt, whole if is_last else after)
        stop = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] in self.eos_ids), None)
        if stop is None:
            raise CannotRender(
                reason="The model's chat template does not end an assistant message with a stop token, so the model "
                "would never learn to stop. Use a template that writes the end-of-turn token after each answer."
            )
        answer = ids[: stop + 1]
        if is_last:
            return answer, ids[stop + 1 :]
        rest = self._tokens.extend(given, prompt, whole)
        # If the following text changes the answer's tokens, it is left out; none of it is learned.
        return answer, rest[len(answer) :] if rest[: len(answer)] == answer else []

    def _all_stop_ids(self, configured: Sequence[int]) -> frozenset[int]:
        """Returns the configured stop tokens and the special token that the template writes after an answer."""
        question, answer = Message(role="user", content="question"), Message(role="assistant", content="answer")
        try:
            after = self.render([question, answer]).rpartition("answer")[2]
        except CannotRender:
            return frozenset(configured)
        special = set(self._tokens.special_ids.values())
        ends = [id for id in self._tokens.encode(after) if id in special]
        return frozenset(configured) | frozenset(ends[:1])


def _cut(ids: list[int], labels: list[int], max_length: int, spelled: tuple[str, ...]) -> Rendered:
    truncated = len(ids) > max_length
    answer_cut = truncated and any(label != IGNORED for label in labels[max_length:])
    if truncated:
        ids, labels = ids[:max_length], labels[:max_length]
    trained = len(labels) - labels.count(IGNORED) - (labels[:1] not in ([], [IGNORED]))
    return Rendered(ids, labels, truncated, trained, spelled, answer_cut)
