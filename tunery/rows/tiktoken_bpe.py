"""Byte-level BPE by `tiktoken`, three times as fast as `tokenizers`, for models with provably equal ids.

Proven for each model before its first text:

- Text is split alike. The pre-tokenizer is one of those below, whose patterns differ only in the regex engine, and each
  character of a text is in the same classes in both: tested once for each block of 256 characters.
- Pieces are merged alike. `tiktoken` joins neighbours whenever their bytes are a token, `tokenizers` only by a listed
  merge. The two are equivalent if each token comes from one merge, merges rank in the order of their ids, and each
  token's own text encodes to that token: neighbours that form a token are then its last two parts when it is encoded
  alone.

`tokenizers` encodes for any other model, and any text with a character that is classified differently.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import tiktoken
from tokenizers import Tokenizer

from tunery.rows.tokens import any_of

_BLANKS = r"|\s+(?!\S)|\s+"
_LETTERS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+"
_GPT2 = rf"(?:{_LETTERS}| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+){_BLANKS}"
"""Alternatives without lookahead are grouped: the engine compiles them to one automaton and takes a tenth less time."""
_GPT2_DIGITS = rf"(?:{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+)|\s+(?![^\s\p{{N}}])|\s+"
"""Digits are split off first, so that blanks before a digit are at the end of their piece."""
_WORDS = [
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    for digits in ("", "{1,3}")
]
_SPLITS = {words + _BLANKS: f"(?:{words}){_BLANKS}" for words in _WORDS}
"""The patterns as in models' files, and as compiled here."""
_BLOCK = 256
_MOST_CHARACTERS = 10_000
"""Longer runs without a special token are left to `tokenizers`: the regex engine fails on a million blanks."""
_KEPT = 256
"""Cached texts between special tokens: a system message is in every row, and a prompt is encoded twice for its row."""
_PROBES = ("{0}", "{0}{0}", "a{0}a", "1{0}1", "!{0}!", " {0}", "{0} ", " {0} ", "'{0}", "{0}\n", "\n{0}")


class Unproven(Exception):
    """`tiktoken` may give other ids for the model."""


def prove(tokenizer: Tokenizer) -> "TiktokenBPE | None":
    """Returns an equivalent, faster encoder; None if equivalence is not proven. Takes up to a second."""
    try:
        return TiktokenBPE(tokenizer)
    except Unproven:
        return None


