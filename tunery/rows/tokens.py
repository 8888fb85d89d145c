"""Tokenises prompts and answers; special tokens in user data stay text.

A row's ids are those of the prompt, as at inference, followed by those of the answer. Tokenising both at once differs:
a token may span the boundary, and the model would be trained on a prompt that it never gets.
"""

import json
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from tunery import processes
from tunery.rows.errors import CannotRender

if TYPE_CHECKING:
    from tunery.rows.tiktoken_bpe import TiktokenBPE

_ANCHORS = ("", "\n")
"""Prefixes for an answer that is tokenised alone, so that a tokenizer which adds a blank before the first word of every
text (SentencePiece's) does not add one before the answer. The first that leaves the text unchanged is used."""
_CONTEXT = 8
"""Number of prompt tokens that are decoded with the answer to compare texts."""


class Tokens:
    """A tokenizer that adds no special tokens by itself. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int] = ()) -> None:
        """`stop_ids`: tokens that count as special although the tokenizer does not mark them."""
        self.tokenizer = tokenizer
        added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: id for id, token in added.items() if token.special or id in stop_ids}
        # Such a token absorbs the blanks that follow it, also those of an answer.
        self._takes_blanks = {id for id, token in added.items() if token.rstrip}
        self._names = list(self.special_ids)
        self._special = any_of(self._names)
        # Random, so that no user data can contain it.
        self._mark = f"zq{secrets.token_hex(8)}"
        self._placeholder = re.compile(rf"{self._mark}n(\d+)z")
        self._fast: TiktokenBPE | None = None
        self._is_hastened = False

    def hide(self, value: Any) -> tuple[Any, list[str]]:
        """Returns a JSON value with placeholders for the special tokens in its texts, and those tokens.

        `encode` encodes the placeholders as the original text, and the special tokens of the template as such.
        """
        found: list[str] = []

        def placeholder(match: re.Match[str]) -> str:
            found.append(match.group())
            return f"{self._mark}n{self._names.index(match.group())}z"

        if self._special is None or not self.has_special(texts(value)):
            return value, []
        pattern = self._special
        return map_texts(value, lambda text: pattern.sub(placeholder, text)), found

    def has_special(self, some: list[str]) -> bool:
        """Whether a special token occurs in one of the texts, or across two of them, which does no harm."""
        return self._special is not None and self._special.search("\0".join(some)) is not None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text that a template has written."""
        tokenizer = self.tokenizer
        if self._special is not None and self._mark in text:
            text = self.show(self._special.sub(lambda match: self._secret(match.group()), text))
            tokenizer = self._without_spellings
        elif self._fast is not None and (found := self._fast.encode(text)) is not None:
            return found
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def hasten(self) -> None:
        """Switches to `tiktoken`, if it is installed and proven equal: takes a second, worth it for many rows."""
        if not self._is_hastened:
            self._is_hastened = True
            with suppress(ImportError):
                from tunery.rows import tiktoken_bpe

                self._fast = tiktoken_bpe.prove(self.tokenizer)
                processes.return_memory()  # the proof takes 60 MiB, and several processes make one

    def extend(self, given: list[int], prompt: str, text: str) -> list[int]:
        """Returns the ids of `text` after those of its beginning `prompt`, which are `given`. Raises CannotRender.

        They are those of the whole text unless one of its tokens spans the prompt's end.
        """
        whole, rest = self.encode(text), text[len(prompt) :]
        loses_blanks = bool(given) and given[-1] in self._takes_blanks and rest[:1].isspace()
        if whole[: len(given)] == given and not loses_blanks:
            return whole[len(given) :]
        return self._continue(given, rest)

    def context(self, prompt: list[int]) -> list[int]:
        """Returns the prompt's last tokens, to decode an answer with: alone it would lose a blank at its beginning.

        Empty after a special token, where some tokenizers add a blank before any text.
        """
        return [] if not prompt or prompt[-1] in self.special_ids.values() else prompt[-_CONTEXT:]

    def _continue(self, given: list[int], text: str) -> list[int]:
        special = None if self._special is None else self._special.search(text)
        # Up to the first special token, as those may absorb blanks around them.
        head = self.show(text[: special.end()] if special else text)
        for context in (self.context(given), given[-_CONTEXT:]):
            before = self._decode(context)
            for anchor in _ANCHORS:
                start, ids = self.encode(anchor), self.encode(anchor + text)
                answer = ids[len(start) :]
                if ids[: len(start)] == start and self._decode(context + answer)[len(before) :].startswith(head):
                    return answer
        raise CannotRender(
            reason=f"The model's tokenizer cannot encode an answer that begins with {json.dumps(head[:10])} after its "
            "prompt without changing it. Change the beginning of the answer."
        )

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def show(self, text: str) -> str:
        """Returns the text with what `hide` has replaced."""
        return self._placeholder.sub(lambda match: self._names[int(match[1])], text)

    def _secret(self, name: str) -> str:
        return f"\ue000{self._mark}{self.special_ids[name]}\ue001"

    @cached_property
    def _without_spellings(self) -> Tokenizer:
        """Returns the tokenizer with its special tokens renamed to what no text contains: same ids, same rules.

        `Tokenizer.encode_special_tokens` would turn all special tokens into text, also those of the template.
        """
        made = json.loads(self.tokenizer.to_str())
        secret = {name: self._secret(name) for name in self._names}
        for token in made["added_tokens"]:
            token["content"] = secret.get(token["content"], token["content"])
        model = made["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {secret.get(name, name): id for name, id in model["vocab"].items()}
        else:
            model["vocab"] = [[secret.get(name, name), score] for name, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = secret.get(model["unk_token"], model["unk_token"])
        return Tokenizer.from_str(json.dumps(made))


def texts(value: Any) -> list[str]:
    """Returns all texts in a JSON value, keys too, in no particular order."""
    found: list[str] = []
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            left += item
            left += item.values()
        elif isinstance(item, list):
            left += item
    return found


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a JSON value with each of its texts changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    return value


def any_of(names: list[str]) -> re.Pattern[str] | None:
    """Returns a pattern of one group that matches the longest of `names`, ordered by first character for speed."""
    groups: dict[str, list[str]] = {}
    for name in sorted(filter(None, names), key=len, reverse=True):
        groups.setdefault(name[0], []).append(name[1:])
    parts = [re.escape(first) + f"(?:{'|'.join(map(re.escape, rest))})" for first, rest in groups.items()]
    return re.compile(f"({'|'.join(parts)})") if parts else None
