"""The docs agree with the code: links, tables, fields, defaults, errors, settings and commands."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer.main
from known_models import LLAMA_8B
from openai.types.fine_tuning import FineTuningJob
from pydantic import BaseModel

from api.errors import status_of
from api.main import create_app
from api.schemas.jobs import CreateJob, Job
from tunery import errors
from tunery.cli.main import app
from tunery.failures import JobFailure
from tunery.jobs.states import State, mermaid
from tunery.planning import engines, memory
from tunery.settings import Settings
from tunery.spec import EarlyStopping, Full, Lora, Qlora, Replay

UNTYPED = {"shared_with_openai", "usage_metrics", "user_provided_suffix"}
"""Fields of OpenAI's job that the client's type lacks."""
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
OPENAI = {"model", "training_file", "validation_file", "method", "hyperparameters", "suffix", "seed", "metadata"}


@pytest.fixture(scope="module")
def pages(texts: dict[Path, str]) -> dict[Path, str]:
    return {path: text for path, text in texts.items() if path.suffix == ".md"}


def _rows(text: str, heading: str) -> list[list[str]]:
    """Returns the cells of the table rows between a heading and the next one."""
    section = re.split(r"^#+ ", text.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[2:]]


def _ticked(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def _page(root: Path, name: str) -> str:
    return (root / "docs" / name).read_text()


# --- links ----------------------------------------------------------------------------------------------------------


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_inside_the_project_lead_somewhere(pages: dict[Path, str]) -> None:
    broken = []
    for path, text in pages.items():
        for found in LINK.finditer(text):
            link = found[1] or found[2]
            if re.match(r"\w+:", link):
                continue
            target, _, anchor = link.partition("#")
            file = (path.parent / unquote(target)).resolve() if target else path
            headings = {_anchor(h) for h in re.findall(r"^#+ (.+)$", pages.get(file, ""), flags=re.MULTILINE)}
            if not file.exists() or (anchor and anchor not in headings):
                broken.append(f"{path}: {link}")
    assert broken == []


def test_every_row_of_a_table_stands_below_a_head(pages: dict[Path, str]) -> None:
    lost = [f"{path}: {table.splitlines()[0]}" for path, text in pages.items() for table in _headless_tables(text)]
    assert lost == []


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _headless_tables(text: str) -> list[str]:
    """Returns table rows that a renderer shows as text, such as those after a blank line inside a table."""
    tables = re.findall(r"(?:^\|.*\n?)+", _without_code(text), flags=re.MULTILINE)
    return [table for table in tables if not re.match(r".*\n\|[\s:|-]+\|$", table, flags=re.MULTILINE)]


def test_lines_of_text_have_at_most_120_columns(pages: dict[Path, str], root: Path) -> None:
    kept = {root / "changelog.d", root / "docs/decisions"}
    texts = {path: _without_code(text) for path, text in pages.items() if path.parent not in kept}
    long = [f"{path}: {line}" for path, text in texts.items() for line in text.splitlines() if _is_long(line)]
    assert long == []


def _is_long(line: str) -> bool:
    return len(line) > 120 and not line.startswith(("|", "!"))


def test_every_decision_is_listed(root: Path) -> None:
    folder = root / "docs/decisions"
    listed = set(re.findall(r"\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text()))
    assert listed == {path.name for path in folder.glob("0*.md")}


def test_decisions_fit_one_screen(root: Path) -> None:
    long = [path.name for path in (root / "docs/decisions").glob("0*.md") if len(path.read_text().splitlines()) > 40]
    assert long == []


PRIVATE = re.compile(
    r"\b(fenc(e|ed|ing)|sweepers?|knobs?|wish(es)?|deeds?|mend|strangers?|told)\b|shown a device", re.IGNORECASE
)
"""Names that only this code uses, and figures of speech. Pages for users have the standard terms."""


def test_pages_for_users_have_no_private_words(root: Path) -> None:
    pages = {path.name: path.read_text() for path in [root / "README.md", *(root / "docs").glob("*.md")]}
    document = json.dumps(create_app().openapi())
    said = {name: found for name, text in (pages | {"/docs": document}).items() if (found := _private(text))}
    assert said == {}


def _private(text: str) -> list[str]:
    return [text[max(0, found.start() - 40) : found.end() + 40] for found in PRIVATE.finditer(text)]


def test_every_example_is_listed(root: Path) -> None:
    cells = [_ticked(row[0])[0] for row in _rows((root / "examples/README.md").read_text(), "Examples")]
    listed = {cell.replace(braces, one) for cell in cells for braces, one in _alternatives(cell)}
    assert listed | {"README.md"} == {path.name for path in (root / "examples").iterdir() if path.is_file()}


def _alternatives(cell: str) -> list[tuple[str, str]]:
    """Returns a shell's braces in the cell with each of their alternatives; one pair of blanks if it has none."""
    found = re.search(r"{(.*)}", cell)
    return [(found[0], one) for one in found[1].split(",")] if found else [(" ", " ")]


