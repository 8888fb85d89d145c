"""Files that every export's folder holds beside its weights, and sizes and digests of the weights."""

import gc
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from safetensors import safe_open

from tunery import digests
from tunery.rows import template_files
from worker.trainer.checkpoints import TOKENIZER_FILES


@contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """Yields a folder beside a path, under a hidden name, so that an interrupted export is never published."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}-", dir=beside.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_texts(artifact: Path, out: Path) -> None:
    """Copies an artifact's tokenizer, chat templates and stop tokens into `out`."""
    names = (*TOKENIZER_FILES, *template_files.additional_names(artifact), "generation_config.json")
    for name in names:
        if (artifact / name).exists():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(artifact / name, out / name)


def free_memory() -> None:
    """Frees the memory of models that only refer to themselves."""
    gc.collect()
    torch.cuda.empty_cache()


def parameters(folder: Path) -> int:
    """Returns the number of parameters in the folder's weights."""
    return sum(torch.Size(shape).numel() for path in weight_files(folder) for shape in _shapes(path))


def _shapes(path: Path) -> Iterator[list[int]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is not a dict
            yield file.get_slice(name).get_shape()


def fits_in_fp32(folder: Path) -> bool:
    """Whether the folder's model would fit into free memory in fp32."""
    return 4 * parameters(folder) < psutil.virtual_memory().available


def weights_sha256(folder: Path) -> dict[str, str]:
    """Returns the digest of each of the folder's weight files."""
    return {path.name: digests.sha256(path) for path in weight_files(folder)}


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold a model's weights."""
    return sorted(folder.glob("*.safetensors"))
