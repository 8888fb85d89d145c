"""The exported files answer and stop as the model in memory did; otherwise the run fails."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import PeftModel
from run_folders import chat, lay_out, plan
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from tunery.failures import ArtifactDiffers
from tunery.spec import Full, Lora, Qlora
from worker.trainer import loading, parity, precision
from worker.trainer.recipes.qlora import keep_one_packing
from worker.trainer.recipes.recipe import Recipe, Weights
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i) for i in range(10)]
TECHNIQUES = {"lora": Lora(r=4), "qlora": Qlora(r=4), "full": Full()}


def trained(folder: Path, base: Path, technique: Any = TECHNIQUES["lora"], **changes: Any) -> Path:
    """Carries out a run and returns its directory."""
    rate = 1e-3 if isinstance(technique, Full) else 1e-2
    lay_out(folder, base, plan(**{"technique": technique, "learning_rate": rate} | changes), ROWS, ROWS[:4])
    assert carry_out(folder, MessageWriter(None), StopSignal())
    return folder


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "out" / "parity.json").read_text())
    return record


def loaded(folder: Path) -> Any:
    """Loads the artifact as a user who has only read `parity.json` would."""
    record, out = record_of(folder), folder / "out"
    if not (out / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(out, dtype=record["dtype"]).eval()
    config = record["quantisation"]
    options = {} if config is None else {"quantization_config": BitsAndBytesConfig(**config)}
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=record["dtype"], **options)
    keep_one_packing(base)  # bitsandbytes' other packing does not support layers as small as these
    return PeftModel.from_pretrained(base, out).eval()


def off(model: Any, prompt: dict[str, Any]) -> float:
    """Returns the distance of a model's logits from the recorded ones, as a fraction of their spread."""
    with torch.no_grad():
        found = model(torch.tensor([prompt["input_ids"]])).logits[0, -1]
    wanted = torch.tensor(prompt["logits"])
    return float((found - wanted).norm() / (wanted - wanted.mean()).norm())


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_record_is_repeated_by_plain_transformers_and_peft(tmp_path: Path, tiny: Path, kind: str) -> None:
    folder = trained(tmp_path / "run", tiny, TECHNIQUES[kind])

    record = record_of(folder)
    model = loaded(folder)

    assert (record["dtype"], record["device"], record["position"]) == ("float32", "cpu", "last")
    assert record["base"] == ("nf4" if kind == "qlora" else "float32")
    assert (record["quantisation"] is not None) == (kind == "qlora")
    assert 0 <= record["difference"] < 1e-5
    assert len(record["prompts"]) == 3
    for prompt in record["prompts"]:
        assert off(model, prompt) < record["tolerance"]
    if kind != "full":
        with model.disable_adapter():  # the check must fail without the adapter
            assert min(off(model, prompt) for prompt in record["prompts"]) > 10 * record["tolerance"]


PLAIN = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base_dir, out = sys.argv[1:]
record = json.loads(Path(out, "parity.json").read_text())
options = {"dtype": record["dtype"]}
if record["quantisation"]:
    options["quantization_config"] = BitsAndBytesConfig(**record["quantisation"])
if Path(out, "adapter_config.json").exists():
    base = AutoModelForCausalLM.from_pretrained(base_dir, **options)
    for layer in base.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # that packing takes no layers as small as these
    model = PeftModel.from_pretrained(base, out).eval()
else:
    model = AutoModelForCausalLM.from_pretrained(out, **options).eval()
assert not [name for name in sys.modules if name.split(".")[0] in ("tunery", "worker")]
for prompt in record["prompts"]:
    with torch.no_grad():
        found = model(torch.tensor([prompt["input_ids"]])).logits[0, -1]
    wanted = torch.tensor(prompt["logits"])
    assert (found - wanted).norm() < record["tolerance"] * (wanted - wanted.mean()).norm()
