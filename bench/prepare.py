"""Measures speed and memory of validating and tokenising rows:
`python -m bench.prepare BASE OUT.json [--rows 1000000] [--datasets PYTHON] [--parts validation,trainer]`.

BASE: a folder with SmolLM2's tokenizer.json and chat template. The rows are chats of some 1,200 bytes, made of the
examples' words; no user text occurs twice. Each part runs in a process of its own: a job's validation, the trainer's
reading, a comparison of every row's ids with those of `tokenizers`, and the stages one by one. PYTHON is one with the
package `datasets`, whose `map(batched=True, num_proc=2)` then tokenises the rendered texts, and does nothing else. Only
the trainer's part needs torch; the others need only jinja2, psutil, pydantic, tiktoken and tokenizers.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer

from bench import record
from tunery.datasets.rules import _judge, check_examples
from tunery.rows import dialect, preparers
from tunery.rows.bulk import Judged, encode_rows
from tunery.rows.encoding import CHATS, read_rows
from tunery.rows.messages import Example
from tunery.rows.shapes import FileShape
from tunery.rows.template import ChatTemplate
from tunery.rows.turns import trained_turns, views_of

GOALS = {"rows_a_second": 9000, "validation_mib": 600, "trainer_mib": 1024}
_CHUNK_BYTES = 2**20
_SYSTEMS = ("Answer briefly.", "You help with orders and deliveries.", "Reply in the language of the question.")
_MAX_LENGTH = 2048


# --- the rows ---


def running_words() -> list[str]:
    """Returns the words of the examples' rows, each as often as it occurs."""
    paths = [*sorted((record.ROOT / "examples").glob("*_train.jsonl")), record.ROOT / "README.md"]
    return re.findall(r"\S+", "\n".join(path.read_text(encoding="utf-8") for path in paths))


def write_rows(path: Path, count: int) -> None:
    """Writes chats of one or two turns; a number makes each question unique."""
    dice, words = random.Random(0), running_words()

    def text(least: int, most: int) -> str:
        said = dice.choices(words, k=dice.randint(least, most))
        return ". ".join(" ".join(said[at : at + 12]) for at in range(0, len(said), 12)) + "."

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = [("system", dice.choice(_SYSTEMS))]
            turns += [("user", f"{number}. {text(20, 70)}"), ("assistant", text(20, 70))]
            if number % 8 == 0:
                turns += [("user", f"{number}, again: {text(5, 20)}"), ("assistant", text(5, 20))]
            messages = [{"role": role, "content": said} for role, said in turns]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from iter(lambda: file.read(_CHUNK_BYTES), b"")


# --- the parts ---


def validate(path: Path, base: Path) -> dict[str, Any]:
    """Does what a job's validation does with a file."""
    summary = check_examples(chunks(path), template=ChatTemplate.load(base), max_length=_MAX_LENGTH)
    return {"rows": summary.examples, "tokens": summary.tokens}


def prepare(path: Path, base: Path) -> dict[str, Any]:
    """Does what the trainer does with a file before it loads the model."""
    from worker.trainer.data import read_rows
    from worker.trainer.stepper import _shared

    rows = read_rows(path, ChatTemplate.load(base), _MAX_LENGTH)
    shapes = _shared(example.shape for example in rows.examples)
    return {"rows": len(shapes), "tokens": rows.tokens}


def compare(path: Path, base: Path) -> dict[str, Any]:
    """Compares the ids that are trained on with special tokens' ids and all other text as `tokenizers` encodes it."""
    tokenizer, template = Tokenizer.from_file(str(base / "tokenizer.json")), ChatTemplate.load(base)
    start, end = (tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    tokenizer.encode_special_tokens = True

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return found

    rows = unequal = 0
    for row in encode_rows(chunks(path), "training", CHATS, template, max_length=_MAX_LENGTH):
        assert row.example is not None
        assert row.encoded is not None
        wanted: list[int] = []
        for message in row.example.messages:
            wanted += [start, *ids(f"{message.role}\n{message.content}"), end, *ids("\n")]
        rows += 1
        unequal += row.encoded.sequences[0].input_ids != wanted[:_MAX_LENGTH]
    return {"rows": rows, "unequal": unequal}


def stages(path: Path, base: Path) -> dict[str, Any]:
    """Returns each stage's microseconds of processor time per row on the first rows: the least of three measurements.

    All stages run in this process, one after the other, including the renderer's, which else has its own processes."""
    preparers.collect_seldom()  # as processes that prepare rows do
    template = ChatTemplate.load(base)
    template.hasten()
    lines = list(islice(chunks(path), 24))
    sources = list(read_rows(lines[:-1], "training", FileShape()))[:-1]  # the last is cut off
    found = {"read": _time(sources, lambda: list(read_rows(lines[:-1], "training", FileShape())))}
    examples = [CHATS.parse(source, "training") for source in sources]
    found["parse"] = _time(sources, lambda: [CHATS.parse(source, "training") for source in sources])
    groups = [examples[at : at + 128] for at in range(0, len(examples), 128)]
    prepared = [template.render_ahead(group) for group in groups]
    found["ask for texts"] = _time(sources, lambda: [template.render_ahead(group) for group in groups])
    encode = partial(CHATS.encode, name="example 1", max_length=_MAX_LENGTH, role="training")
    pairs = [(ahead, example) for ahead, group in zip(prepared, groups, strict=True) for example in group]
    found["tokenise"] = _time(sources, lambda: deque((encode(ahead, example) for ahead, example in pairs), maxlen=0))
    judged = [Judged(1, "example 1", example, encode(ahead, example)) for ahead, example in pairs]
    found["sum up"] = _time(sources, lambda: _judge(None, "training", 0, False, iter(judged)))
    found["render"] = _time(sources, lambda: _render(base, examples))
    return {"rows": len(sources), "us_a_row": found}


def _time(rows: list[Any], work: Callable[[], object]) -> float:
    taken = []
    for _ in range(3):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return round(min(taken) / len(rows) * 1e6, 1)


def _render(base: Path, examples: list[Example]) -> None:
    """Does what the renderer's process does."""
    environment, now = dialect.Environment(), datetime(2026, 1, 1, tzinfo=UTC)
    template = environment.from_string((base / "chat_template.jinja").read_text())
    for example in examples:
        messages = [message.for_template() for message in example.messages]
        for count, prompting in views_of(trained_turns(example), len(messages)):
            variables = {"messages": messages[:count], "tools": None, "add_generation_prompt": prompting}
            environment.render(template, variables, now)


PARTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "validation": validate,
    "trainer": prepare,
    "comparison": compare,
    "stages": stages,
}


