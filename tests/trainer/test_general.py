"""The general benchmark against plain transformers (likelihoods) and plain torch (KL and losses)."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import PeftModel
from run_folders import Ear, chat, lay_out, plan, said
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tunery.failures import BenchmarkUnavailable
from tunery.spec import Evaluation, Full, General, Lora
from tunery.trainer_protocol import GeneralScore
from worker.trainer.data import Row
from worker.trainer.general import batches, benchmark, choices, forgetting, harness, measure, stored
from worker.trainer.general.benchmark import Item, Tokens
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Training

ROWS = [chat(i) for i in range(8)]
ITEMS = [
    Item("Question: What is cold?\nAnswer:", ("ice", "the sun"), 0),
    Item("Question: Name a colour\nAnswer:", ("seven", "a big red one", "I"), 1),
    Item("Question: Why\nAnswer:", ("because it is so", "no"), 1),
]


def start(folder: Path, base: Path, **changes: Any) -> Training:
    return prepare(lay_out(folder, base, plan(**changes), ROWS), MessageWriter(None), StopSignal())


def shift(t: Training) -> None:
    """Makes the adapter's B random, so that it changes the model."""
    for name, parameter in t.parameters.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)


def encoded(t: Training, items: Sequence[Item] = ITEMS) -> list[Tokens]:
    return [benchmark.encode(t.template.tokenizer, item) for item in items]


@torch.no_grad()
def plain_scores(model: Any, tokenizer: Any, items: Sequence[Item]) -> list[list[float]]:
    """Returns the log-likelihood of each choice, computed one at a time from the full logits."""
    found = []
    for item in items:
        prefix = tokenizer.encode(item.prefix).ids
        sums = []
        for choice in item.choices:
            ids = tokenizer.encode(f"{item.prefix} {choice}").ids
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(prefix), len(ids))))
        found.append(sums)
    return found


