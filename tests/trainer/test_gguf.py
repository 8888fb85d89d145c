"""GGUF exports answer in llama.cpp as the models do in transformers, or are refused if llama.cpp would differ."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import other_clients
import pytest
import tiny_models
import torch
import zoo
from peft import LoraConfig, get_peft_model
from run_folders import Ear, chat, lay_out, plan, said
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunery.spec import Export, Full, Lora
from worker.trainer import gguf_files
from worker.trainer.data import Row
from worker.trainer.export import gguf_adapter, gguf_proof, gguf_tokenizers, gguf_writer, work
from worker.trainer.export.errors import FormatDiffers, NoGguf
from worker.trainer.export.proof import Answered, Divergence
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

PROMPT = "<|im_start|>user\nalpha beta 1234, gamma delta & epsilon?<|im_end|>\n<|im_start|>assistant\n"
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma 2": {"query_pre_attn_scalar": 16},
    "Gemma 3": {"query_pre_attn_scalar": 16, "num_hidden_layers": 6},
    "Phi-3": {},
}


@pytest.fixture(scope="session")
def engine() -> Path:
    """Returns the Python interpreter that has llama.cpp installed."""
    return other_clients.install("llama-cpp") / "bin" / "python"


def prompt_ids(folder: Path) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(PROMPT, add_special_tokens=False)["input_ids"]
    return ids


def log_probs(folder: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same_logits(tmp_path: Path, engine: Path, family: str) -> None:
    folder = tiny_models.with_a_merge(zoo.make(family, tmp_path / "model", **FAMILIES[family]))
    gguf_writer.write(folder, out=tmp_path / "model.gguf", kind="f16", name="tiny")
    ids = prompt_ids(folder)
    wanted = log_probs(folder, ids)

    with llama_cpp.serve(engine, tmp_path / "model.gguf") as server:
        assert server.tokenize(PROMPT) == ids
        found = server.log_probs(ids, 20)

    assert len(found) == 20
    assert max(abs(wanted[token].item() - logprob) for token, logprob in found.items()) < 0.02


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_transformers_reads_the_file_as_the_model(tmp_path: Path) -> None:
    folder = tiny_models.with_a_merge(tiny_models.llama(tmp_path / "model", bf16=True))
    (tmp_path / "gguf").mkdir()
    gguf_writer.write(folder, out=tmp_path / "gguf" / "model.gguf", kind="f16", name="tiny")

    back = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)

    ids = prompt_ids(folder)
    with torch.no_grad():
        found = back(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert (found - log_probs(folder, ids)).abs().max() < 1e-3


def test_file_has_tokens_and_template_of_the_training(tmp_path: Path) -> None:
    folder = tiny_models.with_a_merge(zoo.make("Gemma 3", tmp_path / "model", **FAMILIES["Gemma 3"]))
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    gguf_writer.write(folder, out=tmp_path / "model.gguf", kind="f16", name="tiny")

    found = fields(tmp_path / "model.gguf")

    assert found["tokenizer.chat_template"] == tiny_models.CHATML
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (2, 0)
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.merges"]) == (False, ["a l"])
    assert found["tokenizer.ggml.tokens"][:3] == list(tiny_models.SPECIAL)
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # control, then normal
    assert (found["gemma3.attention.sliding_window"], found["gemma3.context_length"]) == (16, 256)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_matrices_are_quantised_and_what_is_small_is_not(tmp_path: Path, kind: Any) -> None:
    folder = tiny_models.with_a_merge(zoo.make("Qwen3", tmp_path / "model"))
    gguf_writer.write(folder, out=tmp_path / "model.gguf", kind=kind, name="tiny")

    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}

    assert types["blk.1.ffn_up.weight"] == kind.upper()
    assert types["blk.1.attn_norm.weight"] == "F32"
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("Mixtral", {}, "architecture 'mixtral' is not supported; supported are llama, mistral"),
        ("Llama", {"hidden_act": "gelu"}, "llama.cpp uses silu for 'llama', but this model has gelu"),
        ("Llama, dynamic", {}, "its RoPE scaling 'dynamic'"),
        ("Phi-3 longrope", {}, "its RoPE scaling 'longrope'"),
        ("Gemma 3", {}, "llama.cpp scales attention scores by 16, but this model by 256"),
        ("Gemma 3", {"layer_types": ["full_attention", "sliding_attention"]}, "whose number is divisible by 6"),
    ],
    ids=["architecture", "activation", "dynamic", "longrope", "scale", "layers"],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], reason: str
) -> None:
    folder = tiny_models.with_a_merge(zoo.make(family, tmp_path / "model", **changes))

    with pytest.raises(NoGguf, match=reason):
        gguf_writer.write(folder, out=tmp_path / "model.gguf", kind="f16", name="tiny")


@pytest.mark.parametrize("family", ["Llama", "Gemma 3"])
def test_meter_reads_the_numbers_of_the_file(tmp_path: Path, family: str) -> None:
    folder = tiny_models.with_a_merge(zoo.make(family, tmp_path / "model", **FAMILIES[family]))
    ids = prompt_ids(folder)
    meter = gguf_proof.Meter(folder, [Row(ids, [-100, *ids[1:]])])
    found = {}
    for kind in ("q4_0", "q8_0", "f16"):
        gguf_writer.write(folder, out=tmp_path / f"{kind}.gguf", kind=kind, name="tiny")
        found[kind] = meter.measure(tmp_path / f"{kind}.gguf")[0].mean_kl

    assert found["f16"] < 1e-4 < found["q8_0"] < found["q4_0"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= -1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    gguf_writer.write(folder, out=tmp_path / "other.gguf", kind="f16", name="tiny")
    assert meter.measure(tmp_path / "other.gguf")[0].mean_kl > 1e-3


def test_window_of_all_layers_ends_the_context(tmp_path: Path) -> None:
    folder = tiny_models.with_a_merge(zoo.make("Mistral", tmp_path / "model"))
    gguf_writer.write(folder, out=tmp_path / "model.gguf", kind="f16", name="tiny")

    assert fields(tmp_path / "model.gguf")["llama.context_length"] == 16


def test_numbers_beyond_f16_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.with_a_merge(zoo.make("Qwen3", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 7e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(NoGguf, match=r"blk\.0\.ffn_up\.weight has values beyond 65,504, .* Export q8_0"):
        gguf_writer.write(folder, out=tmp_path / "model.gguf", kind="f16", name="tiny")


@pytest.mark.parametrize("name", gguf_tokenizers.RULES)
def test_rule_of_words_is_found_by_its_cuts(name: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = gguf_files.word_rule(name)

    assert gguf_tokenizers.find_rule(tokenizer, ignores_merges=True) == name
    assert gguf_tokenizers.find_rule(tokenizer, ignores_merges=False) == {"llama-bpe": "dbrx"}.get(name, name)


def test_unknown_rule_of_words_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    with pytest.raises(NoGguf, match="splits words by an unsupported rule"):
        gguf_tokenizers.find_rule(tokenizer, ignores_merges=False)


def test_scores_fall_with_the_merges_of_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    folder = zoo.make("Gemma 3", tmp_path / "model", **FAMILIES["Gemma 3"])
    pieces = [
        "<bos>",
        "<|im_start|>",
        "<|im_end|>",
        "\u2581",
        *"abc",
        "ab",
        "\u2581ab",
        *(f"<0x{value:02X}>" for value in range(245)),
    ]
    made = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[("a", "b"), ("\u2581", "ab")],
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.add_special_tokens(pieces[:3])
    made.save(str(folder / "tokenizer.json"))
    gguf_writer.write(folder, out=tmp_path / "model.gguf", kind="f16", name="tiny")

    found = fields(tmp_path / "model.gguf")

    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.scores"][7:9] == [0, -1]
    assert found["tokenizer.ggml.add_space_prefix"] is False
    assert found["tokenizer.ggml.token_type"][9] == 6  # a byte


ASCII = range(3, 97)
"""Ids of tokens whose probabilities llama.cpp's server lists; it omits stop tokens and parts of characters."""
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 1, "up_proj": 32}},
    "rank-stabilised": {"use_rslora": True},
}


