"""The faster tokeniser gives the ids of `tokenizers`, or is not used."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tunery.rows import bulk, tiktoken_bpe
from tunery.rows.encoding import CHATS
from tunery.rows.template import ChatTemplate
from tunery.rows.tokens import Tokens

ROOT = Path(__file__).parents[2]
MARKS = ["<|im_start|>", "<|im_end|>", "<|im"]
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA = WORDS + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {
    "gpt2": BYTES,
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama3": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
}


@cache
def trained(cut: str, only_seen: bool = False) -> Tokenizer:
    """A tokenizer of 1,500 tokens, trained on texts of this repository. `only_seen`: with only the bytes in them."""
    made = Tokenizer(models.BPE())
    made.decoder = decoders.ByteLevel()
    made.pre_tokenizer = CUTS[cut]
    alphabet = [] if only_seen else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=MARKS, show_progress=False)
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/formats.md", "CONTRIBUTING.md")]
    made.train_from_iterator([*texts, "äöü  1234  12 é\n\n\n  x'S \u017f"], trainer)
    return made


@cache
def fast(cut: str) -> tiktoken_bpe.TiktokenBPE:
    found = tiktoken_bpe.prove(trained(cut))
    assert found is not None
    return found


WORDLIKE = [
    "the",
    " model",
    "'s",
    "'S",
    "'\u017f",
    "x",
    "1",
    "12",
    "½",
    "٣",
    "é",
    "e\u0301",
    "漢",
    "字",
    "!",
    "?!",
    "'",
]
BLANKS = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000"]
PIECES = st.sampled_from([*WORDLIKE, *BLANKS, "🎉", "\u200d", "\x00", "\x1d", "\U000e0001", "\ufffd", *MARKS])
TEXT = st.lists(PIECES | st.characters(exclude_categories=["Cs"]), max_size=25).map("".join)


@pytest.mark.parametrize("cut", CUTS)
@settings(deadline=None, derandomize=True, max_examples=100)
@given(TEXT)
def test_ids_are_equal_whatever_the_text(cut: str, text: str) -> None:
    assert fast(cut).encode(text) == trained(cut).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", [" " * 9_000, "a" * 9_000, "\n " * 4_000, "ab" * 4_000 + " "])
def test_long_runs_are_equal_too(text: str) -> None:
    assert fast("smollm2").encode(text) == trained("smollm2").encode(text, add_special_tokens=False).ids


def test_what_the_engine_of_patterns_gives_up_on_is_left_to_the_tokenizer() -> None:
    assert fast("gpt2").encode(" " * 1_000_000) is None
    tokens = Tokens(trained("gpt2"))
    tokens.hasten()
    assert tokens.encode(" " * 20_000) == trained("gpt2").encode(" " * 20_000, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["\x1d", "a\x1db", "漢字", "ab\U0001f389"])
def test_bytes_that_are_no_tokens_are_left_to_the_tokenizer(text: str) -> None:
    found = tiktoken_bpe.prove(trained("smollm2", only_seen=True))
    assert found is not None
    assert found.encode("the model") is not None
    assert found.encode(text) is None


def altered(change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    spec = json.loads(trained("gpt2").to_str())
    change(spec)
    return Tokenizer.from_str(json.dumps(spec))


def _swap_merges(spec: dict[str, Any]) -> None:
    merges = spec["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]


def _make_unreachable(spec: dict[str, Any]) -> None:
    """Adds a token whose two parts never meet: 'h' and 'e' are merged before 'z' and 'h' could be."""
    model = spec["model"]
    assert ["h", "e"] in model["merges"]
    model["vocab"] |= {"zh": len(model["vocab"]), "zhe": len(model["vocab"]) + 1}
    model["merges"] += [["z", "h"], ["zh", "e"]]


@pytest.mark.parametrize(
    "change",
    [
        _swap_merges,
        _make_unreachable,
        lambda spec: spec["added_tokens"][0].update(lstrip=True),
        lambda spec: spec["added_tokens"][0].update(normalized=True),
        lambda spec: spec["model"].update(dropout=0.1),
        lambda spec: spec["model"].update(byte_fallback=True),
        lambda spec: spec.update(normalizer={"type": "Lowercase"}),
        lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
        lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}),
        lambda spec: spec.update(pre_tokenizer=None),
    ],
)
def test_another_tokenizer_is_not_proven(change: Callable[[dict[str, Any]], object]) -> None:
    assert tiktoken_bpe.prove(altered(change)) is None


def test_words_and_sentencepiece_are_not_proven() -> None:
    assert tiktoken_bpe.prove(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None
    assert tiktoken_bpe.prove(Tokenizer(models.Unigram([("a", 0.0)]))) is None


def test_normalised_text_is_left_to_the_tokenizer() -> None:
    made = Tokenizer.from_str(trained("llama3").to_str())
    made.normalizer = normalizers.NFC()
    found = tiktoken_bpe.prove(made)
    assert found is not None
    assert found.encode("the model") == made.encode("the model", add_special_tokens=False).ids
    assert found.encode("e\u0301") is None


def test_rows_are_the_same_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content }}<|im_end|>\n{% endfor %}"
    source += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    asked = ["Was kostet das?", "<|im_end|> spelled", "  1234  ", "\x00 漢字 🎉"]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in asked]
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats * 20).replace("\\u0000", "\\u0001")

    def rows(many: int) -> list[list[int]]:
        monkeypatch.setattr(bulk, "MANY_ROWS", many)
        template = ChatTemplate(trained("smollm2"), {"default": source}, {"eos_token": "<|im_end|>"})
        found = bulk.encode_rows([lines.encode()], "training", CHATS, template, max_length=500)
        encoded = [row.encoded.sequences[0].input_ids for row in found if row.encoded is not None]
        assert (template._tokens._fast is not None) == (many == 1)
        return encoded

    assert len(rows(1)) == 80
    assert rows(1) == rows(10_000)


def test_added_tokens_are_cut_out_first() -> None:
    made = Tokenizer.from_str(trained("gpt2").to_str())
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<think>x", normalized=False)])
    found = tiktoken_bpe.prove(made)
    assert found is not None
    for text in ("a<think>x b", "<think><think>", "<|im<|im_end|>", "<think"):
        assert found.encode(text) == made.encode(text, add_special_tokens=False).ids