def near(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> bool:
    return all(list(a) == pytest.approx(list(b), rel=1e-4) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("way", [choices.by_rows, choices.by_branches])
def test_likelihoods_equal_those_of_plain_transformers(tmp_path: Path, tiny: Path, way: Any) -> None:
    t = start(tmp_path / "run", tiny)
    plain = plain_scores(AutoModelForCausalLM.from_pretrained(tiny), t.template.tokenizer, ITEMS)

    t.objective.eval()
    with torch.no_grad():
        found = way(t.objective, encoded(t), t.device)

    assert near(found, plain)


def test_batches_of_any_size_score_alike(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = start(tmp_path / "run", tiny)
    items = encoded(t, [item for item in benchmark.load_items(12) if len(item.prefix) < 140])
    t.objective.eval()
    whole = choices.score(t, items)
    monkeypatch.setitem(batches.TOKENS, "cpu", 300)
    assert near(choices.score(t, items), whole)

    monkeypatch.setitem(batches.TOKENS, "cpu", 100_000)
    by_branches = choices.by_branches

    def crowded(objective: Any, some: Sequence[Tokens], device: torch.device) -> list[list[float]]:
        if len(some) > choices._TRIED:
            raise torch.OutOfMemoryError
        return by_branches(objective, some, device)

    monkeypatch.setattr(choices, "by_branches", crowded)
    assert near(choices.score(t, items), whole)


FAMILIES = ["Gemma 3", "Bloom", "Phi-3 longrope"]


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(f, marks=pytest.mark.slow) for f in zoo.FAMILIES if f not in FAMILIES)]
)
def test_every_family_scores_as_plain_transformers_does(tmp_path: Path, family: str) -> None:
    """Families whose windows, position biases or RoPE cannot keep branches apart score each choice in its own row."""
    base = zoo.make(family, tmp_path / "base")
    t = start(tmp_path / "run", base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    t.objective.eval()
    found = choices.score(t, encoded(t))

    assert near(found, plain_scores(model, t.template.tokenizer, ITEMS))


def test_branches_that_see_each_other_are_noticed(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = start(tmp_path / "run", tiny)
    t.objective.eval()
    assert choices.keeps_branches_apart(t, encoded(t))

    def causal(branches: torch.Tensor, _objective: Any) -> torch.Tensor:
        return torch.ones(len(branches), 1, *2 * branches.shape[1:], dtype=torch.bool).tril()

    monkeypatch.setattr(choices, "_mask", causal)
    assert not choices.keeps_branches_apart(t, encoded(t))


def test_tokens_that_the_tokenizer_begins_with_are_not_scored(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    tiny_folder = zoo.make("Llama", tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    bare = benchmark.encode(tokenizer, ITEMS[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert benchmark.encode(tokenizer, ITEMS[0]) == Tokens([0, *bare.prefix], bare.choices)


def prompts_of(t: Training, count: int = 3) -> list[Row]:
    return benchmark.load_prompts(t.template, count, 200)


@torch.no_grad()
def plain_moves(before: Any, after: Any, rows: Sequence[Row]) -> list[tuple[float, float, float]]:
    """Returns each row's KL and both losses, summed over its labelled tokens, from full distributions."""
    found = []
    for row in rows:
        wanted = torch.tensor(row.labels[1:])
        kept = wanted >= 0
        then, now = (
            model(torch.tensor([row.input_ids])).logits[0, :-1].float().log_softmax(-1)[kept]
            for model in (before, after)
        )
        kl = (then.exp() * (then - now)).sum()
        losses = [functional.nll_loss(logs, wanted[kept], reduction="sum") for logs in (then, now)]
        found.append((float(kl), *map(float, losses)))
    return found


def test_kl_and_losses_equal_those_of_whole_distributions(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = start(tmp_path / "run", tiny)
    shift(t)
    rows, model = prompts_of(t), t.objective.model
    assert isinstance(model, PeftModel)

    def moved() -> list[tuple[float, float, float]]:
        with measure._as_base(t):
            base = forgetting.describe(t, rows)
        t.objective.eval()
        return [(each.kl, each.base_loss, each.loss) for each in forgetting.compare(t, rows, base)]

    t.objective.eval()
    plain = plain_moves(AutoModelForCausalLM.from_pretrained(tiny), model, rows)
    assert min(kl for kl, _, _ in plain) > 0.1
    assert near(moved(), plain)

    monkeypatch.setattr(forgetting, "LIKELIEST", 20)  # of 260
    for (coarse, *losses), (kl, *wanted) in zip(moved(), plain, strict=True):
        assert 0.5 * kl < coarse < kl
        assert losses == pytest.approx(wanted, rel=1e-4)


def test_an_untrained_model_has_forgotten_nothing(tmp_path: Path, tiny: Path) -> None:
    t = start(tmp_path / "run", tiny, evaluation=Evaluation(general=General(items=10, prompts=4)))
    probe = measure.prepare(t)
    assert probe is not None

    score = measure.compare(t, probe, measure.describe_base(t, probe))

    assert score.change == 0
    assert score.p == 1
    assert score.change_low < 0 < score.change_high
    assert score.forgetting is not None
    assert abs(score.forgetting.kl) < 1e-6
    assert score.forgetting.nll_change == 0
    assert t.objective.model.training


def run(folder: Path, base: Path, ear: Ear, **changes: Any) -> GeneralScore | None:
    evaluation = Evaluation(test_file="file-test", max_new_tokens=4, general=General(items=20, prompts=4))
    lay_out(folder, base, plan(**{"evaluation": evaluation} | changes), ROWS, test=ROWS[:2])
    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())
    found: GeneralScore | None = said(ear, "score")[-1].general
    written = json.loads((folder / "out" / "scorecard.json").read_text())["general"]
    assert written == (None if found is None else found.model_dump(mode="json"))
    return found


def test_both_techniques_are_measured_against_the_same_base(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    """The base is the model before training, even where its own weights are trained and no adapter can be disabled."""
    adapted = run(tmp_path / "lora", tiny, ear, technique=Lora(r=4), n_epochs=4)
    full = run(tmp_path / "full", tiny, ear, technique=Full(), learning_rate=1e-2, n_epochs=4)

    assert adapted is not None
    assert full is not None
    assert full.base_accuracy == adapted.base_accuracy
    assert full.base_accuracy_norm == adapted.base_accuracy_norm
    assert full.forgetting is not None
    assert adapted.forgetting is not None
    assert full.forgetting.base_nll == pytest.approx(adapted.forgetting.base_nll, rel=1e-6)
    for found in (full.forgetting, adapted.forgetting):
        assert 0.01 < found.kl_low < found.kl < found.kl_high
        assert found.tuned_nll == pytest.approx(found.base_nll + found.nll_change)


@pytest.mark.parametrize("technique", [Lora(r=4), pytest.param(Full(), marks=pytest.mark.slow)], ids=["lora", "full"])
def test_a_run_stopped_while_measuring_goes_on(
    tmp_path: Path, tiny: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch, technique: Any
) -> None:
    """The base of a full fine-tune is measured before the snapshot is loaded, and again when the run resumes."""
    whole = run(tmp_path / "whole", tiny, ear, technique=technique)
    evaluation = Evaluation(test_file="file-test", max_new_tokens=4, general=General(items=20, prompts=4))
    folder = lay_out(tmp_path / "run", tiny, plan(technique=technique, evaluation=evaluation), ROWS, test=ROWS[:2])
    stop_signal, compare = StopSignal(), measure.compare

    def stopping(t: Training, *others: Any) -> GeneralScore:
        stop_signal.received = True
        return compare(t, *others)

    monkeypatch.setattr(measure, "compare", stopping)
    assert not carry_out(folder, MessageWriter(ear.descriptor), stop_signal)
    monkeypatch.setattr(measure, "compare", compare)
    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    assert said(ear, "score")[-1].general == whole


def test_lengths_decide_where_likelihoods_are_taken_by_character() -> None:
    """The longer choice has the lower sum and the higher mean."""
    item = Item("", ("no", "certainly not"), 1)
    scores = [[-4.0, -13.0]]
    assert measure._right([item], scores) == [False]
    assert measure._by_character([item], scores) == [[-2.0, -1.0]]
    assert measure._right([item], measure._by_character([item], scores)) == [True]


def test_it_can_be_turned_off(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    off = Evaluation(test_file="file-test", max_new_tokens=4, general=General(enabled=False))
    assert run(tmp_path / "run", tiny, ear, evaluation=off) is None


def test_base_is_scored_once_on_a_host(tmp_path: Path, tiny: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny.iterdir():
        (base / file.name).symlink_to(file)
    (base / "manifest.json").write_text("{}")
    kept = tmp_path / "scores"
    kept.mkdir()

    def started(name: str, **changes: Any) -> Training:
        t = start(tmp_path / name, base, evaluation=Evaluation(general=General(items=10, prompts=0)), **changes)
        (t.folder / "scores").symlink_to(kept)
        return t

    def known(t: Training) -> Any:
        probe = measure.prepare(t)
        assert probe is not None
        return probe.known

    first = started("first")
    probe = measure.prepare(first)
    assert probe is not None
    assert probe.known is None
    found = measure.describe_base(first, probe).likelihoods
    assert known(started("second")) == found
    assert known(started("qlora", technique={"type": "qlora", "r": 4})) is None
    (base / "manifest.json").write_text("{ }")
    assert known(started("another base")) is None
    (base / "manifest.json").write_text("{}")
    [file] = kept.iterdir()
    file.write_text(file.read_text()[:-2])
    assert known(started("damaged")) is None


def test_scores_that_cannot_be_kept_stop_no_run(tmp_path: Path) -> None:
    stored.write(tmp_path / "no such folder" / "file.json", [[1.0]])
    stored.write(None, [[1.0]])
    assert stored.read(None, 1) is None


TASK = """
task: frozen
dataset_path: json
dataset_kwargs:
  data_files: {test: ROWS}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} ->"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


def test_a_task_of_lm_evaluation_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    rows = [{"question": item.prefix, "choices": list(item.choices), "answer": item.answer} for item in ITEMS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "frozen.yaml").write_text(TASK.replace("ROWS", str(tmp_path / "rows.jsonl")))
    monkeypatch.setenv(harness.TASKS, str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    wanted = [Item(f"{item.prefix} ->", item.choices, item.answer, " ") for item in ITEMS]
    assert harness.load_items("frozen", None) == wanted
    assert harness.load_items("frozen", 2) == benchmark.sample(wanted, 2)
    with pytest.raises(BenchmarkUnavailable, match="cannot load it"):
        harness.load_items("no_such_task", None)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_task_without_its_package_is_refused_before_training(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    general = General(benchmark="lm_eval:arc_easy")
    evaluation = Evaluation(test_file="file-test", max_new_tokens=4, general=general)
    with pytest.raises(BenchmarkUnavailable, match="'lm_eval:arc_easy' cannot be run: lm-eval is not installed"):
        run(tmp_path / "run", tiny, ear, evaluation=evaluation)
    assert said(ear, "step") == []


def test_shipped_questions_and_prompts() -> None:
    items = benchmark.load_items()
    assert len(items) == 800
    assert all(0 <= item.answer < len(item.choices) for item in items)
    some = benchmark.load_items(100)
    assert some == benchmark.load_items(100)
    assert [item for item in items if item in some] == some
    assert benchmark.digest(some) != benchmark.digest(items)
