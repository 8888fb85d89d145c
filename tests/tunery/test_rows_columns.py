"""Rows whose column names say nothing: columns that their owner names, and plain text. What is learned of them."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from backports import zstd
from commands import Run
from pyarrow import parquet
from templates import CHATML, LLAMA_LIKE, model_folder

from tunery.datasets.columns import parse
from tunery.datasets.rules import check_examples
from tunery.errors import InvalidValue
from tunery.failures import InvalidTrainingFile
from tunery.rows.bulk import Judged, Reading, digest_rows
from tunery.rows.encoding import encoder_of_any, find_encoder, read_examples
from tunery.rows.shapes import can_be_named
from tunery.rows.template import ChatTemplate
from tunery.spec import Columns, Dpo, Supervised
from worker.trainer.data import read_rows

TABLE = [{"Frage": f"Wie spät, {i}?", "Antwort": "Zehn.", "output": "x", "label": False} for i in range(12)]
NAMED = Columns(prompt="Frage", completion="Antwort")


def as_csv(separator: str) -> bytes:
    text = io.StringIO()
    table = csv.DictWriter(text, list(TABLE[0]), delimiter=separator)
    table.writeheader()
    table.writerows(TABLE)
    return text.getvalue().encode()


def as_parquet() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(TABLE), sink)
    return sink.getvalue()


FILES = {
    "JSON Lines": b"".join(json.dumps(row).encode() + b"\n" for row in TABLE),
    "an array": json.dumps(TABLE, indent=1).encode(),
    "CSV": as_csv(","),
    "semicolons": as_csv(";"),
    "TSV": as_csv("\t"),
    "Parquet": as_parquet(),
}


def _texts(rows: Iterator[Judged]) -> list[list[str | None]]:
    return [[turn.content for turn in row.example.messages] for row in rows if row.example is not None]


@pytest.mark.parametrize("compressed", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize("kind", FILES)
def test_named_columns_are_read_in_every_format(kind: str, compressed: str) -> None:
    data = {"plain": bytes, "gzip": gzip.compress, "zstd": zstd.compress}[compressed](FILES[kind])
    encoder = find_encoder(Supervised(), "training", NAMED)
    groups = digest_rows([data], Reading("training", encoder, None, 2048), _texts)

    assert list(chain.from_iterable(groups)) == [[row["Frage"], row["Antwort"]] for row in TABLE]
    assert check_examples([data], encoder=encoder).shape.describe() == (
        "prompt/completion rows: 'Frage' as the user's message, 'Antwort' as the answer; other columns are not read"
    )


def test_trainer_reads_named_columns(tmp_path: Path) -> None:
    template = ChatTemplate.load(model_folder(tmp_path / "model", CHATML))
    (tmp_path / "train.jsonl").write_bytes(FILES["CSV"])
    (tmp_path / "plain.jsonl").write_text(
        "".join(json.dumps({"prompt": row["Frage"], "completion": row["Antwort"]}) + "\n" for row in TABLE)
    )

    found = read_rows(tmp_path / "train.jsonl", template, 99, encoder=find_encoder(Supervised(), "training", NAMED))
    assert found.rows == read_rows(tmp_path / "plain.jsonl", template, 99).rows


def test_named_columns_of_pairs_and_conversations() -> None:
    pairs = Columns(prompt="q", chosen="gut", rejected="schlecht")
    row = {"q": "A?", "gut": "Ja.", "schlecht": "Nein."}
    summary = check_examples([json.dumps(row).encode()], encoder=find_encoder(Dpo(), "training", pairs), least=1)
    assert "'gut' as the preferred answer" in (summary.shape.describe() or "")

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chat = Columns(messages="Verlauf")
    data = json.dumps({"Verlauf": json.dumps(turns), "score": 1}).encode()
    summary = check_examples([data], encoder=encoder_of_any("assistant", chat), least=1)
    assert summary.shape.describe() == "chat messages rows: 'Verlauf' as the conversation; other columns are not read"


@pytest.mark.parametrize(
    ("table", "missing"),
    [
        (b'{"prompt": "q", "completion": null}', "prompt/completion, but has no value in 'completion'."),
        (b'{"id": 1, "Question": null, "Answer": "a"}', "question/answer, but has no value in 'Question'."),
        (b'{"text": "q", "label": null}\n{"text": "q", "label": "a"}', "text/label, but has no value in 'label'."),
        (b'{"text": "q", "output": null}', "text/output, but has no value in 'output'."),
        (b"id,messages\n1,\n", "chat messages, but has no value in 'messages'."),
        (b"text,intent\nq,\n", "'intent' may be the class of 'text'"),
        (b'{"prompt": "q", "chosen": null, "rejected": "b"}', "chosen/rejected, but has no value in 'chosen'."),
    ],
)
def test_a_first_row_without_a_value_says_which(table: bytes, missing: str) -> None:
    with pytest.raises(InvalidTrainingFile) as refused:
        check_examples([table], least=1)
    assert missing in refused.value.message
    assert can_be_named(refused.value.message)


@pytest.mark.parametrize(
    ("table", "turns"),
    [
        (b"prompt,completion\na,b\nc,\n,d\n", [("a", "b"), ("c", ""), ("", "d")]),
        (b"prompt,completion\nq,\na,b\n", [("q", ""), ("a", "b")]),
        (b"Question\tAnswer\tid\nq\t\t1\n", [("q", "")]),
        (b"text,label\nq,\nq,a\n", [("q", ""), ("q", "a")]),
    ],
)
def test_an_empty_cell_is_an_empty_text_as_in_json(table: bytes, turns: list[tuple[str, str]]) -> None:
    examples = [example for _, example in read_examples([table], "training")]
    assert [tuple(message.content for message in example.messages) for example in examples] == turns
    assert check_examples([table], least=1).silent == [line for line, (_, said) in enumerate(turns, 2) if not said]


def test_an_empty_cell_of_a_named_column_is_an_empty_text() -> None:
    encoder = encoder_of_any("assistant", NAMED)
    assert check_examples([b"Frage,Antwort\nq,\nq,a\n"], encoder=encoder, least=1).silent == [2]


@pytest.mark.parametrize(
    "table", [b"Frage,Antwort\nq,a\n,\n", b"Frage,Antwort\n,\nq,a\n", b"Frage;Antwort;id\n;;1\nq;a;2\n"]
)
def test_an_empty_row_is_judged_alike_with_named_columns(table: bytes) -> None:
    named = check_examples([table], encoder=encoder_of_any("assistant", NAMED), least=1)
    own = [table.replace(b"Frage", b"prompt").replace(b"Antwort", b"completion")]
    assert named.examples == 2
    assert named.silent == check_examples(own, least=1).silent


@pytest.mark.parametrize("row", [b"{}", b'{"Frage": null, "Antwort": null}'])
def test_an_empty_row_of_json_is_refused_alike_with_named_columns(row: bytes) -> None:
    table = b'{"Frage": "q", "Antwort": "a"}\n' + row
    own = table.replace(b"Frage", b"prompt").replace(b"Antwort", b"completion")
    for data, encoder in ((table, encoder_of_any("assistant", NAMED)), (own, encoder_of_any("assistant"))):
        with pytest.raises(InvalidTrainingFile, match="Example 2"):
            check_examples([data], encoder=encoder, least=1)


@pytest.mark.parametrize("table", [b"Frage,Antwort\nq,a\n", b'{"Frage": "q", "Antwort": "a"}'])
@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        (Columns(prompt="Frage", completion="Antwrt"), "It has 'Frage', 'Antwort'. Did you mean 'Antwort'?"),
        (
            Columns(prompt="Fragen", completion="x"),
            "It has 'Frage', 'Antwort'. Did you mean 'Frage'? Correct 'columns'.",
        ),
    ],
)
def test_a_wrong_column_is_refused_with_those_of_the_file(table: bytes, columns: Columns, advice: str) -> None:
    with pytest.raises(InvalidTrainingFile) as refused:
        check_examples([table], encoder=encoder_of_any("assistant", columns), least=1)
    assert advice in refused.value.message


def test_an_empty_cell_beside_the_answer_is_absent() -> None:
    table = b"prompt,completion,label,system,chosen\nq,a,,,\nq,b,,Be brief.,\n"
    examples = [example for _, example in read_examples([table], "training")]
    assert [len(example.messages) for example in examples] == [2, 3]


@pytest.mark.parametrize("row", [{"Frage": "q", "Antwort": None}, {"Frage": "q", "antwort": "a"}])
def test_a_first_row_without_a_named_column_says_which(row: dict[str, Any]) -> None:
    with pytest.raises(InvalidTrainingFile) as refused:
        check_examples([json.dumps(row).encode()], encoder=encoder_of_any("assistant", NAMED), least=1)
    assert "prompt/completion, but has no value in 'Antwort'. Add it" in refused.value.message


def test_a_text_beside_other_empty_columns_is_plain() -> None:
    assert check_examples([b"text,source\nOnce.,\nTwice.,x\n"], least=1).shape.name == "plain text"
    assert check_examples([b"text,label\nOnce.,\n"], least=1, encoder=encoder_of_any("assistant", Columns(text="text")))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "completion": "a"}, "the row has none of the columns 'Frage', 'Antwort'. It has 'prompt'"),
        ({"Frage": "q"}, "expected prompt/completion as in example 1: the key 'Antwort' is missing."),
    ],
)
def test_row_without_a_named_column_says_which(row: dict[str, Any], reason: str) -> None:
    data = json.dumps(TABLE[0]).encode() + b"\n" + json.dumps(row).encode()
    with pytest.raises(InvalidTrainingFile, match="Example 2") as refused:
        check_examples([data], encoder=encoder_of_any("assistant", NAMED), least=1)
    assert reason in refused.value.message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt=Frage", "does not define a whole row"),
        ("prompt=a,completion=a", "names a column twice"),
        ("prompt", "Write 'columns' as part=column"),
        ("frage=a,completion=b", "Unknown parameter: 'columns.frage'. .* as in prompt=Frage. The parts are messages, "),
        ("promt=a,completion=b", "Did you mean 'prompt'?"),
        ("text=a,text=b", "'columns' has 'text' twice"),
        ('{"text": "a", "text": "a"}', "'columns' has 'text' twice"),
        ('{"text": {"a": 1}}', "'columns.text' .* should be a string"),
        ("{prompt", "'columns' is no JSON object"),
        ('{"text": ' + "[" * 100_000, "'columns' is no JSON object"),
    ],
)
def test_columns_that_make_no_rows_are_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidValue, match=reason) as refused:
        parse(text)
    assert str(refused.value.param).startswith("columns")
    assert "Value error" not in refused.value.message


@pytest.mark.parametrize("name", ["Frage", "Frage, kurz", " Frage", "a=b", "{"])
def test_columns_are_spelled_as_they_are_read(name: str) -> None:
    columns = Columns(prompt=name, completion="Antwort")
    assert parse(columns.spelled) == columns
    assert parse(columns.model_dump_json()) == columns


def test_command_takes_columns(tunery: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(FILES["CSV"])
    good = tunery("files", "check", "rows.csv", "--columns", "prompt=Frage,completion=Antwort")
    bad = tunery("files", "check", "rows.csv", "--columns", "prompt=Frage")

    assert (good[0], "'Frage' as the user's message" in good[1]) == (0, True)
    assert (bad[0], "does not define a whole row" in " ".join(bad[2].split())) == (2, True)


@pytest.mark.parametrize(("source", "bos"), [(CHATML, False), (LLAMA_LIKE, True)])
def test_plain_text_is_learned_whole_and_ends(tmp_path: Path, source: str, bos: bool) -> None:
    template = ChatTemplate.load(model_folder(tmp_path / "model", source))
    text = "Es war einmal <|im_end|> ein Müller.\n"
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": text, "url": "x"}))
    [row] = read_rows(tmp_path / "train.jsonl", template, 999).rows

    assert row.labels == row.input_ids
    written = template.tokenizer.decode(row.input_ids, skip_special_tokens=False)
    assert written == ("<s>" if bos else "") + text + "</s>"
    ends = [id for id in row.input_ids if id in template.eos_ids]
    assert ends == [template.tokenizer.token_to_id("</s>")]  # a special token in the text stays text


def test_plain_text_is_no_test_row_and_no_pair() -> None:
    data = [b'{"text": "Once."}\n']
    with pytest.raises(InvalidTrainingFile, match="is plain text, but a test row needs a question"):
        check_examples(data, role="test")
    with pytest.raises(InvalidTrainingFile, match="the method 'dpo' learns from pairs"):
        check_examples(data, encoder=find_encoder(Dpo(), "training"), least=1)


def test_general_rows_are_read_by_their_own_columns() -> None:
    general = [json.dumps({"prompt": "Hello?", "completion": "Hello."}).encode()]
    assert check_examples(general, role="replay", encoder=find_encoder(Supervised(), "replay", NAMED)).examples == 1
    with pytest.raises(InvalidTrainingFile, match="Frage"):
        check_examples(general, role="validation", encoder=find_encoder(Supervised(), "validation", NAMED))
