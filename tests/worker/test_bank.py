"""Adapters in one batch give the answers that each gives alone in PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import PeftModel
from safetensors.torch import load_file, save_file
from streamed import PROMPTS, TOKENS, alone, by_peft, greedy, make

from tunery.planning.precision import decide
from tunery.spec import Qlora
from worker.server import factors
from worker.server.batch import Batch
from worker.server.cache_memory import CacheMemory
from worker.server.factors import Factors
from worker.server.models import AdapterAlone, Base, BrokenAdapter, Source, StackedAdapter
from worker.server.streams import NoProbabilities

SHAPES: list[dict[str, Any]] = [
    {"r": 8},
    {"r": 64, "lora_alpha": 32},
    {"r": 8, "use_rslora": True},
    {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 40}},
    {"r": 8, "target_modules": ["q_proj", "v_proj"]},
]


def load(folder: Path) -> Base:
    return Base(Source(folder, None, "cpu", torch.float32), CacheMemory(2**30))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.make("Llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def folders(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [make(root / str(seed), llama, seed, **options) for seed, options in enumerate(SHAPES)]


def test_ranks_and_shapes_are_mixed_in_one_batch(llama: Path, folders: list[Path]) -> None:
    base = load(llama)
    laid = [base.lay_on(folder) for folder in folders]
    assert all(isinstance(one, StackedAdapter) for one in laid)
    # The first adapter has three rows, the base two: rows of one adapter share its factors.
    asked: list[int | None] = [0, None, 1, 2, 3, 4, 0, None, 0]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(asked))]
    rows = [(base if i is None else laid[i]).stream(prompt) for i, prompt in zip(asked, prompts, strict=True)]

    said = [[greedy(row)] for row in rows]
    for _ in range(TOKENS - 1):
        for one, row in zip(said, rows, strict=True):
            one.append(greedy(row))

    wanted = [
        by_peft(llama, None if i is None else folders[i], prompt) for i, prompt in zip(asked, prompts, strict=True)
    ]
    assert said == wanted
    assert len({tuple(one) for one in wanted}) == len(wanted) - 2  # two requests repeat others


def test_adapters_of_one_shape_come_and_go(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_PLACES", 3)
    folders = [make(tmp_path / str(seed), llama, seed) for seed in range(4)]
    base = load(llama)
    laid = [base.lay_on(folder) for folder in folders]
    wanted = [by_peft(llama, folder, PROMPTS[0]) for folder in folders]
    for together in ([0], [0, 1], [2, 1], [3], [3, 2, 0], [1, 3], [0, 1, 2, 3], [2, 0]):
        rows = [laid[i].stream(PROMPTS[0]) for i in together]
        said = [[greedy(row) for row in rows] for _ in range(TOKENS)]
        assert [list(one) for one in zip(*said, strict=True)] == [wanted[i] for i in together], together
        for row in rows:
            row.close()
    laid[2].leave()
    again = base.lay_on(folders[2])
    rows = [one.stream(PROMPTS[0]) for one in (laid[3], again, laid[0])]
    said = [[greedy(row) for row in rows] for _ in range(TOKENS)]
    assert [list(one) for one in zip(*said, strict=True)] == [wanted[i] for i in (3, 2, 0)]


def test_plans_follow_adapters_that_move(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs in turns, which take each other's places."""
    monkeypatch.setattr(factors, "_PLACES", 2)
    folders = [make(tmp_path / str(seed), llama, seed) for seed in range(4)]
    base = load(llama)
    laid = [base.lay_on(folder) for folder in folders]
    batch = Batch(base.model, base.bank, long_tokens=40)
    rows = [batch.join(PROMPTS[4 if i > 1 else 0], one._factors) for i, one in enumerate(laid)]  # type: ignore[union-attr]
    said = [[greedy(row) for row in rows] for _ in range(TOKENS)]
    assert [list(one) for one in zip(*said, strict=True)] == [
        by_peft(llama, folder, PROMPTS[4 if i > 1 else 0]) for i, folder in enumerate(folders)
    ]


def test_parts_of_a_batch_do_not_push_each_other_out() -> None:
    """Four adapters run in two passes, then together, then in two passes again: each is copied once."""
    sites = (factors.Site("a", 1, 2, 2),)
    adapters = [Factors(sites, torch.full((4,), float(i))) for i in range(4)]
    stack = factors.Stack(sites, torch.device("cpu"))
    brought: list[Factors] = []
    bring = stack._bring
    stack._bring = lambda one, place: (brought.append(one), bring(one, place))[1]  # type: ignore[func-returns-value, method-assign]
    for part in (adapters[:2], adapters[2:], adapters, adapters[:2], adapters[2:]):
        rows, order = stack.gather(part)
        assert {one: float(row[0]) for one, row in zip(order, rows, strict=True)} == {
            one: float(adapters.index(one)) for one in part
        }
    assert brought == adapters


OTHERS = ("Qwen3", "Phi-3", "Granite", "Cohere2", "Phi")