class Watch:
    """Samples the peak memory of this process and its descendants together, and the processor time of all of them,
    including those that have ended."""

    def __init__(self) -> None:
        self.peak = 0
        self._seconds: dict[int, float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    @property
    def seconds(self) -> float:
        return sum(self._seconds.values())

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            self._sample()

    def _sample(self) -> None:
        held = 0
        for process in [own := psutil.Process(), *own.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self._seconds[process.pid] = times.user + times.system
                held += int(process.memory_full_info().pss)
            except psutil.Error:  # it ended meanwhile
                continue
        self.peak = max(self.peak, held)


def measure(part: str, path: Path, base: Path) -> dict[str, Any]:
    """Runs one part in this process; returns its result with its time and peak memory."""
    load, began = os.getloadavg()[0], time.monotonic()
    with Watch() as watch:
        found = PARTS[part](path, base)
        seconds = time.monotonic() - began
    if part == "stages":
        return found | {"load_before": round(load, 1)}
    times = {"seconds": round(seconds, 1), "cpu_seconds": round(watch.seconds, 1), "load_before": round(load, 1)}
    return {**found, **times, "rows_a_second": round(found["rows"] / seconds), "peak_mib": watch.peak // 2**20}


# --- beside datasets ---

_MAP = """
import json, sys, time
from datasets import Dataset
from tokenizers import Tokenizer
texts, base = sys.argv[1:3]
tokenizer = Tokenizer.from_file(base + "/tokenizer.json")
rows = Dataset.from_json(texts, cache_dir=texts + ".cache")
def ids(batch):
    return {"ids": [each.ids for each in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]}
began = time.monotonic()
rows.map(ids, batched=True, num_proc=2, load_from_cache_file=False)
print(json.dumps({"rows": len(rows), "seconds": round(time.monotonic() - began, 1)}))
"""


def write_texts(path: Path, texts: Path) -> None:
    """Writes the rows as ChatML, which is what SmolLM2's template renders."""
    with texts.open("w", encoding="utf-8") as file, path.open(encoding="utf-8") as rows:
        for row in map(json.loads, rows):
            turns = (f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in row["messages"])
            file.write(json.dumps({"text": "".join(turns)}, ensure_ascii=False) + "\n")


def by_datasets(python: str, path: Path, base: Path) -> dict[str, Any]:
    texts = path.with_suffix(".texts.json")
    write_texts(path, texts)
    load = os.getloadavg()[0]
    said = subprocess.run([python, "-c", _MAP, str(texts), str(base)], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return {**found, "load_before": round(load, 1), "rows_a_second": round(found["rows"] / found["seconds"])}


def in_a_process(part: str, path: Path, base: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.prepare", str(base), str(path), "--part", part]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=record.ROOT)
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--datasets")
    parser.add_argument("--part", choices=PARTS, help="run only this part, on the file of rows OUT")
    parser.add_argument("--parts", default=",".join(PARTS), help="the parts to run, separated by commas")
    options = parser.parse_args()
    if options.part:  # `out` is the file of rows
        print(json.dumps(measure(options.part, Path(options.out), options.base)))
        return 0
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.jsonl"
        write_rows(path, options.rows)
        found["bytes"] = path.stat().st_size
        for part in options.parts.split(","):
            found[part] = in_a_process(part, path, options.base)
            print(part, found[part], flush=True)
        if options.datasets:
            found["datasets_map"] = by_datasets(options.datasets, path, options.base)
            print("datasets_map", found["datasets_map"], flush=True)
            ratio = found["validation"]["rows_a_second"] / found["datasets_map"]["rows_a_second"]
            found["ratio_to_datasets"] = round(ratio, 2)
    what = "rows of a chat file validated and tokenised, and read by the trainer"
    record.write(options.out, {"what": what, "goals": GOALS, **found})
    return 0 if found.get("comparison", {"unequal": 0})["unequal"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
