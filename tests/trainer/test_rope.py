"""Models whose RoPE depends on a row's length compute each row as if alone, in validation, scoring and serving."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from run_folders import chat, lay_out, plan
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tunery.rows.template import ChatTemplate
from tunery.spec import Dpo, Evaluation
from worker.server.generation import Generation
from worker.server.sampling import Sampling
from worker.server.streams import Alone
from worker.trainer import rope, validation
from worker.trainer.cuda_graphs import reason_against
from worker.trainer.data import collate
from worker.trainer.report import MessageWriter
from worker.trainer.rope import LengthRope
from worker.trainer.run import carry_out, prepare
from worker.trainer.scoring import answers
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Training

ROWS = [chat(i, words=words) for i, words in enumerate((2, 9, 1, 5, 12, 3))]
NEW_TOKENS = 6


@pytest.fixture(params=["Phi-3 longrope", "Llama, dynamic"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Returns a base whose RoPE frequencies change beyond 40 tokens, which changes its answers."""
    return zoo.make(request.param, tmp_path / "base")


def prepared(tmp_path: Path, base: Path) -> Training:
    settled = plan(evaluation=Evaluation(max_new_tokens=NEW_TOKENS))
    return prepare(lay_out(tmp_path / "run", base, settled, ROWS), MessageWriter(None), StopSignal())


def fresh(base: Path) -> Any:
    """Returns a newly loaded model, because dynamic RoPE keeps the frequencies of the longest row so far."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def continuation(base: Path, prompt: list[int], count: int) -> list[int]:
    """Returns the greedy tokens of a new model that computes the whole row for each token, without a cache.

    Its rows only grow, so dynamic RoPE never uses the frequencies of a longer row.
    """
    model, ids = fresh(base), list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_validation_loss_is_that_of_each_row_alone(tmp_path: Path, base: Path) -> None:
    t = prepared(tmp_path, base)
    total = 0.0
    for row in t.rows.rows:
        with torch.no_grad():
            logits = fresh(base)(torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1]
        total += functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum").item()

    for _ in range(2):  # the second time after longer rows
        loss = validation.loss(t.stepper, t.rows.examples).loss
        assert loss == pytest.approx(total / sum(row.labelled for row in t.rows.rows), rel=1e-5)


def pair(seed: int, preferred: int, other: int) -> dict[str, Any]:
    """Returns a preference row whose answers have so many words, of 4 to 8 tokens each."""
    question = chat(seed, words=1)["messages"][:1]
    answers = [chat(seed + i, words=words)["messages"][0]["content"] for i, words in enumerate((preferred, other))]
    preferred_output, other_output = ([{"role": "assistant", "content": answer}] for answer in answers)
    return {
        "input": {"messages": question},
        "preferred_output": preferred_output,
        "non_preferred_output": other_output,
    }


@pytest.mark.parametrize("part", [[[0], [1]], [[0, 1]]], ids=["padded", "packed"])
def test_answers_of_a_pair_on_both_sides_of_the_limit_are_those_alone(
    tmp_path: Path, base: Path, part: list[list[int]]
) -> None:
    """The rows of a pair share a micro-batch whatever their lengths are."""
    folder = lay_out(tmp_path / "run", base, plan(method=Dpo()), [pair(0, 1, 6), pair(5, 5, 1)])
    t = prepare(folder, MessageWriter(None), StopSignal())
    lengths = [[len(row) for row in example.rows] for example in t.rows.examples]
    assert lengths[0][0] < 40 < lengths[0][1]
    assert lengths[1][1] < 40 < lengths[1][0]
    wanted = []
    for row in t.rows.rows:
        with torch.no_grad():
            logits = fresh(base)(torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1]
        wanted.append(functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum").item())

    with torch.no_grad():
        found = t.objective.row_losses(collate(t.rows.examples, part, t.device))

    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_exported_files_are_compared_on_each_prompt_alone(tmp_path: Path, base: Path) -> None:
    """A model that is loaded again must not keep the frequencies of the longer prompt before."""
    rows = [chat(i, words=words) for i, words in enumerate((12, 9, 3))]

    assert carry_out(lay_out(tmp_path / "run", base, plan(), rows), MessageWriter(None), StopSignal())


def test_answers_are_those_of_each_prompt_alone(tmp_path: Path, base: Path) -> None:
    t = prepared(tmp_path, base)
    prompts = [[3 + (7 * i) % 250 for i in range(length)] for length in (60, 12, 36, 33, 47, 20)]
    asked = [answers.Question(ids, "", []) for ids in prompts]

    found = answers.generate(t, asked, base=True)

    wanted = [continuation(base, ids, NEW_TOKENS) for ids in prompts]
    assert found == [t.template.answer_text(ids) for ids in wanted]


def test_served_answer_that_grows_past_the_limit_is_that_of_whole_rows(base: Path) -> None:
    template, model = ChatTemplate.load(base), fresh(base)
    lengths = rope.install(model)
    prompt = [3 + (7 * i) % 250 for i in range(37)]

    for _ in range(2):  # the second time after longer rows
        tokens = Generation(
            stream=Alone(model, prompt, lengths),
            tokenizer=template.tokenizer,
            prompt_ids=prompt,
            max_tokens=NEW_TOKENS,
            eos_ids=frozenset(),
            sampling=Sampling(temperature=0),
        )
        assert list(tokens.tokens()) == continuation(base, prompt, NEW_TOKENS)


def test_served_logits_past_the_limit_are_those_of_whole_rows(base: Path) -> None:
    model, whole = fresh(base), fresh(base)
    ids = [3 + (7 * i) % 250 for i in range(44)]
    stream = Alone(model, ids[:37], rope.install(model))

    for end in range(37, 44):
        with torch.no_grad():
            wanted = whole(torch.tensor([ids[:end]]), use_cache=False).logits[0, -1]
        assert (stream.logits() - wanted).norm() < 1e-4 * wanted.norm(), end
        stream.push(ids[end])


def test_lengths_at_which_frequencies_change(base: Path) -> None:
    lengths = rope.of(fresh(base))

    assert lengths
    assert not lengths.changes(1, 40)
    assert lengths.changes(40, 41)
    assert lengths.changes(41, 42) == bool(lengths.dynamic)


def test_other_models_have_one_group(tiny: Path, tmp_path: Path) -> None:
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), ROWS), MessageWriter(None), StopSignal())

    assert rope.of(t.objective.causal) == LengthRope()
    assert len(set(t.stepper._groups)) == 1
    assert not LengthRope().changes(1, 100_000)


@pytest.mark.gpu
def test_steps_of_such_a_model_are_not_recorded(tmp_path: Path, base: Path) -> None:
    t = prepared(tmp_path, base)

    assert reason_against(t.objective, 64) == "RoPE depends on the rows' lengths"
    assert t.objective.pad_to == (1, 1), "padding would change the lengths"
