"""Writes a model's tokenizer by GGUF's names: its tokens, their types, how pieces are joined and where words end.

llama.cpp has two kinds for these models. "gpt2" joins bytes by a list of merges inside words, which a named rule
splits; "llama" joins characters by the score of the result, as SentencePiece does. A tokenizer that is neither is
refused: its ids would differ.
"""

import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, pre_tokenizers

from tunery.rows import template_files
from tunery.rows.template import ChatTemplate
from worker.trainer import gguf_files
from worker.trainer.export.errors import NoGguf

RULES = ("smollm", "llama-bpe", "qwen2", "gpt-2")
_WITHOUT_WHOLE_WORDS = {"llama-bpe": "dbrx"}
"""The rule with the same splits that joins every word by its merges; the first keeps a word that is a token whole."""
_SPECIAL = re.compile(r"_?</?[^<>\s]*>")
_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_PHI3_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}
_NORMALIZERS = {"NFC", "Prepend", "Replace"}
SAMPLES = (
    "Hello, World!  It's 2024-11-28; I'LL pay 1234567.89 for you've   got\n\n\n  three\ttabs\t\tand spaces  ",
    "naïve café \u2013 Grüße, Ελληνικά, русский, 日本語のテキスト, العربية, हिन्दी, 👩‍👩‍👧 ½ ² ⅷ",
    "def f(x):\n    return x**2 != [1, 2]  # ok?\r\n\r\n<|im_start|>user\n'tis 'S 'Ve don'T",
    " leading, trailing \u00a0\u3000 wide\u200bzero… “quotes” \u2018single\u2019 \x00\x07 _under_score_ CamelCaseHTML5",
)


