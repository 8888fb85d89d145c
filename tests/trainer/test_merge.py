"""A merged model predicts as the adapter on its base does, or is refused."""

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from run_folders import Ear, chat, lay_out, plan, said
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tunery.planning.precision import Precision, decide
from tunery.rows.template import ChatTemplate
from tunery.spec import Export, Lora, Qlora
from worker.trainer.data import Row, read_rows
from worker.trainer.export import merge, proof
from worker.trainer.export.errors import FormatAnswersWorse, MergeDiffers, NoRoom
from worker.trainer.export.proof import Divergence
from worker.trainer.recipes.qlora import keep_one_packing
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

NEVER = tuple(range(6, 260))
"""Tokens that the model never produces: among many random logits, rounding would swap pairs that are nearly equal."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("merge") / "base", bf16=True, never_said=NEVER)


@pytest.fixture(scope="module")
def rows(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(chat(i, words=6)) + "\n" for i in range(24)))
    return read_rows(path, ChatTemplate.load(base), 128).rows


def adapter(folder: Path, base: Path, **config: Any) -> Path:
    """Makes a random adapter for the model in `base`, and returns its folder."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | config
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(str(folder))
    tiny_models.tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2]}\n')
    return folder


def source(base: Path, adapter: Path, precision: Precision | None = None) -> merge.Source:
    return merge.Source(base, adapter, precision or decide(Lora(), "cpu"), CPU)


def log_probs(model: Any, rows: list[Row]) -> torch.Tensor:
    """Returns the log-probabilities of the next token after every token of the rows."""
    with torch.no_grad():
        logits = [model(torch.tensor([row.input_ids])).logits[0, :-1] for row in rows]
    return torch.cat(logits).log_softmax(-1)


def kl(old: torch.Tensor, new: torch.Tensor) -> float:
    return float(torch.nn.functional.kl_div(new, old, log_target=True, reduction="batchmean"))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 1, "up_proj": 32}},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "new tokens": {"trainable_token_indices": [1, 2]},
}


QUICK = ("plain", "patterns", "DoRA", "embeddings", "new tokens")
ON_TIED_LAYERS = ("head", "embeddings", "whole head", "new tokens")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_merged_files_predict_as_the_adapter_does(
    tmp_path: Path, rows: list[Row], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        proof, "EQUAL", proof.Bounds(mean_kl=1e-3, top1=0.9)
    )  # some random logits are so close to each other that rounding swaps them
    base = tiny_models.llama(
        tmp_path / "base", bf16=True, tie_word_embeddings=kind in ON_TIED_LAYERS, initializer_range=0.1
    )
    made = adapter(tmp_path / "adapter", base, **KINDS[kind])

    record = merge.write(source(base, made), rows[:12], tmp_path / "out")

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), made).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    wanted = log_probs(adapted, rows[:12])
    assert kl(wanted, log_probs(merged, rows[:12])) < 1e-4
    assert record["candidates"][0]["proof"]["mean_kl"] < 1e-4
    with adapted.disable_adapter():
        assert kl(wanted, log_probs(adapted, rows[:12])) > 1e-3


def test_product_is_added_in_fp32_and_rounded_once(tmp_path: Path, base: Path, rows: list[Row]) -> None:
    made = adapter(tmp_path / "adapter", base, target_modules=["up_proj"])
    merge.write(source(base, made), rows[:12], tmp_path / "out")

    factors, name = load_file(made / "adapter_model.safetensors"), "model.layers.1.mlp.up_proj"
    b, a = (factors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "BA")
    weight = load_file(base / "model.safetensors")[f"{name}.weight"]
    wanted = (weight.double() + 2 * b.double() @ a.double()).to(torch.bfloat16)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found[f"{name}.weight"].dtype == torch.bfloat16
    assert (found[f"{name}.weight"] == wanted).double().mean() > 0.999  # a few round the other way in fp32
    others = {n: w for n, w in load_file(base / "model.safetensors").items() if "up_proj" not in n}
    assert all(torch.equal(found[n], weight) for n, weight in others.items())


