"""An administrator can give a base a chat template if it has none or the wrong one."""

import json
from pathlib import Path

import pytest
import tiny_gguf
import tiny_models
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tunery.errors import UnusableModel
from tunery.rows.messages import Example
from tunery.rows.template import IGNORED, ChatTemplate
from worker.trainer.convert import convert

ROOT = Path(__file__).parents[2]
GEMMA3 = (ROOT / "tunery/local/templates/gemma3.jinja").read_text()
TERSE = (
    "{% for m in messages %}<|im_start|>{{ m.role[0] }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a {% endif %}"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_models.llama(tmp_path / "source")


def test_given_template_replaces_every_template_of_the_model(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "tokenizer_config.json").read_text())
    named = [{"name": name, "template": tiny_models.CHATML} for name in ("default", "tool_use")]
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))

    model_info = convert(str(source), tmp_path / "base", TERSE)

    assert (tmp_path / "base/chat_template.jinja").read_text() == TERSE
    assert "chat_template" not in json.loads((tmp_path / "base/tokenizer_config.json").read_text())
    assert model_info["chat_template_sha256"] == ChatTemplate.load(tmp_path / "base").sha256
    assert model_info["eos_token_ids"] == [2]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (GEMMA3, "with a stop token"),  # <end_of_turn> is plain text to this tokenizer
        ("{% for", "is not valid"),
        ("", "no chat template.*--chat-template FILE"),
    ],
)
def test_template_that_does_not_fit_is_refused(source: Path, tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(UnusableModel, match=reason):
        convert(str(source), tmp_path / "base", template)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a base converted from a folder that holds a GGUF file without a template, and a template."""
    pytest.importorskip("gguf", reason="a host that only trains reads no GGUF")
    folder = tmp_path_factory.mktemp("gemma")
    tiny_gguf.gemma3(folder / "source/model.gguf")
    (folder / "source/chat_template.jinja").write_text(GEMMA3)
    convert(str(folder / "source"), folder / "base")
    return folder / "base"


def test_folder_with_a_gguf_and_a_template_becomes_a_base(gemma: Path) -> None:
    model_info = json.loads((gemma / "facts.json").read_text())
    assert (model_info["model_type"], model_info["num_hidden_layers"], model_info["head_dim"]) == ("gemma3_text", 2, 16)
    assert model_info["eos_token_ids"] == [1, 5]
    assert GenerationConfig.from_pretrained(gemma).eos_token_id == [1, 5]
    assert (gemma / "chat_template.jinja").read_text() == GEMMA3


def test_sentencepiece_tokenizer_of_a_gguf_keeps_its_ids(gemma: Path) -> None:
    """The ids follow from the scores by SentencePiece's rules: no space is added in front, unknown text is bytes."""
    tokenizer = ChatTemplate.load(gemma).tokenizer
    first_byte, first_piece = 7, 263
    ids = {piece: first_piece + place for place, piece in enumerate(tiny_gguf.PIECES)}

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    assert encode("hello world") == [ids[piece] for piece in ("hello", "\u2581w", *"orld")]
    assert encode("low") == [ids["l"], ids["ow"]], "the higher score wins, not the piece on the left"
    assert encode("2026") == [ids[digit] for digit in "2026"]
    assert encode("é") == [first_byte + value for value in "é".encode()]
    assert encode("<start_of_turn>\n<end_of_turn>") == [4, 6, 5]
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert {0, 1, 2, 3, 4, 5} <= special
    assert 6 not in special, "a newline is text, which an answer keeps"


def test_row_of_a_gemma_base_trains_the_answer_and_its_end(gemma: Path) -> None:
    messages = [
        {"role": "system", "content": "hello"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "world"},
    ]
    template = ChatTemplate.load(gemma)

    rendered = template.encode(Example.model_validate({"messages": messages}), max_length=256)

    text = template.tokenizer.decode(rendered.input_ids, skip_special_tokens=False)
    assert text == "<bos><start_of_turn>user\nhello\n\na<end_of_turn>\n<start_of_turn>model\nworld<end_of_turn>\n"
    assert rendered.input_ids[:2] == [2, 4], "one <bos>, which the template writes"
    trained = [label for label in rendered.labels if label != IGNORED]
    assert template.tokenizer.decode(trained, skip_special_tokens=False) == "world<end_of_turn>"
    assert trained[-1] == 5


def test_folder_with_several_gguf_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "source" / name).touch()

    with pytest.raises(UnusableModel, match=r"several GGUF files \(a.gguf, b.gguf\)\. Name one"):
        convert(str(tmp_path / "source"), tmp_path / "base")


@pytest.mark.slow
def test_gemma_3_of_the_demo_becomes_a_base(tmp_path: Path) -> None:
    """The expected ids are those that SentencePiece itself gives with the file's pieces and scores."""
    path = ROOT / ".vendor/gemma3-270m/gemma-3-270m.gguf"
    if not path.exists():
        pytest.skip("Gemma 3 is not fetched: run `make demo BASE=gemma3`")

    model_info = convert(str(path), tmp_path / "base", GEMMA3)

    assert (model_info["params"], model_info["eos_token_ids"]) == (268_098_176, [1, 106])
    tokenizer = ChatTemplate.load(tmp_path / "base").tokenizer
    for text, ids in {
        "Hello world": [9259, 1902],
        "2026": [236778, 236771, 236778, 236825],
        "\u169b": [463, 392, 393],
        "<start_of_turn>user\nHi<end_of_turn>\n": [105, 2364, 107, 10979, 106, 107],
    }.items():
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    prompt = torch.tensor([[2, *tokenizer.encode("one, two, three, four,", add_special_tokens=False).ids]])
    assert tokenizer.decode([int(model(prompt).logits[0, -1].argmax())]) == " five"
