"""Adapters trained with plain PEFT are imported unchanged, or refused with the name of the unsupported setting."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tunery.spec import ImportOrder, Lora
from tunery.trainer_protocol import EXIT_USER_ERROR
from worker.trainer.adapter_import import __main__ as adapter_import
from worker.trainer.adapter_import.errors import UnusableAdapter

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[1, *range(40, 60), 2]])
LOUD = "LOUD {{ bos_token }}" + tiny_models.CHATML
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("import") / "base", bf16=True)


def train(folder: Path, base: Path, **settings: Any) -> Path:
    """Trains an adapter with plain PEFT for three steps on the model in `base`, and returns its folder."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
    adapted = get_peft_model(model, made)
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=0.05)
    for _ in range(3):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(str(folder))
    return folder


def order(folder: Path, base: Path, adapter: Path, **asked: Any) -> Path:
    """Makes a folder for the importer, with the files of `adapter` in an archive."""
    folder.mkdir()
    (folder / "base").symlink_to(base)
    with zipfile.ZipFile(folder / "adapter.zip", "w") as archive:
        for path in adapter.rglob("*"):
            archive.write(path, f"{adapter.name}/{path.relative_to(adapter)}")
    (folder / "import.json").write_text(ImportOrder(source="mine.zip", base_model="tiny", **asked).model_dump_json())
    return folder


def logits(base: Path, adapter: Path | None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 1, "up_proj": 32}},
    "expressions": {
        "target_modules": r".*\.layers\.\d+\.(self_attn|mlp)\.(q_proj|up_proj)",
        "rank_pattern": {r"layers\.1\..*": 2},
        "alpha_pattern": {r"^model\.layers\.0\..*up_proj": 32},
    },
    "one-layer": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole-head": {"modules_to_save": ["lm_head"]},
    "new-tokens": {"trainable_token_indices": [1, 2]},
    "saved-embedding": {},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_adapter_computes_what_it_did(tmp_path: Path, base: Path, kind: str) -> None:
    made = train(tmp_path / "made", base, **KINDS[kind])
    if kind == "saved-embedding":  # as PEFT saves it after resize_token_embeddings
        own = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        tensors = load_file(made / WEIGHTS) | {"base_model.model.model.embed_tokens.weight": own.float()}
        save_file(tensors, made / WEIGHTS)

    folder = order(tmp_path / "order", base, made)
    technique = adapter_import.carry_out(folder)

    wanted = logits(base, made)
    assert torch.equal(logits(base, folder / "out"), wanted)
    assert not torch.allclose(wanted, logits(base, None), atol=1e-2)
    config = json.loads((folder / "out" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert not isinstance(config["target_modules"], str)
    assert not any("\\" in key for key in (*config["rank_pattern"], *config["alpha_pattern"]))
    assert "base_model.model.model.embed_tokens.weight" not in load_file(folder / "out" / WEIGHTS)
    assert (technique.r, technique.alpha, technique.use_dora) == (4, 8, kind == "DoRA")
    record = json.loads((folder / "out" / "training_config.json").read_text())
    assert Lora.model_validate(record["plan"]["technique"]) == technique
    assert list(record["facts"]["base_weights_sha256"]) == ["model.safetensors"]


def test_it_keeps_its_own_template_and_takes_the_bases_where_it_has_none(tmp_path: Path, base: Path) -> None:
    made = train(tmp_path / "made", base)
    folder = order(tmp_path / "plain", base, made)
    adapter_import.carry_out(folder)
    assert (folder / "out" / "chat_template.jinja").read_text() == tiny_models.CHATML
    assert json.loads((folder / "out" / "generation_config.json").read_text())["eos_token_id"] == [2]

    tiny_models.tokenizer(made, LOUD)
    folder = order(tmp_path / "loud", base, made)
    adapter_import.carry_out(folder)
    assert (folder / "out" / "chat_template.jinja").read_text() == LOUD


def _config(**changes: Any) -> Callable[[Path, Path], None]:
    def change(made: Path, _base: Path) -> None:
        path = made / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path, Path], None]:
    def apply(made: Path, _base: Path) -> None:
        tensors = load_file(made / WEIGHTS)
        change(tensors)
        save_file(tensors, made / WEIGHTS)

    return apply


def _pickle(made: Path, _base: Path) -> None:
    torch.save(load_file(made / WEIGHTS), made / "adapter_model.bin")
    (made / WEIGHTS).unlink()


def _vocabulary(made: Path, base: Path) -> None:
    tiny_models.tokenizer(made)
    path = made / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|im_end|>":2', '"<|other|>":2').replace("<|im_end|>", "<|other|>"))