def describe(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Writes the tokenizer, chat template and special tokens of a model's folder. Raises NoGguf."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    said = json.loads(tokenizer.to_str())
    model = said["model"]
    if model["type"] != "BPE":
        raise NoGguf(reason=f"its tokenizer is of type {model['type']}, and only BPE is supported.")
    _check_normalizer(said)
    tokens = _tokens(tokenizer, vocabulary)
    if _is_sentencepiece(said):
        _describe_sentencepiece(writer, said, tokens)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(find_rule(tokenizer, ignores_merges=model.get("ignore_merges", False)))
        writer.add_token_merges(_merges(tokenizer, model["merges"]))
    writer.add_token_list(tokens)
    writer.add_token_types(_types(tokenizer, said, tokens))
    _describe_specials(writer, folder, tokenizer)


def name_for(folder: Path, name: str) -> str:
    """Returns the model's name as the file must state it. Raises NoGguf.

    Only by the name does llama.cpp know that special tokens strip the whitespace after them: it does that in models
    called Phi-3, and in no others.
    """
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    strip = {token["content"] for token in added if token["rstrip"]}
    if any(token["lstrip"] or token["single_word"] for token in added) or (
        strip and strip != {token["content"] for token in added} - _PHI3_KEEPS
    ):
        raise NoGguf(reason="its special tokens strip adjacent whitespace in a way that llama.cpp does not support.")
    if not strip:
        return _PHI3.sub("phi_3", name)
    return name if _PHI3.search(name) else f"{name} (Phi-3)"


def composes(folder: Path) -> bool:
    """Whether the tokenizer normalises text to Unicode's NFC, which llama.cpp leaves to its callers."""
    said = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return "NFC" in _normalizers(said)


def _normalizers(said: dict[str, Any]) -> set[str]:
    found = said["normalizer"] or {"normalizers": []}
    return {part["type"] for part in found.get("normalizers", [found])}


def _tokens(tokenizer: Tokenizer, vocabulary: int) -> list[str]:
    """Returns each id's token; ids that only the weights have get names that occur in no text."""
    by_id = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    if max(by_id) >= vocabulary:
        raise NoGguf(reason=f"its tokenizer has the id {max(by_id)}, but its weights have only {vocabulary} tokens.")
    mistaken = _mistaken(tokenizer)
    by_id = {number: token for number, token in by_id.items() if token not in mistaken}
    return [by_id.get(number, f"[UNUSED{number}]") for number in range(vocabulary)]


def _mistaken(tokenizer: Tokenizer) -> set[str]:
    """Returns tokens that look special, are not, and are never produced from text: Qwen has "</s>". llama.cpp
    recognises such names and would read them in a text as its end.
    """
    looking = {token: number for token, number in tokenizer.get_vocab(False).items() if _SPECIAL.fullmatch(token)}
    in_bytes = {f"<0x{value:02X}>" for value in range(256)}
    return {
        token
        for token, number in looking.items()
        if token not in in_bytes and number not in tokenizer.encode(token, add_special_tokens=False).ids
    }


def _check_normalizer(said: dict[str, Any]) -> None:
    """Raises NoGguf for a tokenizer that changes texts in a way that llama.cpp does not.

    Why NFC is accepted, though llama.cpp does not apply it: nearly all text is in it already.
    """
    if others := sorted(_normalizers(said) - _NORMALIZERS):
        raise NoGguf(reason=f"its tokenizer normalises text by {', '.join(others)}, which llama.cpp does not support.")


def _merges(tokenizer: Tokenizer, merges: list[Any]) -> list[str]:
    """Returns both sides of each merge whose product is a token of the file."""
    mistaken, pairs = _mistaken(tokenizer), [each.split(" ") if isinstance(each, str) else each for each in merges]
    return [" ".join(pair) for pair in pairs if "".join(pair) not in mistaken]


def _types(tokenizer: Tokenizer, said: dict[str, Any], tokens: list[str]) -> list[TokenType]:
    added = {token["id"]: token["special"] for token in said["added_tokens"]}
    unknown, known = said["model"].get("unk_token"), tokenizer.get_vocab(with_added_tokens=True)
    in_bytes = {f"<0x{value:02X}>" for value in range(256)} if said["model"].get("byte_fallback") else set()

    def kind(number: int, token: str) -> TokenType:
        if token not in known:
            return TokenType.UNUSED
        if token == unknown:
            return TokenType.UNKNOWN
        if number in added:
            return TokenType.CONTROL if added[number] else TokenType.USER_DEFINED
        return TokenType.BYTE if token in in_bytes else TokenType.NORMAL

    return [kind(number, token) for number, token in enumerate(tokens)]


def find_rule(tokenizer: Tokenizer, *, ignores_merges: bool) -> str:
    """Returns llama.cpp's name for the tokenizer's word splitting: the rule with the same splits. Raises NoGguf."""
    own = tokenizer.pre_tokenizer
    for name in RULES:
        rule = gguf_files.word_rule(name)
        if rule is not None and own is not None and all(_cuts(own, text) == _cuts(rule, text) for text in SAMPLES):
            return name if ignores_merges else _WITHOUT_WHOLE_WORDS.get(name, name)
    raise NoGguf(reason="its tokenizer splits words by an unsupported rule.")


def _cuts(rule: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in rule.pre_tokenize_str(text)]


def _is_sentencepiece(said: dict[str, Any]) -> bool:
    return bool(said["model"].get("byte_fallback")) and '"\u2581"' in json.dumps(
        [said["normalizer"], said["pre_tokenizer"]], ensure_ascii=False
    )


def _describe_sentencepiece(writer: GGUFWriter, said: dict[str, Any], tokens: list[str]) -> None:
    """Writes the SentencePiece tokenizer. Scores fall with the position of a piece's merge, SentencePiece's order of
    joining.
    """
    places: dict[str, int] = {}
    for place, merge in enumerate(said["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        places.setdefault(left + right, place)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(places[token]) if token in places else -1e6 for token in tokens])
    writer.add_add_space_prefix(_begins_with_space(said))


def _begins_with_space(said: dict[str, Any]) -> bool:
    """Whether a space is put before a text, as a Prepend of the normalizer or a Metaspace does."""
    parts = said["normalizer"].get("normalizers", [said["normalizer"]]) if said["normalizer"] else []
    metaspace = (said["pre_tokenizer"] or {}).get("prepend_scheme")
    if metaspace == "first":
        raise NoGguf(
            reason="its tokenizer puts a space only before the first word of a text, which llama.cpp does not support."
        )
    return metaspace == "always" or any(part["type"] == "Prepend" for part in parts)


def _describe_specials(writer: GGUFWriter, folder: Path, tokenizer: Tokenizer) -> None:
    """Writes stop tokens and no BOS: as in training, the template writes everything before the text."""
    template = ChatTemplate.load(folder)
    config = template_files.read_json(folder / "tokenizer_config.json")
    named = template_files.special_tokens(config)
    stops = list(template.eos_ids)
    first = tokenizer.token_to_id(named["eos_token"]) if named.get("eos_token") else None
    stops.sort(key=lambda stop: stop != first)
    writer.add_eos_token_id(stops[0])
    if len(stops) > 1:
        writer.add_eot_token_id(stops[1])
    for name, add in (
        ("bos_token", writer.add_bos_token_id),
        ("pad_token", writer.add_pad_token_id),
        ("unk_token", writer.add_unk_token_id),
    ):
        number = tokenizer.token_to_id(named[name]) if named.get(name) else None
        if number is not None:
            add(number)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(template_files.load_templates(folder, config)["default"])