def test_ranks_that_vllm_accepts_are_listed(root: Path) -> None:
    (listed,) = re.findall(r"vLLM accepts ([\d,\s]+)\)", _page(root, "models.md"))
    assert tuple(map(int, listed.split(","))) == engines.VLLM_RANKS


# --- jobs.md --------------------------------------------------------------------------------------------------------


def test_the_state_diagram_is_the_code_s(root: Path) -> None:
    (drawn,) = re.findall(r"```mermaid\n(.*?)\n```", _page(root, "jobs.md"), flags=re.DOTALL)
    assert drawn == mermaid()


def test_every_state_has_its_prose(root: Path) -> None:
    assert [_ticked(row[0])[0] for row in _rows(_page(root, "jobs.md"), "States")] == [state.value for state in State]


# --- api.md ---------------------------------------------------------------------------------------------------------


def test_every_operation_is_described_and_none_else(root: Path) -> None:
    described = set(re.findall(r"^\| `([A-Z]+ /\S*)`", _page(root, "api.md"), flags=re.MULTILINE))
    document = create_app().openapi()
    offered = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert described == offered


def _default(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _native() -> dict[str, Any]:
    """Returns the default of every native field, in JSON; the key of a nested field is its path."""
    found: dict[str, Any] = {}
    for name, field in CreateJob.model_fields.items():
        if name in OPENAI | {"integrations"}:
            continue
        if isinstance(field.default, BaseModel):
            found |= {f"{name}.{inner}": _default(value) for inner, value in field.default}
        else:
            found[name] = field.default
    for kind in (Full, Lora, Qlora):
        found |= {f"technique.{n}": f.default for n, f in kind.model_fields.items() if n != "type"}
    for name, part in (("early_stopping", EarlyStopping), ("replay", Replay)):
        found |= {f"{name}.{n}": f.default for n, f in part.model_fields.items()}
    return found


def test_native_fields_are_listed_with_their_defaults(root: Path) -> None:
    rows = _rows(_page(root, "api.md"), "Create: native fields")
    assert {_ticked(row[0])[0]: json.loads(_ticked(row[1])[0]) for row in rows} == _native()


def test_openai_s_fields_are_listed(root: Path) -> None:
    rows = _rows(_page(root, "api.md"), "Create: OpenAI's fields")
    assert {_ticked(row[0])[0] for row in rows} == OPENAI | {"integrations"}


def test_native_fields_of_a_job_are_listed(root: Path) -> None:
    rows = _rows(_page(root, "api.md"), "The job's answer")
    own = set(Job.model_fields) - set(CreateJob.model_fields) - set(FineTuningJob.model_fields) - UNTYPED
    assert {_ticked(row[0])[0] for row in rows} - set(CreateJob.model_fields) == own


def _classes(kind: type[errors.TuneryError]) -> set[type[errors.TuneryError]]:
    """Returns `kind` and its subclasses in the documented tree, which leaves out errors of command and local stack."""
    places = [path.parent for path in Path(errors.__file__).parent.glob("*/errors.py")]
    modules = {
        errors.__name__,
        "tunery.failures",
        "api.request_errors",
        *(f"tunery.{place.name}.errors" for place in places),
    }
    for name in modules:
        import_module(name)
    below = {found for child in kind.__subclasses__() for found in _classes(child)}
    return {found for found in {kind, *below} if found.__module__ in modules}


def test_the_tree_of_errors_is_drawn() -> None:
    drawn, above = set(), ["TuneryError"]
    for bars, name in re.findall(r"^    ([│ ]*)[├└]── (\w+)", errors.__doc__ or "", re.MULTILINE):
        above[len(bars) // 4 + 1 :] = [name]
        drawn.add((name, above[-2]))
    assert drawn == {(kind.__name__, kind.__base__.__name__) for kind in _classes(errors.TuneryError)} - {
        ("TuneryError", "Exception")
    }


def test_errors_are_listed_with_their_status(root: Path) -> None:
    rows = _rows(_page(root, "api.md"), "Errors")
    listed = {(int(row[0]), _ticked(row[1])[0]) for row in rows}
    answered = {kind for kind in _classes(errors.TuneryError) if status_of(kind.__new__(kind)) != 500}
    assert listed == {(status_of(kind.__new__(kind)), kind.code) for kind in answered} | {(500, "server_error")}


def test_reasons_of_failed_jobs_are_listed(root: Path) -> None:
    rows = _rows(_page(root, "api.md"), "Why a job failed")
    assert {_ticked(row[0])[0] for row in rows} == {kind.code for kind in _classes(JobFailure)}


# --- operations.md --------------------------------------------------------------------------------------------------


def test_settings_are_listed_with_their_defaults(root: Path) -> None:
    listed = {
        name: default
        for row in _rows(_page(root, "operations.md"), "Settings")
        for name, default in zip(_ticked(row[0]), _defaults_of(row), strict=True)
    }
    settings = {
        str(field.validation_alias or f"TUNERY_{name.upper()}"): _shown(field.default)
        for name, field in Settings.model_fields.items()
    }
    assert listed == settings


def _defaults_of(row: list[str]) -> list[str]:
    names = _ticked(row[0])
    cells = row[1].split(",") if len(names) > 1 else [row[1]]
    return [cell.strip().strip("`") for cell in cells]


def _shown(value: object) -> str:
    return "" if value in (None, ()) else str(value)


# --- README.md ------------------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": LLAMA_8B,
    "Llama-3.1-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def test_the_memory_table_is_what_planning_says(root: Path) -> None:
    rows = _rows((root / "README.md").read_text(), "What it needs")
    computed = [
        [name, *(memory.gib(memory.estimate(model_info, kind, max_seq_length=2048).bytes) for kind in KINDS)]
        for name, model_info in SHAPES.items()
    ]
    assert rows == computed


KINDS = (Qlora(), Lora(), Full())


def test_the_first_screen_has_the_two_commands(root: Path) -> None:
    first = "\n".join((root / "README.md").read_text().splitlines()[:25])
    assert "make demo" in first
    assert "make test" in first


def test_targets_that_the_docs_name_exist(root: Path, pages: dict[Path, str]) -> None:
    makefile = (root / "Makefile").read_text()
    named = {name for text in pages.values() for name in re.findall(r"(?:\$ |`)make ([a-z-]+)", text)}
    assert named
    assert [name for name in named if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)] == []


def test_python_in_the_docs_compiles(pages: dict[Path, str]) -> None:
    blocks = [(p, code) for p, text in pages.items() for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    assert blocks
    for path, code in blocks:
        compile(code, str(path), "exec")


def test_python_on_a_page_defines_its_names_in_order(pages: dict[Path, str]) -> None:
    for path, text in pages.items():
        code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821", "--output-format=concise", "-"]
        checked = subprocess.run(command, input=code, capture_output=True, text=True)
        assert checked.returncode == 0, f"{path}: {checked.stdout}{checked.stderr}"


def test_json_in_the_docs_is_json(pages: dict[Path, str]) -> None:
    for text in pages.values():
        for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL):
            json.loads(block)


def test_requests_in_the_docs_are_ones_that_the_api_takes(root: Path) -> None:
    for block in re.findall(r"```json\n(.*?)```", _page(root, "techniques.md"), re.DOTALL):
        CreateJob.model_validate({"model": "m", "training_file": "f", **json.loads(block)})


def _commands(group: Any, before: str) -> Iterator[tuple[str, str]]:
    """Yields each command that `--help` shows, with its description."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before} {name}")
        elif not command.hidden:
            yield f"{before} {name}", " ".join(command.help.split())


def test_every_command_is_listed_with_its_description(root: Path) -> None:
    listed = re.findall(r"^\| `(tunery [^`]+)` \| (.*) \|$", _page(root, "command.md"), flags=re.MULTILINE)
    assert listed == list(_commands(typer.main.get_command(app), "tunery"))


def _command(words: list[str]) -> tuple[Any, list[str]]:
    """Returns the command that the words name, and the words after it."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def test_commands_that_the_docs_name_exist(pages: dict[Path, str]) -> None:
    said = [line for text in pages.values() for line in re.findall(r"(?:\$ |`)tunery ([a-z][^`#\n]*)", text)]
    assert said
    for line in said:
        if line.startswith("..."):
            continue
        command, words = _command(re.sub(r"\.\.\.|\|.*", "", line).split())
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, line