def _no_lora(made: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, IA3Config(task_type="CAUSAL_LM")).save_pretrained(str(made))


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"
BAD: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a-pickle": (_pickle, "are a pickle (adapter_model.bin)"),
    "no-weights": (lambda made, _: (made / WEIGHTS).unlink(), f"it has no {WEIGHTS}"),
    "no-config": (lambda made, _: (made / CONFIG).unlink(), f"it has no {CONFIG}"),
    "no-JSON": (lambda made, _: (made / CONFIG).write_text("{"), "is not valid JSON"),
    "cut-off": (lambda made, _: (made / WEIGHTS).write_bytes(b"x" * 99), f"{WEIGHTS} is damaged"),
    "IA3": (_no_lora, "its peft_type is 'IA3'"),
    "a-classifier": (_config(task_type="SEQ_CLS"), "its task_type is 'SEQ_CLS'"),
    "PiSSA": (_config(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    "biases": (_config(bias="all"), "option bias ('all')"),
    "replicated-layers": (_config(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "activated-LoRA": (_config(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "of-a-later-PEFT": (_config(use_tomorrow=True), "does not know its option use_tomorrow"),
    "no-such-module": (_config(target_modules=["c_attn"]), "PEFT cannot load it onto this base"),
    "broken-expression": (_config(target_modules="(q_proj"), "PEFT cannot load it onto this base"),
    "another-rank": (_config(r=8), f"is 4 x 64 in its file, but 8 x 64 according to {CONFIG}"),
    "no-rank": (_config(r=0), "should be a positive integer value"),
    "no-alpha": (_config(lora_alpha=0), "its alpha is not supported here"),
    "fewer-weights": (_weights(lambda t: t.pop(FIRST)), f"lacks {FIRST}"),
    "more-weights": (_weights(lambda t: t.update({"base_model.model.x.weight": torch.ones(2)})), "does not have"),
    "NaN": (_weights(lambda t: t[FIRST][0].fill_(float("nan"))), "NaN or infinite"),
    "integers": (_weights(lambda t: t.update({FIRST: t[FIRST].to(torch.int8)})), "is int8"),
    "more-tokens": (
        _weights(lambda t: t.update({EMBEDDING: torch.ones(263, 32)})),
        "has 263 rows, but the base's has 260",
    ),
    "another-embedding": (_weights(lambda t: t.update({EMBEDDING: torch.ones(260, 32)})), "differs from the base's"),
    "another-vocabulary": (_vocabulary, "'<|im_end|>' has another id or none"),
    "a-broken-template": (
        lambda made, _: (made / "chat_template.jinja").write_text("{% if %}"),
        "its tokenizer and chat template cannot be used",
    ),
}


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("good") / "made", base)


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path, base: Path, good: Path, fault: str) -> None:
    spoil, sentence = BAD[fault]
    made = shutil.copytree(good, tmp_path / "made")
    spoil(made, base)
    with pytest.raises(UnusableAdapter) as caught:
        adapter_import.carry_out(order(tmp_path / "order", base, made))
    assert sentence in caught.value.message
    assert caught.value.message.startswith("The adapter 'mine.zip' cannot be used: ")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    wider = tiny_models.llama(tmp_path / "wider", intermediate_size=96)
    made = train(tmp_path / "made", wider)
    with pytest.raises(UnusableAdapter, match="is 4 x 96 in its file, but 4 x 64"):
        adapter_import.carry_out(order(tmp_path / "order", base, made))


@pytest.mark.parametrize("kind", ["no archive", "a bomb", "two adapters"])
def test_archives_that_are_no_adapter_are_refused(tmp_path: Path, base: Path, good: Path, kind: str) -> None:
    folder = order(tmp_path / "order", base, good)
    if kind == "no archive":
        (folder / "adapter.zip").write_bytes(b"PK no archive")
    else:
        with zipfile.ZipFile(folder / "adapter.zip", "a", zipfile.ZIP_DEFLATED) as archive:
            name = f"made/{CONFIG}" if kind == "two adapters" else "more/../../../../tmp/escaped"
            archive.writestr(f"other/{CONFIG}" if kind == "two adapters" else "made/tokenizer.json", b"0" * 2**28)
            archive.writestr(f"{name}x", "never read")
    sentence = {
        "no archive": "not a readable zip archive",
        "a bomb": "larger than such a file can be",
        "two adapters": "2 adapter_config.json files",
    }
    with pytest.raises(UnusableAdapter, match=sentence[kind]):
        adapter_import.carry_out(folder)


@pytest.mark.slow
def test_the_program_says_why_in_one_line(tmp_path: Path, base: Path, good: Path) -> None:
    made = shutil.copytree(good, tmp_path / "made")
    _config(r=8)(made, base)
    folder = order(tmp_path / "order", base, made)
    command = [sys.executable, "-m", "worker.trainer.adapter_import", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == EXIT_USER_ERROR
    assert "according to adapter_config.json on this base" in ended.stderr.splitlines()[-1]
