"""`python -m worker.trainer.convert SOURCE OUT_DIR [TEMPLATE]`: makes a base of a folder, a hub id or a GGUF file.

OUT_DIR gets bf16 safetensors, the tokenizer, its chat template (the file TEMPLATE in place of the model's own) and
`facts.json`. Only data is read: weights from safetensors or GGUF, never a pickle, and no code that came with a model is
run. A source that cannot be used gets one line on standard error and exit code 65.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from tunery.errors import UnusableModel
from tunery.rows import template_files
from tunery.rows.template import ChatTemplate
from tunery.trainer_protocol import EXIT_USER_ERROR
from worker.trainer import chat_templates, coverage, folders, gguf_files, inspection, trial, weights

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_NO_PATH = "it is neither a folder nor a GGUF file on the I/O worker's host"
_EXPECTED = (
    "Give a folder with config.json and safetensors, a .gguf file, or a hub id such as HuggingFaceTB/SmolLM2-135M."
)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def convert(source: str, out: Path, chat_template: str | None = None) -> dict[str, Any]:
    """Writes the base model into `out` (created, must be empty) and returns its model info.

    `chat_template`: Jinja text that replaces every template of the source. Raises UnusableModel.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UnusableModel(source=source, reason=f"the folder '{out}' is not empty. Choose a new one.")
    _check_place(source)
    if Path(source).is_dir():
        folders.refuse_links_out(source)
    if (gguf := gguf_files.find(source)) is not None:
        gguf_files.unpack(gguf, out)
        chat_template = chat_templates.in_folder(source) if chat_template is None else chat_template
    elif Path(source).is_dir():
        _copy(source, Path(source), out)
    else:
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            _copy(source, _download(source, folder), out)
    chat_templates.write(source, out, chat_template)
    model = inspection.load(source, out)
    model_info = inspection.model_info(source, model, ChatTemplate.load(out)) | trial.model_info(model)
    model_info |= coverage.model_info(model.config)
    _refuse_untrainable(source, model_info["techniques"])
    (out / "facts.json").write_text(json.dumps(model_info, indent=2) + "\n")
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, but processes of other users read the folder
    return model_info


def _check_place(source: str) -> None:
    """Raises UnusableModel for a file that is no GGUF file, and for a path that does not exist."""
    path = Path(source)
    if path.is_dir():
        return
    if path.exists() and path.suffix != ".gguf":
        raise UnusableModel(source=source, reason=f"it is a file, and not a GGUF file. {_EXPECTED}")
    if not path.exists() and (source.startswith(("/", "./", "../", "~")) or source.endswith(".gguf")):
        raise UnusableModel(source=source, reason=f"there is no such path on the I/O worker's host. {_EXPECTED}")


def _download(source: str, folder: str) -> Path:
    """Downloads the hub's files into `folder`; `id@revision` names a revision. Honours HF_ENDPOINT and HF_TOKEN."""
    name, _, revision = source.partition("@")
    try:
        names = HfApi().list_repo_files(name, revision=revision or None)
        _check_names(source, [Path(n) for n in names if "/" not in n])
        allowed = [*TEXTS, f"{template_files.ADDITIONAL}/*.jinja", *WEIGHTS]
        snapshot_download(name, revision=revision or None, local_dir=folder, allow_patterns=allowed)
    except UnusableModel:
        raise
    except Exception as error:  # also errors of the HTTP library, which differs between releases
        raise UnusableModel(source=source, reason=f"{_NO_PATH}, and {_of_hub(error)}") from error
    return Path(folder)


def _of_hub(error: Exception) -> str:
    """Returns why the hub has no such model, and what to change."""
    if isinstance(error, HFValidationError):
        return f"it cannot be a hub id either. {_EXPECTED}"
    if isinstance(error, GatedRepoError):
        return "the model hub gives it only to accounts that have its owner's permission. Set HF_TOKEN for I/O workers."
    if isinstance(error, RevisionNotFoundError):
        return "the model hub has no such revision of it. Check what follows the '@'."
    if isinstance(error, RepositoryNotFoundError):
        return f"the model hub has no such model that is public. For a private one, set HF_TOKEN. {_EXPECTED}"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return (
        f"the model hub cannot be used: {reason}. Check the name; on a closed network, set HF_ENDPOINT or use a local "
        "folder."
    )


def _check_names(source: str, paths: list[Path]) -> None:
    if any(path.suffix == ".safetensors" for path in paths):
        return
    found = sorted(path.name for path in paths if path.suffix in PICKLES)
    what = (
        f"its weights are pickle files ({', '.join(found[:3])}), which can run code" if found else ("it has no weights")
    )
    raise UnusableModel(source=source, reason=f"{what}. Save it as safetensors and add it again.")


def _copy(source: str, folder: Path, out: Path) -> None:
    """Copies the folder's text files unchanged and its weights in bf16, with one shard in memory at a time."""
    _check_names(source, list(folder.iterdir()))
    for text in (*TEXTS, *template_files.additional_names(folder)):
        if (folder / text).exists():
            _refuse_code(source, folder / text)
            (out / text).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / text, out / text)
    if not (out / "config.json").exists():
        raise UnusableModel(source=source, reason="it has no config.json. Add the one that was saved with the weights.")
    _write_config(source, out / "config.json")
    weights.copy(source, folder, out, inspection.skeleton(source, out))
    if not (out / "tokenizer.json").exists():
        _save_fast_tokenizer(source, folder, out)


def _refuse_code(source: str, path: Path) -> None:
    """Raises UnusableModel if a JSON file requests code of the model's own (`auto_map`)."""
    if path.suffix == ".json" and path.name != "tokenizer.json" and "auto_map" in json.loads(path.read_text()):
        raise UnusableModel(
            source=source,
            reason=f"{path.name} has auto_map, which runs the model's own code, and that is never allowed. Use a model "
            "whose architecture is part of transformers.",
        )


def _write_config(source: str, path: Path) -> None:
    """Sets bf16 as the config's type. Refuses a quantised checkpoint, whose weights cannot simply be cast."""
    config = json.loads(path.read_text())
    if config.get("quantization_config"):
        raise UnusableModel(
            source=source,
            reason="its weights are already quantised. Add the unquantised model; qlora quantises it during training.",
        )
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2) + "\n")


def _save_fast_tokenizer(source: str, folder: Path, out: Path) -> None:
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(out)
    except Exception as error:
        raise UnusableModel(
            source=source, reason=f"its tokenizer cannot be read ({error}). Add the model's tokenizer.json."
        ) from error


def _refuse_untrainable(source: str, techniques: dict[str, str | None]) -> None:
    if all(techniques.values()):
        reason = f"no technique can train it ({techniques['lora']}). Choose another base."
        raise UnusableModel(source=source, reason=reason)


def main() -> int:
    if len(sys.argv) not in (3, 4):
        sys.stderr.write("usage: python -m worker.trainer.convert SOURCE OUT_DIR [TEMPLATE]\n")
        return 2
    template = Path(sys.argv[3]).read_text(encoding="utf-8") if len(sys.argv) == 4 else None
    disable_progress_bar()
    disable_progress_bars()
    try:
        model_info = convert(sys.argv[1], Path(sys.argv[2]), template)
    except UnusableModel as error:
        sys.stderr.write(error.message + "\n")
        return EXIT_USER_ERROR
    sys.stdout.write(json.dumps(model_info) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