class TiktokenBPE:
    """Encodes texts as a proven model's `tokenizers.Tokenizer` does without `add_special_tokens`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises Unproven."""
        spec = json.loads(tokenizer.to_str())
        self._tokenizer = tokenizer
        self._pattern = _pattern(spec)
        self._only_ascii = spec["normalizer"] is not None  # NFC, which leaves ASCII as it is
        self._added_ids = _added(spec)
        self._added = any_of(list(self._added_ids))
        ranks = _ranks(spec)
        self._bytes = {byte for token in ranks if len(token) == 1 for byte in token}
        self._encoding = _encoding(self._pattern, ranks)
        self._proven = self._agreeing(0)
        self._proven_ascii = "".join(filter(str.isascii, self._proven)).encode()
        self._tried = {0}
        self._ids = lru_cache(_KEPT)(self._encode_part)

    def encode(self, text: str) -> list[int] | None:
        """Returns the ids; None if `tokenizers` has to encode the text."""
        ids: list[int] = []
        for at, part in enumerate(self._added.split(text) if self._added else (text,)):
            if at % 2:
                ids.append(self._added_ids[part])
            elif part:
                if (found := self._ids(part)) is None:
                    return None
                ids += found
        return ids

    def _encode_part(self, part: str) -> list[int] | None:
        """Returns the ids of a text between special tokens; None if `tokenizers` has to encode it."""
        if len(part) > _MOST_CHARACTERS or not self._is_proven(part):
            return None
        return self._encoding.encode_ordinary(part)

    def _is_proven(self, text: str) -> bool:
        if text.isascii():
            return not text.encode().translate(None, self._proven_ascii)
        if self._only_ascii:
            return False
        for block in {ord(character) // _BLOCK for character in set(text) - self._proven} - self._tried:
            self._tried.add(block)
            self._proven |= self._agreeing(block)
        return self._proven.issuperset(text)

    def _agreeing(self, block: int) -> set[str]:
        """Returns the characters of a block at which both split alike, whatever their neighbours."""
        characters = [chr(code) for code in range(block * _BLOCK, (block + 1) * _BLOCK) if not 0xD800 <= code < 0xE000]
        # `tokenizers` drops a byte that is not a token.
        characters = [character for character in characters if self._bytes.issuperset(character.encode())]
        probes = {character: [probe.format(character) for probe in _PROBES] for character in characters}
        # With every possible piece as a token, each piece becomes one token, which makes the splits visible.
        pieces = {part for texts in probes.values() for text in texts for part in _parts(text)}
        seen = _encoding(self._pattern, {bytes([byte]): byte for byte in range(256)} | _numbered(pieces))
        return {character for character, texts in probes.items() if all(self._cuts_alike(seen, text) for text in texts)}

    def _cuts_alike(self, seen: tiktoken.Encoding, text: str) -> bool:
        ours = [seen.decode_single_token_bytes(id).decode(errors="replace") for id in seen.encode_ordinary(text)]
        return ours == [text[start:end] for _, (start, end) in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _numbered(pieces: set[str]) -> dict[bytes, int]:
    return {piece.encode(): 256 + at for at, piece in enumerate(sorted(pieces)) if len(piece.encode()) > 1}


def _parts(text: str) -> list[str]:
    return [text[start:end] for start in range(len(text)) for end in range(start + 1, len(text) + 1)]


def _encoding(pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("model", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _pattern(spec: dict[str, Any]) -> str:
    """Returns the pattern by which the model splits text. Raises Unproven."""
    cut, normalizer = spec["pre_tokenizer"] or {}, spec["normalizer"]
    if spec["truncation"] or spec["padding"] or (normalizer or {"type": "NFC"})["type"] != "NFC":
        raise Unproven
    steps = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    names = [step.get("type") for step in steps]
    if names[-1:] != ["ByteLevel"] or steps[-1]["add_prefix_space"]:
        raise Unproven
    by_itself = steps[-1].get("use_regex", True)
    if names == ["ByteLevel"] and by_itself:
        return _GPT2
    if names == ["Digits", "ByteLevel"] and by_itself and steps[0]["individual_digits"]:
        return _GPT2_DIGITS
    if names == ["Split", "ByteLevel"] and not by_itself and _is_plain_split(steps[0]):
        return _SPLITS[steps[0]["pattern"]["Regex"]]
    raise Unproven


def _is_plain_split(step: dict[str, Any]) -> bool:
    return step["behavior"] == "Isolated" and not step["invert"] and step["pattern"].get("Regex") in _SPLITS


def _added(spec: dict[str, Any]) -> dict[str, int]:
    """Returns the tokens that are split off first. Raises Unproven if they match more than their own text."""
    tokens = spec["added_tokens"]
    takes_more = any(token[flag] for token in tokens for flag in ("lstrip", "rstrip", "single_word"))
    if takes_more or len({token["normalized"] for token in tokens}) > 1:
        raise Unproven
    return {token["content"]: token["id"] for token in tokens}


def _ranks(spec: dict[str, Any]) -> dict[bytes, int]:
    """Returns the id of each token's bytes, by which merges are ranked. Raises Unproven."""
    model, added = spec["model"], {token["content"] for token in spec["added_tokens"]}
    if model["type"] != "BPE" or any(model.get(name) for name in _UNUSUAL):
        raise Unproven
    vocab: dict[str, int] = model["vocab"]
    merged = [left + right for left, right in (_pair(merge) for merge in model["merges"])]
    ids = [vocab[token] for token in merged]
    letters = _alphabet()
    is_ranked = all(before < after for before, after in pairwise(ids))
    known = (letters.keys() & vocab.keys()) | set(merged)
    if not is_ranked or (model["ignore_merges"] and vocab.keys() - known - added):
        raise Unproven
    _check_alone(model, known, vocab)
    return {bytes(letters[letter] for letter in token): vocab[token] for token in known}


_UNUSUAL = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")


def _pair(merge: Sequence[str] | str) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _check_alone(model: dict[str, Any], tokens: set[str], vocab: dict[str, int]) -> None:
    """Raises Unproven unless the merges alone turn each token's text into that token."""
    bare = {"version": "1.0", "model": {**model, "ignore_merges": False}, "added_tokens": []}
    alone = Tokenizer.from_str(json.dumps(bare))
    texts = sorted(tokens)
    for text, found in zip(texts, alone.encode_batch_fast(texts), strict=True):
        if found.ids != [vocab[text]]:
            raise Unproven


def _alphabet() -> dict[str, int]:
    """Returns the byte of each character of byte-level vocabularies: itself if printable, else from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(seen))
    return {chr(byte): byte for byte in seen} | {chr(256 + at): byte for at, byte in enumerate(hidden)}
