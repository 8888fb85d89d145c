"""A model sharded over two ranks learns, answers, is saved and is exported like a whole one on one rank.

On a CPU over gloo, and with `-m gpu` on two GPUs over NCCL.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import two_ranks
import zoo
from run_folders import Interrupting, chat, lay_out, plan
from safetensors.torch import load_file
from transformers import AutoConfig

from tunery.planning.precision import decide
from tunery.spec import Dpo, Evaluation, Export, Full, General, Lora, Qlora, Replay, Resources, Run
from worker.trainer import layout
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i, words=2 + i % 9) for i in range(9)]  # of different lengths; rank 1 has none in an epoch's last step
EVALUATION = Evaluation(test_file="file-test", max_new_tokens=6, general=General(items=7, prompts=3), task_rows=2)
PIECES = Resources(gpus=2, sharding="full_shard")
COMMON: dict[str, Any] = {"n_epochs": 2, "evaluation": EVALUATION}
FULL: dict[str, Any] = COMMON | {"technique": Full(), "learning_rate": 3e-3}
PLAIN: dict[str, Any] = {"n_epochs": 2, "technique": Full(weights_dtype="float32"), "learning_rate": 3e-3}
"""In fp32 on a GPU too: two ranks would split a block of 8-bit moments, and such a run starts over."""
ADAPTERS: dict[str, Any] = {
    "lora": {"n_epochs": 2, "technique": Lora(r=4)},
    "qlora": {"n_epochs": 2, "technique": Qlora(r=4, compute_dtype="float32")},
}
PAIRS = [
    {"prompt": row["messages"][0]["content"], "chosen": row["messages"][1]["content"], "rejected": f"no {number}"}
    for number, row in enumerate(ROWS)
]
MORE: dict[str, dict[str, Any]] = {
    "pairs": PLAIN | {"method": Dpo(), "learning_rate": 1e-3},
    "replay": PLAIN | {"replay": Replay(share=0.3, max_new_tokens=32)},
    "exported": PLAIN | {"export": Export(fp8=True)},
    "merged": {"n_epochs": 2, "technique": Lora(r=4), "export": Export(merged=True)},
    "continued": {"n_epochs": 2, "technique": Lora(r=4, alpha=8)},
    "uneven": {"n_epochs": 1, "technique": Lora(r=4)},  # of its validation rows, each takes a pass of its own
    "narrow": PLAIN | {"optimizer": "adamw_8bit", "learning_rate": 1e-3},
}
"""Everything else that a run may do, with a sharded model."""
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PLACES = ["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, TWO_GPUS])]


class Runs:
    """The runs' folders, and the report of each of the two ranks by the command."""

    def __init__(self, folder: Path, base: Path, gpus: bool) -> None:
        self.folder, self.base, self.gpus = folder, base, gpus
        self.seen: dict[str, list[dict[str, Any]]] = {}

    def lay_out(self, name: str, base: Path | None = None, **changes: Any) -> Path:
        settled = plan(**{"resources": PIECES} | changes)
        rows = PAIRS if "method" in changes else ROWS
        return lay_out(self.folder / name, base or self.base, settled, rows, rows[:3], rows[:3])

    def carry_out(self, *commands: tuple[str, str]) -> None:
        """Carries out commands, each a run's name and a mode of `two_ranks`, on two ranks."""
        found = two_ranks.spawn(self.folder, *(f"{how}:{self.folder / name}" for name, how in commands), gpus=self.gpus)
        for (name, how), *ranks in zip(commands, *found, strict=True):
            self.seen[f"{name} {how}"] = ranks

    def carry_out_alone(self, name: str, **changes: Any) -> tuple[Path, list[dict[str, Any]]]:
        """Carries out the same run unsharded on one rank, and returns its folder and metrics."""
        base = (self.folder / name / "base").resolve()
        alone = self.lay_out(f"{name}-alone", base, **changes | {"resources": Resources()})
        if (adapter := self.folder / name / "adapter").exists():
            (alone / "adapter").symlink_to(adapter)
        carry_out(alone, writer := MessageWriter(None), StopSignal())
        return alone, writer.metrics

    def check_metrics(self, command: str, wanted: list[dict[str, Any]]) -> None:
        for rank in self.seen[command]:
            two_ranks.check_metrics(rank["metrics"], wanted, self.gpus)