@pytest.mark.parametrize("family", ["Gemma 2", *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)])
def test_adapters_of_other_families_are_laid_so_too(family: str, tmp_path: Path) -> None:
    made = zoo.make(family, tmp_path / "base")
    folders = [make(tmp_path / str(seed), made, seed, r=4 + 4 * seed) for seed in range(2)]
    base = load(made)
    laid = [base.lay_on(folder) for folder in folders]
    assert all(isinstance(one, StackedAdapter) for one in laid)

    rows = [one.stream(PROMPTS[i]) for i, one in enumerate((*laid, base))]
    said = [[greedy(row) for row in rows] for _ in range(TOKENS)]
    wanted = [by_peft(made, folder, PROMPTS[i]) for i, folder in enumerate((*folders, None))]
    assert [list(one) for one in zip(*said, strict=True)] == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [5, 6]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_adapters_answer_by_peft_beside_the_batch(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = make(tmp_path / "adapter", llama, 5, **options)
    base = load(llama)
    plain, other = base.stream(PROMPTS[0]), base.lay_on(folder)
    assert isinstance(other, AdapterAlone)
    own = other.stream(PROMPTS[1])

    said = [(greedy(plain), greedy(own)) for _ in range(TOKENS)]

    assert [one for one, _ in said] == by_peft(llama, None, PROMPTS[0])
    assert [one for _, one in said] == by_peft(llama, folder, PROMPTS[1])
    # The base's weights are in memory once.
    weights = {id(part) for part in base.model.parameters()}
    assert weights <= {id(part) for part in other.model.parameters()} | {id(base.model.lm_head.weight)}
    assert other.nbytes < base.nbytes


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_adapters_on_experts_answer_alone(layers: str, tmp_path: Path) -> None:
    made = zoo.make("Qwen3-MoE", tmp_path / "base")
    on = ["q_proj", "o_proj"] if layers == "attention" else ["q_proj", "gate"]
    folder = make(tmp_path / "adapter", made, 5, target_modules=on)
    base = load(made)
    laid = base.lay_on(folder)
    assert isinstance(laid, StackedAdapter if layers == "attention" else AdapterAlone)
    rows = [laid.stream(PROMPTS[0]), base.stream(PROMPTS[1])]
    said = [[greedy(row) for row in rows] for _ in range(TOKENS)]
    assert [list(one) for one in zip(*said, strict=True)] == [
        by_peft(made, folder, PROMPTS[0]),
        by_peft(made, None, PROMPTS[1]),
    ]


def test_adapters_are_mixed_on_a_base_in_four_bits(llama: Path, folders: list[Path]) -> None:
    precision = decide(Qlora(r=8, double_quant=False, compute_dtype="float32"), "cpu")
    source = Source(llama, precision, "cpu", torch.float32)
    base = Base(source, CacheMemory(2**30))
    laid: list[Any] = [base, *(base.lay_on(folder) for folder in folders[:2])]  # of ranks 8 and 64
    assert all(isinstance(one, StackedAdapter) for one in laid[1:])
    rows = [one.stream(PROMPTS[i]) for i, one in enumerate(laid)]
    said = [[greedy(row) for row in rows] for _ in range(TOKENS)]

    wanted = [alone(source.read().eval(), PROMPTS[0])]
    for i, folder in enumerate(folders[:2], 1):
        wanted.append(alone(PeftModel.from_pretrained(source.read(), folder).eval(), PROMPTS[i]))
    assert [list(one) for one in zip(*said, strict=True)] == wanted
    assert wanted[0] != by_peft(llama, None, PROMPTS[0]), "four bits change no answer of this base"


def test_adapter_whose_numbers_are_broken_changes_no_other_answer(llama: Path, tmp_path: Path) -> None:
    folders = [make(tmp_path / str(seed), llama, seed) for seed in range(2)]
    weights = load_file(folders[1] / "adapter_model.safetensors")
    save_file({name: part.fill_(torch.nan) for name, part in weights.items()}, folders[1] / "adapter_model.safetensors")
    base = load(llama)
    laid: list[Any] = [base, *(base.lay_on(folder) for folder in folders)]
    rows = [one.stream(PROMPTS[0]) for one in laid]
    said = [[greedy(row) for row in rows[:2]] for _ in range(TOKENS)]
    with pytest.raises(NoProbabilities, match="not finite"):
        rows[2].logits()
    wanted = [by_peft(llama, folder, PROMPTS[0]) for folder in (None, folders[0])]
    assert [list(one) for one in zip(*said, strict=True)] == wanted
    rows[2].close()
    dora = make(tmp_path / "dora", llama, 5, use_dora=True)
    weights = load_file(dora / "adapter_model.safetensors")
    save_file({name: part.fill_(torch.nan) for name, part in weights.items()}, dora / "adapter_model.safetensors")
    with pytest.raises(NoProbabilities):
        base.lay_on(dora).stream(PROMPTS[0]).likeliest()
    row = laid[1].stream(PROMPTS[3])  # in its slot, and in the same stack
    assert [greedy(row) for _ in range(TOKENS)] == by_peft(llama, folders[0], PROMPTS[3])


def test_adapter_of_another_base_is_refused_in_a_sentence(llama: Path, tmp_path: Path) -> None:
    other = zoo.make("Llama", tmp_path / "other", hidden_size=32)
    folder = make(tmp_path / "adapter", other, 1)
    with pytest.raises(BrokenAdapter, match="cannot be loaded onto its base"):
        load(llama).lay_on(folder)


def test_base_alone_computes_nothing_for_adapters(llama: Path, folders: list[Path], monkeypatch: Any) -> None:
    base = load(llama)
    for folder in folders:
        base.lay_on(folder)
    monkeypatch.setattr("worker.server.bank._add", lambda *_: pytest.fail("a product of an adapter"))
    row = base.stream(PROMPTS[0])
    assert [greedy(row) for _ in range(TOKENS)] == by_peft(llama, None, PROMPTS[0])