def adapted(base: Path, folder: Path, **config: Any) -> Any:
    """Returns the model in `base` with a random adapter, and saves the adapter in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | config
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    made.save_pretrained(str(folder), save_embedding_layers=False)
    return made.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_llama_cpp_lays_the_adapter_on_its_base(tmp_path: Path, engine: Path, kind: str) -> None:
    base = tiny_models.with_a_merge(zoo.make("Llama", tmp_path / "model"))
    model = adapted(base, tmp_path / "adapter", **ADAPTERS[kind])
    gguf_writer.write(base, out=tmp_path / "model.gguf", kind="f16", name="tiny")
    gguf_adapter.write(base, tmp_path / "adapter", out=tmp_path / "adapter.gguf", name="tiny")
    ids = prompt_ids(base)
    with torch.no_grad():
        after = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    place = next(place for place in reversed(range(len(ids))) if after[place].argmax() in ASCII)
    wanted, ids = after[place], ids[: place + 1]

    with llama_cpp.serve(engine, tmp_path / "model.gguf", tmp_path / "adapter.gguf") as server:
        found = server.log_probs(ids, 20)

    assert max(abs(wanted[token].item() - logprob) for token, logprob in found.items()) < 0.03
    assert max(abs(log_probs(base, ids)[token].item() - logprob) for token, logprob in found.items()) > 0.3


@pytest.mark.parametrize("kind", ADAPTERS)
def test_factors_in_the_file_make_the_adapters_product(tmp_path: Path, kind: str) -> None:
    base = zoo.make("Qwen3", tmp_path / "model")
    model = adapted(base, tmp_path / "adapter", **ADAPTERS[kind])
    gguf_adapter.write(base, tmp_path / "adapter", out=tmp_path / "adapter.gguf", name="tiny")

    tensors = {each.name: torch.tensor(each.data) for each in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}

    assert fields(tmp_path / "adapter.gguf")["adapter.lora.alpha"] == 8
    for name, target in (("mlp.up_proj", "ffn_up"), ("self_attn.q_proj", "attn_q")):
        a, b = (tensors[f"blk.1.{target}.weight.lora_{letter}"] for letter in "ab")
        wanted = model.get_submodule(f"base_model.model.model.layers.1.{name}").get_delta_weight("default")
        assert torch.allclose(8 / len(a) * b @ a, wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, "the adapter has base_model.model.lm_head.weight"),
        ({"target_modules": ["q_proj", "lm_head"]}, "does not support an adapter on lm_head"),
    ],
    ids=["DoRA", "whole head", "tied head"],
)
def test_adapter_that_llama_cpp_does_not_know_is_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    base = zoo.make("Qwen2", tmp_path / "model")
    adapted(base, tmp_path / "adapter", **config)

    with pytest.raises(NoGguf, match=reason):
        gguf_adapter.write(base, tmp_path / "adapter", out=tmp_path / "adapter.gguf", name="tiny")


@pytest.mark.parametrize("technique", [Full(), Lora(r=4)], ids=["full", "lora"])
def test_job_leaves_gguf_files(tmp_path: Path, ear: Ear, technique: Any) -> None:
    base = tiny_models.with_a_merge(tiny_models.llama(tmp_path / "base", bf16=True, never_said=tuple(range(6, 260))))
    export = Export(gguf=["q8_0", "f16"], adapter_gguf=technique.type == "lora")
    asked = plan(technique=technique, learning_rate=1e-3, export=export)
    lay_out(tmp_path / "run", base, asked, [chat(i) for i in range(8)])

    assert carry_out(tmp_path / "run", MessageWriter(ear.descriptor), StopSignal())

    out = tmp_path / "run" / "out"
    assert not [export.message for export in said(ear, "exported") if export.is_refused]
    said_of_file = {export.path: export.message for export in said(ear, "exported")}["gguf/model-q8_0.gguf"]
    measured = r"MB, of the architecture llama; on [\d,]+ labelled tokens the mean KL divergence from"
    assert re.search(measured, said_of_file)
    adapter = ["adapter-f32.gguf"] if technique.type == "lora" else []
    found = sorted(path.name for path in (out / "gguf").iterdir())
    assert found == ["Modelfile", *adapter, "model-f16.gguf", "model-q8_0.gguf"]
    assert (out / "gguf" / "Modelfile").read_text().startswith("FROM ./model-f16.gguf\nTEMPLATE ")
    assert "llama-server -m tuned/gguf/model-f16.gguf --jinja" in (out / "README.md").read_text()
    assert not (out / "merged").exists()
    assert fields(out / "gguf" / "model-f16.gguf")["general.architecture"] == "llama"
    digests = {"model.safetensors": hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()}
    for path in (out / "gguf").glob("*.gguf"):
        assert json.loads(fields(path)["tunery.base_weights_sha256"]) == digests


@pytest.mark.slow
def test_job_leaves_out_a_type_that_loses_answers(tmp_path: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_models.with_a_merge(tiny_models.llama(tmp_path / "base", bf16=True))
    asked = plan(technique=Full(), n_epochs=60, export=Export(gguf=["q8_0", "f16"]))
    folder = lay_out(tmp_path / "run", base, asked, [chat(i) for i in range(8)])
    own = gguf_writer.encode

    def lossy(tensor: Any, target: str, kind: Any) -> Any:
        return own(-tensor if kind.name == "Q8_0" and "ffn_up" in target else tensor, target, kind)

    monkeypatch.setattr(gguf_writer, "encode", lossy)

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    q8_0, f16 = said(ear, "exported")
    assert (q8_0.path, q8_0.is_refused, f16.is_refused) == ("gguf/model-q8_0.gguf", True, False)
    assert re.search(r"In GGUF q8_0, the model answers worse .* of 8 rows, the safetensors for 100\.0%", q8_0.message)
    assert sorted(path.name for path in (folder / "out" / "gguf").iterdir()) == ["Modelfile", "model-f16.gguf"]


def test_f16_alone_has_to_keep_the_bounds_of_a_merge() -> None:
    far, answered = Divergence(2000, 0.01, 0.98, 0.98), Answered(100, 0.5, 0.5, -0.05, 0.05)

    assert "2,000 labelled tokens" in work._prove("q8_0", lambda: "1 MB", lambda: (far, answered))
    with pytest.raises(FormatDiffers, match=r"In GGUF f16, .* \(at most 0\.001\) .* 98\.00% .* Serve the safetensors"):
        work._prove("f16", lambda: "1 MB", lambda: (far, answered))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_update_below_half_a_step_arrives_when_it_is_rounded_at_random(kind: str) -> None:
    chosen = gguf.GGMLQuantizationType[kind]
    numbers = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    grid = gguf.dequantize(gguf.quants.quantize(numbers, chosen), chosen)
    blocks = grid.reshape(-1, 32)
    inner = np.abs(blocks) < 0.7 * np.abs(blocks).max(1, keepdims=True)
    inner &= (blocks != blocks.min(1, keepdims=True)) & (blocks != blocks.max(1, keepdims=True))
    tuned = (blocks + 0.03 * inner).astype(np.float32).reshape(grid.shape)

    nearest = gguf.dequantize(gguf.quants.quantize(tuned, chosen), chosen)
    dithered = gguf_writer.dither(tuned, "blk.0.ffn_up.weight", chosen)
    found = gguf.dequantize(gguf.quants.quantize(dithered, chosen), chosen)

    arrived = [(each - grid).reshape(-1, 32)[inner].mean() for each in (nearest, found)]
    assert abs(arrived[0]) < 0.005
    assert arrived[1] == pytest.approx(0.03, abs=0.005)


def test_file_that_loses_answers_to_nearest_is_rounded_at_random(
    tmp_path: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_models.with_a_merge(tiny_models.llama(tmp_path / "base", bf16=True))
    asked = plan(technique=Full(), n_epochs=60, export=Export(gguf=["q4_1"]))
    folder = lay_out(tmp_path / "run", base, asked, [chat(i) for i in range(8)])
    own, dither, dithered = gguf_writer.encode, gguf_writer.dither, set()

    def noted(tensor: Any, target: str, kind: Any) -> Any:
        dithered.add(target)
        return dither(tensor, target, kind)

    def lossy(tensor: Any, target: str, kind: Any) -> Any:
        lost = "ffn_up" in target and target not in dithered
        return own(-tensor if lost else tensor, target, kind)

    monkeypatch.setattr(gguf_writer, "encode", lossy)
    monkeypatch.setattr(gguf_writer, "dither", noted)

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    [export] = said(ear, "exported")
    assert "MB, of the architecture llama, rounded at random; on" in export.message
    assert dithered >= {"blk.0.ffn_up.weight", "blk.1.attn_q.weight"}
    assert not any("norm" in target or target in ("token_embd.weight", "output.weight") for target in dithered)


def test_job_says_why_it_leaves_no_gguf_file(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    base = zoo.make("GPT-2", tmp_path / "base")
    lay_out(tmp_path / "run", base, plan(technique=Full(), export=Export(gguf=["f16"])), [chat(i) for i in range(8)])

    assert carry_out(tmp_path / "run", MessageWriter(ear.descriptor), StopSignal())

    [export] = said(ear, "exported")
    assert (export.path, export.is_refused) == ("gguf/model-f16.gguf", True)
    assert "architecture 'gpt2' is not supported" in export.message
    assert not (tmp_path / "run" / "out" / "gguf").exists()