def test_adapter_of_four_bits_is_merged_into_the_base_that_it_was_trained_on(
    tmp_path: Path, base: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "EQUAL", proof.Bounds(mean_kl=1e-3, top1=0.9))
    made = adapter(tmp_path / "adapter", base)

    record = merge.write(source(base, made, decide(Qlora(), "cpu")), rows, tmp_path / "out")

    original, dequantised = record["candidates"]
    assert (original["base"], dequantised["base"]) == ("original", "dequantised")
    assert record["merged_into"] == "dequantised"
    assert dequantised["from_trained"]["mean_kl"] < 1e-3 < original["from_trained"]["mean_kl"]
    assert original["proof"]["mean_kl"] < 1e-3  # both on the original base
    quantised = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True), dtype=torch.float32, device_map={"": "cpu"},
    )  # fmt: skip
    keep_one_packing(quantised)
    trained = log_probs(PeftModel.from_pretrained(quantised, made).eval(), rows)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert kl(trained, log_probs(merged, rows)) < 1e-3


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], Any]) -> None:
    """Applies `change` to a matrix of the written files between export and proof."""
    export = merge.FULL.export

    def broken(model: torch.nn.Module, out: Path, name: str, weights: Any) -> None:
        export(model, out, name, weights)
        tensors = load_file(out / "model.safetensors")
        change(tensors["model.layers.1.mlp.up_proj.weight"])
        save_file(tensors, out / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(merge, "FULL", replace(merge.FULL, export=broken))


def test_update_below_the_grid_arrives_when_it_is_rounded_at_random() -> None:
    layer = torch.nn.Linear(512, 64, bias=False)
    layer._keep_in_fp32_modules = layer._keep_in_fp32_modules_strict = None  # type: ignore[assignment]
    on_grid = torch.empty(64, 512).uniform_(0.51, 0.99).bfloat16().float()
    update = torch.full_like(on_grid, 2e-4)  # neighbouring bf16 values are 3.9e-3 apart
    assert torch.equal((on_grid + update).bfloat16().float(), on_grid)
    layer.weight.data = on_grid + update

    merge._round(layer)

    moved = layer.weight.data - on_grid
    assert torch.equal(layer.weight.data, layer.weight.data.bfloat16().float())
    assert moved.mean().item() == pytest.approx(2e-4, rel=0.1)
    layer.weight.data = on_grid.clone()
    merge._round(layer)
    assert torch.equal(layer.weight.data, on_grid)


def test_merge_that_nearest_rounding_spoils_is_rounded_at_random(
    tmp_path: Path, base: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = iter([1.5, 1.0])
    spoil(monkeypatch, lambda weight: weight.mul_(next(factors)))

    record = merge.write(source(base, adapter(tmp_path / "adapter", base)), rows, tmp_path / "out")

    assert [each["rounding"] for each in record["candidates"]] == ["nearest", "stochastic"]
    assert record["rounding"] == "stochastic"
    assert "mean KL divergence" in merge.summary(record)


def test_merge_that_predicts_otherwise_is_refused(
    tmp_path: Path, base: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda weight: weight.mul_(1.1))

    with pytest.raises(MergeDiffers, match=r"mean KL .* \(at most 0\.001\) .* \(at least 99\.50%\)"):
        merge.write(source(base, adapter(tmp_path / "adapter", base)), rows, tmp_path / "out")

    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_base_without_room_is_refused(
    tmp_path: Path, base: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))

    with pytest.raises(NoRoom, match=r"for the base in fp32, but only 0\.0 GB is free"):
        merge.write(source(base, adapter(tmp_path / "adapter", base)), rows, tmp_path / "out")


def test_full_device_leaves_the_merge_to_the_cpu(
    tmp_path: Path, base: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 10**12))
    on_gpu = replace(source(base, adapter(tmp_path / "adapter", base)), device=torch.device("cuda"))

    assert merge.write(on_gpu, rows, tmp_path / "out")["merged_into"] == "original"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:inner dimension:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run it on a host with a GPU")
@pytest.mark.parametrize("technique", [Lora(r=4), Qlora(r=4)], ids=["lora", "qlora"])
def test_job_on_a_gpu_leaves_a_merged_model(tmp_path: Path, base: Path, ear: Ear, technique: Any) -> None:
    """The trained model frees its memory first, and the 4-bit base is quantised to the same weights as in the run."""
    asked = plan(technique=technique, export=Export(merged=True, gguf=["q8_0"], adapter_gguf=True), n_epochs=2)
    lay_out(tmp_path / "run", base, asked, [chat(i) for i in range(24)], [chat(i) for i in range(100, 106)])

    assert carry_out(tmp_path / "run", MessageWriter(ear.descriptor), StopSignal())

    assert [(each.path, each.message) for each in said(ear, "exported") if each.is_refused] == []
    record = json.loads((tmp_path / "run" / "out" / "merged" / "merge.json").read_text())
    assert record["merged_into"] == ("dequantised" if technique.type == "qlora" else "original")
    assert all(each["proof"]["mean_kl"] < 1e-3 for each in record["candidates"])


