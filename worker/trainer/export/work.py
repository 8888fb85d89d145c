"""Makes the requested exports of a model from its files.

A refused or failed export does not fail the model: it is left out with its reason, and the others are made.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from tunery.planning.precision import Precision
from tunery.rows.template import ChatTemplate
from tunery.spec import Export, GgufType
from tunery.trainer_protocol import Exported
from worker.trainer.data import Row
from worker.trainer.export import files, fp8, merge, proof, readme
from worker.trainer.export.errors import ExportRefused, FormatDiffers, NoRows
from worker.trainer.export.proof import Answered, Divergence
from worker.trainer.stop_signal import Stopped

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What to export, and where to. `is_whole`: the artifact is a full fine-tune. `precision`: that of training.

    `rows`: those that prove a merge, read when needed. `say` gets each export's message; `check` is called before each:
    what it raises ends the work.
    """

    asked: Export
    name: str
    base: Path
    artifact: Path
    out: Path
    is_whole: bool
    precision: Precision
    device: torch.device
    template: ChatTemplate
    rows: Callable[[], list[Row]]
    say: Callable[[Exported], None]
    check: Callable[[], None] = lambda: None

    @cached_property
    def base_weights_sha256(self) -> dict[str, str]:
        """The digests of the base's weight files, which each export records."""
        return files.weights_sha256(self.base)


def carry_out(work: Work) -> None:
    """Writes `merged/` and `gguf/` to the work's folder, if requested and not refused."""
    if work.is_whole:
        _write_of_whole(work, work.artifact)
    else:
        _write_of_adapter(work)
    readme.write_modelfile(work.template, work.out)


def _write_of_adapter(work: Work) -> None:
    if work.asked.adapter_gguf:
        _write_adapter(work)
    if not work.asked.needs_merge:
        return
    with files.temporary_folder(work.out / "merged") as folder:
        if _try(work, "merged", lambda: _merge(work, folder / "merged")):
            _write_of_whole(work, folder / "merged")
            if work.asked.merged:
                (folder / "merged").rename(work.out / "merged")


def _try(work: Work, path: str, make: Callable[[], str]) -> bool:
    """Reports `make`'s message about the export, or why there is none; returns whether there is one."""
    work.check()
    try:
        message, is_refused = make(), False
    except ExportRefused as error:
        message, is_refused = error.message, True
    except Stopped:
        raise
    except Exception as error:
        log.exception("the export %s failed", path)
        message, is_refused = f"It failed: {type(error).__name__}: {error}. The job's log has the details.", True
    (log.warning if is_refused else log.info)("export %s: %s", path, message)
    work.say(Exported(path=path, message=message, is_refused=is_refused))
    return not is_refused


def _merge(work: Work, out: Path) -> str:
    source = merge.Source(work.base, work.artifact, work.precision, work.device)
    return merge.summary(merge.write(source, work.rows(), out))


def _write_of_whole(work: Work, model: Path) -> None:
    """Writes the exports of the whole model in `model`."""
    if work.asked.fp8 and not _try(work, "fp8", lambda: _write_fp8(work, model)):
        shutil.rmtree(work.out / "fp8", ignore_errors=True)
    _write_gguf(work, model)


def _write_fp8(work: Work, model: Path) -> str:
    return fp8.write(model, _rows_left(work), out=work.out / "fp8", base_weights_sha256=work.base_weights_sha256)


def _write_gguf(work: Work, model: Path) -> None:
    """Writes the GGUF files of the whole model in `model`."""
    from worker.trainer.export import gguf_proof, gguf_writer  # imported here: other runs do not need it

    meters: list[gguf_proof.Meter] = []

    def make(kind: GgufType, out: Path) -> str:
        known = work.base_weights_sha256
        write = partial(gguf_writer.write, model, out=out, kind=kind, name=work.name, base_weights_sha256=known)
        if not files.fits_in_fp32(model) or not (rows := _rows_left(work)):
            return write()
        if not meters:
            meters.append(gguf_proof.Meter(model, rows))
        return _prove(kind, write, lambda: meters[0].measure(out))

    for kind in dict.fromkeys(work.asked.gguf):
        _write_file(work, f"model-{kind}.gguf", partial(make, kind))


def _prove(kind: GgufType, write: Callable[..., str], measure: Callable[[], tuple[Divergence, Answered]]) -> str:
    """Writes a GGUF file that keeps the answers; returns its loss in words. Raises FormatDiffers, FormatAnswersWorse.

    Why random rounding is the second choice: its error is larger. But if the base's weights are exact in the file's
    type, as those that came in four bits are, rounding to nearest undoes what was learned.
    """
    message = write()
    divergence, answered = measure()
    if kind == "f16":
        divergence.check(proof.EQUAL, FormatDiffers, format="GGUF f16")
    if answered.is_loss and kind in ("q4_0", "q4_1"):
        message = f"{write(rounding='stochastic')}, rounded at random"
        divergence, answered = measure()
    answered.check(f"GGUF {kind}")
    return f"{message}; {divergence.describe('the whole model')}"


def _rows_left(work: Work) -> list[Row]:
    """Returns the rows that can prove an export; none if the job's files are deleted."""
    try:
        return work.rows()
    except NoRows:
        return []


def _write_adapter(work: Work) -> None:
    from worker.trainer.export import gguf_adapter

    _write_file(work, "adapter-f32.gguf", partial(gguf_adapter.write, work.base, work.artifact, name=work.name))


def _write_file(work: Work, name: str, make: Callable[..., str]) -> None:
    """Writes a file to gguf/, and removes it again if the export is refused."""
    path = work.out / "gguf" / name
    path.parent.mkdir(exist_ok=True)
    if not _try(work, f"gguf/{name}", lambda: make(out=path)):
        path.unlink(missing_ok=True)
    if not any(path.parent.iterdir()):
        path.parent.rmdir()
