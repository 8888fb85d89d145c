"""Extracts an adapter's files from a user's zip archive. Names in the archive determine no path on this disk."""

import zipfile
from pathlib import Path, PurePosixPath

from tunery.rows.template_files import ADDITIONAL
from worker.trainer.adapter_import.errors import UnusableAdapter
from worker.trainer.checkpoints import TOKENIZER_FILES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = (CONFIG, WEIGHTS, *TOKENIZER_FILES, "generation_config.json")
_TEXT_BYTES = 64 * 2**20
_CHUNK = 2**20


def unpack(source: str, archive: Path, out: Path) -> None:
    """Writes the adapter's files into `out`, which must not exist. Raises UnusableAdapter."""
    out.mkdir()
    try:
        with zipfile.ZipFile(archive) as opened:
            folder, entries = _adapter(source, opened)
            for entry in entries:
                _copy(source, opened, entry, out / PurePosixPath(entry.filename).relative_to(folder))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        reason = f"it is not a readable zip archive ({error}). Zip the folder that PEFT's save_pretrained wrote."
        raise UnusableAdapter(source=source, reason=reason) from error


def _adapter(source: str, opened: zipfile.ZipFile) -> tuple[PurePosixPath, list[zipfile.ZipInfo]]:
    """Returns the archive's folder that has the adapter, and the entries to read. Raises UnusableAdapter."""
    found = {PurePosixPath(entry.filename): entry for entry in opened.infolist() if not entry.is_dir()}
    folders = [path.parent for path in found if path.name == CONFIG]
    if len(folders) != 1:
        what = f"it has {len(folders)} {CONFIG} files" if folders else f"it has no {CONFIG}"
        raise UnusableAdapter(source=source, reason=f"{what}. Zip only the folder that PEFT's save_pretrained wrote.")
    [folder] = folders
    own = {path.relative_to(folder): entry for path, entry in found.items() if path.is_relative_to(folder)}
    _check_weights(source, {str(path) for path in own})
    return folder, [entry for path, entry in own.items() if _is_read(path)]


def _is_read(path: PurePosixPath) -> bool:
    return str(path) in NAMES or (str(path.parent) == ADDITIONAL and path.suffix == ".jinja")


def _check_weights(source: str, names: set[str]) -> None:
    """Raises UnusableAdapter if the weights are missing or a pickle."""
    if WEIGHTS in names:
        return
    if "adapter_model.bin" in names:
        what = "its weights are a pickle (adapter_model.bin), which can run code. Load it with PEFT and save it again: "
        raise UnusableAdapter(source=source, reason=f"{what}save_pretrained writes {WEIGHTS}.")
    raise UnusableAdapter(source=source, reason=f"it has no {WEIGHTS}. Add the file that PEFT wrote beside {CONFIG}.")


def _copy(source: str, opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    """Copies one entry. Raises UnusableAdapter if it is too large for such a file, or compressed suspiciously well."""
    is_text = path.name != WEIGHTS
    # Weights and tokenizers compress to a half or a tenth; what compresses to a thousandth is made to fill a disk.
    limit = min(_TEXT_BYTES, entry.file_size) if is_text else entry.file_size
    if entry.file_size > limit or entry.file_size > 200 * max(entry.compress_size, _CHUNK):
        reason = f"{path.name} of {entry.file_size} bytes is larger than such a file can be. Zip the folder unchanged."
        raise UnusableAdapter(source=source, reason=reason)
    path.parent.mkdir(exist_ok=True)
    with opened.open(entry) as packed, path.open("wb") as file:
        while part := packed.read(_CHUNK):  # never more than the entry's size, which zipfile enforces
            file.write(part)