@pytest.mark.parametrize(
    ("kl", "different", "positions", "is_small"),
    [
        (1e-3, 10, 2000, True),
        (1.1e-3, 0, 2000, False),
        (0.0, 11, 2000, False),
        (0.0, 1, 50, True),
        (0.0, 2, 50, False),
        (float("nan"), 0, 2000, False),
    ],
)
def test_bounds(kl: float, different: int, positions: int, is_small: bool) -> None:
    same = 1 - different / positions
    assert Divergence(positions, kl, same, same).keeps(proof.EQUAL) == is_small


def test_tie_of_the_reference_is_no_difference() -> None:
    reference = torch.tensor([[0.495, 0.490, 0.015], [0.50, 0.48, 0.02], [0.1, 0.1, 0.8]]).log()
    found = torch.tensor([[0.490, 0.495, 0.015], [0.48, 0.50, 0.02], [0.1, 0.1, 0.8]]).log()

    divergence = proof.compare(reference, found)

    assert (divergence.identical, divergence.top1) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def predictions(rows: list[Row], wrong: set[int]) -> torch.Tensor:
    """Returns log-probabilities that predict every wanted token except the last one of the `wrong` rows."""
    found = []
    for number, row in enumerate(rows):
        wanted = [label for label in row.labels[1:] if label != -100]
        if number in wrong:
            wanted[-1] = (wanted[-1] + 1) % 260
        found.append(torch.nn.functional.one_hot(torch.tensor(wanted), 260).float().log_softmax(-1))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("before", "after", "is_loss"),
    [
        (set(), set(range(8)), True),
        (set(range(8)), set(), False),
        (set(), {0, 1}, False),  # could be chance
        (set(range(24)), set(range(24)), False),  # no answer was right before
    ],
)
def test_format_is_refused_for_answers_that_chance_does_not_lose(
    rows: list[Row], before: set[int], after: set[int], is_loss: bool
) -> None:
    answered = proof.compare_answers(predictions(rows, before), predictions(rows, after), rows)

    assert (answered.before, answered.after) == ((24 - len(before)) / 24, (24 - len(after)) / 24)
    with pytest.raises(FormatAnswersWorse, match=r"In FP8, .* 66\.7%") if is_loss else nullcontext():
        answered.check("FP8")


def test_rows_fill_a_bound_of_tokens(rows: list[Row]) -> None:
    assert proof.choose(rows, 2**29) == rows[:1]
    few = proof.choose(rows * 100, 260)
    assert proof.POSITIONS - 10 < sum(row.labelled for row in few) <= proof.POSITIONS


@pytest.mark.parametrize(
    "technique", [pytest.param(Lora(r=4), marks=pytest.mark.slow), Qlora(r=4)], ids=["lora", "qlora"]
)
def test_job_leaves_a_whole_model_beside_its_adapter(tmp_path: Path, base: Path, ear: Ear, technique: Any) -> None:
    asked = plan(technique=technique, export=Export(merged=True), n_epochs=2)
    train = [chat(i) for i in range(20)]
    lay_out(tmp_path / "run", base, asked, train, train[:4], train[4:6])

    assert carry_out(tmp_path / "run", MessageWriter(ear.descriptor), StopSignal())

    merged = tmp_path / "run" / "out" / "merged"
    [export] = said(ear, "exported")
    assert not export.is_refused, export.message
    assert export.path == "merged"
    assert "mean KL divergence" in export.message
    record = json.loads((merged / "merge.json").read_text())
    assert record["merged_into"] == ("dequantised" if technique.type == "qlora" else "original")
    assert record["base_weights_sha256"] == {
        "model.safetensors": hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    }
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert (model.generation_config.eos_token_id, tokenizer.chat_template) == ([2], tiny_models.CHATML)


def test_refused_export_keeps_the_model(tmp_path: Path, base: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda weight: weight.fill_(torch.nan))
    lay_out(tmp_path / "run", base, plan(export=Export(merged=True)), [chat(i) for i in range(8)])

    assert carry_out(tmp_path / "run", MessageWriter(ear.descriptor), StopSignal())

    [export] = said(ear, "exported")
    assert export.is_refused
    assert "predictions differ from those of the adapter on its base" in export.message
    assert (tmp_path / "run" / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "run" / "out" / "merged").exists()
    assert not list((tmp_path / "run" / "out").glob(".*"))