@pytest.fixture(scope="module", params=PLACES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Runs:
    gpus = request.param == "nccl"
    made = Runs(tmp_path_factory.mktemp("pieces"), tiny, gpus)
    made.lay_out("full", **FULL)
    for name, changes in ADAPTERS.items():
        made.lay_out(name, **changes)
    for name in ("stopped", "two-to-one", "one-to-two"):
        made.lay_out(name, **PLAIN)
    wide = tiny_models.llama(made.folder / "base-512", bf16=True, **WIDE)
    made.lay_out("wide", wide, technique=Lora(r=4))
    one = made.folder / "one-to-two"
    on_ranks(one, Resources())
    assert not carry_out(one, Interrupting(3, stop_signal := StopSignal()), stop_signal)
    on_ranks(one, PIECES)
    commands = [
        ("full", "whole"), ("lora", "whole"), ("qlora", "whole"), ("stopped", "step-2"), ("stopped", "whole"),
        ("two-to-one", "step-2"), ("one-to-two", "whole"), ("wide", "ready"),
    ]  # fmt: skip
    made.carry_out(*commands)
    return made


@pytest.fixture(scope="module", params=PLACES)
def more(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Runs:
    """Carries out the runs of MORE."""
    made = Runs(tmp_path_factory.mktemp("more"), tiny, request.param == "nccl")
    larger = {"narrow": tiny_models.llama(made.folder / "base-64", hidden_size=64, intermediate_size=128)}
    larger["uneven"] = zoo.make("Llama, dynamic", made.folder / "base-dynamic")
    for name, changes in MORE.items():
        made.lay_out(name, larger.get(name), **changes)
    tiny_models.lora(made.folder / "continued" / "adapter", tiny)
    made.carry_out(*((name, "whole") for name in MORE))
    return made


def on_ranks(folder: Path, resources: Resources) -> None:
    """Changes the number of ranks on which a run resumes."""
    spec = folder / "spec.json"
    run = Run.model_validate_json(spec.read_text())
    settled = run.plan.model_copy(update={"resources": resources})
    spec.write_text(run.model_copy(update={"plan": settled}).model_dump_json())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> list[dict[str, Any]]:
    """Returns the metrics of the plain full fine-tune, unsharded on one rank."""
    carry_out(
        lay_out(tmp_path_factory.mktemp("plain") / "run", tiny, plan(**PLAIN), ROWS, ROWS[:3], ROWS[:3]),
        writer := MessageWriter(None),
        StopSignal(),
    )
    return writer.metrics


def exported(folder: Path) -> dict[str, torch.Tensor]:
    [file] = (folder / "out").glob("*model*.safetensors")
    return load_file(file)


def test_each_rank_keeps_half_of_every_weight(runs: Runs) -> None:
    ranks = runs.seen["full whole"]

    assert [rank["world"] for rank in ranks] == [2, 2]
    for rank in ranks:
        kinds = {kind for kind, _, _ in rank["weights"].values()}
        assert kinds == {"DTensor"}
        assert all(kept * 2 == whole for _, kept, whole in rank["weights"].values())
        precision = decide(Full(), "cuda" if runs.gpus else "cpu")
        computed = layout.compute(AutoConfig.from_pretrained(runs.base), precision, 2)
        assert computed.weights == sum(kept for _, kept, _ in rank["weights"].values()) * precision.trained_bytes


def test_pieces_learn_what_a_whole_model_does(runs: Runs, tmp_path: Path) -> None:
    alone = lay_out(tmp_path / "alone", runs.base, plan(**FULL), ROWS, ROWS[:3], ROWS[:3])

    carry_out(alone, writer := MessageWriter(None), StopSignal())

    runs.check_metrics("full whole", writer.metrics)
    found, wanted = exported(runs.folder / "full"), exported(alone)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert runs.gpus or (found[name] - tensor).abs().max() < 1e-3, name
    assert two_ranks.relative_difference(found, wanted) < 0.05
    record = json.loads((runs.folder / "full" / "out" / "training_config.json").read_text())
    assert record["memory"]["recompute"] == 2  # all layers, from weights that are gathered again


@pytest.mark.filterwarnings("ignore:inner dimension:UserWarning")  # bitsandbytes has a fast kernel for larger layers
@pytest.mark.parametrize("name", list(ADAPTERS))
def test_adapters_learn_on_a_base_in_pieces(runs: Runs, tmp_path: Path, name: str) -> None:
    alone = lay_out(tmp_path / "alone", runs.base, plan(**ADAPTERS[name]), ROWS, ROWS[:3], ROWS[:3])

    carry_out(alone, writer := MessageWriter(None), StopSignal())

    runs.check_metrics(f"{name} whole", writer.metrics)
    for rank in runs.seen[f"{name} whole"]:
        for weight, (kind, kept, whole) in rank["weights"].items():
            assert (kind, kept * 2) == ("DTensor", whole) if ".lora_" not in weight else kept == whole, weight
    found, wanted = exported(runs.folder / name), exported(alone)
    assert list(found) == list(wanted)
    for weight, tensor in wanted.items():
        assert runs.gpus or (found[weight] - tensor).abs().max() < 1e-3, weight
    assert two_ranks.relative_difference(found, wanted) < (0.2 if runs.gpus else 0.05)


def test_pieces_that_were_stopped_go_on(runs: Runs, unbroken: list[dict[str, Any]]) -> None:
    """Only rank 1 is asked to stop; the snapshot has the whole weights, of which each rank loads its shard."""
    assert [rank["done"] for rank in runs.seen["stopped step-2"]] == [False, False]
    runs.check_metrics("stopped whole", unbroken)
    weights = load_file(runs.folder / "stopped" / "snapshots" / "step-3" / "weights.safetensors")
    assert weights["model.lm_head.weight"].shape == (260, 32)


def test_pieces_go_on_as_a_whole(runs: Runs, unbroken: list[dict[str, Any]]) -> None:
    folder = runs.folder / "two-to-one"
    on_ranks(folder, Resources())

    carry_out(folder, writer := MessageWriter(None), StopSignal())

    runs.seen["two-to-one whole"] = [{"metrics": writer.metrics}]
    runs.check_metrics("two-to-one whole", unbroken)


def test_whole_goes_on_in_pieces(runs: Runs, unbroken: list[dict[str, Any]]) -> None:
    assert [len(rank["seen"]) for rank in runs.seen["one-to-two whole"]] == [3, 3], "it did not go on, but started over"
    runs.check_metrics("one-to-two whole", unbroken)


def test_host_holds_one_copy_of_the_base(runs: Runs) -> None:
    """The first rank reads the base and sends the others their shards, which on a CPU are in host memory too.

    On a CPU, the file of half the size of the copy in fp32 is mapped too. For a GPU the copy is in bf16.
    """
    layers, width, inner, kv = WIDE["num_hidden_layers"], WIDE["hidden_size"], WIDE["intermediate_size"], 256
    layer = 4 * (2 * width * width + 2 * width * kv + 3 * width * inner)
    whole = layers * layer
    first, second = (rank["host_bytes"] for rank in runs.seen["wide ready"])

    assert 0.9 * whole / (2 if runs.gpus else 1) < first < 1.5 * whole + 3 * layer
    assert second < (0 if runs.gpus else 0.5) * whole + 4 * layer


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MORE))
def test_whatever_a_run_does_it_does_in_pieces(more: Runs, name: str) -> None:
    alone, metrics = more.carry_out_alone(name, **MORE[name])

    kinds = {kind for kind, kept, whole in more.seen[f"{name} whole"][0]["weights"].values() if kept < whole}
    assert kinds == {"DTensor"}
    more.check_metrics(f"{name} whole", metrics)
    for file in sorted((alone / "out").rglob("*.safetensors")):
        found, wanted = (load_file(each) for each in (more.folder / name / file.relative_to(alone), file))
        assert list(found) == list(wanted)
        assert two_ranks.relative_difference(found, wanted) < (0.05 if more.gpus else 1e-3), file.name