print("repeated", len(record["prompts"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", TECHNIQUES)
def test_record_is_repeated_where_nothing_of_ours_is(tmp_path: Path, tiny: Path, kind: str) -> None:
    folder = trained(tmp_path / "run", tiny, TECHNIQUES[kind])

    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(tiny), str(folder / "out")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip

    assert done.stdout.split() == ["repeated", "3"], done.stderr


def test_prompts_are_held_out_rows(tmp_path: Path, tiny: Path) -> None:
    held_out = [chat(100 + i) for i in range(4)]
    with_valid = prepare(lay_out(tmp_path / "a", tiny, plan(), ROWS, held_out), MessageWriter(None), StopSignal())
    without = prepare(lay_out(tmp_path / "b", tiny, plan(), ROWS), MessageWriter(None), StopSignal())

    def text(t: Any) -> str:
        return "".join(t.template.tokenizer.decode(prompt["input_ids"]) for prompt in parity.measure(t).prompts)

    assert all(row["messages"][0]["content"] in text(with_valid) for row in held_out[:3])
    assert all(row["messages"][0]["content"] in text(without) for row in ROWS[:3])


def double_alpha(out: Path) -> None:
    path = out / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))


def change_weights(out: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    [path] = out.glob("*model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def drop_one(out: Path) -> None:
    change_weights(out, lambda tensors: tensors.pop(a_weight(tensors)))


def rename_one(out: Path) -> None:
    change_weights(out, lambda tensors: tensors.update(renamed=tensors.pop(a_weight(tensors))))


def a_weight(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if "layers.1.mlp.up_proj" in name and "lora_A" not in name)


def swap_two(out: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        one = a_weight(tensors)
        other = one.replace("up_proj", "gate_proj")
        tensors[one], tensors[other] = tensors[other], tensors[one]

    change_weights(out, swap)


def halve_the_digits(out: Path) -> None:
    change_weights(
        out, lambda tensors: tensors.update({n: t.to(torch.float8_e4m3fn).to(t.dtype) for n, t in tensors.items()})
    )


def broken(recipe: Recipe, breaks: Callable[[Path], None]) -> Recipe:
    """Returns the recipe with an export that `breaks` damages."""

    def export(model: torch.nn.Module, folder: Path, base_model: str, weights: Weights | None) -> None:
        recipe.export(model, folder, base_model, weights)
        breaks(folder)

    return replace(recipe, export=export)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("kind", "breaks"),
    [
        ("lora", double_alpha),
        ("lora", drop_one),
        ("lora", rename_one),
        ("lora", swap_two),
        ("qlora", double_alpha),
        ("qlora", drop_one),
        ("full", drop_one),
        ("full", rename_one),
        ("full", swap_two),
        ("full", halve_the_digits),
    ],
)
def test_faulty_export_fails_the_run(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, kind: str, breaks: Callable[[Path], None]
) -> None:
    monkeypatch.setitem(loading.RECIPES, kind, broken(loading.RECIPES[kind], breaks))

    with pytest.raises(ArtifactDiffers, match="do not reproduce the trained model"):
        trained(tmp_path / "run", tiny, TECHNIQUES[kind])

    assert not (tmp_path / "run" / "out").exists()


def test_adapter_of_another_base_is_found_out(tmp_path: Path, tiny: Path) -> None:
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), ROWS), MessageWriter(None), StopSignal())
    record = parity.measure(t)
    t.recipe.export(t.objective.model, tmp_path, "tiny", None)
    (t.folder / "base").unlink()
    (t.folder / "base").symlink_to(tiny_models.llama(tmp_path / "other", seed=1))

    with pytest.raises(ArtifactDiffers):
        parity.write(t, record, tmp_path)


def test_large_model_is_recorded_and_not_loaded_again(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "MOST_CHECKED", 10)
    monkeypatch.setattr(parity, "_load", lambda *_: pytest.fail("loaded again"))

    folder = trained(tmp_path / "run", tiny)

    record = record_of(folder)
    assert record["difference"] is None
    assert max(off(loaded(folder), prompt) for prompt in record["prompts"]) < 1e-5


def test_measuring_leaves_the_model_as_it_was(tmp_path: Path, tiny: Path) -> None:
    t = prepare(lay_out(tmp_path / "run", tiny, plan(technique=Full()), ROWS), MessageWriter(None), StopSignal())
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in t.parameters.items()}

    parity.measure(t)

    for name, parameter in t.objective.named_parameters():
        same, place, weights = before[name]
        assert parameter is same
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, weights)


def test_weights_are_measured_in_the_type_of_the_files(tmp_path: Path, tiny: Path) -> None:
    """A full fine-tune on a CPU is trained in fp32 and exported in bf16."""
    t = prepare(lay_out(tmp_path / "run", tiny, plan(technique=Full()), ROWS), MessageWriter(None), StopSignal())
    parameter = t.objective.causal.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        parameter += 1e-6
    seen = []

    with precision.in_fp32(t.objective.model, lambda _name, weight: weight.bfloat16()):
        seen.append(parameter.detach().clone())

    assert torch.equal(seen[0], parameter.detach().bfloat16().float())
    assert not torch.equal(seen[0], parameter.detach())


@pytest.fixture(scope="module")
def stops_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a base whose files stop only at <|endoftext|> (id 0), while its template ends turns with <|im_end|>."""
    folder = tiny_models.llama(tmp_path_factory.mktemp("base") / "base", eos_token_id=0, pad_token_id=0)
    settings = {"bos_token_id": 0, "eos_token_id": 0, "temperature": 0.6, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": "<|endoftext|>"}))
    return folder


@pytest.mark.filterwarnings("ignore:The following generation flags are not valid")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_artifact_carries_the_stop_tokens_that_were_trained(tmp_path: Path, stops_elsewhere: Path, kind: str) -> None:
    """The answers are memorised, so plain `generate` on the artifact must give each one and stop after it."""
    rows = [chat(i, words=2) for i in range(2)]
    rate = 3e-3 if kind == "full" else 1e-2
    settled = plan(technique=TECHNIQUES[kind], n_epochs=30, learning_rate=rate)
    folder = lay_out(tmp_path / "run", stops_elsewhere, settled, rows)
    assert carry_out(folder, MessageWriter(None), StopSignal())
    out = folder / "out"

    for written in (out, *(folder / "checkpoints").glob("step-*")):
        settings = json.loads((written / "generation_config.json").read_text())
        assert settings == {
            "bos_token_id": 0, "eos_token_id": [0, 2], "temperature": 0.6, "repetition_penalty": 1.1,
        }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(out)
    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    else:
        base = AutoModelForCausalLM.from_pretrained(stops_elsewhere, dtype=torch.float32)
        base.generation_config = GenerationConfig.from_pretrained(out)
        model = PeftModel.from_pretrained(base, out).eval()
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**prompt, max_new_tokens=40, do_sample=False, repetition_penalty=1.0)
        answer = ids[0, prompt["input_ids"].shape[1] :].tolist()
        assert tokenizer.decode(answer) == row["messages"][1]["content"] + "<|im_end|>"


def test_model_without_room_is_recorded_as_it_computes(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full GPU the fp32 copy fails; that must not fail a run of hours."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(precision, "in_fp32", full)

    record = record_of(trained(tmp_path / "run", tiny))

    assert record["difference"] is None
    assert record["tolerance"] == parity.NARROW_TOLERANCE
    assert len(record["prompts"]) == 3
