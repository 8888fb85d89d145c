"""Two ranks exchange only those rows of an embedding's gradient that a step looks up, and learn the same to the bit."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import toy_methods
import two_ranks
import zoo
from run_folders import chat, lay_out, plan
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tunery.spec import METHODS, Dpo, Full, Lora, Replay, Resources, Technique
from worker.trainer.cuda_graphs import forward_backward
from worker.trainer.data import PADDING, Example, Row, Rows, collate, singles
from worker.trainer.loading import RECIPES
from worker.trainer.lookups import Lookups, embedding_of
from worker.trainer.objective import Objective

ROWS = [chat(i, words=2 + i % 9) for i in range(9)]  # an epoch's last step has one row, so rank 1 has none
CHATS = [{**row, "other": f"no {number} &"} for number, row in enumerate(ROWS)]
PAIRS = [
    {"prompt": row["messages"][0]["content"], "chosen": row["messages"][1]["content"], "rejected": row["other"]}
    for row in CHATS
]
STEPS = 6
EMBEDDING = 260 * 32
"""The elements of the tiny model's embedding; its head has as many."""


def _runs() -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Returns the plan and the rows of each run."""
    saved = Lora(r=4, alpha=8, modules_to_save=["embed_tokens"])
    return {
        "mixed": (
            {
                "technique": Full(),
                "replay": Replay(share=0.3, max_new_tokens=16),
                "packing": True,
                "neftune_noise_alpha": 5,
            },
            ROWS,
        ),
        "saved": ({"technique": saved}, ROWS),
        "dpo": ({"technique": Full(), "method": Dpo()}, PAIRS),
        "pairwise": ({"technique": Full(), "method": METHODS["pairwise"](margin=0.5)}, CHATS),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the folder of all runs, and what each rank recorded of them, by name and mode."""
    folder = tmp_path_factory.mktemp("lookups")
    with toy_methods.pairwise(), pytest.MonkeyPatch.context() as patched:
        patched.setenv("TUNERY_PLUGINS", ",".join(toy_methods.PLUGINS))
        commands = [(name, how) for name in _runs() for how in ("rows", "embedding")]
        for name, how in commands:
            changes, rows = _runs()[name]
            settled = plan(n_epochs=2, learning_rate=1e-3, resources=Resources(gpus=2), **changes)
            lay_out(folder / f"{name} {how}", tiny, settled, rows, rows[:3])
        seen = two_ranks.spawn(folder, *(f"{how}:{folder / f'{name} {how}'}" for name, how in commands))
        yield folder, {f"{name} {how}": ranks for (name, how), *ranks in zip(commands, *seen, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "saved", "dpo", "pairwise"])
def test_two_ranks_learn_the_same_to_the_bit(found: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, seen = found
    rows, embedding = (load_file(path) for how in ("rows", "embedding")
                       for path in (folder / f"{name} {how}" / "out").glob("*.safetensors"))  # fmt: skip

    assert rows.keys() == embedding.keys()
    for key, weight in embedding.items():
        assert torch.equal(rows[key], weight), key
    assert sum(key.endswith("embed_tokens.weight") for key in rows) == 1
    for ours, theirs in zip(seen[f"{name} rows"], seen[f"{name} embedding"], strict=True):
        for entry, wanted in zip(ours["metrics"], theirs["metrics"], strict=True):
            assert {k: v for k, v in entry.items() if not k.startswith("seconds")} == {
                k: v for k, v in wanted.items() if not k.startswith("seconds")
            }
        assert theirs["sent"].count(EMBEDDING) - ours["sent"].count(EMBEDDING) == STEPS


def objective_of(base: Path, technique: Technique) -> Objective:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return Objective(RECIPES[technique.type].prepare(model, technique, None))


def test_an_embedding_that_is_trained_and_no_head_is_found(tmp_path: Path, tiny: Path) -> None:
    full = objective_of(tiny, Full())
    saved = objective_of(tiny, Lora(r=4, modules_to_save=["embed_tokens"]))
    tied = tiny_models.llama(tmp_path / "tied", tie_word_embeddings=True)

    assert embedding_of(full) is full.causal.model.embed_tokens.weight
    assert embedding_of(saved) is saved.causal.model.embed_tokens.modules_to_save["default"].weight
    assert embedding_of(objective_of(tiny, Lora(r=4))) is None
    assert embedding_of(objective_of(tiny, Lora(r=4, trainable_token_indices=[1]))) is None
    assert embedding_of(objective_of(tied, Full())) is None
    assert embedding_of(objective_of(tied, Lora(r=4, modules_to_save=["embed_tokens"]))) is None


def test_an_embedding_is_left_whole_where_other_tokens_may_be_looked_up(tiny: Path) -> None:
    objective = objective_of(tiny, Full())

    objective.is_sharded = True  # it has idle passes over some example
    assert embedding_of(objective) is None
    objective.is_sharded = False
    objective.method = SimpleNamespace(sums=("loss",))  # of a plug-in that does not say
    assert embedding_of(objective) is None
    objective.method = SimpleNamespace(looks_up_rows_only=False)
    assert embedding_of(objective) is None


def test_rows_of_a_step_are_those_of_all_its_tokens() -> None:
    examples = [Example((Row([5, 6, 5], [5, 6, 5]), Row([5, 9], [5, 9]))), *singles([Row([2], [2]), Row([7], [7])])]
    found = Lookups(nn.Parameter(torch.zeros(10, 2)), Rows(examples))

    assert ids(found.of_step([0])) == [0, 5, 6, 9], "padding is one of them"
    assert ids(found.of_step([2, 1])) == [0, 2, 7]
    assert ids(found.of_step([0, 1])) == [0, 2, 5, 6, 9]
    assert found.of_step([0, 1, 2]) is None, "over half of the vocabulary"


def ids(found: Tensor | None) -> list[int]:
    assert found is not None
    return found.tolist()


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in zoo.IN_EVERY_RUN else [pytest.mark.slow]) for f in zoo.FAMILIES]
)
def test_other_rows_have_no_gradient(tmp_path: Path, family: str) -> None:
    """Nor has padding, of which each row here has some."""
    objective = objective_of(zoo.make(family, tmp_path, tie_word_embeddings=False), Full())
    embedding = embedding_of(objective)
    assert embedding is not None
    rows = Rows(singles(Row(said, said) for said in (list(range(30, 60)), [*range(100, 120)] * 2, [3, 4, 5])))

    forward_backward(objective, collate(rows.examples, [[0], [1], [2]], torch.device("cpu"), (64, 1)), 1.0)

    assert embedding.grad is not None
    learned = set(embedding.grad.any(1).nonzero().flatten().tolist())
    assert {30, 58, 100, 3} <= learned
    assert learned <= {*ids(Lookups(embedding, rows).of_step([0, 1, 2]))} - {PADDING}
